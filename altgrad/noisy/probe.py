"""What is found out before the first step: which layers there are, whether a pass can be repeated, and whether rows belong to examples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from altgrad.errors import CapabilityError
from altgrad.noisy.draws import Draws
from altgrad.noisy.passes import clean, losses_of, passing
from altgrad.noisy.trace import Local, NoisyTrace, Sums
from altgrad.problem import Batch, Problem
from altgrad.rng import Key

ROUNDING = 1e-6  # relative: rows of one product may be rounded apart


@dataclass(frozen=True)
class Facts:
    """layers: names of the layers, in the order in which they run; loose: parameters that no layer takes; sites: calls of layers;
    independent: row n of every layer's output reaches the loss of example n and no other."""

    layers: tuple[str, ...]
    loose: tuple[str, ...]
    sites: int
    independent: bool


class Look(NoisyTrace):
    """A pass without noise that notes what every layer puts out; with `disturb`, example 0's rows are moved far away.

    Args:
        keep: keep the outputs themselves (`outputs`), not only a number a row (`rows`).
    """

    def __init__(self, draws: Draws, *, disturb: bool = False, keep: bool = False):
        super().__init__(draws, [0], sigma=lambda name: 1.0, independent=True, batched=False, sums=Sums({}))
        self.disturb, self.keep = disturb, keep
        self.rows: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.loose: list[str] = []

    def site(self, weight: Any, bias: Any, inputs: Tensor, compute: Callable[[], Tensor], local: Local, *, units: int | None = None) -> Tensor:
        value = super().site(weight, bias, inputs, compute, local)
        self.records = []
        return value

    def noised(self, record: Any, site: str, value: Tensor) -> Tensor:
        if self.keep:
            self.outputs[site] = value.clone()
            return value
        flat = value.reshape(value.shape[0], -1) if value.ndim else value.reshape(1, 1)
        self.rows[site] = flat.double() @ torch.linspace(1, 2, flat.shape[1], dtype=torch.float64, device=value.device)
        if self.disturb and value.ndim and value.shape[0] == self.draws.examples:
            drawn = self.draws.site(site, [0], value.shape, value.dtype, value.device)[0][0]
            value[0] += drawn * (1 + value.abs().amax())
        return value

    def fallen(self, name: str, value: Tensor) -> Tensor:
        if name not in self.loose:
            self.loose.append(name)
        return value.clone()


def look(problem: Problem, params: dict[str, Tensor], chosen: set[str], batch: Batch, key: Key, trace: Look) -> Tensor:
    """One pass under `trace`: its losses."""
    with passing(key, batch, trace.draws.examples):
        return losses_of(problem, trace.parameters(params, chosen), batch, problem.fresh_buffers()).detach()


def examine(problem: Problem, params: dict[str, Tensor], chosen: set[str], batch: Batch, key: Key) -> tuple[Facts, bool]:
    """The facts, and whether the pass was finite (only then are they worth keeping).

    Raises:
        CapabilityError: the same inputs gave other outputs the second time.
    """
    examples = problem.batch_size_of(batch)
    draws = Draws(key.fold("first row"), examples, batch.first, antithetic=False, qmc=False, total=1)
    clean(problem, params, batch, key, problem.fresh_buffers())  # settles what kind of loss it is
    first, second = Look(draws), Look(draws)
    losses = look(problem, params, chosen, batch, key, first)
    again = look(problem, params, chosen, batch, key, second)
    for site, rows in first.rows.items():
        if site not in second.rows or not same(rows, second.rows[site]):
            raise unstable(f"the input of layer {site.split('@')[0]!r}, or the layer itself, ")
    if not same(losses, again):
        raise unstable("what follows the last layer, or the loss, ")
    independent = True
    if examples > 1 and len(losses) == examples:
        moved = Look(draws, disturb=True)
        pairs = [(losses, look(problem, params, chosen, batch, key, moved))]
        pairs += [(rows, moved.rows[site]) for site, rows in first.rows.items() if len(rows) == examples and site in moved.rows]
        for before, after in pairs:
            change = (after - before).abs()
            scale = before.abs().amax() + change[0]
            independent = independent and not bool((change[1:] > ROUNDING * scale).any())
    layers = tuple(first.calls)
    return Facts(layers, tuple(first.loose), sum(first.calls.values()), independent), bool(losses.isfinite().all())


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def unstable(where: str) -> CapabilityError:
    return CapabilityError(
        f"{where}changes from one pass to the next with the same inputs, parameters and dropout masks; likelihood-ratio compares losses of passes "
        "that differ by its own noise only. Make it a function of its inputs (fix its seed, or draw through torch's random functions)."
    )
