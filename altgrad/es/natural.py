r"""Natural evolution strategies: SNES (a scale for every coordinate) and xNES (a full matrix).

Both take the utilities u_k of `ranking.utilities` and z_k with x_k = m + σ z_k (SNES) or m + s B z_k (xNES), best first:

    SNES   m ← m + η_m σ Σ u_k z_k,   σ ← σ exp((η_σ/2) Σ u_k (z_k² - 1))
    xNES   G_M = Σ u_k (z_k z_kᵀ - I),  G_s = tr(G_M)/n,  G_B = G_M - G_s I
           m ← m + η_m s B Σ u_k z_k,   s ← s exp(η_s G_s/2),   B ← B expm(η_B G_B/2)

expm is the exponential of the matrix, not of its entries: entry by entry B would stay diagonal and never learn a rotation.

Source: Wierstra, Schaul, Glasmachers, Sun, Peters, Schmidhuber, "Natural evolution strategies", JMLR 15 (2014).
"""

from dataclasses import dataclass, field, replace
from math import exp, log, sqrt
from typing import Any, ClassVar

import numpy as np

from altgrad.errors import require
from altgrad.es import draws, ranking
from altgrad.es.base import RANGE, State, Strategy, is_number, is_whole, refuse_above

GREATEST = 2.0  # of an exponent: one wild generation must not throw the search away


@dataclass(frozen=True, eq=False)
class ScaleState(State):
    """A standard deviation for every coordinate; `sigma` is their root mean square."""

    scales: np.ndarray  # [n]


@dataclass(frozen=True, eq=False)
class SNES(Strategy[ScaleState]):
    """Separable NES: learns a scale for every coordinate; linear in n."""

    mean_rate: float = field(default=1.0, metadata={"help": "η_m, the learning rate of the mean"})
    scale_rate: float | None = field(default=None, metadata={"help": "η_σ; (3 + ln n)/(5 √n) where none is given"})

    name: ClassVar[str] = "snes"
    source: ClassVar[str] = "Wierstra et al., Natural evolution strategies, JMLR 15 (2014), algorithm 6"
    state_class: ClassVar[type[State]] = ScaleState

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates(self.mean_rate, self.scale_rate)

    def extras(self, mean: np.ndarray) -> dict[str, Any]:
        return {"scales": np.full(len(mean), float(self.sigma))}

    def sample(self, state: ScaleState, members: int) -> np.ndarray:
        return draws.fill(state.key, state.mean, state.scales, members)

    def update(self, state: ScaleState, population: np.ndarray, fitness: np.ndarray) -> ScaleState:
        members, n = population.shape
        weights = np.empty(members)
        weights[ranking.order(fitness)] = ranking.utilities(members)
        rate = (3 + log(n)) / (5 * sqrt(n)) if self.scale_rate is None else self.scale_rate
        move, squares = draws.weighted_sums(weights, population, state.mean, weights)
        growth = 0.5 * rate * squares / np.square(state.scales)  # Σ u = 0, so that the -1 of z² - 1 drops out
        scales = np.clip(state.scales * np.exp(np.clip(growth, -GREATEST, GREATEST)), *RANGE)
        return replace(state, mean=state.mean + self.mean_rate * move, scales=scales, sigma=float(np.sqrt(np.mean(np.square(scales)))))

    def deviations(self, state: ScaleState) -> np.ndarray:
        return state.scales


@dataclass(frozen=True, eq=False)
class MatrixState(State):
    """The shape matrix B, of determinant 1; the scale s is `sigma`."""

    basis: np.ndarray  # [n, n]


@dataclass(frozen=True, eq=False)
class XNES(Strategy[MatrixState]):
    """Exponential NES: learns scales and directions by the natural gradient."""

    mean_rate: float = field(default=1.0, metadata={"help": "η_m, the learning rate of the mean"})
    scale_rate: float | None = field(default=None, metadata={"help": "η_s = η_B; (9 + 3 ln n)/(5 n √n) where none is given"})
    max_dimension: int = field(default=3000, metadata={"help": "largest n that is accepted; matrices are n × n"})

    name: ClassVar[str] = "xnes"
    source: ClassVar[str] = "Glasmachers et al., Exponential natural evolution strategies, GECCO 2010; JMLR 15 (2014), algorithm 5"
    state_class: ClassVar[type[State]] = MatrixState
    stands_clipping: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates(self.mean_rate, self.scale_rate)
        require(is_whole(self.max_dimension) and self.max_dimension >= 1, "max_dimension", self.max_dimension, "a whole number ≥ 1")

    def check_dimension(self, dimension: int) -> None:
        refuse_above(self.max_dimension, dimension, self.name)

    def extras(self, mean: np.ndarray) -> dict[str, Any]:
        return {"basis": np.eye(len(mean))}

    def sample(self, state: MatrixState, members: int) -> np.ndarray:
        return state.mean + state.sigma * (draws.normals(state.key, members, len(state.mean)) @ state.basis.T)

    def update(self, state: MatrixState, population: np.ndarray, fitness: np.ndarray) -> MatrixState:
        members, n = population.shape
        rate = (9 + 3 * log(n)) / (5 * n * sqrt(n)) if self.scale_rate is None else self.scale_rate
        weights = ranking.utilities(members)
        steps = (population[ranking.order(fitness)] - state.mean) / state.sigma  # [λ, n] B z, best first
        z = np.linalg.solve(state.basis, steps.T).T
        gradient = (z.T * weights) @ z  # [n, n] G_M: Σ u = 0, so that the -I drops out
        scale = float(np.trace(gradient)) / n
        shape = gradient - scale * np.eye(n)
        return replace(
            state,
            mean=state.mean + self.mean_rate * state.sigma * (weights @ steps),
            sigma=state.sigma * exp(max(-GREATEST, min(GREATEST, 0.5 * rate * scale))),
            basis=state.basis @ exponential(0.5 * rate * shape),
        )

    def deviations(self, state: MatrixState) -> np.ndarray:
        return state.sigma * np.sqrt(np.square(state.basis).sum(1))


def exponential(matrix: np.ndarray) -> np.ndarray:
    """expm of a symmetric matrix [n, n], exact through its eigenvectors: V diag(e^λ) Vᵀ; eigenvalues held within ±2."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.exp(np.clip(values, -GREATEST, GREATEST))) @ vectors.T


def check_rates(mean_rate: float, scale_rate: float | None) -> None:
    """Both learning rates are positive."""
    require(is_number(mean_rate) and 0 < mean_rate < np.inf, "mean_rate", mean_rate, "a number above 0")
    require(scale_rate is None or (is_number(scale_rate) and 0 < scale_rate < np.inf), "scale_rate", scale_rate, "a number above 0")
