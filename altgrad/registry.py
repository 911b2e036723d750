"""Names to classes: engines and problems from the tables and from entry points, settings from "k=v"."""

import ast
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any

from altgrad.errors import SettingError, UsageError, missing_extra, near_miss

ENGINE, SCHEDULE = "forward", "constant"  # where a problem has no defaults of its own
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
        missing = missing_extra(error, f"{kind} {target}")
        if missing is not None:
            raise missing from error
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise UsageError(f"{kind} {target!r}: there is no module {module!r} on the path. Give package.module:attribute.") from error
        raise
    if not hasattr(found, attribute):
        raise UsageError(f"{kind} {target!r}: " + near_miss("attribute", attribute, [n for n in vars(found) if not n.startswith("_")]))
    return getattr(found, attribute)


def engine(name: str, settings: Mapping[str, Any] | None = None) -> Any:
    """The engine `name` with `settings`: values, or strings to be parsed by the field they set.

    Raises:
        UsageError: no such engine, or what `name` points at is none. SettingError: as in `build`.
    """
    from altgrad.engine import Engine

    found = find("engine", name)
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise UsageError(f"engine {name!r} is {kind_of(found)}; it must be a subclass of altgrad.Engine. See `altgrad engines`.")
    return build(found, settings or {}, f"engine {name}")


def problem(name: str, settings: Mapping[str, Any] | None = None) -> Any:
    """The factory of the problem `name` with `settings`, as in `engine`."""
    found = find("problem", name)
    if not hasattr(found, "build"):
        raise UsageError(f"problem {name!r} is {kind_of(found)}; it must be a dataclass of settings with build(key). See `altgrad problems`.")
    return build(found, settings or {}, f"problem {name}")


def preferred(problem: str) -> dict[str, Any]:
    """What `problem` is trained with where nobody says otherwise: "engine", its "engine_settings", and the learning rate's "schedule"."""
    own = getattr(find("problem", problem), "defaults", {})
    return {"engine": own.get("engine", ENGINE), "engine_settings": dict(own.get("engine_settings", {})), "schedule": own.get("schedule", SCHEDULE)}


def kind_of(thing: Any) -> str:
    """`the class JSONDecoder`, `a function`: what somebody pointed at, in an error."""
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"


def build(cls: Any, settings: Mapping[str, Any], label: str) -> Any:
    """An instance of the dataclass `cls` from `settings`.

    Raises:
        UsageError: `cls` is no dataclass.
        SettingError: an unknown setting (the nearest one is suggested), one that cannot be parsed or is out of range, or one that is missing.
    """
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise UsageError(f"{label} is {kind_of(cls)}; it must be a dataclass, whose fields are the settings.")
    known = {field.name: field for field in fields(cls) if field.init}
    values = {}
    for key, value in settings.items():
        name = key.replace("-", "_")
        if name not in known:
            raise SettingError(f"{label}: " + near_miss("setting", key, known))
        values[name] = parse(value, known[name], label) if isinstance(value, str) else value
    absent = [field.name for field in known.values() if field.default is MISSING and field.default_factory is MISSING and field.name not in values]
    if absent:
        raise SettingError(f"{label} needs the setting {' and '.join(absent)}, which has no default; give {absent[0]}=VALUE.")
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
    """The needs of every engine with its default settings, to offer alternatives where one does not fit; what cannot be loaded is no alternative."""
    found = {}
    for name in names("engine"):
        try:
            found[name] = engine(name).needs
        except Exception:  # somebody else's entry point: whatever is wrong with it, it must not hide the error at hand
            continue
    return found
