"""`altgrad es`: minimise a test function, or any function of a vector, on NumPy alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from altgrad.cli_frame import Command, columns, emit, note
from altgrad.cli_options import FOLDER, out_options
from altgrad.cli_progress import Display
from altgrad.errors import Interrupted, MissingExtraError, NumericsError, UsageError

LOG, PLOT, RESULT, STATE = "log.csv", "plot.png", "result.json", "state.npz"
OWN = {LOG, PLOT, RESULT, STATE}
TARGET = 1e-9  # of test functions, whose minimum is 0
SHOWN = 8  # coordinates of x that are printed


def complete_strategy(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Strategy names for the shell."""
    from altgrad.es.table import STRATEGIES

    return [name for name in STRATEGIES if name.startswith(incomplete)]


def complete_function(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of test functions for the shell."""
    from altgrad.es.functions import TABLE

    return [name for name in TABLE if name.startswith(incomplete)]


@click.command(cls=Command)
@click.option(
    "--function",
    "function_name",
    default="rosenbrock",
    show_default=True,
    shell_complete=complete_function,
    help="See --list, or package.module:callable of a vector.",
)
@click.option("--strategy", default="cma-es", show_default=True, shell_complete=complete_strategy, help="See --list.")
@click.option("-s", "--set", "setting", multiple=True, metavar="NAME=VALUE", help="A setting of the strategy; repeatable.")
@click.option("--dimension", type=click.IntRange(min=1), metavar="N", help="Coordinates of x. [default: 10, or those of --x0]")
@click.option("--x0", help="Where to start: one number for every coordinate, or all with commas between. [default: 1; 0 for rosenbrock and functions of yours]")
@click.option("--sigma", type=float, default=0.5, show_default=True, help="First standard deviation of every coordinate.")
@click.option("--population", type=int, metavar="N", help="Members of a generation. [default: the strategy's own]")
@click.option("--evaluations", type=click.IntRange(min=1), default=100_000, show_default=True, metavar="N", help="No more calls of the function than this.")
@click.option("--target", type=float, help=f"End when the function is this or better. [default: {TARGET:g} for test functions, else none]")
@click.option("--bounds", metavar="LOW,HIGH", help="Of every coordinate, for instance -5,5 or 0,inf. [default: none]")
@click.option("--bounds-kind", help="none, clip, reflect, transform or penalty. [default: reflect]")
@click.option("--restarts", default="none", show_default=True, help="none, ipop or bipop: start anew where a run has nothing left to find.")
@click.option("--seed", type=int, default=0, show_default=True, help="Names all randomness.")
@click.option("--maximize", is_flag=True, help="Search for the largest value.")
@click.option("--vectorized", is_flag=True, help="Your function takes the population [members, n] and returns [members].")
@click.option("--out", type=FOLDER, help=f"A folder for {LOG}, {PLOT}, {RESULT} and {STATE}. [default: nothing is written]")
@click.option("--resume", is_flag=True, help=f"Go on from {STATE} in --out, to the same bits as without a stop.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier search in --out.")
@click.option("--list", "listing", is_flag=True, help="Print the strategies with their settings, and the test functions; search nothing.")
@out_options
def es(
    function_name: str,
    strategy: str,
    setting: tuple[str, ...],
    dimension: int | None,
    x0: str | None,
    sigma: float,
    population: int | None,
    evaluations: int,
    target: float | None,
    bounds: str | None,
    bounds_kind: str | None,
    restarts: str,
    seed: int,
    maximize: bool,
    vectorized: bool,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    listing: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Minimise a function by evaluating it (no torch needed).

    \b
    altgrad es --function rosenbrock --strategy cma-es --dimension 10
    altgrad es --function mypackage.simulator:cost --x0 0.5,2,10 --bounds 0,20 --out runs/es
    """
    if listing:
        show_listing(as_json=as_json)
        return
    from altgrad import registry, report_es
    from altgrad.es import Bounds, minimize
    from altgrad.es.loop import STOPPED
    from altgrad.signals import StopSignals, exit_code, name

    f, of_ours = function_of(function_name)
    point = start_of(x0, dimension, function_name if of_ours else None)
    if bounds is None and bounds_kind is not None:
        raise UsageError(f"--bounds-kind {bounds_kind} has no bounds to keep; add --bounds LOW,HIGH.")
    limits = None if bounds is None else Bounds(*limits_of(bounds), bounds_kind or "reflect")
    goal = TARGET if target is None and of_ours and not maximize else target
    rows: list[dict[str, Any]] = begun(out, resume=resume, overwrite=overwrite)
    with StopSignals() as stop:
        with Display(quiet=quiet) as display:

            def on_generation(row: dict[str, Any]) -> bool:
                while rows and rows[-1]["generation"] >= row["generation"]:  # logged after the last checkpoint, then stopped
                    rows.pop()
                rows.append(row)
                if out is not None:
                    report_es.append(out / LOG, row)
                value = "no finite value yet" if row["best"] is None else f"best {row['best']:.4g}"
                display.show(f"{function_name}, {strategy}: evaluation", row["evaluations"], evaluations, figures=f"{value}, σ {row['sigma']:.2g}")
                return stop.received is not None

            result = minimize(
                f,
                point,
                strategy=strategy,
                sigma=sigma,
                settings=registry.split_pairs(setting),
                population=population,
                max_evaluations=evaluations,
                target=goal,
                bounds=limits,
                restarts=restarts,
                seed=seed,
                maximize=maximize,
                vectorized=vectorized or of_ours,
                checkpoint=None if out is None else out / STATE,
                label=function_name,
                on_generation=on_generation,
            )
        stopped = stop.received if result.reason == STOPPED else None  # a signal that came later found the search done
        found = as_dict(result) | ({} if stopped is None else {"reason": f"Stopped by {name(stopped)}."})
        if out is not None:
            write(out, found, rows, title=f"{strategy} on {function_name}, n = {len(point)}", maximize=maximize)
            display.say(f"folder: {out}")
        if as_json:
            emit(found)
        else:
            show(found)
    if stopped is not None:
        again = f"add --resume to go on from {out}" if out else "with --out it could be gone on from"
        raise Interrupted(f"stopped after {result.evaluations} evaluations; {again}.", exit_code(stopped))
    if not len(result.top):
        raise NumericsError(f"no evaluation of {function_name} gave a finite number. {result.reason}")


# -- what was asked for ----------------------------------------------------------------------------------------------------------


def function_of(name: str) -> tuple[Callable[..., Any], bool]:
    """The function, and whether it is one of our test functions (which take whole populations)."""
    from altgrad import registry
    from altgrad.es import functions

    if ":" not in name:
        return functions.find(name), True
    found = registry.locate(name, "function")
    if not callable(found):
        raise UsageError(f"--function {name!r} is {registry.kind_of(found)}; it must be a function of a vector that returns a number.")
    return found, False


def start_of(text: str | None, dimension: int | None, name: str | None) -> Any:
    """x0: as given, or the test function's own; a single number is every coordinate's."""
    import numpy as np

    from altgrad.es import functions

    values = [0.0 if name is None else functions.start(name)] if text is None else numbers(text, "--x0")
    if len(values) > 1 and dimension not in (None, len(values)):
        raise UsageError(f"--x0 has {len(values)} numbers and --dimension is {dimension}; give as many, or one number for every coordinate.")
    if not all(math.isfinite(value) for value in values):
        raise UsageError(f"--x0 {text!r} is not finite; give numbers a search can start from.")
    count = len(values) if len(values) > 1 else dimension or 10
    if name is not None and count < functions.fewest(name):
        raise UsageError(f"--dimension {count} is not allowed; {name} needs {functions.fewest(name)} coordinates or more.")
    return np.array(values) if len(values) > 1 else np.full(count, values[0])


def limits_of(text: str) -> tuple[float, float]:
    """ "-5,5" as two numbers."""
    values = numbers(text, "--bounds")
    if len(values) != 2:
        raise UsageError(f"--bounds {text!r} is not allowed; it must be LOW,HIGH, for instance -5,5 or 0,inf.")
    return values[0], values[1]


def numbers(text: str, option: str) -> list[float]:
    """ "1,2.5" as numbers."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not a list of numbers; write it as 0.5,2,10.") from error
    if any(math.isnan(value) for value in values):
        raise UsageError(f"{option} {text!r} holds a NaN; give numbers.")
    return values


def begun(out: Path | None, *, resume: bool, overwrite: bool) -> list[dict[str, Any]]:
    """The log of the search in `out` that is gone on with; empty for a new one, whose folder is made ready."""
    if out is None:
        if resume:
            raise UsageError("--resume needs --out, the folder of the search to go on with.")
        return []
    if resume:
        if not (out / STATE).is_file():
            raise UsageError(f"{out} holds no {STATE} to go on from. Put --overwrite in place of --resume, or give the folder of an earlier search.")
        from altgrad import report_es
        from altgrad.tables import place

        rows = report_es.from_csv((out / LOG).read_bytes()) if (out / LOG).is_file() else []
        place(out / LOG, report_es.to_csv(rows))  # whole again, should a line have been cut short
        return rows
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UsageError(f"{out} exists and is not empty. Give another --out, add --resume to go on with it, or --overwrite.")
        if not {path.name for path in out.iterdir()} <= OWN:
            raise UsageError(f"{out} holds files that no search wrote, so --overwrite leaves it alone. Give another --out.")
        for name in OWN:
            (out / name).unlink(missing_ok=True)
    return []


# -- what came of it -------------------------------------------------------------------------------------------------------------


def as_dict(result: Any) -> dict[str, Any]:
    """A result for JSON."""
    names = ("fun", "evaluations", "reason", "reached", "generations", "restarts", "failures", "first_failure")
    arrays = ("x", "mean", "average", "top", "top_fun")
    return {**{name: getattr(result, name) for name in names}, **{name: getattr(result, name).tolist() for name in arrays}}


def write(out: Path, found: dict[str, Any], rows: list[dict[str, Any]], *, title: str, maximize: bool) -> None:
    """The log, the result and the plot; without matplotlib a warning, since the search is done."""
    import json

    from altgrad import report_es
    from altgrad.runs import finite
    from altgrad.tables import place

    place(out / LOG, report_es.to_csv(rows))
    place(out / RESULT, (json.dumps(finite(found), indent=1) + "\n").encode())
    try:
        place(out / PLOT, report_es.convergence(rows, title=title, maximize=maximize))
    except MissingExtraError as error:
        note(f"Warning: there is no plot: {error}")


def show(found: dict[str, Any]) -> None:
    """The result for reading."""
    x = found["x"]
    more = f", … ({len(x)} coordinates)" if len(x) > SHOWN else ""
    click.echo(found["reason"])
    click.echo(f"f = {found['fun']:.10g}   evaluations {found['evaluations']}   generations {found['generations']}   restarts {found['restarts']}")
    click.echo("x = " + ", ".join(f"{value:.6g}" for value in x[:SHOWN]) + more)
    if found["failures"]:
        click.echo(f"f raised {found['failures']} times, first at {found['first_failure']}")


def show_listing(*, as_json: bool) -> None:
    """Strategies and test functions."""
    from altgrad.es import STRATEGIES, Strategy, functions
    from altgrad.registry import describe_settings

    strategies = {name: {"summary": summary(cls), "source": cls.source, "settings": describe_settings(cls)} for name, cls in STRATEGIES.items()}
    if as_json:
        emit({"strategies": strategies, "functions": {name: summary(f) for name, f in functions.TABLE.items()}})
        return
    shared = [entry["name"] for entry in describe_settings(Strategy)]
    own = {name: [entry["name"] for entry in describe_settings(cls) if entry["name"] not in shared] for name, cls in STRATEGIES.items()}
    click.echo(columns([(name, summary(cls), ", ".join(own[name])) for name, cls in STRATEGIES.items()], ("strategy", "what it does", "settings of its own")))
    click.echo(f"\nEvery strategy has the settings {', '.join(shared)}.\n")
    click.echo(columns([(name, summary(f)) for name, f in functions.TABLE.items()], ("function", "what it is")))


def summary(thing: Any) -> str:
    """The first line of a docstring."""
    return (thing.__doc__ or "").strip().split("\n")[0]


COMMANDS = (es,)
