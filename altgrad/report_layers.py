"""Cosines by layer: how far every rule's estimate of a parameter's gradient points from that gradient, as a table and as a picture."""

from collections.abc import Sequence

import numpy as np

from altgrad.compare_row import Row
from altgrad.comparison import Comparison
from altgrad.drawing import canvas, looks
from altgrad.tables import markdown_table


def layers_of(rows: Sequence[Row]) -> list[str]:
    """The parameters that a row has a cosine of, in the model's order."""
    return list(dict.fromkeys(name for row in rows for name in row.cosines))


def layer_table(rows: Sequence[Row]) -> str:
    """Engines by parameters as markdown; "" where nothing was measured."""
    names = layers_of(rows)
    body = [[row.label, *(f"{row.cosines[name]:.3f}" if name in row.cosines else "-" for name in names)] for row in rows]
    return markdown_table(["cosine", *names], body) if names else ""


def layer_cosines(comparison: Comparison, *, theme: str = "light") -> bytes:
    """A line for every engine over the parameters, first layer to the left, as PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    names = layers_of(comparison.rows)
    with canvas(8.0, 4.2, theme=theme) as (figure, png):
        axes = figure.subplots()
        for row, look in zip(comparison.rows, looks(comparison.rows, theme), strict=True):
            values = [row.cosines.get(name, np.nan) for name in names]
            axes.plot(range(len(names)), values, label=row.label, marker="o", markersize=3.5, **look)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axes.set_ylabel("cosine to the parameter's gradient\nat the first weights")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=9, handlelength=2.6)
        return png()


__all__ = ["layer_cosines", "layer_table", "layers_of"]
