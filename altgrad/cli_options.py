"""What commands that train share: options, folders, and "engine[name=value]"."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from altgrad.errors import UsageError

FOLDER = click.Path(file_okay=False, path_type=Path)
SCHEDULE = "The learning rate along the run: constant, or falling to 0 as cosine or linear. [default: constant, or for train the problem's own]"


def complete_engine(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Engine names for the shell."""
    return completed("engine", incomplete)


def complete_problem(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Problem names for the shell."""
    return completed("problem", incomplete)


def complete_schedule(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Schedule names for the shell."""
    from altgrad.schedules import SHAPES

    return [name for name in SHAPES if name.startswith(incomplete)]


def completed(kind: str, incomplete: str) -> list[str]:
    """The names of `kind` that go on from `incomplete`."""
    from altgrad import registry

    return [name for name in registry.names(kind) if name.startswith(incomplete)]


def with_options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, in the order of the help text."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


QUANTIZE = "Quantise the model's layers: weights=sign:reste, activations=sign:bireal, bits=4, per_channel=true, exempt=none …; repeatable."
quantize_option = click.option("--quantize", multiple=True, metavar="NAME=VALUE", help=QUANTIZE)
what_options = with_options(
    click.option("--problem", default="digits", show_default=True, shell_complete=complete_problem, help="See `altgrad problems`, or package.module:factory."),
    click.option("--problem-setting", multiple=True, metavar="NAME=VALUE", help="A setting of the problem; repeatable."),
    click.option("--model", help="See `altgrad models`, or package.module:callable. [default: the problem's own]"),
    click.option("--model-setting", multiple=True, metavar="NAME=VALUE", help="A setting of the model; repeatable."),
    quantize_option,
)
how_options = with_options(
    click.option("--optimizer", help="See `altgrad optimizers`; upper and lower case do not matter. [default: Adam, or what the engine is made for]"),
    click.option("--optimizer-setting", multiple=True, metavar="NAME=VALUE", help="A setting of the optimizer; repeatable."),
    click.option("--schedule", metavar="NAME", shell_complete=complete_schedule, help=SCHEDULE),
    click.option("--warmup", type=float, default=0.0, show_default=True, metavar="SHARE", help="Share of the run in which the rate rises to its full height."),
    click.option("--batch-size", type=int, metavar="N", help="Examples a step. [default: the problem's own]"),
    click.option("--clip", type=float, metavar="NORM", help="Largest norm of the whole gradient. [default: no limit]"),
    click.option("--data-dir", type=click.Path(), help="Where your own data files are. [default: the cache]"),
)
AT = "PATTERN=ENGINE[,NAME=VALUE…]"
at_option = click.option("--at", multiple=True, metavar=AT, help="Another engine for the parameters or modules that PATTERN matches; repeatable.")
out_options = with_options(
    click.option("--json", "as_json", is_flag=True, help="End with one JSON object on stdout."),
    click.option("--quiet", "-q", is_flag=True, help="No progress, only the result and errors."),
)


def chosen(text: str) -> Any:
    """ "forward[space=weights,rank=1]" as a Choice."""
    from altgrad.compare_settings import choice_of

    name, bracket, rest = text.strip().partition("[")
    if bracket and not rest.endswith("]"):
        raise UsageError(f"{text!r} has no closing bracket; write it as forward[space=weights,rank=1].")
    return choice_of(":".join([name, *(part for part in rest.removesuffix("]").split(",") if part)]))


def mixed_at(engine: str, settings: Mapping[str, Any], at: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The engine's name and settings, or, with other engines `at` patterns, those of the mix."""
    return ("mixed", {"rest": (engine, dict(settings)), "parts": tuple(at)}) if at else (engine, dict(settings))


def labelled(name: str, at: Sequence[str]) -> str:
    """What to call an engine with others `at` patterns: `forward, head=backprop`."""
    return ", ".join([name, *at])


def free_folder(name: str) -> Path:
    """runs/NAME-1, or with the first number that is not taken."""
    number = 1
    while (path := Path("runs") / f"{plain(name)}-{number}").exists():
        number += 1
    return path


def plain(name: str) -> str:
    """`name` as a part of a path."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")
