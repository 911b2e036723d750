"""Comparisons and runs made visible: plots, and one HTML page that stands alone. The tables are in tables.py, the canvas in drawing.py."""

import base64
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from altgrad import runs
from altgrad.compare_row import Row
from altgrad.comparison import Comparison
from altgrad.drawing import COLOURS, INK, canvas, looks
from altgrad.report_layers import layer_cosines, layer_table
from altgrad.tables import cells, engine_table, from_csv, from_json, headings, markdown, place, size, table, to_csv, to_json

# what is shown, the first that there is
FIGURES = {
    "test_accuracy": "Test accuracy",
    "test_return": "Test return",
    "test_psnr": "PSNR in decibels",
    "test_mse": "Mean square error",
    "test_loss": "Test loss",
}


def write(comparison: Comparison, folder: str | Path) -> list[Path]:
    """comparison.json, comparison.csv and table.md, then plots and report.html: without matplotlib the first three are there all the same.

    Raises:
        MissingExtraError: matplotlib is not installed. AltgradError: a file cannot be written.
    """
    folder = Path(folder)
    tables = [markdown(comparison.rows), layer_table(comparison.rows)]
    lines = "".join(table + "\n" for table in tables if table) + "".join(f"- {sentence}\n" for sentence in [*comparison.verdict(), *comparison.method])
    found = [to_json(comparison, folder / "comparison.json"), to_csv(comparison, folder / "comparison.csv"), place(folder / "table.md", lines.encode())]
    found += [place(folder / f"{name}.png", draw(comparison)) for name, (_, draw) in PLOTS.items()]
    return [*found, place(folder / "report.html", page(comparison).encode())]


# -- plots -----------------------------------------------------------------------------------------------------------------------


def curves(comparison: Comparison, *, against: str, theme: str = "light") -> bytes:
    """Accuracy (return or loss where there is none) against "forwards" or "seconds", as PNG: the mean over seeds in a band of ± one standard deviation."""
    rows = comparison.rows
    measured = figure_of([point for row in rows for curve in row.curves for point in curve])
    with canvas(8.0, 4.6, theme=theme) as (figure, png):
        axes = figure.subplots()
        lines = [common(row, measured, against) for row in rows]  # [points], [seeds, points]
        logarithmic = wide([x for x, _ in lines])
        for row, look, (x, values) in zip(rows, looks(rows, theme), lines, strict=True):
            x, values = (x[x > 0], values[:, x > 0]) if logarithmic else (x, values)
            if not len(x):
                continue
            mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(x))
            axes.plot(x, mean, label=row.label, solid_capstyle="round", **look)
            axes.fill_between(x, mean - spread, mean + spread, color=look["color"], alpha=0.16, linewidth=0, zorder=2)
        if logarithmic:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 100 else f"{value:g}")
        unit = "forward-equivalents (forwards + 2 × backwards)" if against == "forwards" else "seconds spent in steps"
        axes.set_xlabel(unit + (", logarithmic" if logarithmic else ""))
        if measured == "test_accuracy":
            axes.yaxis.set_major_formatter(percent)
            axes.set_ylim(top=min(101.0, axes.get_ylim()[1]), bottom=max(0.0, axes.get_ylim()[0]))
        elif all((values > 0).all() for _, values in lines) and measured == "test_loss":
            axes.set_yscale("log")
        what = FIGURES[measured]
        seeds = max((len(row.curves) for row in rows), default=0)
        axes.set_ylabel(what.lower())
        axes.set_title(f"{what} on {comparison.settings['problem']}, {seeds} seed{'s' * (seeds != 1)}, band ± 1 standard deviation")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=9, handlelength=2.6)
        return png()


def figure_of(points: Sequence[dict[str, Any]]) -> str:
    """The held-out figure to show: the first of FIGURES that a point has."""
    return next((name for name in FIGURES if any(point.get(name) is not None for point in points)), "test_loss")


def wide(axes: Sequence[np.ndarray]) -> bool:
    """Whether curves end so far apart that on an even axis the short ones would be a line along its edge."""
    ends = [float(x[-1]) for x in axes if len(x)]
    return bool(ends) and max(ends) > 8 * min(ends) > 0


def percent(value: float, _: Any = None) -> str:
    """A tick of an accuracy axis."""
    return f"{value:g} %"


