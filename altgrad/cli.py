"""The command line. Nothing heavy is imported before a command runs: `altgrad --help` never waits for torch.

Exit codes: 0 done, 1 failure, 2 usage, 3 diverged, 4 bad checkpoint, 5 missing extra, 130 and 143 interrupted.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

import altgrad
from altgrad import cli_bench, cli_checks, cli_compare, cli_es, cli_export, cli_listings
from altgrad.cli_frame import Root, columns, emit, figures, note, percent
from altgrad.cli_options import (
    FOLDER,
    at_option,
    chosen,
    complete_engine,
    free_folder,
    how_options,
    labelled,
    mixed_at,
    out_options,
    plain,
    what_options,
)
from altgrad.cli_progress import Display
from altgrad.errors import MissingExtraError, UsageError

HEADINGS = ("engine", "test accuracy", "test loss", "forwards", "backwards", "seconds", "peak memory")


@click.group(cls=Root, context_settings={"auto_envvar_prefix": "ALTGRAD", "help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(altgrad.__version__, prog_name="altgrad")
def cli() -> None:
    """Train PyTorch models with gradients that do not come from plain backpropagation.

    Data go to stdout, messages to stderr. Every option can be set in the environment: ALTGRAD_TRAIN_ENGINE=forward.
    """
    if not sys.flags.safe_path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # package.module:callable of the folder at hand; last, so that it shadows nothing


def main() -> None:
    """The program `altgrad`."""
    cli(prog_name="altgrad")


@cli.command()
@what_options
@click.option("--engine", shell_complete=complete_engine, help="See `altgrad engines`, or package.module:class. [default: forward, or the problem's own]")
@click.option("-s", "--set", "engine_setting", multiple=True, metavar="NAME=VALUE", help="A setting of the engine (see `altgrad describe ENGINE`); repeatable.")
@at_option
@how_options
@click.option("--lr", type=float, help="Learning rate. [default: the problem's own]")
@click.option("--epochs", type=int, metavar="N", help="Passes over the data. [default: the problem's own]")
@click.option("--steps", type=int, metavar="N", help="Updates, instead of epochs.")
@click.option("--seed", type=int, default=0, show_default=True, help="Names all randomness: first weights, order of the data, noise.")
@click.option("--save-every", type=int, metavar="STEPS", help="Steps between checkpoints. [default: an epoch]")
@click.option("--evaluate-every", type=int, metavar="STEPS", help="Steps between looks at the test set, the last step besides. [default: an epoch]")
@click.option("--out", type=FOLDER, help="The run folder. [default: runs/PROBLEM-ENGINE-N, the next that is free]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in --out.")
@click.option("--beside", multiple=True, metavar="ENGINE", shell_complete=complete_engine, help="Then train with this engine too, without --at; repeatable.")
@click.option("--dry-run", is_flag=True, help="Print the settings with every default filled in; train nothing.")
@out_options
def train(
    problem: str,
    problem_setting: tuple[str, ...],
    model: str | None,
    model_setting: tuple[str, ...],
    quantize: tuple[str, ...],
    engine: str | None,
    engine_setting: tuple[str, ...],
    at: tuple[str, ...],
    optimizer: str | None,
    optimizer_setting: tuple[str, ...],
    schedule: str | None,
    warmup: float,
    batch_size: int | None,
    clip: float | None,
    data_dir: str | None,
    lr: float | None,
    epochs: int | None,
    steps: int | None,
    seed: int,
    save_every: int | None,
    evaluate_every: int | None,
    out: Path | None,
    overwrite: bool,
    beside: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train a model.

    Leaves a run folder with settings, metrics, a plot and checkpoints.

    \b
    altgrad train --engine forward
    altgrad train --problem fashion-mnist -s tangents=4 --lr 3e-3 --out runs/a
    altgrad train --engine likelihood-ratio -s copies=16 --at 4=backprop
    """
    with Display(quiet=quiet or dry_run or follows()) as display, ranks() as world:
        from altgrad import registry, trainer
        from altgrad import training as training_module

        own = registry.preferred(problem)
        given = registry.split_pairs(engine_setting)
        given = {**own["engine_settings"], **given} if engine in {None, own["engine"]} else given
        engine = engine or own["engine"]
        rule, rule_settings = mixed_at(engine, given, at)
        settings = trainer.TrainSettings(
            problem=problem,
            problem_settings={**registry.split_pairs(problem_setting), **({} if batch_size is None else {"batch_size": batch_size})},
            model=model,
            model_settings=registry.split_pairs(model_setting),
            quantize=registry.split_pairs(quantize),
            engine=rule,
            engine_settings=rule_settings,
            optimizer=optimizer,
            optimizer_settings=registry.split_pairs(optimizer_setting),
            lr=lr,
            schedule=schedule or own["schedule"],
            warmup=warmup,
            epochs=epochs,
            steps=steps,
            seed=seed,
            clip=clip,
            save_every=save_every,
            evaluate_every=evaluate_every,
            data_dir=data_dir,
        )
        training = trainer.build(settings, world=world)
        others = [fitting(text, training) for text in beside]
        if dry_run:
            show_settings(training_module.resolved(training), as_json=as_json)
            return
        folder = out or free_folder(f"{problem}-{rule}")
        results = {labelled(engine, at): run(training, display, folder=folder, overwrite=overwrite)}
        folders = [folder]
        for choice in others:
            folders.append(folder / f"beside-{plain(choice.label)}")
            changed = replace(settings, engine=choice.engine, engine_settings=dict(choice.settings))
            results[choice.label] = run(trainer.build(changed, world=world), display, folder=folders[-1], overwrite=overwrite)
        if world.is_main:
            plot(folders)
        display.say(f"run folder: {folder}{illustrated(folder)}")
    if world.is_main:
        show_results(results, as_json=as_json)


