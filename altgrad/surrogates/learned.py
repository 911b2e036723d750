r"""Estimators whose step between two levels is trained with the weights (and, in LSQ+, the place of its zero).

    q = s r + β,  r = round(clip(u, -Q_n, Q_p)),  u = (v - β) / s

    ∂q/∂v = 1 where -Q_n < u < Q_p, 0 outside           ∂q/∂β = 0 inside, 1 outside
    ∂q/∂s = (r - u inside, -Q_n below, Q_p above) / √(N Q_p)

N is how many numbers share a step. The factor 1 / √(N Q_p) is part of the rule: it makes a step's updates as large, beside its own size, as a
weight's; reverse and forward mode both carry it. Only v, s and β are saved.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from altgrad.errors import SettingError, ShapeError, require
from altgrad.surrogates.estimator import Estimator, setting
from altgrad.surrogates.levels import bits_range


class Reversed(torch.autograd.Function):
    """(v, s, β, estimator) -> q, by reverse mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, step: Tensor, offset: Tensor, estimator: "LSQ") -> Tensor:  # type: ignore[override]
        low, high = estimator.range
        return step * ((v - offset) / step).clamp(low, high).round() + offset

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.estimator = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        v, step, offset = ctx.saved_tensors
        to_v, to_step, to_offset = ctx.estimator.slopes(v, step, offset)
        return grad * to_v, over(grad * to_step, step), over(grad * to_offset, offset), None


class Stepped(Reversed):
    """The same by forward mode too, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, v_dot: Tensor | None, step_dot: Tensor | None, offset_dot: Tensor | None, _: Any) -> Tensor:  # type: ignore[override]
        slopes = ctx.estimator.slopes(*ctx.saved_tensors)
        moved = [slope * dot for slope, dot in zip(slopes, (v_dot, step_dot, offset_dot), strict=True) if dot is not None]
        return sum(moved[1:], moved[0])


@dataclass(frozen=True)
class LSQ(Estimator):
    """Learned step size: `estimator(v, step)`, with `step` a tensor that broadcasts over v: a scalar, or one a channel.

    Raises:
        SettingError: bits outside 1 to 8, or one bit signed, which would have no positive level.
    """

    bits: int = setting(4, "bits, 2 to 8; 1 where not signed")
    signed: bool = setting(True, "whether levels lie on both sides of 0: weights; activations behind a ReLU do not need it")

    kind: ClassVar[str] = "learned"
    name: ClassVar[str] = "lsq"
    source: ClassVar[str] = "Esser, McKinstry, Bablani, Appuswamy, Modha 2020, arXiv 1902.08153"

    def __post_init__(self) -> None:
        if bits_range(self.bits, signed=self.signed)[1] < 1:
            raise SettingError(f"bits={self.bits!r} is not allowed with signed={self.signed!r}: no level lies above 0. Take 2 bits, or signed=False.")

    @property
    def range(self) -> tuple[int, int]:
        """(-Q_n, Q_p)."""
        return bits_range(self.bits, signed=self.signed)

    def initial(self, v: Tensor, *, axis: int | None = None) -> Tensor:
        """2 mean|v| / √Q_p, a scalar, or where `axis` is given one for each of its entries, in a shape that broadcasts over v."""
        dims = [dim for dim in range(v.ndim) if axis is None or dim != axis % v.ndim]
        mean = v.detach().abs().mean() if axis is None else v.detach().abs().mean(dims, keepdim=True) if dims else v.detach().abs()
        return (2 * mean / math.sqrt(self.range[1])).clamp_min(torch.finfo(v.dtype).eps)

    def slopes(self, v: Tensor, step: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(∂q/∂v, ∂q/∂s, ∂q/∂β), elementwise in the shape of v."""
        low, high = self.range
        u = (v - offset) / step
        inside = ((u > low) & (u < high)).to(v.dtype)
        factor = 1 / math.sqrt(max(1, v.numel() // max(1, step.numel())) * high)
        # u clipped is a level itself beyond the ends, where the round leaves it alone.
        edge = u.clamp(low, high)
        return inside, (edge.round() - inside * u) * factor, 1 - inside

    def __call__(self, v: Tensor, step: Tensor) -> Tensor:
        """q(v; step).

        Args:
            v: any shape.
            step: s > 0, broadcasts over v, of v's dtype.

        Raises:
            ShapeError: step does not broadcast over v.
        """
        return stepped(self, v, step, torch.zeros_like(step))


@dataclass(frozen=True)
class LSQPlus(LSQ):
    """LSQ with a trained place of the zero: `estimator(v, step, offset)`, for activations whose range is neither [0, …) nor even."""

    signed: bool = setting(False, "whether levels lie on both sides of the offset")

    name: ClassVar[str] = "lsq-plus"
    source: ClassVar[str] = "Bhalgat, Lee, Nagel, Blankevoort, Kwak 2020, arXiv 2004.09576"

    def initial_offset(self, v: Tensor) -> Tensor:
        """β at first, a scalar: where the least value of v meets the least level; 0 where levels lie on both sides."""
        return v.detach().amin() if not self.signed else torch.zeros((), dtype=v.dtype, device=v.device)

    def initial(self, v: Tensor, *, axis: int | None = None) -> Tensor:
        """LSQ's where levels lie on both sides; else the range of v over that of the levels."""
        if self.signed or axis is not None:
            return super().initial(v, axis=axis)
        low, high = self.range
        return ((v.detach().amax() - v.detach().amin()) / (high - low)).clamp_min(torch.finfo(v.dtype).eps)

    def __call__(self, v: Tensor, step: Tensor, offset: Tensor | None = None) -> Tensor:
        """q(v; step, offset), arguments as for LSQ; offset β broadcasts over v, 0 where it is left out."""
        return stepped(self, v, step, torch.zeros_like(step) if offset is None else offset)


def stepped(estimator: LSQ, v: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """Stepped, once the shapes have been looked at."""
    for name, tensor in (("step", step), ("offset", offset)):
        fits = tensor.ndim <= v.ndim and all(own in {1, whole} for own, whole in zip(reversed(tensor.shape), reversed(v.shape), strict=False))
        if not fits:
            raise ShapeError(
                f"{name} of shape {tuple(tensor.shape)} does not broadcast over a tensor of shape {tuple(v.shape)}; give a scalar, or one a channel."
            )
    require(v.is_floating_point(), "v", v.dtype, "a floating-point tensor")
    rule = Reversed if torch.compiler.is_compiling() else Stepped
    return rule.apply(v, step, offset, estimator)  # type: ignore[no-any-return]


def over(grad: Tensor, like: Tensor) -> Tensor:
    """`grad` added up to the shape of `like`, which broadcasts over it."""
    lead = grad.ndim - like.ndim
    dims = [*range(lead), *(lead + dim for dim, length in enumerate(like.shape) if length == 1 and grad.shape[lead + dim] != 1)]
    return (grad.sum(dims, keepdim=True) if dims else grad).reshape(like.shape)
