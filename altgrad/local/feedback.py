r"""Matrices that carry an error backwards where backprop would take the transposed weights.

    B = σ z,   z ~ N(0, 1) at an address of its own,   σ = s √(2 / (fan in + fan out))

Drawn from the run's seed, never from its step: the same at every step, on every rank and after resuming, and in no checkpoint.

Source: Lillicrap et al. 2016, Nature Communications 7, 13276 (fixed random feedback); Glorot, Bengio 2010 (σ, as in BioTorch, arXiv 2108.13446).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from altgrad.kernels import noise
from altgrad.problem import Problem
from altgrad.rng import Key, tensor_id

FACT = "feedback"


def deviation(shape: Sequence[int]) -> float:
    """√(2 / (fan in + fan out)) of a weight [out, in, window…]."""
    return math.sqrt(2 / ((shape[0] + shape[1]) * math.prod(shape[2:]))) if math.prod(shape) else 0.0


def fixed(problem: Problem, key: Key, name: str, shape: Sequence[int], scale: float, like: Tensor) -> Tensor:
    """Normals [*shape] with the standard deviation `scale` · deviation(shape), those of all steps of the run; kept with the problem.

    Args:
        key: of any step of the run.
        name: of what they belong to.
        like: has their dtype and device.
    """
    address = key.fold("feedback").at(0)
    kept: dict[Any, Any] = problem.recall(FACT, dict)
    if kept.get("address") != address:  # another run: its matrices are others
        kept.clear()
        kept["address"] = address
    fact = (name, tuple(shape), scale, like.dtype, like.device)
    if fact not in kept:
        kept[fact] = drawn(address, name, shape, scale, like)
    found: Tensor = kept[fact]
    return found


def fresh(key: Key, name: str, shape: Sequence[int], scale: float, like: Tensor) -> Tensor:
    """As `fixed`, but of this step alone."""
    return drawn(key.fold("fresh feedback"), name, shape, scale, like)


def drawn(key: Key, name: str, shape: Sequence[int], scale: float, like: Tensor) -> Tensor:
    with torch.no_grad():
        return noise.draw("normal", key, tensor_id(name), [0], shape, dtype=like.dtype, device=like.device)[0].mul_(scale * deviation(shape))


__all__ = ["deviation", "fixed", "fresh"]