@cli.command()
@click.argument("folder", metavar="RUN", type=FOLDER)
@click.option("--fallback", is_flag=True, help="If the newest checkpoint is damaged, take the newest good one before it.")
@out_options
def resume(folder: Path, fallback: bool, as_json: bool, quiet: bool) -> None:
    """Go on with a run from its newest checkpoint.

    RUN is its folder. The result is bit for bit that of a run that never stopped.
    """
    with Display(quiet=quiet or follows()) as display, ranks() as world:
        from altgrad import trainer

        training = trainer.resume(folder, fallback=fallback, world=world)
        display.say(f"{folder}: {'done already' if training.step >= training.total_steps else 'going on'} at step {training.step} of {training.total_steps}")
        results = {training.settings.engine: run(training, display)}
        if world.is_main:
            plot([folder])
    if world.is_main:
        show_results(results, as_json=as_json)


def follows() -> bool:
    """Whether this process is a rank other than the first, which alone speaks."""
    return os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def ranks() -> Iterator[Any]:
    """The processes torchrun started, who share every batch; this one alone where there are no others."""
    from altgrad.world import World

    world = World.from_environment()
    yield world
    world.close()  # after an error the others must not be waited for


def run(training: Any, display: Display, *, folder: Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Train to the end under `display`; what it came to."""
    from altgrad import trainer

    display.watch(training)
    result = trainer.fit(training, run_folder=folder, overwrite=overwrite, on_step=display.on_step, on_evaluate=display.on_evaluate)
    return result.as_dict()


def fitting(text: str, training: Any) -> Any:
    """An engine to stand beside, "forward" or "forward[tangents=4]", checked before the first run starts."""
    from altgrad import registry
    from altgrad.engine import fit_check

    choice = chosen(text)
    if choice.label == training.settings.engine:
        raise UsageError(f"--beside {text!r} is the engine of the run itself; give another, or other settings.")
    fit_check(registry.engine(choice.engine, choice.settings), training.problem, alternatives=registry.needs)
    return choice


def plot(folders: list[Path]) -> None:
    """plot.png in every run folder, in the first with the second beside it; without matplotlib a warning, since the run is done."""
    from altgrad import report

    try:
        report.plot_run(folders[0], beside=folders[1] if len(folders) > 1 else None)
        for folder in folders[1:]:
            report.plot_run(folder)
    except MissingExtraError as error:
        note(f"Warning: there is no plot: {error}")


def illustrated(folder: Path) -> str:
    """How many pictures of the problem a run has left, and where; nothing where it has none."""
    from altgrad import runs

    found = sorted((folder / runs.PICTURES).glob("*.png"))
    return f" ({len(found)} pictures in {folder / runs.PICTURES})" if found else ""


def show_settings(settings: dict[str, Any], *, as_json: bool) -> None:
    """The resolved settings: JSON on one line, or readable (and still JSON)."""
    import json

    if as_json:
        emit(settings)
    else:
        click.echo(json.dumps(settings, indent=2, default=str))


def show_results(results: dict[str, dict[str, Any]], *, as_json: bool) -> None:
    """The first run's result, with the others beside it."""
    first, *others = results.items()
    if as_json:
        emit({**first[1], **({"beside": dict(others)} if others else {})})
    elif not others:
        click.echo(figures(first[1]))
    else:
        rows = [
            (
                name,
                percent(result["test_accuracy"]),
                result["test_loss"],
                result["forwards"],
                result["backwards"],
                f"{result['seconds']:.1f}",
                f"{result['peak_memory_bytes'] / 1e6:.0f} MB",
            )
            for name, result in results.items()
        ]
        click.echo(columns(rows, HEADINGS))


for command in (*cli_compare.COMMANDS, *cli_listings.COMMANDS, *cli_checks.COMMANDS, *cli_bench.COMMANDS, *cli_export.COMMANDS, *cli_es.COMMANDS):
    cli.add_command(command)
