"""Files that are either whole or absent: written beside their place, synced to the disk, then renamed."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from altgrad.errors import AltgradError

FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextmanager
def explained(path: Path, *, losing: str = "Nothing that was there before has been changed.") -> Iterator[None]:
    """Turn an OSError raised while writing `path` into an AltgradError that says what to do; `losing` says what is left."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise AltgradError(f"the disk is full: {path} could not be written. {losing} Free some space, then run again.") from error
        raise AltgradError(f"{path} could not be written: {error.strerror or error}. {losing} Check the path and its permissions.") from error


def write(path: Path, data: bytes) -> None:
    """Write `data` to a new file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes) -> None:
    """Give `path` the content `data` in one move: a reader, or a crash at any moment, sees the old content or the new."""
    beside = path.with_name(f".tmp-{path.name}")
    try:
        write(beside, data)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; systems that cannot open a folder do this by themselves."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, *, indent: int | None = None) -> bytes:
    """`value` as one JSON text; a float comes back as the same bits."""
    return (json.dumps(value, indent=indent, sort_keys=True) + "\n").encode()
