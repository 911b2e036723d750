"""Rules for the functions every model is made of: linear in one argument, elementwise, and the arithmetic of two."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from altgrad.forward_mode.dual import DECOMPOSED, KEEPING, LAYERS, RULES, Dual, Trace, primal_of, tangent_of
from altgrad.forward_mode.ladder import lift
from altgrad.forward_mode.lazy import BLOCK, Masked

Rule = Callable[..., Any]


def rule(*functions: Any, decomposed: bool = False, layer: bool = False, keeping: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for torch functions; `decomposed` ones stand in for a missing forward formula and are counted.

    `layer` marks the rules whose outputs may be perturbed (they end in `finish`, or call such rules), `keeping` those that leave the
    tangents waiting which they do not need: they write to nothing that was there before.
    """

    def register(function: Rule) -> Rule:
        for target in functions:
            RULES[target] = function
            if decomposed:
                DECOMPOSED.add(target)
            if layer:
                LAYERS.add(target)
            if keeping:
                KEEPING.add(target)
        return function

    return register


def align(tangent: Tensor, rank: int) -> Tensor:
    """[K, *shape] with ones after K, so that it broadcasts as a tensor of `rank` axes behind K."""
    missing = rank - (tangent.ndim - 1)
    return tangent if missing <= 0 else tangent.reshape(tangent.shape[0], *(1 for _ in range(missing)), *tangent.shape[1:])


def only_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the first argument is the only one with tangents."""
    others = [*args[1:], *kwargs.values()]
    return isinstance(args[0], Dual) and not any(isinstance(a, Dual) or (isinstance(a, (list, tuple)) and any(isinstance(b, Dual) for b in a)) for a in others)


def linear_in_first(func: Any) -> Rule:
    """D f(x)[t] = f(t): the function itself, applied to all K tangents at once."""

    def apply_linear(trace: Trace, *args: Any, **kwargs: Any) -> Any:
        if not args or not only_first(args, kwargs):
            return lift(trace, func, args, kwargs)
        x, rest = args[0], args[1:]
        value = func(x.primal, *rest, **kwargs)
        push = torch.func.vmap(lambda t: func(t, *rest, **kwargs))
        try:
            moved = push(x.tangent)
        except RuntimeError:  # a view that the tangents' strides do not allow: x keeps the contiguous ones, so that writes are seen by both
            x._tangent = x.tangent.contiguous()
            moved = push(x._tangent)
        return pair(trace, value, moved)

    return apply_linear


def pair(trace: Trace, value: Any, moved: Any) -> Any:
    """Duals from a value and its tangents, through tuples and lists."""
    if isinstance(value, (tuple, list)):
        pairs = (pair(trace, v, m) for v, m in zip(value, moved, strict=True))
        return list(pairs) if isinstance(value, list) else tuple(pairs)
    return Dual(value, moved, trace)


def elementwise(func: Any) -> Rule:
    """D f(x)[t] = f'(x)·t, with f' taken once from PyTorch's own formula (a jvp along ones) and shared by the K tangents."""

    def apply_elementwise(trace: Trace, *args: Any, **kwargs: Any) -> Any:
        in_place = kwargs.pop("inplace", False) is True
        if not args or not only_first(args, kwargs):
            return lift(trace, func, args, kwargs)
        x, rest = args[0], args[1:]
        if rest and rest[-1] is True and func in TAKES_INPLACE:
            in_place, rest = True, rest[:-1]
        value, slope = torch.func.jvp(lambda p: func(p, *rest, **kwargs), (x.primal,), (torch.ones_like(x.primal),))  # type: ignore[misc]
        return overwrite(x, value, x.tangent * slope) if in_place else Dual(value, x.tangent * slope, trace)

    return apply_elementwise


def overwrite(x: Dual, value: Tensor, tangent: Tensor) -> Dual:
    """The in-place form: views of x and of its tangents see the new value."""
    x.primal.copy_(value)
    x.tangent.copy_(tangent)
    return x


LINEAR_NAMES = """
    reshape flatten unflatten transpose permute unsqueeze squeeze sum mean neg clone chunk split unbind narrow select index_select
    roll flip t movedim swapaxes tile cumsum diagonal tril triu
""".split()
LINEAR_METHODS = """
    view __neg__ contiguous to float double half bfloat16 expand expand_as __getitem__ swapdims repeat view_as reshape_as unfold type_as
""".split()
LINEAR_FUNCTIONS = """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d unfold fold pixel_shuffle pixel_unshuffle
""".split()
ELEMENTWISE_NAMES = "tanh sigmoid exp log log1p expm1 sqrt rsqrt sin cos abs square reciprocal erf".split()
ELEMENTWISE_FUNCTIONS = """
    tanh sigmoid gelu silu elu selu celu softplus hardtanh leaky_relu relu6 hardswish hardsigmoid mish logsigmoid softsign tanhshrink
""".split()
TAKES_INPLACE = {getattr(F, name) for name in "relu elu selu celu silu hardtanh leaky_relu relu6 hardswish hardsigmoid mish".split()}


