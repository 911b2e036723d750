"""The constants of covariance matrix adaptation: weights, learning rates, and the rule for the step size.

Source: Hansen, "The CMA evolution strategy: a tutorial", arXiv 1604.00772, with the learning rates pycma uses today.
"""

from functools import lru_cache
from math import exp, log, sqrt
from typing import NamedTuple

import numpy as np


class Constants(NamedTuple):
    """What λ and n decide."""

    weights: np.ndarray  # [λ] from best to worst; the first μ are positive and sum to 1, the rest negative (active)
    positive: np.ndarray  # [λ] the same with 0 for the negative ones: the weights of the mean
    mu_eff: float
    c_s: float
    d_s: float
    c_c: float
    c_1: float
    c_mu: float
    chi: float  # E‖N(0, I)‖


def expected_norm(dimension: int) -> float:
    """χ_n = √n (1 - 1/(4n) + 1/(21n²))."""
    return sqrt(dimension) * (1 - 1 / (4 * dimension) + 1 / (21 * dimension**2))


def raw_weights(members: int) -> np.ndarray:
    """w'_i = ln((λ + 1)/2) - ln i."""
    return log((members + 1) / 2) - np.log(np.arange(1, members + 1))


def positive_weights(members: int) -> tuple[np.ndarray, float]:
    """The weights of the better half, which sum to 1, with 0 for the rest, [λ]; and μ_eff = 1 / Σw²."""
    raw = np.where(np.arange(members) < members // 2, raw_weights(members), 0.0)
    weights = raw / raw.sum()
    return weights, float(1 / np.square(weights).sum())


@lru_cache
def constants(members: int, dimension: int, *, diagonal: bool, active: bool) -> Constants:
    """The constants for λ members in n dimensions; `diagonal` takes the faster rates of a diagonal covariance."""
    positive, mu_eff = positive_weights(members)
    n = dimension
    if diagonal:
        c_1 = 1 / (n + 2 * sqrt(n) + mu_eff / n)
        c_mu = min(1 - c_1, (mu_eff + 1 / mu_eff - 2 + 0.25) / (n + 4 * sqrt(n) + mu_eff / 2))
        c_c = (1 + 1 / n + mu_eff / n) / (sqrt(n) + 1 / n + 2 * mu_eff / n)
    else:
        c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)
        c_mu = min(1 - c_1, 2 * (0.25 + mu_eff - 2 + 1 / mu_eff) / ((n + 2) ** 2 + mu_eff))
        c_c = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)
    c_1 *= min(1.0, members / 6)
    c_s = (mu_eff + 2) / (n + mu_eff + 3)
    d_s = 1 + 2 * max(0.0, sqrt(max(0.0, mu_eff - 1) / (n + 1)) - 1) + c_s
    negative = np.minimum(raw_weights(members), 0.0)
    total = -negative.sum()
    weights = positive
    if active and total > 0:
        mu_negative = total**2 / np.square(negative).sum()
        limit = min(1 + c_1 / c_mu, 1 + 2 * mu_negative / (mu_eff + 2), (1 - c_1 - c_mu) / (n * c_mu))
        weights = positive + negative * (max(0.0, limit) / total)
    for array in (weights, positive):
        array.flags.writeable = False
    return Constants(weights, positive, mu_eff, c_s, d_s, min(1.0, c_c), c_1, c_mu, expected_norm(n))


def kept_positive(weights: np.ndarray, lengths: np.ndarray, dimension: int) -> np.ndarray:
    """`weights` [λ] with w n / ‖z‖² for each negative w, so that C stays positive definite; ‖z‖² [λ] is `lengths`.

    A member that fell on the mean, its step below the mean's rounding, has ‖z‖ = 0 and a finite weight.
    """
    return np.where(weights >= 0, weights, weights * dimension / np.maximum(lengths, 1e-20))


def step_size(sigma: float, path_norm: float, c: Constants) -> float:
    """s exp((c_s/d_s)(‖p_s‖/χ_n - 1)), at most e times as large: one wild generation must not throw the search away."""
    return sigma * exp(min(1.0, (c.c_s / c.d_s) * (path_norm / c.chi - 1)))


def path_is_short(path_norm: float, generation: int, dimension: int, c: Constants) -> bool:
    """h: whether ‖p_s‖ is small enough that p_c may take this step in; after a long p_s it would blow C up."""
    settled = sqrt(1 - (1 - c.c_s) ** (2 * (generation + 1)))
    return path_norm / settled < (1.4 + 2 / (dimension + 1)) * c.chi
