"""Engines as plain values and as text: what a settings file holds, what a command line says, and back."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from altgrad import registry
from altgrad.engine import Engine
from altgrad.errors import SettingError, UsageError

FORMS = "an engine, its name, its name with settings as in 'forward,tangents=8', or (name, {setting: value})"
BETWEEN = r"[,\s]+(?=[\w-]+=)"  # before the next setting: a value may hold commas of its own


def engine_of(given: Any) -> Engine:
    """The engine that `given` spells.

    Raises:
        UsageError: no such engine. SettingError: another form, or a wrong setting.
    """
    if isinstance(given, Engine):
        return given
    if isinstance(given, str):
        name, *pairs = re.split(BETWEEN, given.strip().strip(","))
        if not name or "=" in name:
            raise UsageError(f"{given!r} names no engine; write it as forward or forward,tangents=8. Engines: {', '.join(registry.names('engine'))}.")
        given = (name.strip(), registry.split_pairs(pairs))
    if isinstance(given, Sequence) and len(given) == 2 and isinstance(given[0], str) and isinstance(given[1], Mapping):
        found: Engine = registry.engine(given[0], {key: tupled(value) for key, value in given[1].items()})
        return found
    raise SettingError(f"{given!r} is no engine; give {FORMS}.")


def part_of(given: Any) -> tuple[str, Engine]:
    """(pattern, engine) of "head=backprop", "body.*=forward,tangents=8", (pattern, engine) or (pattern, name, settings)."""
    if isinstance(given, str):
        pattern, sign, text = given.partition("=")
        if not (pattern.strip() and sign and text.strip()):
            raise SettingError(
                f"{given!r} gives no parameters to an engine; write it as PATTERN=ENGINE, for instance head=backprop or body.*=forward,tangents=8."
            )
        return pattern.strip(), engine_of(text)
    if isinstance(given, Sequence) and len(given) in {2, 3} and isinstance(given[0], str) and given[0].strip():
        return given[0].strip(), engine_of(given[1] if len(given) == 2 else given[1:])
    raise SettingError(f"{given!r} is no part of a mix; give (pattern, engine), with {FORMS}.")


def parts_of(given: Any) -> tuple[tuple[str, Engine], ...]:
    """Parts from text ("head=backprop;body.*=spsa"), a mapping pattern -> engine, or a sequence of what `part_of` takes."""
    if isinstance(given, str):
        given = [text for text in given.split(";") if text.strip()]
    elif isinstance(given, Mapping):
        given = list(given.items())
    if not isinstance(given, Sequence):
        raise SettingError(f"parts={given!r} is not allowed; it must be text as head=backprop;body.*=spsa, a dict, or a sequence of (pattern, engine).")
    return tuple(part_of(part) for part in given)


def spelled(engine: Engine) -> tuple[str, dict[str, Any]]:
    """(name, settings), plain values that `engine_of` takes: the name in the table, or package.module:class."""
    own = f"{type(engine).__module__}:{type(engine).__qualname__}"
    return next((name for name, target in registry.table("engine").items() if target == own), own), engine.settings()


def tupled(value: Any) -> Any:
    """Lists as tuples, at any depth: JSON has no tuples."""
    return tuple(tupled(part) for part in value) if isinstance(value, list | tuple) else value
