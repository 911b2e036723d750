"""A record: figures, timed in turns where they are times, with the command, versions and machine shape they came from."""

import json
import os
import pathlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from typing import Any

import numpy
import torch

import altgrad


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.process_time) -> dict[str, list[float]]:
    """Seconds of each call by `clock`, in `repeats` rounds in which all take turns; a round before them warms up."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            started = clock()
            call()
            if turn:
                found[name].append(clock() - started)
    return found


def ratio(own: list[float], reference: list[float]) -> float:
    """The median quotient of two calls that took turns."""
    return statistics.median(a / b for a, b in zip(own, reference, strict=True))


def record(path: str | None, figures: dict[str, Any]) -> None:
    """Write `figures` to `path` beside what is needed to repeat them; nothing without a path."""
    if path is None:
        return
    content = {
        "command": "python " + shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__, "altgrad": altgrad.__version__},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()},
        **figures,
    }
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")
    os.replace(temporary, target)
