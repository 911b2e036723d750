"""Comparisons as tables: for the terminal, as markdown, JSON and CSV; and the table of engines."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from altgrad import durable, registry
from altgrad.compare_row import Row
from altgrad.comparison import Comparison
from altgrad.errors import AltgradError

COLUMNS = ("engine", "test accuracy", "forwards", "backwards", "seconds", "peak memory", "cosine", "lr")
MAPPINGS = ("settings", "tuning", "fgsm", "readouts", "best_readout", "cosines", "metrics")  # columns that a CSV holds as JSON
LISTS = ("accuracies", "losses")


def returns(row: Row) -> list[float]:
    """The last test returns of a row's seeds; none where the problem has no episodes."""
    return [curve[-1]["test_return"] for curve in row.curves if curve and curve[-1].get("test_return") is not None]


def cells(row: Row) -> list[str]:
    """A row of the table as text."""
    earned = returns(row)
    if earned:
        score = f"{statistics.fmean(earned):.1f}" + (f" ± {statistics.stdev(earned):.1f}" if len(earned) > 1 else "")
    elif row.accuracy is not None:
        score = f"{100 * row.accuracy:.2f} %" + (f" ± {100 * row.accuracy_spread:.2f}" if row.accuracy_spread is not None else "")
    elif row.loss is not None:
        score = f"{row.loss:.4g}" + (f" ± {row.loss_spread:.2g}" if row.loss_spread is not None else "")
    else:
        score = "-"
    if row.diverged:
        score += f" ({row.diverged} of {len(row.curves)} diverged)"
    cosine = "-" if row.cosine is None else f"{row.cosine:.3f}"
    cost = [f"{row.forwards:,.0f}", f"{row.backwards:,.0f}", f"{row.seconds:.2f}", size(row.peak_memory_bytes)]
    return [row.label, score, *cost, cosine, f"{row.lr:g}", *(attacked(values) for values in row.fgsm.values())]


def attacked(accuracies: Sequence[float | None]) -> str:
    """The mean over the seeds that could be attacked."""
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    return f"{100 * statistics.fmean(known):.2f} %" if known else "-"


def headings(rows: Sequence[Row]) -> list[str]:
    """COLUMNS, with "test return" where the problem has episodes, "test loss" where it has neither those nor classes, and one for every attack."""
    measured = "test loss" if all(row.accuracy is None for row in rows) else "test accuracy"
    measured = "test return" if any(returns(row) for row in rows) else measured
    return [*(measured if name == "test accuracy" else name for name in COLUMNS), *(f"FGSM {epsilon}" for epsilon in (rows[0].fgsm if rows else ()))]


def table(rows: Sequence[Row], *, title: str | None = None) -> Table:
    """The rows as a rich table, baselines first and dimmed."""
    found = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for number, name in enumerate(headings(rows)):
        if name != "backwards":  # beside the forwards in one column, so that the table fits a terminal of 80
            # A label may wrap where it is long; a number stays whole.
            name = {"forwards": "forwards +\nbackwards", "peak memory": "peak\nmemory"}.get(name, name)
            found.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number > 0)
    for number, row in enumerate(rows):
        label, score, forwards, backwards, *rest = cells(row)
        last = row.baseline and number + 1 < len(rows) and not rows[number + 1].baseline
        found.add_row(Text(label), score, f"{forwards} + {backwards}", *rest, style="dim" if row.baseline else None, end_section=last)
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a markdown table."""
    return markdown_table(headings(rows), [cells(row) for row in rows])


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Cells as markdown; a bar inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def engine_table() -> str:
    """Every registered engine as markdown: name, what it needs, how it may differ from backprop, what it is, source."""
    from altgrad.engine import flag_names

    body = []
    for name in registry.names("engine"):
        cls = registry.find("engine", name)
        engine = cls()
        line = (cls.__doc__ or "").strip().split("\n")[0]
        body.append([f"`{name}`", flag_names(engine.needs), f"{engine.bias.name.lower()}: {engine.bias.value}", line, engine.source])
    return markdown_table(["engine", "needs", "beside backprop's gradient", "what it does", "source"], body)


def size(count: float) -> str:
    """Bytes in a unit that leaves 1 to 1023 of it."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def to_json(comparison: Comparison, path: str | Path) -> Path:
    """Write the whole comparison, curves and all, as JSON."""
    return place(path, durable.to_json(comparison.as_dict(), indent=1))


def from_json(path: str | Path) -> Comparison:
    """The comparison that `to_json` wrote.

    Raises:
        AltgradError: the file is missing, or is no comparison.
    """
    try:
        return Comparison.of(json.loads(Path(path).read_bytes()))
    except OSError as error:
        raise AltgradError(f"{path} could not be read: {error.strerror or error}.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise AltgradError(f"{path} is no comparison ({type(error).__name__}: {error}); give the JSON that `altgrad compare` wrote.") from error


def to_csv(comparison: Comparison, path: str | Path) -> Path:
    """Write a line for every row: all but the curves; settings, tuning and the figures of single seeds as JSON in their cells."""
    lines = [{name: value for name, value in row.items() if name != "curves"} for row in comparison.as_dict()["rows"]]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(lines[0]) if lines else ["label"], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: json.dumps(value) if name in MAPPINGS + LISTS else value for name, value in line.items()})
    return place(path, text.getvalue().encode())


def from_csv(path: str | Path) -> list[dict[str, Any]]:
    """The lines that `to_csv` wrote, with numbers as numbers and nothing as None."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: read_cell(value) if name not in ("label", "engine") else value for name, value in line.items()} for line in csv.DictReader(file)]


def read_cell(text: str) -> Any:
    """A cell as the value it was written from."""
    return {"": None, "True": True, "False": False}[text] if text in {"", "True", "False"} else json.loads(text)


def place(path: str | Path, data: bytes) -> Path:
    """Write a file whole or not at all, its folder made if need be."""
    path = Path(path)
    with durable.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.replace(path, data)
    return path
