"""States on disk, as npz or JSON by the suffix of the file: numbers and text only, no pickle, a sha256 over the contents, exact to the bit."""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from altgrad.durable import explained, replace
from altgrad.errors import CheckpointError, SettingError
from altgrad.es.base import State, Strategy

FORMAT = 1
SUFFIXES = (".npz", ".json")
T = TypeVar("T")


def save(path: str | Path, strategy: Strategy[Any], state: State) -> Path:
    """Write `state`, with the name and the settings of `strategy`, to a .npz or .json file, in one move.

    Raises:
        SettingError: another suffix. AltgradError: the file cannot be written.
    """
    return write(path, {"strategy": strategy.name, "settings": settings_of(strategy)}, state)


def load(path: str | Path, *, strategy: Strategy[Any] | None = None) -> tuple[Strategy[Any], Any]:
    """Strategy and state from a file of `save`; the search goes on with the same bits.

    Args:
        strategy: for a strategy of your own, which no table holds; else it is built from the file.

    Raises:
        CheckpointError: no such file, damaged, foreign, of a newer format, or of another strategy than the one given.
    """
    about, scalars, arrays = read(path)
    if strategy is None:
        from altgrad.es.table import build

        strategy = build(about["strategy"], about["settings"])
    elif strategy.name != about["strategy"]:
        raise CheckpointError(f"{path} holds a state of {about['strategy']}, not of {strategy.name}.")
    return strategy, rebuild(strategy.state_class, scalars, arrays, Path(path))


def settings_of(strategy: Strategy[Any]) -> dict[str, Any]:
    """name -> value of every setting, as plain numbers and text."""
    return {field.name: plain(getattr(strategy, field.name)) for field in fields(strategy)}


def plain(value: Any) -> Any:
    """A NumPy number as Python's own."""
    return value.item() if isinstance(value, np.generic) else value


# -- files -----------------------------------------------------------------------------------------------------------------------


def write(path: str | Path, about: Mapping[str, Any], content: Any) -> Path:
    """Write a dataclass of arrays, numbers, text and other such dataclasses, with `about` (JSON) beside it."""
    path = Path(path)
    check_suffix(path)
    scalars, arrays = flatten(content)
    meta = {"format": FORMAT, "about": dict(about), "scalars": scalars}
    meta["sha256"] = digest(meta, arrays)
    if path.suffix == ".npz":
        buffer = io.BytesIO()
        text = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
        np.savez(buffer, meta=text, **arrays)  # type: ignore[arg-type]
        data = buffer.getvalue()
    else:
        data = json.dumps({**meta, "arrays": {name: listed(array) for name, array in arrays.items()}}, allow_nan=False).encode()
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, data)
    return path


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """`about`, scalars and arrays of a file of `write`."""
    path = Path(path)
    check_suffix(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}.")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            meta = json.loads(arrays.pop("meta").tobytes())
        else:
            meta = json.loads(path.read_bytes())
            arrays = {name: array_of(entry) for name, entry in meta.pop("arrays").items()}
        found, kept = meta["format"], meta.pop("sha256")
    # RuntimeError and SyntaxError: a zip that claims to be encrypted or packed, a dtype that does not parse.
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, RuntimeError, SyntaxError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged, or no state of altgrad.es: {error}.") from error
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found}; this version of altgrad reads format {FORMAT}.")
    if digest(meta, arrays) != kept:
        raise CheckpointError(f"{path} is damaged: its contents do not have the sha256 they were saved with. Use an earlier copy.")
    return meta["about"], meta["scalars"], arrays


def check_suffix(path: Path) -> None:
    """.npz or .json."""
    if path.suffix not in SUFFIXES:
        raise SettingError(f"{path} has the suffix {path.suffix!r}; a state is kept as .npz or .json.")


def digest(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 over everything, in an order of its own."""
    found = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype.str} {arrays[name].shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def listed(array: np.ndarray) -> dict[str, Any]:
    """An array for JSON. Python writes the shortest digits that give the same bits back; JSON has no NaN or infinity, so these are text."""
    values = [value if not isinstance(value, float) or np.isfinite(value) else str(value) for value in array.reshape(-1).tolist()]
    return {"dtype": array.dtype.str, "shape": array.shape, "values": values}


def array_of(entry: Mapping[str, Any]) -> np.ndarray:
    """An array from `listed`."""
    dtype = np.dtype(entry["dtype"])
    if dtype.kind not in "fib":
        raise ValueError(f"an array of type {dtype} is not expected")
    values = [float(value) if isinstance(value, str) else value for value in entry["values"]]
    return np.array(values, dtype=dtype).reshape(entry["shape"])


# -- dataclasses -----------------------------------------------------------------------------------------------------------------


def flatten(content: Any, prefix: str = "") -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Whole numbers and text by dotted name, arrays by dotted name; a float becomes an array, which can hold infinity."""
    scalars: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for field in fields(content):
        value, name = plain(getattr(content, field.name)), prefix + field.name
        if is_dataclass(value):
            inner = flatten(value, f"{name}.")
            scalars |= inner[0]
            arrays |= inner[1]
        elif isinstance(value, np.ndarray):
            arrays[name] = value
        elif isinstance(value, float):
            arrays[name] = np.array(value)
        else:
            scalars[name] = value
    return scalars, arrays


def rebuild(
    cls: type[T], scalars: Mapping[str, Any], arrays: Mapping[str, np.ndarray], path: Path, *, prefix: str = "", inner: Mapping[str, type] | None = None
) -> T:
    """A dataclass from `flatten`; `inner` names the classes of fields that are dataclasses."""
    values: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        name = prefix + field.name
        if inner and field.name in inner:
            values[field.name] = rebuild(inner[field.name], scalars, arrays, path, prefix=f"{name}.")
        elif name in scalars:
            values[field.name] = scalars[name]
        elif name in arrays:
            values[field.name] = float(arrays[name]) if field.type in (float, "float") else arrays[name]
        else:
            raise CheckpointError(f"{path} lacks {name!r}: it is no {cls.__name__}, or of another version.")
    return cls(**values)
