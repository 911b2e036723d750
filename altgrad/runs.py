"""The run folder: what was asked for, what happened, and what is needed to go on.

config.json     the resolved settings        env.json      versions (no paths)
metrics.jsonl   one JSON object a row        result.json   written when the run is done
checkpoints/    see checkpoint.py            plot.png      see report.py
pictures/       see pictures.py, for problems that have something to look at
"""

import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from altgrad import durable
from altgrad.errors import UsageError

CONFIG, METRICS, ENVIRONMENT, RESULT, PLOT, CHECKPOINTS = "config.json", "metrics.jsonl", "env.json", "result.json", "plot.png", "checkpoints"
PICTURES = "pictures"
OWN = (CONFIG, METRICS, ENVIRONMENT, RESULT, PLOT, CHECKPOINTS, PICTURES)


@dataclass(frozen=True)
class Run:
    """A run folder that exists."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def pictures(self) -> Path:
        return self.folder / PICTURES

    def config(self) -> dict[str, Any]:
        """The resolved settings."""
        try:
            found = json.loads((self.folder / CONFIG).read_bytes())
        except ValueError as error:
            raise UsageError(f"{self.folder / CONFIG} is not JSON ({error}); restore it, or start a new run.") from error
        if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
            raise UsageError(f'{self.folder / CONFIG} has no "settings"; restore it, or start a new run.')
        return found["settings"]

    def environment(self) -> dict[str, Any]:
        """The versions the run was started with; empty where that file is gone or damaged."""
        try:
            return json.loads((self.folder / ENVIRONMENT).read_bytes())
        except (OSError, ValueError):
            return {}

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row to metrics.jsonl; numbers that are not finite become null."""
        path = self.folder / METRICS
        with durable.explained(path, losing="Checkpoints written before stay."), open(path, "ab") as file:
            file.write(durable.to_json(finite(row)))

    def rows(self) -> list[dict[str, Any]]:
        """The whole rows of metrics.jsonl; a row torn by a crash ends the list."""
        found: list[dict[str, Any]] = []
        path = self.folder / METRICS
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def truncate(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run writes again."""
        path = self.folder / METRICS
        kept = [row for row in self.rows() if row["step"] <= step]
        with durable.explained(path):
            durable.replace(path, b"".join(durable.to_json(row) for row in kept))

    def sync(self) -> None:
        """Wait until metrics.jsonl is on the disk, so that a checkpoint never gets ahead of its rows."""
        path = self.folder / METRICS
        with durable.explained(path, losing="Checkpoints written before stay."), open(path, "ab") as file:
            os.fsync(file.fileno())

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json."""
        path = self.folder / RESULT
        with durable.explained(path, losing="Checkpoints written before stay."):
            durable.replace(path, durable.to_json(finite(result), indent=1))


def create(folder: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> Run:
    """Make a run folder and write config.json and env.json.

    Args:
        folder: a path that does not exist, or an empty folder; with `overwrite` a run folder, whose own files (and no others) are removed.
        settings: the resolved settings; JSON values.

    Raises:
        UsageError: the folder is not empty, not a folder, or (with `overwrite`) no run folder; or a setting is not a JSON value.
    """
    folder = Path(folder)
    try:
        config = durable.to_json({"settings": dict(settings)}, indent=1)
    except TypeError as error:
        raise UsageError(f"a setting cannot be written to {CONFIG} ({error}); use numbers, strings, lists and dicts, or train without a run folder.") from error
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; a run needs a folder of its own. Give another --out.")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise UsageError(f"{folder} exists and is not empty. Give another --out, add --overwrite, or go on with: altgrad resume {folder}")
        if not (folder / CONFIG).is_file():
            raise UsageError(f"{folder} is not empty and is no run folder (it has no {CONFIG}), so --overwrite leaves it alone. Give another --out.")
    with durable.explained(folder):
        for name in OWN:
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        durable.replace(folder / ENVIRONMENT, durable.to_json(environment(), indent=1))
        durable.replace(folder / METRICS, b"")
        durable.replace(folder / CONFIG, config)
    return Run(folder)


def withdraw(run: Run, *, existed: bool) -> Path | None:
    """Take a run that failed before its first checkpoint out of the way of the next one, losing nothing.

    Args:
        run: what `create` made.
        existed: whether the folder was there before (empty), and shall stay.

    Returns:
        Where the rows that it logged are now: NAME.failed-1 and so on, or still its own folder where somebody else's files are in it, too.
        None where there are none; then its files are gone.
    """
    folder = run.folder
    if run.rows():
        if any(path.name not in OWN for path in folder.iterdir()):
            return folder
        number = 1
        while (aside := folder.with_name(f"{folder.name}.failed-{number}")).exists():
            number += 1
        try:
            folder.rename(aside)
        except OSError:  # a mount point, or a parent that cannot be written
            return folder
        return aside
    for name in (CONFIG, METRICS, ENVIRONMENT):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(run.pictures, ignore_errors=True)
    with suppress(OSError):  # not empty: what is in there is not ours
        (folder / CHECKPOINTS).rmdir()
    if not existed:
        with suppress(OSError):
            folder.rmdir()
    return None


def find(folder: str | Path) -> Run:
    """The run folder at `folder`.

    Raises:
        UsageError: there is none.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        what = f"has no {CONFIG}" if folder.is_dir() else "is no folder"
        raise UsageError(f"{folder} is no run folder: it {what}. Give the folder that `altgrad train --out` made.")
    return Run(folder)


def environment() -> dict[str, Any]:
    """The versions and the thread count that figures depend on; no paths."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    for package in ("altgrad", "torch", "numpy", "safetensors", "pytorch-optimizer"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["cuda"], found["device"] = torch.version.cuda, torch.cuda.get_device_name()
    return found


def peak_memory() -> int:
    """The most memory used so far, in bytes: allocated on the CUDA device if there is one, else resident in this process."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such counter
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def finite(value: Any) -> Any:
    """`value` with the floats JSON cannot hold as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value
