r"""Sweeps until every example stands still.

s ← damping · s + (1 - damping) · update(s)   until   max |update(s) - s| / (1 + max |s|) ≤ tolerance,   example by example
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, ...]  # one tensor [N, ...] a layer
Update = Callable[[State], State]
Disturb = Callable[[int, State], State]  # (sweep, state) -> state with noise


class Settled(NamedTuple):
    """Where a relaxation came to."""

    state: State
    residual: Tensor  # [N] of the last sweep that moved the example
    sweeps: Tensor  # [N] how many sweeps the example took
    ran: int  # sweeps over the batch


def relax(update: Update, start: State, *, steps: int, tolerance: float, damping: float = 0.0, disturb: Disturb | None = None) -> Settled:
    """Sweeps from `start`; an example that has come to rest is not moved again, so that its state does not depend on the rest of its batch.

    Args:
        update: one sweep; real or complex.
        start: tensors [N, ...].
        steps: the most sweeps, >= 1.
        tolerance: the residual at which an example has come to rest, relative to 1 + max |s|.
        damping: the share of the old state that a sweep keeps, in [0, 1).
        disturb: noise of the dynamics, added after every sweep; what is disturbed does not come to rest, and takes all steps.
    """
    state, count = start, start[0].shape[0]
    moving = torch.ones(count, dtype=torch.bool, device=start[0].device)
    residual = torch.full((count,), torch.inf, dtype=start[0].abs().dtype, device=start[0].device)
    sweeps = torch.zeros(count, dtype=torch.int64, device=start[0].device)
    ran = 0
    while ran < steps:
        swept = update(state) if disturb is None else disturb(ran, update(state))
        change = greatest([new - old for new, old in zip(swept, state, strict=True)]) / (1 + greatest(state))
        residual, sweeps, ran = torch.where(moving, change, residual), sweeps + moving, ran + 1
        mixed = [damping * old + (1 - damping) * new if damping else new for new, old in zip(swept, state, strict=True)]
        state = tuple(torch.where(rows(moving, new), new, old) for new, old in zip(mixed, state, strict=True))
        moving = moving & (change > tolerance)  # what has become NaN cannot come to rest and is left
        if not bool(moving.any()):
            break
    lost = torch.isnan(residual)  # NaN in one layer, that stopped the example, must show in all
    state = tuple(torch.where(rows(lost, leaf), torch.nan, leaf) for leaf in state)
    return Settled(state, residual, sweeps, ran)


def greatest(state: State | list[Tensor]) -> Tensor:
    """The largest absolute value of every example [N]."""
    return reduce(torch.maximum, [leaf.abs().flatten(1).amax(1) for leaf in state])


def rows(mask: Tensor, like: Tensor) -> Tensor:
    """`mask` [N] with axes to broadcast against [N, ...]."""
    return mask.view(-1, *[1] * (like.ndim - 1))


def as_complex(value: Tensor) -> Tensor:
    """A real floating-point tensor as a complex one of the same precision; others as they are."""
    return value.to(torch.promote_types(value.dtype, torch.complex32)) if value.is_floating_point() else value


__all__ = ["Disturb", "Settled", "State", "Update", "as_complex", "greatest", "relax", "rows"]
