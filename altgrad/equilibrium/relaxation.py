r"""Sweeps until every example stands still.

s ← damping · s + (1 - damping) · update(s)   until   max |update(s) - s| / (1 + max |s|) ≤ tolerance,   example by example

or, accelerated, s ← Anderson's combination of the last sweeps (altgrad.fixed_point), which comes to the same rest in fewer of them.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad.fixed_point import Anderson

State = tuple[Tensor, ...]  # one tensor [N, ...] a layer
Update = Callable[[State], State]
Disturb = Callable[[int, State], State]  # (sweep, state) -> state with noise
ACCELERATIONS = ("none", "anderson")
AWAY = 2.0  # a residual of so many times the least seen: leaps lead away, and a plain sweep is made


class Settled(NamedTuple):
    """Where a relaxation came to."""

    state: State
    residual: Tensor  # [N] of the last sweep that moved the example
    sweeps: Tensor  # [N] how many sweeps the example took
    ran: int  # sweeps over the batch


def relax(
    update: Update,
    start: State,
    *,
    steps: int,
    tolerance: float,
    damping: float = 0.0,
    disturb: Disturb | None = None,
    acceleration: str = "none",
) -> Settled:
    """Sweeps from `start`; an example that has come to rest is not moved again, so that its state does not depend on the rest of its batch.

    Args:
        update: one sweep; real or complex.
        start: tensors [N, ...].
        steps: the most sweeps, >= 1.
        tolerance: the residual at which an example has come to rest, relative to 1 + max |s|.
        damping: the share of the old state that a sweep keeps, in [0, 1).
        disturb: noise of the dynamics, added after every sweep; what is disturbed does not come to rest, and takes all steps.
        acceleration: "anderson" or "none".
    """
    state, count = start, start[0].shape[0]
    moving = torch.ones(count, dtype=torch.bool, device=start[0].device)
    residual = torch.full((count,), torch.inf, dtype=start[0].abs().dtype, device=start[0].device)
    sweeps = torch.zeros(count, dtype=torch.int64, device=start[0].device)
    leap = Leap(damping) if acceleration == "anderson" else None
    ran, left = 0, count
    while ran < steps:
        swept = update(state) if disturb is None else disturb(ran, update(state))
        change = greatest([new - old for new, old in zip(swept, state, strict=True)]) / (1 + greatest(state))
        mixed = tuple(damping * old + (1 - damping) * new if damping else new for new, old in zip(swept, state, strict=True))
        if leap is not None:
            mixed = leap(state, swept, mixed, change, moving, tolerance)
        everyone = left == count  # nobody rests yet: nothing to hold back
        residual, sweeps, ran = change if everyone else torch.where(moving, change, residual), sweeps + moving, ran + 1
        state = mixed if everyone else tuple(torch.where(rows(moving, new), new, old) for new, old in zip(mixed, state, strict=True))
        moving = moving & (change > tolerance)  # what has become NaN cannot come to rest and is left
        left = int(moving.sum())
        if not left:
            break
    lost = torch.isnan(residual)  # NaN in one layer, that stopped the example, must show in all
    state = tuple(torch.where(rows(lost, leaf), torch.nan, leaf) for leaf in state)
    return Settled(state, residual, sweeps, ran)


class Leap:
    """Anderson's combinations of one relaxation's sweeps, example by example; a sweep counts real and imaginary parts as numbers of their own."""

    def __init__(self, damping: float):
        self.method, self.memory = Anderson(mixing=1 - damping), dict[str, Any]()
        self.least: Tensor | None = None

    def __call__(self, state: State, swept: State, mixed: State, change: Tensor, moving: Tensor, tolerance: float) -> State:
        """The next state: `mixed`, a plain step, where an example has come to rest or the last leaps led away from it."""
        here = numbers(state)
        far = self.method.step(lambda x: x, here, numbers(swept) - here, moving[:, None], self.memory)
        least = change if self.least is None else torch.minimum(self.least, change)
        plain, self.least = (change <= tolerance) | (change > AWAY * least) | ~change.isfinite(), least
        leapt = shaped(far, state)
        return tuple(torch.where(rows(plain, one), one, other) for one, other in zip(mixed, leapt, strict=True))


def numbers(state: State) -> Tensor:
    """The state as real numbers [N, n]."""
    return torch.cat([(torch.view_as_real(leaf) if leaf.is_complex() else leaf).flatten(1) for leaf in state], 1)


def shaped(flat: Tensor, like: State) -> State:
    """`numbers` undone."""
    found = []
    for part, leaf in zip(flat.split([leaf[0].numel() * (2 if leaf.is_complex() else 1) for leaf in like], 1), like, strict=True):
        found.append(torch.view_as_complex(part.reshape(*leaf.shape, 2).contiguous()) if leaf.is_complex() else part.reshape(leaf.shape))
    return tuple(found)


def greatest(state: State | list[Tensor]) -> Tensor:
    """The largest absolute value of every example [N]."""
    return reduce(torch.maximum, [leaf.abs().flatten(1).amax(1) for leaf in state])


def rows(mask: Tensor, like: Tensor) -> Tensor:
    """`mask` [N] with axes to broadcast against [N, ...]."""
    return mask.view(-1, *[1] * (like.ndim - 1))


def as_complex(value: Tensor) -> Tensor:
    """A real floating-point tensor as a complex one of the same precision; others as they are."""
    return value.to(torch.promote_types(value.dtype, torch.complex32)) if value.is_floating_point() else value


__all__ = ["ACCELERATIONS", "Disturb", "Settled", "State", "Update", "as_complex", "greatest", "relax", "rows"]
