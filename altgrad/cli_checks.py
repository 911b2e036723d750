"""Commands that look something over: check (an engine against its claims) and doctor (a model against the engines)."""

from collections.abc import Callable
from typing import Any

import click

from altgrad.cli_frame import Command, columns, emit, note
from altgrad.cli_options import at_option, quantize_option
from altgrad.cli_progress import Display
from altgrad.errors import UsageError

OWN_SHAPE = "1,28,28"  # for altgrad's own models, which fit themselves to any image
VERDICTS = {True: "passed", False: "FAILED"}


@click.command(cls=Command)
@click.argument("engine", metavar="ENGINE")
@click.option("-s", "--set", "engine_setting", multiple=True, metavar="NAME=VALUE", help="A setting of the engine; repeatable.")
@click.option("--problem", help="Check on this problem, where the engine needs more than a model and a loss.")
@click.option("--problem-setting", multiple=True, metavar="NAME=VALUE", help="A setting of the problem; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="One JSON value on one line.")
@click.pass_context
def check(context: click.Context, engine: str, engine_setting: tuple[str, ...], problem: str | None, problem_setting: tuple[str, ...], as_json: bool) -> None:
    """Run the conformance suite on ENGINE: a name, or package.module:class. Leaves with 1 if a claim fails."""
    with Display(quiet=False) as display:
        from altgrad import registry, testing
        from altgrad.engine import Engine

        found = registry.find("engine", engine)
        if not (isinstance(found, type) and issubclass(found, Engine)):
            raise UsageError(f"engine {engine!r} is a {type(found).__name__}; it must be a subclass of altgrad.Engine.")
        rule = registry.engine(engine, registry.split_pairs(engine_setting))
        listed = list(testing.checks(rule, problem_factory(problem, problem_setting)))
        results = []
        for number, (name, claim) in enumerate(listed):
            display.show("claim", number, len(listed), figures=name)
            results.append(testing.attempt(name, claim))
    failed = sum(not result.passed for result in results)
    if as_json:
        emit({"engine": engine, "settings": rule.settings(), "passed": not failed, "claims": [result.as_dict() for result in results]})
    else:
        click.echo(
            columns([(result.name, "refused" if result.refused else VERDICTS[result.passed], result.detail) for result in results], ("claim", "", "detail"))
        )
        note(f"{len(results) - failed} of {len(results)} claims hold")
    context.exit(1 if failed else 0)


def problem_factory(name: str | None, pairs: tuple[str, ...]) -> Callable[[], Any] | None:
    """What gives a fresh problem `name`; None for the suite's own."""
    from altgrad import registry
    from altgrad.rng import Key

    if name is None:
        return None
    factory = registry.problem(name, registry.split_pairs(pairs))
    return lambda: factory.build(Key(0))


@click.command(cls=Command)
@click.argument("model", metavar="MODEL", required=False)
@click.option("--model-setting", multiple=True, metavar="NAME=VALUE", help="A setting of the model; repeatable.")
@click.option("--input-shape", metavar="N,N,…", help="One example's shape, for instance 1,28,28. [default: the model's own example_inputs]")
@click.option("--classes", type=click.IntRange(min=1), default=10, show_default=True, metavar="N", help="Outputs, for a model that takes their number.")
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True, metavar="N", help="Examples to look at.")
@click.option("--eval", "evaluating", is_flag=True, help="Put the model into evaluation mode first.")
@click.option("--precision", type=click.Choice(["float64", "float32"]), default="float64", show_default=True, help="What to compute in.")
@quantize_option
@at_option
@click.option("--probes", is_flag=True, help="Instead of MODEL: every module kind that altgrad knows of.")
@click.option("--json", "as_json", is_flag=True, help="One JSON value on one line.")
@click.pass_context
def doctor(
    context: click.Context,
    model: str | None,
    model_setting: tuple[str, ...],
    input_shape: str | None,
    classes: int,
    batch_size: int,
    evaluating: bool,
    precision: str,
    quantize: tuple[str, ...],
    at: tuple[str, ...],
    probes: bool,
    as_json: bool,
) -> None:
    """Which engines can drive MODEL, and what is in the way.

    MODEL is package.module:callable, given input_shape and classes if it takes them, or one of `altgrad models`. Leaves with 1 where forward mode
    does not get through or disagrees with backprop. With --at every engine is also tried as the rest of that mix.
    """
    if (model is None) != probes:
        raise click.UsageError("give a MODEL (package.module:callable, or a name of `altgrad models`), or --probes.")
    if model is None:
        rows = examined_probes(precision)
        sound = all(row["driven"] and row["agrees"] for row in rows)
        if as_json:
            emit(rows)
        else:
            table = [(row["name"], yes(row["driven"]), yes(row["agrees"]), row["error"], row["rung"], ", ".join(row["functions"])) for row in rows]
            click.echo(columns(table, ("module", "driven", "agrees", "error", "rung", "below a native formula")))
            note(f"{sum(row['driven'] and row['agrees'] for row in rows)} of {len(rows)} module kinds driven, and equal to backprop")
    else:
        from altgrad import doctor as examining

        loaded, inputs = subject(model, model_setting, input_shape, classes, batch_size)
        if quantize:
            from altgrad import registry
            from altgrad.quantisation import Quantisation

            registry.build(Quantisation, registry.split_pairs(quantize), "quantize").apply(loaded, example=inputs)
        report = examining.examine(loaded.train(not evaluating), inputs, precision=precision, at=at)
        sound = report.driven and report.agrees
        if as_json:
            emit(report.as_dict())
        else:
            click.echo(findings(report))
    context.exit(0 if sound else 1)


