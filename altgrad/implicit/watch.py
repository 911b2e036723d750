"""What an engine asks of the implicit layers of a model while it runs, and what they tell it."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from altgrad.implicit.equation import Info
from altgrad.rng import Key

SETTINGS = ("solver", "adjoint", "tol", "max_steps", "adjoint_tol", "adjoint_steps", "strict")


@dataclass
class Watch:
    """One estimate's: settings that take the place of the layers' own, and what the layers found.

    Args:
        settings: of SETTINGS; those left out are the layers' own.
        penalty: whether layers add their Jacobian penalty to `penalties`.
        radius: products of a power iteration at each layer's solution, 0 for none.
        key: addresses the noise of both.
        first: the global index of the batch's first example.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    penalty: bool = False
    radius: int = 0
    key: Key = field(default_factory=lambda: Key(0))
    first: int = 0
    infos: list[Info] = field(default_factory=list)
    penalties: list[Tensor] = field(default_factory=list)
    radii: list[tuple[Tensor, Tensor]] = field(default_factory=list)


active = threading.local()  # .watches: those at work in this thread, innermost last


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """The implicit layers that run inside report to `watch`."""
    active.watches = [*getattr(active, "watches", ()), watch]
    try:
        yield watch
    finally:
        active.watches = active.watches[:-1]


def current() -> Watch | None:
    """The innermost watch of this thread."""
    watches = getattr(active, "watches", ())
    return watches[-1] if watches else None
