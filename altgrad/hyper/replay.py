r"""The exact gradient through a whole training run, without its graph: states are kept here and there and the steps between them are run again.

    s_{t+1} = step(s_t, t, φ)        λ_t = (∂s_{t+1}/∂s_t)ᵀ λ_{t+1},   φ̄ = Σ_t (∂step_t/∂φ)ᵀ λ_{t+1}

All random draws of step t come from (key, t), so that a step run again is the same to the bit, dropout and all.

Source: Engstrom et al. 2025, arXiv 2503.13751 (metagradients by replay); Griewank 1992 (logarithmic checkpointing).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from altgrad.engine import Tree
from altgrad.errors import CapabilityError, NumericsError, SettingError, require
from altgrad.implicit.closing import unseen
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers

Step = Callable[[Tree, int, Any], Tree]


def replay(step: Step, start: Tree, meta: Any, *, steps: int, save: str | int = "sqrt", key: Key | None = None) -> Tree:
    """The state after `steps` steps, differentiable (once) in `start` and in `meta`.

    Args:
        step: (state, t, meta) -> state, of tensors by name; altgrad.hyper.Descent is one. Pure: what it uses beside its arguments carries no derivative.
        start: the first state.
        meta: any pytree of tensors, the same in every step: data weights, labels, hyper-parameters.
        steps: T, 1 or more.
        save: which states are kept: "all", T of them; "sqrt", about 2 √T at a time, every step run twice forwards; "log", about log₂ T, every step run
            about ½ log₂ T times; or every how many steps.
        key: addresses the draws of every step.

    Raises:
        SettingError: steps or save out of range. CapabilityError: a step uses a tensor that requires a gradient and is no argument. In the backward
            pass, NumericsError: the gradient is not finite.
    """
    require(isinstance(steps, int) and steps >= 1, "steps", steps, "an integer of at least 1")
    interval = every(steps, save)
    leaves, spec = tree_flatten(meta)
    tensors = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    run = Run(step, tuple(start), leaves, spec, tuple(tensors), steps, interval, key or Key(0))
    names: list[str] = []
    found = Replayed.apply(run, names, *start.values(), *(leaves[index] for index in tensors))
    return dict(zip(names, found, strict=True))


def every(steps: int, save: str | int) -> int:
    """Steps between kept states; 0 for "log"."""
    if save == "log":
        return 0
    if save in ("all", "sqrt"):
        return 1 if save == "all" else max(1, math.isqrt(steps))
    if isinstance(save, bool) or not isinstance(save, int) or save < 1:
        raise SettingError(f"save={save!r} is not allowed; it must be all, sqrt, log, or a number of steps, 1 or more.")
    return save


@dataclass(frozen=True)
class Run:
    """What is run: the step, the names of the first state, meta taken apart, and which states are kept."""

    step: Step
    names: tuple[str, ...]
    leaves: list[Any]
    spec: TreeSpec
    places: tuple[int, ...]
    steps: int
    interval: int
    key: Key

    def meta(self, values: tuple[Tensor, ...]) -> Any:
        full = list(self.leaves)
        for place, value in zip(self.places, values, strict=True):
            full[place] = value
        return tree_unflatten(full, self.spec)

    def traced(self, state: Tree, t: int, values: tuple[Tensor, ...]) -> tuple[Tree, Tree, tuple[Tensor, ...]]:
        """(the state after step t, with its graph; the leaves it hangs on: of the state, of meta)."""
        held = {name: leaf(value) for name, value in state.items()}
        own = tuple(leaf(value) for value in values)
        with torch.enable_grad(), AddressedSamplers(self.key.fold("replay").at(t)):
            return self.step(held, t, self.meta(own)), held, own

    def advanced(self, state: Tree, t: int, values: tuple[Tensor, ...]) -> Tree:
        """The state after step t: the same operations as `traced`, so the same bits."""
        return {name: value.detach() for name, value in self.traced(state, t, values)[0].items()}

    def backwards(self, kept: dict[int, Tree], values: tuple[Tensor, ...]) -> Iterator[tuple[int, Tree]]:
        """(t, the state before step t) for t = T-1 … 0, from the states that were kept."""
        marks = [*sorted(kept), self.steps]
        for begin, end in zip(reversed(marks[:-1]), reversed(marks[1:]), strict=True):
            if self.interval:
                states = [kept.pop(begin)]
                for t in range(begin, end - 1):
                    states.append(self.advanced(states[-1], t, values))
                for t in range(end - 1, begin - 1, -1):
                    yield t, states.pop()
            else:
                yield from self.halved(kept.pop(begin), begin, end, values)

    def halved(self, state: Tree, begin: int, end: int, values: tuple[Tensor, ...]) -> Iterator[tuple[int, Tree]]:
        if end - begin == 1:
            yield begin, state
            return
        middle, later = (begin + end) // 2, state
        for t in range(begin, middle):
            later = self.advanced(later, t, values)
        yield from self.halved(later, middle, end, values)
        yield from self.halved(state, begin, middle, values)


def leaf(value: Tensor) -> Tensor:
    own = value.detach()
    return own.requires_grad_() if own.is_floating_point() else own


class Replayed(torch.autograd.Function):
    """(run, names, *start, *meta) -> the last state; its names are put into `names`."""

    @staticmethod
    def forward(ctx: Any, run: Run, names: list[str], *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(run.names)
        state, values = dict(zip(run.names, (tensor.detach() for tensor in tensors[:count]), strict=True)), tensors[count:]
        kept: dict[int, Tree] = {}
        for t in range(run.steps):
            if t == 0 or (run.interval and t % run.interval == 0):
                kept[t] = state
            if t == 0:
                following, held, own = run.traced(state, t, values)
                refuse_others(following, [*held.values(), *own])
                state = {name: value.detach() for name, value in following.items()}
                del following, held, own
            else:
                state = run.advanced(state, t, values)
        names.extend(state)
        ctx.run, ctx.kept, ctx.names = run, kept, tuple(state)
        ctx.save_for_backward(*values)
        return tuple(value.clone() for value in state.values())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *bars: Tensor) -> Any:
        run, values = ctx.run, ctx.saved_tensors
        along: Tree = {name: bar for name, bar in zip(ctx.names, bars, strict=True) if bar is not None}
        total: list[Tensor | None] = [None] * len(values)
        for t, state in run.backwards(dict(ctx.kept), values):
            following, held, own = run.traced(state, t, values)
            ends = {name: value for name, value in following.items() if value.requires_grad and name in along}
            begins = [value for value in [*held.values(), *own] if value.requires_grad]
            found = iter(torch.autograd.grad(list(ends.values()), begins, [along[name] for name in ends], allow_unused=True))
            slopes = [next(found) if value.requires_grad else None for value in [*held.values(), *own]]
            along = {name: slope for name, slope in zip(held, slopes, strict=False) if slope is not None}
            total = [new if old is None else old if new is None else old + new for old, new in zip(total, slopes[len(held) :], strict=True)]
        refuse_not_finite([*along.values(), *total])
        return None, None, *(along.get(name) for name in run.names), *total


def refuse_not_finite(slopes: list[Tensor | None]) -> None:
    """Raise NumericsError where a gradient is NaN or infinite: nobody sees it in a long run otherwise."""
    if not all(bool(torch.isfinite(slope).all()) for slope in slopes if slope is not None):
        raise NumericsError(
            "the gradient through the run is NaN or infinite. Either the run amplifies its state without bound (lower lr), or an optimizer divides by the root "
            "of a second moment that is zero (Adam and its kin, where a weight has had no gradient yet); use SGD, or a loss that touches every weight."
        )


def refuse_others(following: Tree, known: list[Tensor]) -> None:
    """Raise CapabilityError where a step hangs on a tensor that it was not handed."""
    made = {id(tensor): tensor for tensor in known}
    for value in tree_leaves(following):
        hidden = unseen(value, made) if isinstance(value, Tensor) and value.requires_grad else None
        if hidden is not None:
            raise CapabilityError(
                f"a step uses a tensor of shape {tuple(hidden.shape)} that requires a gradient and is no argument of it; its gradient would be lost. "
                "Pass it in meta, or detach it."
            )
