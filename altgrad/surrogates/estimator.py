"""What every surrogate is: a frozen dataclass of settings that knows its kind, its source, and how its settings move along a run."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from altgrad.errors import require

KINDS = ("pointwise", "learned", "stochastic", "prox")


def setting(default: Any, meaning: str) -> Any:
    """A field with its default and its meaning."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Estimator:
    """A derivative that stands in for that of an operation which has none of use; the fields are its settings.

    The kinds, each with its protocol:

        pointwise    estimator(x) -> q(x), whose derivative is h(x) by reverse and forward mode; value, derivative, primitive   (pointwise.py)
        learned      estimator(x, step) -> q(x; step), with derivatives in x and in step; initial(x)                            (learned.py)
        stochastic   estimator(x, key=…) -> a sample with a derivative, or (loss=…) a value whose gradient is the estimate      (stochastic.py)
        prox         estimator(w, strength=…) -> what a proximal step makes of w; distance(w), hard(w)                          (prox.py)
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    source: ClassVar[str]

    def at(self, share: float) -> Self:
        """The estimator with its settings as they are when `share` of the run is done, in [0, 1]; most have no schedule and stay as they are."""
        return self

    def settings(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def __str__(self) -> str:
        changed = [f"{entry.name}={getattr(self, entry.name)}" for entry in fields(self) if getattr(self, entry.name) != entry.default]
        return ",".join([self.name, *changed])


def positive(name: str, value: Any) -> None:
    """Require a finite number above 0."""
    require(isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf, name, value, "a number above 0")


def clamped(share: float) -> float:
    """A share of the run, in [0, 1]."""
    return min(max(float(share), 0.0), 1.0)
