"""Standard normals by address, and sums over a population, in blocks of columns that stay in the cache."""

from collections.abc import Iterator

import numpy as np

from altgrad import rng
from altgrad.rng import Key

TENSOR = rng.tensor_id("altgrad.es")
ENTRIES = 1 << 15  # of a block: its temporaries fit the second-level cache, which makes drawing four times as fast as in one piece


def blocks(members: int, dimension: int) -> Iterator[slice]:
    """Slices of the columns of a [members, dimension] array; each starts at a multiple of 4, since four normals share a counter."""
    width = max(4, ENTRIES // max(members, 1) // 4 * 4)
    return (slice(start, min(start + width, dimension)) for start in range(0, dimension, width))


def fill(key: Key, mean: np.ndarray, scale: np.ndarray | float, members: int, *, antithetic: bool = False) -> np.ndarray:
    """A population x_k = mean + scale · z_k.

    Args:
        key: address: member k takes its numbers from (seed, step, k), so any member can be drawn again alone.
        mean: [n].
        scale: [n] or a number: standard deviations.
        members: λ.
        antithetic: members 2k and 2k + 1 share z with opposite signs; λ is even.

    Returns:
        float64 [members, n].
    """
    population = np.empty((members, len(mean)))
    spread = np.broadcast_to(scale, mean.shape)
    draws = members // 2 if antithetic else members
    for part in blocks(draws, len(mean)):
        moves = spread[part] * rng.normal(key, TENSOR, range(draws), part.stop - part.start, start=part.start)  # [draws, width]
        if antithetic:
            population[0::2, part] = mean[part] + moves
            population[1::2, part] = mean[part] - moves
        else:
            population[:, part] = mean[part] + moves
    return population


def normals(key: Key, members: int, dimension: int) -> np.ndarray:
    """float64 [members, dimension]."""
    return fill(key, np.zeros(dimension), 1.0, members)


def weighted_sum(weights: np.ndarray, population: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Σ_k w_k (x_k - mean), [n]: differences first, since far from 0 the sum of products would lose them."""
    total = np.empty(len(mean))
    for part in blocks(len(population), len(mean)):
        total[part] = weights @ (population[:, part] - mean[part])
    return total


def weighted_sums(weights: np.ndarray, population: np.ndarray, mean: np.ndarray, square_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Σ_k w_k d_k and Σ_k v_k d_k², both [n], of the differences d_k = x_k - mean, in one pass."""
    total, squares = np.empty(len(mean)), np.empty(len(mean))
    for part in blocks(len(population), len(mean)):
        moves = population[:, part] - mean[part]
        total[part] = weights @ moves
        squares[part] = square_weights @ np.square(moves, out=moves)
    return total, squares
