r"""Strategies that only sample and select: the cross-entropy method and random search.

    CEM     d = mean(elite) - m,   s² ← (1 - a) s² + a mean((elite - m)²) - (a d)²,   m ← m + a d
    random  x_k = c + σ z_k, with c the best point so far or the first mean

CEM's new law has the moments of the mixture (1 - a) · old + a · elite. Its variance counts the way the elite has moved; with a = 1, the plain method, it
does not, and the search stands still where the slope is steady.

Sources: Rubinstein and Kroese, "The cross-entropy method", 2004; Rastrigin, "The convergence of the random search method", 1963.
"""

from dataclasses import dataclass, field, replace
from math import log
from typing import Any, ClassVar

import numpy as np

from altgrad.errors import SettingError, near_miss, require
from altgrad.es import draws, ranking
from altgrad.es.base import RANGE, State, Strategy, is_number


@dataclass(frozen=True, eq=False)
class CEMState(State):
    """A standard deviation for every coordinate; `sigma` is their root mean square."""

    scales: np.ndarray  # [n]


@dataclass(frozen=True, eq=False)
class CEM(Strategy[CEMState]):
    """The cross-entropy method with a diagonal normal law."""

    population: int | None = field(default=None, metadata={"help": "members of a generation, λ; 10 (4 + floor(3 ln n)) where none is given"})
    elite: float = field(default=0.25, metadata={"help": "share of the members that are kept"})
    rate: float = field(default=0.5, metadata={"help": "a, how far mean and variance go towards those of the elite"})

    name: ClassVar[str] = "cem"
    source: ClassVar[str] = "Rubinstein and Kroese, The cross-entropy method, 2004"
    state_class: ClassVar[type[State]] = CEMState

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.elite) and 0 < self.elite < 1, "elite", self.elite, "in (0, 1)")
        require(is_number(self.rate) and 0 < self.rate <= 1, "rate", self.rate, "in (0, 1]")

    def usual(self, dimension: int) -> int:
        return 10 * (4 + int(3 * log(dimension)))

    def extras(self, mean: np.ndarray) -> dict[str, Any]:
        return {"scales": np.full(len(mean), float(self.sigma))}

    def sample(self, state: CEMState, members: int) -> np.ndarray:
        return draws.fill(state.key, state.mean, state.scales, members)

    def update(self, state: CEMState, population: np.ndarray, fitness: np.ndarray) -> CEMState:
        count = max(2, round(self.elite * len(population)))
        weights = np.zeros(len(population))
        weights[ranking.order(fitness)[:count]] = 1 / count
        move, squares = draws.weighted_sums(weights, population, state.mean, weights)
        variances = (1 - self.rate) * np.square(state.scales) + self.rate * squares - np.square(self.rate * move)
        scales = np.clip(np.sqrt(np.maximum(variances, 0.0)), *RANGE)
        return replace(state, mean=state.mean + self.rate * move, scales=scales, sigma=float(np.sqrt(np.mean(np.square(scales)))))

    def deviations(self, state: CEMState) -> np.ndarray:
        return state.scales


CENTRES = ("best", "start")


@dataclass(frozen=True, eq=False)
class RandomSearch(Strategy[State]):
    """Random search: normal moves of one size about the best point so far. The baseline every other strategy has to beat."""

    around: str = field(default="best", metadata={"help": "what moves start from: best (the best point so far) or start (the first mean)"})

    name: ClassVar[str] = "random-search"
    source: ClassVar[str] = "Rastrigin, The convergence of the random search method in the extremal control of a many parameter system, 1963"
    fewest: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.around not in CENTRES:
            raise SettingError(near_miss("around", str(self.around), CENTRES))

    def sample(self, state: State, members: int) -> np.ndarray:
        return draws.fill(state.key, state.mean, state.sigma, members)

    def update(self, state: State, population: np.ndarray, fitness: np.ndarray) -> State:
        return replace(state, mean=state.best) if self.around == "best" else state
