"""When a search has nothing left to find, as a sentence."""

from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np

from altgrad.errors import require
from altgrad.es.base import State, Strategy, is_number, is_whole
from altgrad.es.cma import condition

LONGEST = 2000  # generations that are looked back on at most


@dataclass(frozen=True)
class Stopping:
    """The limits of a search, beside its target and its evaluations. They are those of pycma, made relative where that helps."""

    step: float = field(default=1e-12, metadata={"help": "smallest standard deviation, as a share of the first σ"})
    flat: float = field(default=1e-12, metadata={"help": "smallest difference of fitness over the last 10 + 30 n/λ generations"})
    condition: float = field(default=1e14, metadata={"help": "largest condition number of a covariance matrix"})
    growth: float = field(default=1e8, metadata={"help": "largest standard deviation, as a multiple of the first σ"})
    barren: int = field(default=3, metadata={"help": "generations in a row without one finite fitness"})

    def __post_init__(self) -> None:
        for name in ("step", "flat"):
            require(is_number(getattr(self, name)) and getattr(self, name) >= 0, name, getattr(self, name), "a number ≥ 0")
        for name in ("condition", "growth"):
            require(is_number(getattr(self, name)) and getattr(self, name) > 1, name, getattr(self, name), "a number above 1")
        require(is_whole(self.barren) and self.barren >= 1, "barren", self.barren, "a whole number ≥ 1")

    def reason(self, strategy: Strategy[Any], state: State, recent: np.ndarray, fitness: np.ndarray) -> str | None:
        """Why this run ends here; None where it goes on.

        Args:
            recent: best fitness of each generation of this run, up to `LONGEST`, newest last.
            fitness: [λ] of the newest generation.
        """
        deviations = np.asarray(strategy.deviations(state))
        largest = float(deviations.max())
        if not (np.isfinite(state.mean).all() and np.isfinite(largest)) or largest > self.growth * strategy.sigma:
            grown = f"its standard deviation grew from {strategy.sigma:.3g} to {largest:.3g}"
            return f"The search has run away: {grown}. f may have no minimum, or σ was far too small."
        if largest < self.step * strategy.sigma:
            return f"The step has become too small to matter: {largest:.2g} is below {self.step:g} of the first σ={strategy.sigma:g}."
        if (deviations < np.spacing(np.abs(state.mean))).all():
            return "The step is below the precision of float64 in every coordinate."
        if condition(state) > self.condition:
            return f"The covariance matrix has become too uneven: its condition number {condition(state):.2g} is above {self.condition:g}."
        span = window(state, 10)
        if len(recent) >= span:
            seen = np.concatenate([recent[-span:], fitness])
            if np.isfinite(seen).all() and float(np.ptp(seen)) < self.flat:
                return f"f has become flat: over {span} generations and the whole of the last one it varied by less than {self.flat:g}."
        return None


def window(state: State, least: int) -> int:
    """least + 30 n/λ generations: what it takes a strategy to see all directions."""
    return min(LONGEST, least + ceil(30 * len(state.mean) / len(state.told)))


def stagnant(state: State, recent: np.ndarray) -> str | None:
    """Why a run should be started anew: the median of the newest 30 % of a long window is no better than that of its oldest 30 %."""
    span = window(state, 120)
    if len(recent) < span:
        return None
    part = recent[-span:]
    third = max(1, int(0.3 * span))
    if np.median(part[-third:]) < np.median(part[:third]):
        return None
    return f"f has stopped getting better: the median over the last {third} of {span} generations is no lower than over the first {third}."
