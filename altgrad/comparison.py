"""What a comparison came to: a row for every engine, and what a reader needs to judge them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from altgrad import runs
from altgrad.compare_row import Row
from altgrad.verdict import sentences


@dataclass(frozen=True)
class Comparison:
    """Rows of all engines, and what a reader needs to judge them."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    method: list[str]
    rows: list[Row]
    skipped: dict[str, str]  # label -> why that baseline could not be run

    def verdict(self) -> list[str]:
        """What the rows show, in sentences."""
        return sentences(self.rows, self.settings, self.skipped)

    def as_dict(self) -> dict[str, Any]:
        """JSON values: the fields and the verdict; numbers that are not finite are none."""
        rows = [{**asdict(row), "equivalents": row.equivalents} for row in self.rows]
        return runs.finite({**asdict(self), "rows": rows, "verdict": self.verdict()})

    @staticmethod
    def of(values: Mapping[str, Any]) -> "Comparison":
        """The comparison that `as_dict` wrote."""
        rows = [Row(**{name: value for name, value in row.items() if name != "equivalents"}) for row in values["rows"]]
        return Comparison(**{name: values[name] for name in ("settings", "environment", "method", "skipped")}, rows=rows)
