r"""LM-MA-ES: a few learned directions in place of a matrix; O(n log n) memory and time a member.

    x = m + s M z,  M z computed as d ← z; for j < min(t, k): d ← (1 - c_d,j) d + c_d,j M_j (M_j · d)
    p_s ← (1 - c_s) p_s + √(μ_eff c_s (2 - c_s)) Σ_i w_i z_{i:λ},   s ← s exp((c_s/d_s)(‖p_s‖/χ_n - 1))
    M_j ← (1 - c_c,j) M_j + √(μ_eff c_c,j (2 - c_c,j)) Σ_i w_i z_{i:λ}

with k = 4 + floor(3 ln n) directions, c_d,j = 1/(1.5^j n), c_c,j = λ/(4^j n), c_s = 2λ/n, d_s = 1 + c_s, rates at most 1. The sum runs over z in the
order of fitness. z is recovered from the point that is told, each factor being undone by a rank-one inverse.

Source: Loshchilov, Glasmachers, Beyer, "Large scale black-box optimization by limited-memory matrix adaptation", arXiv 1705.06693.
"""

from dataclasses import dataclass, field, replace
from math import exp, log, sqrt
from typing import Any, ClassVar

import numpy as np

from altgrad.errors import require
from altgrad.es import draws, ranking
from altgrad.es.base import State, Strategy, is_whole
from altgrad.es.recombination import expected_norm, positive_weights


@dataclass(frozen=True, eq=False)
class LimitedState(State):
    """The direction vectors M_j, the path, and how many updates there have been."""

    directions: np.ndarray  # [k, n]
    path_sigma: np.ndarray  # [n]
    updates: int


@dataclass(frozen=True, eq=False)
class LMMAES(Strategy[LimitedState]):
    """LM-MA-ES: learns a few directions; for many dimensions that hang together."""

    memory: int | None = field(default=None, metadata={"help": "directions that are learned; 4 + floor(3 ln n) where none is given"})

    name: ClassVar[str] = "lm-ma-es"
    source: ClassVar[str] = "Loshchilov, Glasmachers, Beyer, arXiv 1705.06693"
    state_class: ClassVar[type[State]] = LimitedState
    fewest: ClassVar[int] = 4
    stands_clipping: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.memory is None or (is_whole(self.memory) and self.memory >= 1), "memory", self.memory, "a whole number ≥ 1")

    def extras(self, mean: np.ndarray) -> dict[str, Any]:
        n = len(mean)
        return {"directions": np.zeros((self.memory or 4 + int(3 * log(n)), n)), "path_sigma": np.zeros(n), "updates": 0}

    def sample(self, state: LimitedState, members: int) -> np.ndarray:
        moves = draws.normals(state.key, members, len(state.mean))  # [λ, n] d, starting as z
        for rate, direction in factors(state):
            moves = (1 - rate) * moves + np.outer(rate * (moves @ direction), direction)
        return state.mean + state.sigma * moves

    def update(self, state: LimitedState, population: np.ndarray, fitness: np.ndarray) -> LimitedState:
        members, n = population.shape
        weights, mu_eff = positive_weights(members)
        places = ranking.order(fitness)[: members // 2]  # only these have a weight
        weights, chosen = weights[: members // 2], population[places]
        move = draws.weighted_sum(weights, chosen, state.mean)
        step = whitened(state, weights @ ((chosen - state.mean) / state.sigma))  # Σ w z: undoing M is linear
        c_s = min(1.0, 2 * members / n)
        path_sigma = (1 - c_s) * state.path_sigma + sqrt(mu_eff * c_s * (2 - c_s)) * step
        rates = np.minimum(1.0, members / (4.0 ** np.arange(len(state.directions)) * n))[:, None]  # [k, 1] c_c,j
        growth = (c_s / (1 + c_s)) * (float(np.linalg.norm(path_sigma)) / expected_norm(n) - 1)
        return replace(
            state,
            mean=state.mean + move,
            sigma=state.sigma * exp(min(1.0, growth)),
            directions=(1 - rates) * state.directions + np.sqrt(mu_eff * rates * (2 - rates)) * step,
            path_sigma=path_sigma,
            updates=state.updates + 1,
        )

    def deviations(self, state: LimitedState) -> float:
        """An upper bound, s Π (1 - c_d,j + c_d,j ‖M_j‖²): the exact ones would take a pass over all directions for every coordinate."""
        return state.sigma * float(np.prod([max(1 - rate, 1 - rate + rate * float(direction @ direction)) for rate, direction in factors(state)]))


def factors(state: LimitedState) -> list[tuple[float, np.ndarray]]:
    """(c_d,j, M_j) of the directions that have been learned, in the order they are applied. At n = 1 c_d,0 would be 1 and M singular: at most 1/2."""
    n = len(state.mean)
    return [(min(0.5, 1 / (1.5**j * n)), state.directions[j]) for j in range(min(state.updates, len(state.directions)))]


def whitened(state: LimitedState, move: np.ndarray) -> np.ndarray:
    """M^{-1} `move`, [n]: each factor (1 - c) I + c M_j M_jᵀ undone, last first: d = (d' - c M_j (M_j·d') / (1 - c + c‖M_j‖²)) / (1 - c)."""
    for rate, direction in reversed(factors(state)):
        move = (move - direction * (rate * float(direction @ move) / (1 - rate + rate * float(direction @ direction)))) / (1 - rate)
    return move
