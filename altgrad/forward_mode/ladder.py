"""The rungs below our own rules: PyTorch's forward formulas, then a central difference of the one function that has none."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from altgrad.attention import unfused
from altgrad.forward_mode.dual import Dual, Trace, label
from altgrad.samplers import replaying

Leaves = list[Any]


def lift(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    """`func` with tangents pushed through it: natively where PyTorch can, by central difference otherwise (counted)."""
    leaves, spec = tree_flatten((args, kwargs))
    slots = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Dual)]
    tangents = [leaves[index].tangent for index in slots]
    for index in slots:
        leaves[index] = leaves[index].primal
    call = Call(func, leaves, spec, slots)
    if trace.rungs.get(func) != "difference":
        try:
            values, moved = native(call, tangents)
            return call.rebuild(values, [Dual(v, t, trace) for v, t in zip(values, moved, strict=True)])
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            trace.rungs[func] = "difference"
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            trace.fallbacks[f"reason:{label(func)}: {reason[:90]}"] += 0
    values, moved = difference(call, tangents)  # the user's own mistakes raise again here, with PyTorch's message
    if moved:
        trace.fallbacks[f"difference:{label(func)}"] += 1
    return call.rebuild(values, [Dual(v, t, trace) for v, t in zip(values, moved, strict=True)])


class Call:
    """One function call with some argument slots left open; float tensors of the result are numbered, the rest is kept aside."""

    def __init__(self, func: Callable[..., Any], leaves: Leaves, spec: TreeSpec, slots: list[int]):
        self.func, self.leaves, self.spec, self.slots = func, leaves, spec, slots
        self.primals = [leaves[slot] for slot in slots]
        self.result: tuple[Leaves, TreeSpec] | None = None

    def __call__(self, *values: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The float tensors of the result, and its other tensors."""
        leaves = list(self.leaves)
        for slot, value in zip(self.slots, values, strict=True):
            leaves[slot] = value
        args, kwargs = tree_unflatten(leaves, self.spec)
        with unfused():
            out, spec = tree_flatten(self.func(*args, **kwargs))
        self.result = (out, spec)
        moving = tuple(leaf for leaf in out if differentiable(leaf))
        still = tuple(leaf for leaf in out if isinstance(leaf, Tensor) and not differentiable(leaf))
        return moving, still

    def rebuild(self, values: list[Tensor], duals: list[Dual]) -> Any:
        """The result with Duals in place of its float tensors."""
        assert self.result is not None
        out, spec = self.result
        queue, still = iter(duals), iter(self.still)
        return tree_unflatten([next(queue) if differentiable(leaf) else next(still) if isinstance(leaf, Tensor) else leaf for leaf in out], spec)

    still: tuple[Tensor, ...] = ()


def differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def native(call: Call, tangents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """PyTorch's forward formulas: vmap over the K tangents of one jvp, whose primal is computed once."""

    def push(*moves: Tensor) -> Any:
        return torch.func.jvp(call, tuple(call.primals), moves, has_aux=True)

    values, moved, call.still = torch.func.vmap(push, in_dims=0, out_dims=(None, 0, None))(*tangents)  # type: ignore[arg-type]
    return list(values), list(moved)


def difference(call: Call, tangents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    r"""(f(x + ht) - f(x - ht)) / 2h for each tangent t, in float64 where the function takes it.

    h = ∛ε · (1 + max|x|) / max|t| balances the h² truncation against the ε/h rounding.
    """
    with replaying():
        values, call.still = call(*call.primals)
    kept = call.result
    moved = [torch.zeros((tangents[0].shape[0], *value.shape), dtype=value.dtype, device=value.device) for value in values]
    if not values:
        return [], []
    wide = True
    try:
        evaluate(call, [p.double() if p.dtype == torch.float32 else p for p in call.primals])
    except (RuntimeError, TypeError, ValueError):
        wide = False
    for k in range(tangents[0].shape[0]):
        points = [p.double() if wide and p.dtype == torch.float32 else p for p in call.primals]
        steps = [t[k].to(p.dtype) for t, p in zip(tangents, points, strict=True)]
        size = max(float(s.abs().max()) if s.numel() else 0.0 for s in steps)
        if size == 0.0:
            continue
        reach = 1 + max(float(p.abs().max()) if p.numel() else 0.0 for p in points)
        h = torch.finfo(points[0].dtype).eps ** (1 / 3) * reach / size
        up = evaluate(call, [p + h * s for p, s in zip(points, steps, strict=True)])
        down = evaluate(call, [p - h * s for p, s in zip(points, steps, strict=True)])
        for slot, (a, b) in enumerate(zip(up, down, strict=True)):
            moved[slot][k] = ((a - b) / (2 * h)).to(moved[slot].dtype)
    call.result = kept
    return list(values), moved


def evaluate(call: Call, points: list[Tensor]) -> tuple[Tensor, ...]:
    """The function at other values; float32 constants among its arguments follow to float64, samplers repeat their draws."""
    leaves = call.leaves
    if any(p.dtype == torch.float64 for p in points):
        # Clones, because a function that writes its buffers must not write them once per evaluation.
        call.leaves = [leaf.double() if isinstance(leaf, Tensor) and leaf.dtype == torch.float32 else leaf for leaf in leaves]
    else:
        call.leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    try:
        with replaying():
            return call(*points)[0]
    finally:
        call.leaves = leaves
