r"""Linear maps whose errors go down through another matrix than the one that brought the values up.

    y = W x + b,   ∂L/∂W = δ xᵀ,   and the layer below is told  Bᵀ δ  in place of  Wᵀ δ,   δ = ∂L/∂y

for linear layers, convolutions (a transposed convolution by the filters B), transposed convolutions and products with a weight. Attention and
recurrent layers are taken apart into those. Everything between them keeps its own derivative.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from altgrad.population.layers import TAKEN_APART

CONVOLUTIONS = {getattr(F, f"conv{axes}d"): ("stride", "padding", "dilation", "groups") for axes in (1, 2, 3)}
TRANSPOSED = {getattr(F, f"conv_transpose{axes}d"): ("stride", "padding", "output_padding", "groups", "dilation") for axes in (1, 2, 3)}
PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
LINEAR = {F.linear, *CONVOLUTIONS, *TRANSPOSED, *PRODUCTS}
LOOKED_UP = {F.embedding, F.embedding_bag}  # whose inputs have no derivative: nothing is sent down


class Detours(TorchFunctionMode):
    """Within it, an error passes a layer through feedback(name, weight) instead of its weight.

    Args:
        names: id of a weight -> its name; views of it (rows of it, its transpose) are taken for the same part of the feedback.
        feedback: (name, weight) -> a tensor of the weight's shape.

    `met`: weights that were used in a layer of ours; `passed`: those through which an error goes down.
    """

    def __init__(self, names: Mapping[int, str], feedback: Callable[[str, Tensor], Tensor]):
        super().__init__()
        self.names, self.feedback = names, feedback
        self.met: set[str] = set()
        self.passed: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in TAKEN_APART:
            with self:  # which is off while it serves
                return TAKEN_APART[func](*args, **kwargs)
        if func not in LINEAR and func not in LOOKED_UP:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        base = self.owner(weight)
        if base is None or (func in PRODUCTS and weight.ndim != 2):
            return func(*args, **kwargs)
        name = self.names[id(base)]
        self.met.add(name)
        if func in LOOKED_UP or not x.requires_grad:
            return func(*args, **kwargs)
        self.passed.add(name)
        with torch.no_grad():
            way = part_of(self.feedback(name, base.detach()), base, weight)
        value = func(x.detach(), *args[1:], **kwargs) if args else func(**{**kwargs, "input": x.detach()})
        return Detour.apply(value, x, downward(func, args, kwargs, x, way))

    def owner(self, weight: Any) -> Tensor | None:
        """The named tensor that `weight` is, or is a view of."""
        if not isinstance(weight, Tensor):
            return None
        base = weight._base if id(weight) not in self.names and weight._is_view() else weight
        return base if id(base) in self.names else None


class Detour(torch.autograd.Function):
    """`value`, whose error goes on to it unchanged and to `x` by `back`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return value.clone()  # one that layers behind may write in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, Tensor, None]:
        back, ctx.back = ctx.back, None
        return error, back(error), None


def part_of(whole: Tensor, base: Tensor, weight: Tensor) -> Tensor:
    """The part of the feedback `whole` of `base` that its view `weight` is."""
    if weight is base:
        return whole
    laid_out = torch.empty_like(base).copy_(whole)  # as the base lies in memory
    return laid_out.as_strided(weight.shape, weight.stride(), weight.storage_offset() - base.storage_offset())


def downward(func: Any, args: Any, kwargs: Any, x: Tensor, way: Tensor) -> Callable[[Tensor], Tensor]:
    """δ -> what `func` with the weight `way` sends down to its input, in x's dtype; linear, so that the input itself is not kept."""
    shape, dtype = x.shape, x.dtype
    if func is F.linear:
        return lambda error: (error @ way.to(error.dtype)).to(dtype)
    if func in PRODUCTS:
        return lambda error: (error @ way.to(error.dtype).mT).to(dtype)
    names = CONVOLUTIONS.get(func) or TRANSPOSED[func]
    where = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1, **dict(zip(names, args[3:], strict=False)), **kwargs}
    axes = way.ndim - 2

    def run(error: Tensor) -> Tensor:
        filters, stand_in = way.to(error.dtype), error.new_empty(1).expand(shape)
        if isinstance(where["padding"], str):  # "same" or "valid": spelt out inside the forward only
            with torch.enable_grad():
                leaf = torch.zeros_like(stand_in).requires_grad_()
                value = func(leaf, filters, None, **{name: where[name] for name in names})
                return torch.autograd.grad(value, leaf, error)[0].to(dtype)
        single = len(shape) == axes + 1  # one example without an axis for it
        if single:
            error, stand_in = error.unsqueeze(0), stand_in.unsqueeze(0)
        steps = [list(each(where[name], axes)) for name in ("stride", "padding", "dilation")]
        more, transposed = list(each(where["output_padding"], axes)), func in TRANSPOSED
        mask = [True, False, False]
        found: Tensor = torch.ops.aten.convolution_backward(error, stand_in, filters, None, *steps, transposed, more, where["groups"], mask)[0]
        return (found.squeeze(0) if single else found).to(dtype)

    return run


def each(value: Any, axes: int) -> tuple[int, ...]:
    """A number an axis."""
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) * axes if len(value) == 1 else tuple(value)


__all__ = ["Detours"]