def register(make: Callable[[Any], Rule], owner: Any, names: list[str]) -> None:
    """Give every function of `owner` in `names` the rule that `make` makes for it."""
    for name in names:
        if hasattr(owner, name):
            RULES[getattr(owner, name)] = make(getattr(owner, name))


for owner, names in ((torch, LINEAR_NAMES), (torch.Tensor, LINEAR_NAMES + LINEAR_METHODS), (F, LINEAR_FUNCTIONS)):
    register(linear_in_first, owner, names)
for owner, names in ((torch, ELEMENTWISE_NAMES), (torch.Tensor, ELEMENTWISE_NAMES), (F, ELEMENTWISE_FUNCTIONS)):
    register(elementwise, owner, names)


@rule(F.relu, torch.relu, torch.Tensor.relu, keeping=True)
def relu(trace: Trace, x: Dual, inplace: bool = False) -> Dual:
    """D relu(x)[t] = t where x > 0, else 0 (autograd's choice at 0): a mask that the next layer applies as it reads."""
    value = torch.relu(x.primal)
    if inplace:
        trace.make()  # others may wait for the tangent that is written to
        return overwrite(x, value, Masked(x.tangent, value).whole())
    moved = Masked(x.tangent if x.lazy is None else x.lazy, value)
    # Tangents of one block stay in the cache anyway; to let them wait would only keep the ones before relu alive beside them.
    return Dual(value, moved if moved.shape.numel() * moved.dtype.itemsize > BLOCK else moved.whole(), trace)


@rule(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def add(trace: Trace, a: Any, b: Any, *, alpha: float = 1, out: Any = None) -> Any:
    """D(a + αb) = ȧ + αḃ."""
    value = torch.add(primal_of(a), primal_of(b), alpha=alpha) if alpha != 1 else primal_of(a) + primal_of(b)
    return Dual(value, total(value, *unshared(a, b), alpha), trace)


@rule(torch.sub, torch.Tensor.sub, torch.Tensor.__sub__)
def sub(trace: Trace, a: Any, b: Any, *, alpha: float = 1) -> Any:
    """D(a - αb) = ȧ - αḃ."""
    value = primal_of(a) - primal_of(b) * alpha if alpha != 1 else primal_of(a) - primal_of(b)
    return Dual(value, total(value, *unshared(a, b), -alpha), trace)


@rule(torch.rsub, torch.Tensor.__rsub__)
def rsub(trace: Trace, a: Any, b: Any) -> Any:
    """D(b - a) = ḃ - ȧ."""
    return sub(trace, b, a)


def unshared(a: Any, b: Any) -> tuple[Tensor | None, Tensor | None]:
    """Both tangents; a copy where the sum would be one of them itself, for a later write in place must not reach the other tensor."""
    ta, tb = tangent_of(a), tangent_of(b)
    if tb is None and ta is not None and a._tangent is not None:
        return ta.clone(), None
    if ta is None and tb is not None and b._tangent is not None:
        return None, tb.clone()
    return ta, tb


def total(value: Tensor, first: Tensor | None, second: Tensor | None, scale: float) -> Tensor:
    """first + scale·second, broadcast to the value's shape behind K."""
    if second is not None:
        second = align(second, value.ndim) if scale == 1 else align(second, value.ndim) * scale
    if first is None:
        moved = second
    else:
        first = align(first, value.ndim)
        moved = first if second is None else first + second
    assert moved is not None
    return moved if moved.shape[1:] == value.shape else moved.expand(moved.shape[0], *value.shape).contiguous()


@rule(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def mul(trace: Trace, a: Any, b: Any) -> Any:
    """D(ab) = ȧb + aḃ."""
    value = primal_of(a) * primal_of(b)
    ta, tb = tangent_of(a), tangent_of(b)
    first = None if ta is None else align(ta, value.ndim) * primal_of(b)
    second = None if tb is None else align(tb, value.ndim) * primal_of(a)
    return Dual(value, total(value, first, second, 1), trace)


@rule(torch.div, torch.Tensor.div, torch.Tensor.__truediv__, torch.true_divide)
def div(trace: Trace, a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    """D(a/b) = (ȧ - (a/b)ḃ)/b."""
    if rounding_mode is not None:
        return torch.div(primal_of(a), primal_of(b), rounding_mode=rounding_mode)
    value = primal_of(a) / primal_of(b)
    ta, tb = tangent_of(a), tangent_of(b)
    first = None if ta is None else align(ta, value.ndim) / primal_of(b)
    second = None if tb is None else align(tb, value.ndim) * (value / primal_of(b))
    return Dual(value, total(value, first, second, -1), trace)


@rule(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm)
def matmul(trace: Trace, a: Any, b: Any, **kwargs: Any) -> Any:
    """D(ab) = ȧb + aḃ."""
    pa, pb = primal_of(a), primal_of(b)
    if pa.ndim < 2 or pb.ndim < 2:
        return lift(trace, torch.matmul, (a, b), {})
    value = torch.matmul(pa, pb)
    ta, tb = tangent_of(a), tangent_of(b)
    rank = value.ndim
    first = None if ta is None else torch.matmul(align(ta, rank), pb)
    second = None if tb is None else torch.matmul(pa, align(tb, rank))
    return Dual(value, total(value, first, second, 1), trace)
