"""Names to classes: engines and problems from the tables and from entry points, settings from "k=v"."""

import ast
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from importlib.metadata import entry_points
from typing import Any

from altgrad.errors import MissingExtraError, SettingError, UsageError, near_miss

KINDS = {"engine": "altgrad.engines", "problem": "altgrad.problems"}


def table(kind: str) -> dict[str, str]:
    """name -> "package.module:attribute" of every `kind` ("engine" or "problem"), built in or from an entry point."""
    known: dict[str, str] = dict(importlib.import_module(KINDS[kind]).TABLE)
    for point in entry_points(group=KINDS[kind]):
        known.setdefault(point.name, point.value)
    return known


def names(kind: str) -> list[str]:
    """Every known name of `kind`."""
    return sorted(table(kind))


def find(kind: str, name: str) -> Any:
    """The class or factory behind `name`, which is a known name or "package.module:attribute".

    Raises:
        UsageError: no such name (the nearest one is suggested) or no such attribute.
        MissingExtraError: the module needs a package that is not installed.
    """
    target = name if ":" in name else table(kind).get(name)
    if target is None:
        raise UsageError(near_miss(kind, name, table(kind)))
    return locate(target, kind)


def locate(target: str, kind: str) -> Any:
    """Import "package.module:attribute"."""
    module, _, attribute = target.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        extra = {"torch": "torch", "safetensors": "torch", "sklearn": "data", "PIL": "data", "matplotlib": "plot"}.get(missing)
        if extra:
            raise MissingExtraError(missing, extra, f"{kind} {target}") from error
        if module.split(".")[0] == missing or module == error.name:
            raise UsageError(f"{kind} {target!r}: there is no module {module!r} on the path. Give package.module:attribute.") from error
        raise
    if not hasattr(found, attribute):
        raise UsageError(f"{kind} {target!r}: " + near_miss("attribute", attribute, [n for n in vars(found) if not n.startswith("_")]))
    return getattr(found, attribute)


def engine(name: str, settings: Mapping[str, Any] | None = None) -> Any:
    """The engine `name` with `settings`: values, or strings to be parsed by the field they set."""
    return build(find("engine", name), settings or {}, f"engine {name}")


def build(cls: Any, settings: Mapping[str, Any], label: str) -> Any:
    """An instance of the dataclass `cls` from `settings`; unknown settings name their nearest neighbour."""
    known = {field.name: field for field in fields(cls) if field.init}
    values = {}
    for key, value in settings.items():
        name = key.replace("-", "_")
        if name not in known:
            raise SettingError(f"{label}: " + near_miss("setting", key, known))
        values[name] = parse(value, known[name], label) if isinstance(value, str) else value
    return cls(**values)


def split_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """["rank=1", "noise=sign"] -> {"rank": "1", "noise": "sign"}."""
    for pair in pairs:
        if "=" not in pair.strip("="):
            raise SettingError(f"setting {pair!r} is not of the form name=value, for instance tangents=16.")
    return {key.strip(): value.strip() for key, value in (pair.split("=", 1) for pair in pairs)}


def parse(text: str, field: "Field[Any]", label: str) -> Any:
    """`text` as a value of `field`'s declared type (int, float, bool, str, or any of these with None)."""
    declared = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    allowed = {part.strip() for part in str(declared).split("|")}
    if text.lower() in {"none", "null"} and "None" in allowed:
        return None
    if "bool" in allowed and text.lower() in {"true", "false", "yes", "no", "on", "off", "1", "0"}:
        return text.lower() in {"true", "yes", "on", "1"}
    for kind in (int, float):
        if kind.__name__ in allowed or (kind is int and "float" in allowed):
            try:
                return kind(text)
            except ValueError:
                continue
    if "str" in allowed or not allowed & {"int", "float", "bool", "None"}:
        try:
            literal = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
        return text if isinstance(literal, (int, float)) or "str" in allowed else literal
    raise SettingError(f"{label}: {field.name}={text!r} is not allowed; it must be {declared}.")


def describe_settings(cls: Any) -> list[dict[str, Any]]:
    """name, type, default and meaning of every setting of the dataclass `cls` (the meaning from field metadata "help")."""
    return [
        {
            "name": field.name,
            "type": field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type)),
            "default": None if field.default is MISSING else field.default,
            "help": field.metadata.get("help", ""),
        }
        for field in fields(cls)
        if field.init
    ]


def needs() -> dict[str, Any]:
    """The needs of every engine with its default settings, to offer alternatives where one does not fit."""
    return {name: find("engine", name)().needs for name in names("engine")}
