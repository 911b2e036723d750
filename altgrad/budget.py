"""What a run may spend, in one of three currencies.

Forwards are counted as forward-equivalents, forwards + 2 × backwards: a backward sweep costs about two forward passes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from altgrad.errors import SettingError, near_miss, require

BUDGETS = {"epochs": "passes over the training data", "forwards": "forward-equivalents (forwards + 2 × backwards)", "seconds": "seconds spent in steps"}


@dataclass(frozen=True)
class Budget:
    """What every run may spend: `amount` of one of BUDGETS. A run stops with the first step that reaches it."""

    kind: str
    amount: float

    @staticmethod
    def parse(text: str) -> "Budget":
        """ "forwards=20000" -> Budget("forwards", 20000).

        Raises:
            SettingError: not of that form, an unknown kind, or an amount that is not above 0.
        """
        kind, _, amount = (part.strip() for part in text.partition("="))
        if kind not in BUDGETS:
            raise SettingError(near_miss("budget", kind, BUDGETS) + " For instance forwards=20000, seconds=30 or epochs=10.")
        try:
            value = float(amount)
        except ValueError:
            value = math.nan
        require(0 < value < math.inf, f"budget {kind}", amount, "a number above 0")
        return Budget(kind, value)

    def spent(self, row: Mapping[str, Any], epoch: int | None) -> float:
        """How much of it a run has used up; `epoch` is the number of steps in one."""
        if self.kind == "epochs":
            return row["step"] / (epoch or 1)
        return row["seconds"] if self.kind == "seconds" else equivalents(row)

    def share(self, row: Mapping[str, Any], epoch: int | None) -> float:
        """The share of it that is used up, 1 and more at the end."""
        return self.spent(row, epoch) / self.amount

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:g}"


def equivalents(row: Mapping[str, Any]) -> float:
    """forwards + 2 × backwards."""
    return row["forwards"] + 2 * row["backwards"]
