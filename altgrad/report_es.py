"""How a search went, as a picture and as CSV."""

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from altgrad import durable
from altgrad.drawing import COLOURS, INK, canvas

COLUMNS = (
    "generation",
    "evaluations",
    "run",
    "population",
    "best",
    "generation_best",
    "generation_median",
    "sigma",
    "largest_deviation",
    "failures",
)


def convergence(rows: Sequence[Mapping[str, Any]], *, title: str, maximize: bool = False) -> bytes:
    """f and the step over evaluations, as PNG: the best so far, each generation's best and median; restarts as vertical lines.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with canvas(8.4, 3.7, theme="light") as (figure, png):
        left, right = figure.subplots(1, 2)
        evaluations = np.array([row["evaluations"] for row in rows], dtype=float)
        looks = (
            ("generation_median", "median of the generation", {"color": COLOURS["light"][5], "linewidth": 0.9, "alpha": 0.8}),
            ("generation_best", "best of the generation", {"color": COLOURS["light"][0], "linewidth": 0.9, "alpha": 0.8}),
            ("best", "best so far", {"color": INK["light"][0], "linewidth": 1.8}),
        )
        shown = {name: column(rows, name) for name, _, _ in looks}
        for name, label, look in looks:
            left.plot(evaluations, shown[name], label=label, **look)
        finite = np.concatenate([values[np.isfinite(values)] for values in shown.values()])
        left.set_yscale("log" if len(finite) and finite.min() > 0 else "linear")
        left.set(title=title, xlabel="evaluations", ylabel="f (larger is better)" if maximize else "f")
        right.plot(evaluations, column(rows, "sigma"), color=COLOURS["light"][1], linewidth=1.8, label="σ")
        right.plot(evaluations, column(rows, "largest_deviation"), color=COLOURS["light"][2], linewidth=1.2, label="largest deviation of a coordinate")
        right.set(title="Step", xlabel="evaluations", ylabel="standard deviation", yscale="log")
        for axes in (left, right):
            for before, after in itertools.pairwise(rows):
                if after["run"] != before["run"]:
                    axes.axvline(float(before["evaluations"]), color=INK["light"][1], linewidth=1.0, zorder=0)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.legend(fontsize=9)
        return png()


def column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """One column as numbers, NaN where there is none."""
    return np.array([np.nan if row.get(name) in (None, "") else float(row[name]) for row in rows], dtype=float)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows under their headings; a float in the digits that give the same bits back."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({name: "" if row.get(name) is None else row[name] for name in COLUMNS} for row in rows)
    return text.getvalue().encode()


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a file of `to_csv`, which is begun if need be: the log of a search that is killed ends at its last generation."""
    with durable.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            text = to_csv([row])
            file.write(text if file.tell() == 0 else text.split(b"\n", 1)[1])


def from_csv(data: bytes) -> list[dict[str, Any]]:
    """Rows of `to_csv`; of a generation that was logged twice, before a stop and after it, the later row. A line cut short by a stop is left out."""
    whole = {"generation", "evaluations", "run", "population", "failures"}
    text = data[: data.rfind(b"\n") + 1].decode()
    found: dict[int, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO(text)):
        found[int(row["generation"])] = {name: (int(value) if name in whole else float(value)) if value else None for name, value in row.items()}
    return [found[generation] for generation in sorted(found)]
