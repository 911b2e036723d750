"""Learning rates that change along a run, as a pure function of the share of it that is done.

    lr(f) = lr · factor(f),  f in [0, 1)

with w = warmup and g = (f - w) / (1 - w) for the share done of what follows the warm-up:

    f < w      factor = s + (1 - s) f / w,  s = START
    constant   factor = 1
    cosine     factor = (1 + cos π g) / 2
    linear     factor = 1 - g

torch.optim.lr_scheduler's classes keep state that has to be saved and that counts steps; a pure function of the share resumes bit for bit
with nothing saved, and a run that ends by a budget of forwards or seconds, whose number of steps nobody knows, has a share all the same.

Source: Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5 without restarts (cosine).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from altgrad.errors import SettingError, near_miss, require

START = 0.01  # where a warm-up begins: with 0 the first step would be lost
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "linear": lambda share: 1.0 - share,
}


@dataclass(frozen=True)
class Schedule:
    """By how much the learning rate is multiplied at each point of a run.

    Args:
        name: one of SHAPES.
        warmup: share of the run in which the rate rises to its full height, in [0, 1); 0: no warm-up.

    Raises:
        SettingError: an unknown name (the nearest is suggested), or warmup out of range.
    """

    name: str = field(default="constant", metadata={"help": "constant, cosine or linear"})
    warmup: float = field(default=0.0, metadata={"help": "share of the run in which the rate rises to its full height, in [0, 1)"})

    def __post_init__(self) -> None:
        if self.name not in SHAPES:
            raise SettingError(near_miss("schedule", str(self.name), SHAPES))
        require(0 <= self.warmup < 1, "warmup", self.warmup, "a share of the run, in [0, 1)")

    @property
    def moves(self) -> bool:
        """Whether the rate changes at all; where it does not, an optimizer's own is left alone."""
        return self.name != "constant" or self.warmup > 0

    def factor(self, fraction: float) -> float:
        """What the base rate is multiplied by when `fraction` of the run is done; shares outside [0, 1] count as the nearer end."""
        fraction = min(max(fraction, 0.0), 1.0)
        if fraction < self.warmup:
            return START + (1.0 - START) * fraction / self.warmup
        return SHAPES[self.name]((fraction - self.warmup) / (1.0 - self.warmup))

    def rates(self, groups: Sequence[dict[str, Any]], *, optimizer: str) -> tuple[float, ...]:
        """The base rate of every parameter group, which only `optimizer`'s first state tells; none where the rate never moves.

        Raises:
            SettingError: a group has no learning rate.
        """
        if self.moves and any("lr" not in group for group in groups):
            raise SettingError(f"schedule={self.name!r} is not allowed: optimizer {optimizer} has no learning rate to change. Use schedule='constant'.")
        return tuple(float(group["lr"]) for group in groups) if self.moves else ()

    def apply(self, groups: Sequence[dict[str, Any]], rates: Sequence[float], *, fraction: float) -> None:
        """Set every group's "lr" to its own base rate times the factor at `fraction`."""
        if self.moves:
            factor = self.factor(fraction)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * factor

    def __str__(self) -> str:
        return self.name + (f" after a warm-up over {100 * self.warmup:g} % of the run" if self.warmup else "")
