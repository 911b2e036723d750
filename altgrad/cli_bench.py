"""`altgrad bench`: what a rule costs on this machine."""

from dataclasses import asdict
from typing import Any

import click

from altgrad.cli_frame import Command, Group, columns, emit, note
from altgrad.cli_progress import Display

MEANINGS = {
    "noise_before": "forward pass, noise made before: share of plain inference's speed",
    "noise_on_the_way": "forward pass, noise made on the way: share of plain inference's speed",
    "update": "gradient estimate, factors kept: part of the forward pass",
    "update_drawn_again": "gradient estimate, factors drawn again: part of the forward pass",
}


@click.group(cls=Group)
def bench() -> None:
    """Measure what a rule costs on this machine."""


@bench.command(cls=Command)
@click.option("--width", type=int, default=1024, show_default=True, metavar="N", help="Inputs and outputs of every layer.")
@click.option("--depth", type=int, default=3, show_default=True, metavar="N", help="Layers.")
@click.option("--members", type=int, default=256, show_default=True, metavar="N", help="Of the population; even.")
@click.option("--rows", type=int, default=1, show_default=True, metavar="N", help="Rows (tokens) of each member's own.")
@click.option("--rank", type=int, default=1, show_default=True, metavar="R", help="Of the perturbation.")
@click.option("--law", default="normal", show_default=True, help="normal, sign or uniform.")
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--repeats", type=int, default=20, show_default=True, metavar="N", help="Times that everything is measured.")
@click.option("--json", "as_json", is_flag=True, help="One JSON value on one line.")
def lowrank(as_json: bool, **settings: Any) -> None:
    """A population with low-rank perturbations beside plain inference on the same rows."""
    with Display(quiet=False) as display:
        display.show("measuring", 0, 1, figures=f"{settings['members']} members, width {settings['width']}")
        from altgrad import bench as measuring

        chosen = measuring.Settings(**settings)
        found = measuring.lowrank(chosen)
    if as_json:
        emit({"settings": asdict(chosen), **found})
        return
    click.echo(columns([(meaning, f"{found[name]:.2f}") for name, meaning in MEANINGS.items()], ("what", "ratio")))
    note(f"medians of {chosen.repeats} interleaved repeats; compiling the noise took {found['compile_seconds']:.1f} s, which is not counted")


COMMANDS = (bench,)
