"""Fitness to order and weights. Smaller is better; what is not finite stands last."""

from functools import lru_cache

import numpy as np


def worst_last(fitness: np.ndarray) -> np.ndarray:
    """`fitness` with +inf for every NaN and infinity: the worst rank."""
    return np.where(np.isfinite(fitness), fitness, np.inf)


def order(fitness: np.ndarray) -> np.ndarray:
    """Indices from the best member to the worst; equals stand in the order of their index, so that the result is reproducible."""
    return np.argsort(fitness, kind="stable")


def centered_ranks(fitness: np.ndarray) -> np.ndarray:
    """u = rank / (λ - 1) - 1/2, from -1/2 (best) to 1/2 (worst); equals share the mean of their ranks, so a flat generation has no gradient.

    Source: Salimans et al., arXiv 1703.03864.
    """
    _, group, sizes = np.unique(fitness, return_inverse=True, return_counts=True)
    after = np.cumsum(sizes)
    ranks = (after - (sizes + 1) / 2)[group]
    return ranks / max(len(fitness) - 1, 1) - 0.5


def finite_scores(fitness: np.ndarray) -> np.ndarray:
    """`fitness` with the worst finite value in place of +inf, for rules that use differences of values over their spread: all divided by the power
    of two that brings the largest below 1, so that no square overflows and no bit is lost."""
    finite = np.isfinite(fitness)
    if not finite.any():
        return np.zeros_like(fitness)
    scores = np.where(finite, fitness, fitness[finite].max())
    return np.ldexp(scores, -int(np.frexp(np.abs(scores).max())[1]))


@lru_cache
def utilities(members: int) -> np.ndarray:
    """NES utilities from best to worst, [λ]: u_k = max(0, ln(λ/2 + 1) - ln k) / Σ_j(same) - 1/λ. Source: Wierstra et al., JMLR 15 (2014)."""
    raw = np.maximum(0.0, np.log(members / 2 + 1) - np.log(np.arange(1, members + 1)))
    found = raw / raw.sum() - 1 / members
    found.flags.writeable = False
    return found


def best_of(points: np.ndarray, values: np.ndarray, more: np.ndarray, more_values: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """The `keep` best of two lists with finite values, best first: points [k, n] and values [k]. The first list is in order already; it is returned
    as it is where nothing of the second belongs in it."""
    limit = values[-1] if len(values) >= keep else np.inf
    added = [place for place in order(more_values)[:keep] if more_values[place] < limit]
    if not added:
        return points, values
    together = np.concatenate([values, more_values[added]])
    chosen = order(together)[:keep]
    old = len(values)
    return np.stack([points[place] if place < old else more[added[place - old]] for place in chosen]), together[chosen]