def subject(model: str, pairs: tuple[str, ...], shape: str | None, classes: int, batch: int) -> tuple[Any, Any]:
    """The model to examine, and inputs to do it on."""
    from altgrad import doctor as examining
    from altgrad import models, registry
    from altgrad.rng import Key

    given = shape if ":" in model else shape or OWN_SHAPE
    inputs = None if given is None else examining.example_inputs(None, shape=given, batch=batch)  # type: ignore[arg-type]
    size = None if inputs is None else inputs.shape[1:]
    loaded = models.build(model, registry.split_pairs(pairs), input_shape=size, classes=classes, key=Key(0))
    return loaded, examining.example_inputs(loaded, model) if inputs is None else inputs


def examined_probes(precision: str) -> list[dict[str, Any]]:
    """The rows of every probe, with a bar over them."""
    with Display(quiet=False) as display:
        from altgrad import doctor as examining
        from altgrad.probes import PROBES

        rows = []
        for number, probe in enumerate(PROBES):
            display.show("module kind", number, len(PROBES), figures=probe.name)
            rows += examining.examine_probes([probe], precision=precision)
    return rows


def findings(report: Any) -> str:
    """What the doctor found, for reading."""
    agreement = f"relative error {report.error:.2g}, allowed {report.tolerance:g}" if report.error is not None else "no derivative to compare"
    lines = [
        f"{report.model}: {report.parameters:,} parameters, examined in {report.precision}",
        f"forward mode gets through: {yes(report.driven)}",
        f"agrees with backprop: {yes(report.agrees)} ({agreement})",
        f"saved for a backward pass: {report.saved_bytes} bytes (backprop {report.saved_bytes_backprop})",
    ]
    notes = {
        "examples mix in": report.mixes_examples,
        "batch statistics in": report.batch_statistics,
        "weight tangents (no layer rule)": report.weight_tangents,
        "rows are not examples": report.rows_not_examples,
        "parameters without effect": report.unused,
        "buffers written": report.buffers_written,
    }
    lines += [f"{label}: {', '.join(names)}" for label, names in notes.items() if names]
    lines += [f"in the way: {text}" for text in report.obstacles]
    below = [(row.module or "(model)", row.kind, row.function, row.rung, row.calls) for row in report.rows if row.rung != "rule"]
    lines += [f"functions with altgrad's own formula: {len(report.rows) - len(below)}, others: {len(below)}"]
    lines += ["", columns(below, ("module", "kind", "function", "rung", "calls"))] if below else []
    return "\n".join([*lines, "", columns([(fit.engine, yes(fit.fits), fit.reason) for fit in report.engines], ("engine", "fits", "what is in the way"))])


def yes(fact: bool) -> str:
    """A fact as a word."""
    return "yes" if fact else "NO"


COMMANDS = (check, doctor)