def common(row: Row, measured: str, against: str) -> tuple[np.ndarray, np.ndarray]:
    """The curves of a row's seeds on common points, by straight lines between their own; to where the shortest ends."""
    lines = []
    for curve in row.curves:
        kept = [point for point in curve if point.get(measured) is not None]
        x = [point["seconds"] if against == "seconds" else point["forwards"] + 2 * point["backwards"] for point in kept]
        lines.append((np.array(x, dtype=float), np.array([point[measured] * (100 if measured == "test_accuracy" else 1) for point in kept])))
    if not lines or any(len(x) == 0 for x, _ in lines):
        return np.empty(0), np.empty((0, 0))
    end = min(x[-1] for x, _ in lines)
    longest = max((x for x, _ in lines), key=len)
    grid = np.append(longest[longest < end], end)
    return grid, np.stack([np.interp(grid, x, y) for x, y in lines])


def costs(comparison: Comparison, *, theme: str = "light") -> bytes:
    """Peak memory and cosine to backprop as bars, PNG."""
    rows = comparison.rows
    with canvas(8.0, 1.5 + 0.36 * len(rows), theme=theme) as (figure, png):
        left, right = figure.subplots(1, 2, sharey=True)
        places, colours = np.arange(len(rows))[::-1], [look["color"] for look in looks(rows, theme)]
        greatest = max((row.peak_memory_bytes for row in rows), default=1)
        divisor, unit = next(((d, u) for d, u in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if greatest >= d), (1, "B"))
        memory = [row.peak_memory_bytes / divisor for row in rows]
        cosine = [row.cosine or 0.0 for row in rows]
        shown = [size(row.peak_memory_bytes) for row in rows]
        for axes, values, texts, label in (
            (left, memory, shown, f"peak memory of a step beyond\nparameters and gradients ({unit})"),
            (
                right,
                cosine,
                ["not defined" if row.cosine is None else f"{row.cosine:.3f}" for row in rows],
                "cosine to backprop's gradient\nat the first weights",
            ),
        ):
            bars = axes.barh(places, values, color=colours, height=0.62, alpha=0.9)
            axes.bar_label(bars, labels=texts, padding=3, fontsize=9)
            axes.set_xlabel(label)
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        left.set_yticks(places, [row.label for row in rows])
        left.set_xlim(0, 1.3 * max([*memory, 1e-9]))
        right.set_xlim(min(0.0, 1.3 * min(cosine, default=0.0)), 1.25)
        right.set_xticks([tick for tick in (-1.0, -0.5, 0.0, 0.5, 1.0) if tick >= right.get_xlim()[0]])
        return png()


PLOTS: dict[str, tuple[str, Callable[..., bytes]]] = {
    "accuracy-against-forwards": ("Against forwards", lambda comparison, theme="light": curves(comparison, against="forwards", theme=theme)),
    "accuracy-against-seconds": ("Against wall time", lambda comparison, theme="light": curves(comparison, against="seconds", theme=theme)),
    "costs": ("Memory and direction", costs),
    "layers": ("Direction by layer", layer_cosines),
}


def plot_run(run_folder: str | Path, *, beside: str | Path | None = None) -> Path:
    """plot.png of a run folder from its metrics.jsonl: loss and held-out accuracy over steps, with those of a second run beside it.

    Raises:
        UsageError: no run folder. MissingExtraError: matplotlib is not installed.
    """
    found = [runs.find(folder) for folder in (run_folder, beside) if folder is not None]
    with canvas(8.4, 3.7, theme="light") as (figure, png):
        left, right = figure.subplots(1, 2)
        held_out = figure_of([row for run in found for row in run.rows()])
        names = [run.config()["engine"] for run in found]
        names = names if len(set(names)) == len(names) else [run.folder.name for run in found]
        positive = True
        for run, label, colour in zip(found, names, (COLOURS["light"][0], INK["light"][0]), strict=False):
            rows = run.rows()
            steps, losses = series(rows, "loss")
            left.plot(steps, losses, color=colour, alpha=0.22, linewidth=0.8)
            left.plot(steps, smooth(losses), color=colour, linewidth=1.8, label=label)
            positive = positive and bool((losses > 0).all())
            steps, figures = series(rows, held_out)
            figures = figures * 100 if held_out == "test_accuracy" else figures
            last = f"{label}: {figures[-1]:.1f} %" if held_out == "test_accuracy" and len(figures) else label
            right.plot(steps, figures, color=colour, linewidth=1.8, marker="o" if len(steps) < 60 else None, markersize=3.2, label=last)
        left.set(
            title=f"Training loss on {found[0].config()['problem']}", xlabel="step", ylabel="loss (faint: every step)", yscale="log" if positive else "linear"
        )
        if held_out == "test_accuracy":
            right.yaxis.set_major_formatter(percent)
        right.set(title=FIGURES[held_out], xlabel="step", ylabel=held_out.replace("_", " "))
        left.legend(loc="upper right")
        right.legend(loc="upper right" if held_out == "test_loss" else "lower right")
        return place(found[0].folder / runs.PLOT, png())


