"""What a planted bug is, how one is made of an engine or of a patch, and the changes that bugs of several engines share."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from altgrad.conformance.probes import GRADIENT_PROBES
from altgrad.engine import Engine, Estimate
from altgrad.perturb import LowRank
from altgrad.rng import Key

POPULATION = {"population": 16, "shaping": "raw"}
WEIGHTS = {"space": "weights", "tangents": 8}
EVERYWHERE = tuple(GRADIENT_PROBES)


@dataclass(frozen=True)
class Mutant:
    """`engine` under `patch` breaks every claim in `caught_by`."""

    name: str
    engine: Engine
    caught_by: tuple[str, ...]
    patch: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)


def altered(base: type[Engine], change: Callable[..., Estimate], **settings: Any) -> Engine:
    """`base` whose estimates go through change(estimate, self, problem, params, state, batch, key, world)."""

    class Altered(base):  # type: ignore[valid-type, misc]
        def estimate(self, problem, params, state, batch, key, world):
            found = super().estimate(problem, params, state, batch, key, world)
            return change(found._replace(grads=dict(found.grads)), problem, params, state, batch, key, world)

    return Altered(**settings)


def rekeyed(base: type[Engine], change: Callable[[Any, Key], tuple[Any, Key]], **settings: Any) -> Engine:
    """`base` that is handed another batch or key."""

    class Rekeyed(base):  # type: ignore[valid-type, misc]
        def estimate(self, problem, params, state, batch, key, world):
            batch, key = change(batch, key)
            return super().estimate(problem, params, state, batch, key, world)

    return Rekeyed(**settings)


def patched(owner: Any, name: str, value: Any, *, create: bool = False) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(owner, name, value, create=create)


def scaled(factor: float) -> Callable[..., Estimate]:
    return lambda found, *_: found._replace(grads={name: grad * factor for name, grad in found.grads.items()})


def summed_loss(found, problem, params, state, batch, *_):
    return found._replace(loss=found.loss * problem.batch_size_of(batch))


def without_root(self):
    a, b = FACTORS(self)
    return a * self.rank**0.5, b


def own_losses(own, draws, world):
    """The others' taken for zero."""
    share, halves = world.share(draws.count), 2 if draws.antithetic else 1
    whole = own.new_zeros(halves, draws.count)
    whole[:, share.start : share.stop] = own.reshape(halves, -1)
    return whole.flatten()


FACTORS = LowRank.factors


def on(kind: str, *probes: str) -> tuple[str, ...]:
    return tuple(f"{kind}_{probe}" for probe in probes)
