"""What all plots share: an empty canvas in light or dark, and the colour and line of every row.

Plots use matplotlib's Agg canvas through objects of their own: no pyplot, and the reader's settings are as they were afterwards.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from altgrad.compare_row import Row
from altgrad.errors import MissingExtraError

INK = {"light": ("#1c1e21", "#d7dade", "#ffffff"), "dark": ("#e4e6ea", "#3d4148", "#17191c")}  # text, grid, background
# Okabe and Ito's colours, told apart by every kind of eye, lighter on dark; baselines take the ink itself with four kinds of line.
COLOURS = {
    "light": ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6bd1", "#a6761d"),
    "dark": ("#5bb8f0", "#ff8a3d", "#2fcf9f", "#eb9cc8", "#f2bd42", "#9bb7ff", "#b99df5", "#d2a65a"),
}
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1.5, 2)))


@contextmanager
def canvas(width: float, height: float, *, theme: str) -> Iterator[tuple[Any, Callable[[], bytes]]]:
    """A figure of so many inches, and what gives its PNG; the reader's matplotlib settings are put back afterwards.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", "plot", "a plot") from error
    ink, grid, back = INK[theme]
    style: dict[str, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), ink)
    style |= {
        "axes.edgecolor": grid,
        "axes.facecolor": back,
        "grid.color": grid,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    style |= {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False, "figure.dpi": 150, "grid.linewidth": 0.7}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        for name, value in style.items():
            matplotlib.rcParams[name] = value  # type: ignore[index]
        figure = Figure(figsize=(width, height), layout="constrained", facecolor=back)
        FigureCanvasAgg(figure)

        def png() -> bytes:
            out = io.BytesIO()
            figure.savefig(out, format="png", metadata={"Software": None})
            return out.getvalue()

        yield figure, png


def looks(rows: Sequence[Row], theme: str) -> list[dict[str, Any]]:
    """Colour and line of every row: ink and dashes for baselines, colours for the rest."""
    found, plain, coloured = [], 0, 0
    for row in rows:
        if row.baseline:
            found.append({"color": INK[theme][0], "linestyle": DASHES[plain % len(DASHES)], "linewidth": 1.4, "zorder": 2.5})
            plain += 1
        else:
            again, number = divmod(coloured, len(COLOURS[theme]))
            found.append({"color": COLOURS[theme][number], "linestyle": DASHES[again % 3], "linewidth": 2.0, "zorder": 3})
            coloured += 1
    return found


__all__ = ["COLOURS", "INK", "canvas", "looks"]