def series(rows: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have a number called `name`."""
    kept = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return np.array([step for step, _ in kept], dtype=float), np.array([value for _, value in kept], dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """The running mean over a twentieth of the values, fewer at the ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    first, last = np.maximum(np.arange(len(values)) - half, 0), np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[last] - total[first]) / np.maximum(last - first, 1)


# -- one page --------------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6168; --line: #d7dade; --back: #ffffff; --card: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #a2a8b0; --line: #3d4148; --back: #17191c; --card: #202327; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } p, li { max-width: 48rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: .92rem; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.baseline td { color: var(--soft); }
.verdict { background: var(--card); border-left: 4px solid #0072b2; padding: .6rem 1rem .6rem 1.6rem; margin: 1rem 0; }
img { max-width: 100%; height: auto; display: block; } code, pre { font: .85rem/1.45 ui-monospace, monospace; }
pre { background: var(--card); padding: .8rem; overflow-x: auto; } figure { margin: 1rem 0; }
"""


def page(comparison: Comparison) -> str:
    """The comparison as one HTML page: style and pictures inside, nothing fetched, for dark and light screens.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    escape, rows = html.escape, comparison.rows
    title = f"{comparison.settings['problem']}: {len(rows)} engines compared"
    head = "".join(f"<th>{escape(name)}</th>" for name in headings(rows))
    body = "".join(
        f'<tr class="{"baseline" if row.baseline else "rule"}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells(row)) + "</tr>\n" for row in rows
    )
    figures = "".join(
        f"<h2>{escape(heading)}</h2>\n<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{inline(draw(comparison, theme="dark"))}">'
        f'<img alt="{escape(heading)}: the figures of the table above over the run" src="{inline(draw(comparison, theme="light"))}">'
        "</picture></figure>\n"
        for heading, draw in PLOTS.values()
    )
    tuning = "".join(
        f"<tr><td>{escape(row.label)}</td><td>{', '.join(f'{lr}: ' + ('diverged' if value is None else f'{value:.4f}') for lr, value in row.tuning.items())}"
        f"</td><td>{row.lr:g}</td></tr>\n"
        for row in rows
        if row.tuning
    )
    tuned = (
        f'<h2>Tuning</h2>\n<div class="scroll"><table><tr><th>engine</th><th>held-out figure by learning rate</th><th>chosen</th></tr>\n{tuning}</table></div>'
    )
    exact = {
        "comparison": comparison.settings,
        "engines": {row.label: {"engine": row.engine, **row.settings} for row in rows},
        "versions": comparison.environment,
    }
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>Budget of every run: {escape(str(comparison.settings["budget"]))}. Seeds: {escape(", ".join(map(str, comparison.settings["seeds"])))}.</p>
<div class="scroll"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody>
</table></div>
<ul class="verdict">{bullets(comparison.verdict())}</ul>
{figures}<h2>How this was measured</h2>
<ul>{bullets(comparison.method)}</ul>
{tuned if tuning else ""}
<h2>Settings and versions</h2>
<pre>{escape(json.dumps(exact, indent=1, sort_keys=True, default=str))}</pre>
</body>
</html>
"""


def bullets(sentences: Sequence[str]) -> str:
    """Sentences as list items."""
    return "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)


def inline(png: bytes) -> str:
    """A picture as a data address."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


__all__ = [
    "cells",
    "costs",
    "curves",
    "engine_table",
    "from_csv",
    "from_json",
    "headings",
    "markdown",
    "page",
    "plot_run",
    "table",
    "to_csv",
    "to_json",
    "write",
]
