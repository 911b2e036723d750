r"""sep-CMA-ES: CMA-ES with a diagonal covariance, linear in n and with learning rates faster by a factor of about n/3.

    m, p_s, s, p_c as in CMA-ES with C = diag(v);   v ← (1 + c_1 (1 - h) c_c (2 - c_c) - c_1 - c_μ Σw) v + c_1 p_c² + c_μ Σ_i w_i y²_{i:λ}

Negative weights are scaled as in CMA-ES, and no variance falls below a tenth of itself in one generation.

Source: Ros and Hansen, PPSN 2008; the learning rates are those of pycma's diagonal mode.
"""

from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any, ClassVar

import numpy as np

from altgrad.es import draws, ranking
from altgrad.es.base import State, Strategy
from altgrad.es.recombination import constants, kept_positive, path_is_short, step_size


@dataclass(frozen=True, eq=False)
class SeparableState(State):
    """The diagonal of C, and both paths."""

    variances: np.ndarray  # [n]
    path_sigma: np.ndarray  # [n]
    path_covariance: np.ndarray  # [n]


@dataclass(frozen=True, eq=False)
class SepCMAES(Strategy[SeparableState]):
    """sep-CMA-ES: learns a scale for every coordinate; for separable problems and for many dimensions."""

    active: bool = field(default=True, metadata={"help": "learn from the worse half too, with negative weights"})

    name: ClassVar[str] = "sep-cma-es"
    source: ClassVar[str] = "Ros and Hansen, A simple modification in CMA-ES achieving linear time and space complexity, PPSN 2008"
    state_class: ClassVar[type[State]] = SeparableState
    fewest: ClassVar[int] = 4

    def extras(self, mean: np.ndarray) -> dict[str, Any]:
        zeros = np.zeros(len(mean))
        return {"variances": np.ones(len(mean)), "path_sigma": zeros, "path_covariance": zeros}

    def sample(self, state: SeparableState, members: int) -> np.ndarray:
        return draws.fill(state.key, state.mean, self.deviations(state), members)

    def update(self, state: SeparableState, population: np.ndarray, fitness: np.ndarray) -> SeparableState:
        members, n = population.shape
        c = constants(members, n, diagonal=True, active=self.active)
        places = ranking.order(fitness)
        positive, weights = np.empty(members), np.empty(members)
        positive[places], weights[places] = c.positive, c.weights
        if c.weights[-1] < 0:
            weights = kept_positive(weights, squared_lengths(population, state.mean, self.deviations(state)), n)
        move, squares = draws.weighted_sums(positive / state.sigma, population, state.mean, weights / state.sigma**2)
        path_sigma = (1 - c.c_s) * state.path_sigma + sqrt(c.c_s * (2 - c.c_s) * c.mu_eff) * (move / np.sqrt(state.variances))
        norm = float(np.linalg.norm(path_sigma))
        short = path_is_short(norm, state.generation, n, c)
        path_covariance = (1 - c.c_c) * state.path_covariance + short * sqrt(c.c_c * (2 - c.c_c) * c.mu_eff) * move
        lost = 0.0 if short else c.c_c * (2 - c.c_c)
        variances = (1 + c.c_1 * lost - c.c_1 - c.c_mu * c.weights.sum()) * state.variances + c.c_1 * np.square(path_covariance) + c.c_mu * squares
        return replace(
            state,
            mean=state.mean + state.sigma * move,
            sigma=step_size(state.sigma, norm, c),
            variances=np.maximum(variances, 0.1 * state.variances),
            path_sigma=path_sigma,
            path_covariance=path_covariance,
        )

    def deviations(self, state: SeparableState) -> np.ndarray:
        return state.sigma * np.sqrt(state.variances)


def squared_lengths(population: np.ndarray, mean: np.ndarray, deviations: np.ndarray) -> np.ndarray:
    """‖(x_k - m) / deviations‖² of every member, [λ]."""
    total = np.zeros(len(population))
    for part in draws.blocks(len(population), len(mean)):
        white = (population[:, part] - mean[part]) / deviations[part]
        total += np.einsum("ij,ij->i", white, white)
    return total
