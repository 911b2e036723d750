r"""Starting anew: IPOP doubles the population, BIPOP alternates that with small populations and small steps.

    IPOP   λ_r = 2^r λ_0
    BIPOP  large: λ = 2^k λ_0 after k large runs;  small: λ = floor(λ_0 (λ_large / (2 λ_0))^(U²)), σ = σ_0 10^(-2 U'), U and U' uniform on (0, 1),
           at most half of the last large run's evaluations; the regime that has spent less goes next

Sources: Auger and Hansen, CEC 2005; Hansen, GECCO workshop 2009.
"""

from dataclasses import dataclass

import numpy as np

from altgrad import rng
from altgrad.rng import Key

KINDS = ("none", "ipop", "bipop")


@dataclass(frozen=True)
class Run:
    """What one run of a search starts with, and what the runs before it have spent."""

    number: int
    members: int
    sigma: float
    limit: int  # evaluations of this run; 0 = no limit
    large: bool
    doublings: int  # of the population of the large runs
    spent_large: int
    spent_small: int
    last_large: int  # evaluations of the last large run


def first(members: int, sigma: float) -> Run:
    """The run every search begins with."""
    return Run(number=0, members=members, sigma=sigma, limit=0, large=True, doublings=0, spent_large=0, spent_small=0, last_large=0)


def following(kind: str, run: Run, spent: int, base: Run, key: Key, *, even: bool) -> Run:
    """The run after `run`, which took `spent` evaluations.

    Args:
        kind: "ipop" or "bipop".
        base: the first run.
        key: names the uniform numbers of the small runs.
        even: whether λ must be even.
    """
    spent_large, spent_small = (run.spent_large + spent, run.spent_small) if run.large else (run.spent_large, run.spent_small + spent)
    last_large = spent if run.large else run.last_large
    if kind == "ipop" or run.number == 0 or spent_small >= spent_large:
        doublings = run.doublings + 1
        return Run(run.number + 1, base.members * 2**doublings, base.sigma, 0, True, doublings, spent_large, spent_small, last_large)
    u, v = (float(number) for number in rng.uniform(key.at(run.number), rng.tensor_id("altgrad.es.restarts"), [0], 2)[0])
    members = max(base.members, int(base.members * (2**run.doublings / 2) ** (u**2)))
    return Run(
        number=run.number + 1,
        members=members + (members % 2 if even else 0),
        sigma=base.sigma * 10 ** (-2 * v),
        limit=max(last_large // 2, members),
        large=False,
        doublings=run.doublings,
        spent_large=spent_large,
        spent_small=spent_small,
        last_large=last_large,
    )


def start(x0: np.ndarray, sigma: float, lower: np.ndarray, upper: np.ndarray, key: Key, number: int) -> np.ndarray:
    """Where run `number` starts, [n]: x0 for the first; uniform in the box where it is finite, else x0 + σ₀ z, drawn back into the box."""
    if number == 0:
        return x0
    tensor = rng.tensor_id("altgrad.es.restarts.start")
    uniform = rng.uniform(key.at(number), tensor, [0], len(x0))[0].astype(np.float64)
    normal = rng.normal(key.at(number), tensor, [1], len(x0))[0].astype(np.float64)
    finite = np.isfinite(lower) & np.isfinite(upper)
    low, high = np.where(finite, lower, 0.0), np.where(finite, upper, 0.0)
    return np.where(finite, low + uniform * (high - low), np.clip(x0 + sigma * normal, lower, upper))
