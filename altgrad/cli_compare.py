"""`altgrad compare`."""

import re
from pathlib import Path
from typing import Any

import click

from altgrad.cli_frame import Command, columns, emit, note
from altgrad.cli_options import FOLDER, at_option, chosen, free_folder, how_options, labelled, mixed_at, out_options, what_options
from altgrad.cli_progress import Display
from altgrad.errors import MissingExtraError, UsageError

COMPARISON = "comparison.json"


@click.command(cls=Command)
@what_options
@click.option("--engines", default="forward", show_default=True, help="Names with commas between; settings as forward[space=weights,rank=1].")
@at_option
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Runs of every engine, with seeds 0 to N - 1.")
@click.option("--budget", default="epochs=10", show_default=True, help="What each run may spend: epochs=N, forwards=N or seconds=N.")
@how_options
@click.option("--lr", type=float, help="One learning rate for every engine, without tuning.")
@click.option("--lrs", help="Learning rates to try for every engine, with commas between. [default: a grid of four]")
@click.option("--fgsm", metavar="EPSILONS", help="Attack the trained models too: shares of the inputs' range, with commas between, as 0.05,0.1.")
@click.option("--points", type=click.IntRange(min=1), default=25, show_default=True, metavar="N", help="Evaluations along each run, for the curves.")
@click.option("--out", type=FOLDER, help="Where the table, JSON, CSV, plots and HTML go. [default: runs/compare-PROBLEM-N, the next that is free]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier comparison in --out.")
@out_options
def compare(
    problem: str,
    problem_setting: tuple[str, ...],
    model: str | None,
    model_setting: tuple[str, ...],
    quantize: tuple[str, ...],
    engines: str,
    at: tuple[str, ...],
    seeds: int,
    budget: str,
    optimizer: str | None,
    optimizer_setting: tuple[str, ...],
    schedule: str | None,
    warmup: float,
    batch_size: int | None,
    clip: float | None,
    data_dir: str | None,
    lr: float | None,
    lrs: str | None,
    fgsm: str | None,
    points: int,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Engines beside three kinds of backprop: the same budget, tuning and seeds.

    \b
    altgrad compare --problem digits --engines "forward,forward[space=weights]" --budget epochs=5 --lr 1e-3
    """
    with Display(quiet=quiet) as display:
        from altgrad import compare as comparing
        from altgrad import registry, report

        wanted = [chosen(text) for text in re.split(r",(?![^\[]*\])", engines)]
        folder = empty(out or free_folder(f"compare-{problem}"), overwrite=overwrite)
        settings = comparing.CompareSettings(
            problem=problem,
            problem_settings=registry.split_pairs(problem_setting),
            model=model,
            model_settings=registry.split_pairs(model_setting),
            quantize=registry.split_pairs(quantize),
            engines=tuple(comparing.Choice(labelled(choice.label, at), *mixed_at(choice.engine, choice.settings, at)) for choice in wanted),
            seeds=tuple(range(seeds)),
            budget=budget,
            optimizer=optimizer or "Adam",
            optimizer_settings=registry.split_pairs(optimizer_setting),
            lr=lr,
            schedule=schedule or "constant",
            warmup=warmup,
            lrs=numbers("--lrs", lrs),
            batch_size=batch_size,
            clip=clip,
            points=points,
            fgsm=numbers("--fgsm", fgsm),
            data_dir=data_dir,
        )

        def progress(at: Any) -> None:
            rate = "" if at.lr is None else f", lr {at.lr:g}"
            title, figures = ("measuring", at.label) if at.stage == "measure" else ("runs", f"{at.stage} {at.label}, seed {at.seed}{rate}")
            display.show(title, at.run + at.fraction, at.runs, figures=figures)

        result = comparing.compare(settings, progress=progress, on_row=lambda so_far: report.to_json(so_far, folder / COMPARISON))
        try:
            report.write(result, folder)
        except MissingExtraError as error:
            note(f"Warning: there are no plots and no HTML: {error}")
        display.say(f"written: {folder}")
    show_comparison(result, as_json=as_json)


def show_comparison(result: Any, *, as_json: bool) -> None:
    """The table, and what it comes to in words."""
    if as_json:
        emit(result.as_dict())
        return
    from altgrad import report

    click.echo(columns([report.cells(row) for row in result.rows], report.headings(result.rows)))
    click.echo("\n" + "\n".join(result.verdict()))


def numbers(option: str, text: str | None) -> tuple[float, ...]:
    """ "1e-3,3e-3" as numbers."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not a list of numbers; write it as 1e-3,3e-3.") from error


def empty(folder: Path, *, overwrite: bool) -> Path:
    """`folder`, if a comparison may be written there; it is made when there is something to write."""
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise UsageError(f"{folder} exists and is not empty. Give another --out, or add --overwrite.")
        if not (folder / COMPARISON).is_file():
            raise UsageError(f"{folder} is not empty and holds no comparison (no {COMPARISON}), so --overwrite leaves it alone. Give another --out.")
    return folder


COMMANDS = (compare,)
