r"""CMA-ES: the full covariance matrix, with negative weights and a lazy eigendecomposition.

    y_k = (x_k - m)/s,   y_w = Σ_{i≤μ} w_i y_{i:λ},   m ← m + s y_w
    p_s ← (1 - c_s) p_s + √(c_s (2 - c_s) μ_eff) C^{-1/2} y_w,   s ← s exp((c_s/d_s)(‖p_s‖/χ_n - 1))
    p_c ← (1 - c_c) p_c + h √(c_c (2 - c_c) μ_eff) y_w
    C ← (1 + c_1 (1 - h) c_c (2 - c_c) - c_1 - c_μ Σw) C + c_1 p_c p_cᵀ + c_μ Σ_i w°_i y_{i:λ} y_{i:λ}ᵀ

with w°_i = w_i, and for negative weights w_i n / ‖C^{-1/2} y_{i:λ}‖², so that C stays positive definite.

Source: Hansen, arXiv 1604.00772; the learning rates are pycma's.
"""

from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any, ClassVar

import numpy as np

from altgrad.errors import require
from altgrad.es import draws, ranking
from altgrad.es.base import State, Strategy, is_whole, refuse_above
from altgrad.es.recombination import Constants, constants, kept_positive, path_is_short, step_size


@dataclass(frozen=True, eq=False)
class CMAState(State):
    """C, its decomposition C = B diag(d²) Bᵀ as of generation `decomposed`, and both paths."""

    covariance: np.ndarray  # [n, n]
    basis: np.ndarray  # [n, n] B
    scales: np.ndarray  # [n] d
    path_sigma: np.ndarray  # [n] p_s
    path_covariance: np.ndarray  # [n] p_c
    decomposed: int


@dataclass(frozen=True, eq=False)
class CMAES(Strategy[CMAState]):
    """CMA-ES: learns scales and directions; the default up to a few hundred dimensions."""

    active: bool = field(default=True, metadata={"help": "learn from the worse half too, with negative weights"})
    max_dimension: int = field(default=3000, metadata={"help": "largest n that is accepted; matrices are n × n"})

    name: ClassVar[str] = "cma-es"
    source: ClassVar[str] = "Hansen, The CMA evolution strategy: a tutorial, arXiv 1604.00772"
    state_class: ClassVar[type[State]] = CMAState
    fewest: ClassVar[int] = 4
    stands_clipping: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_whole(self.max_dimension) and self.max_dimension >= 1, "max_dimension", self.max_dimension, "a whole number ≥ 1")

    def check_dimension(self, dimension: int) -> None:
        refuse_above(self.max_dimension, dimension, self.name)

    def extras(self, mean: np.ndarray) -> dict[str, Any]:
        n = len(mean)
        zeros = np.zeros(n)
        return {"covariance": np.eye(n), "basis": np.eye(n), "scales": np.ones(n), "path_sigma": zeros, "path_covariance": zeros, "decomposed": 0}

    def sample(self, state: CMAState, members: int) -> np.ndarray:
        z = draws.normals(state.key, members, len(state.mean))
        return state.mean + state.sigma * ((z * state.scales) @ state.basis.T)

    def update(self, state: CMAState, population: np.ndarray, fitness: np.ndarray) -> CMAState:
        n = len(state.mean)
        c = constants(len(population), n, diagonal=False, active=self.active)
        steps = (population[ranking.order(fitness)] - state.mean) / state.sigma  # [λ, n] y, best first
        white = (steps @ state.basis) / state.scales  # [λ, n] C^{-1/2} y, in the axes of B
        move = c.positive @ steps
        path_sigma = (1 - c.c_s) * state.path_sigma + sqrt(c.c_s * (2 - c.c_s) * c.mu_eff) * (state.basis @ (c.positive @ white))
        norm = float(np.linalg.norm(path_sigma))
        short = path_is_short(norm, state.generation, n, c)
        path_covariance = (1 - c.c_c) * state.path_covariance + short * sqrt(c.c_c * (2 - c.c_c) * c.mu_eff) * move
        lost = 0.0 if short else c.c_c * (2 - c.c_c)  # of the variance p_c would have brought
        weights = kept_positive(c.weights, np.square(white).sum(1), n)
        covariance = (1 + c.c_1 * lost - c.c_1 - c.c_mu * c.weights.sum()) * state.covariance
        covariance += c.c_1 * np.outer(path_covariance, path_covariance)
        covariance += (steps.T * (c.c_mu * weights)) @ steps
        after = replace(
            state,
            mean=state.mean + state.sigma * move,
            sigma=step_size(state.sigma, norm, c),
            covariance=covariance,
            path_sigma=path_sigma,
            path_covariance=path_covariance,
        )
        return decomposed(after) if state.generation + 1 - state.decomposed >= gap(n, c) else after

    def deviations(self, state: CMAState) -> np.ndarray:
        return state.sigma * np.sqrt(np.maximum(np.diag(state.covariance), 0.0))


def gap(dimension: int, c: Constants) -> float:
    """Generations between decompositions: 1 / (2 n (c_1 + c_μ)), so that their cost is that of the rest and C has hardly moved."""
    return 0.5 / (dimension * (c.c_1 + c.c_mu))


def decomposed(state: CMAState) -> CMAState:
    """`state` with B and d of its C. Rounding can take the smallest eigenvalues below 0: they are held at 1e-14 of the largest."""
    symmetric = (state.covariance + state.covariance.T) / 2
    values, basis = np.linalg.eigh(symmetric)
    held = np.maximum(values, 1e-14 * max(float(values[-1]), 1e-300))
    if held[0] > values[0]:
        symmetric = (basis * held) @ basis.T
    return replace(state, covariance=symmetric, basis=basis, scales=np.sqrt(held), decomposed=state.generation + 1)


def condition(state: State) -> float:
    """The condition number of C as last decomposed; 1 for a state without one."""
    return float((state.scales.max() / state.scales.min()) ** 2) if isinstance(state, CMAState) else 1.0
