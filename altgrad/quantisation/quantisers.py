r"""Quantisers as modules: a tensor in, the same tensor on a few levels out, with a stand-in derivative. `axes` trailing axes share a scale.

    sign       α q(w),                        α = mean|w| (weights); q(x) (inputs)
    ternary    α t(w / max|w|),               α = mean of |w| where t is not 0 (weights); t(x) (inputs)
    uniform    s round(x / s),                s = max|x| / (2^(bits-1) - 1)           evenly around 0
               s round((x - β) / s) + β,      s = (max x - min x) / (2^bits - 1), β = min x      affine
               max|x| d(x / max|x|)           d: DSQ's 2^bits levels on [-1, 1]
               LSQ, LSQ+                      s (and β) are trained parameters

A weight's scale is that of the tensor or of each output channel; an input's range is that of each example (of each token, for a linear layer), so that
examples stay apart. Gradients pass through the scales.
"""

import math

import torch
from torch import Tensor, nn

from altgrad.quantisation.specs import Spec
from altgrad.surrogates import Pointwise
from altgrad.surrogates.learned import LSQ, LSQPlus
from altgrad.surrogates.levels import DSQ, Round
from altgrad.surrogates.modules import BinaryWeight, SignActivation


class TernaryWeight(nn.Module):
    """w -> α t(w / max|w|): levels -α, 0 and α."""

    def __init__(self, estimator: Pointwise, *, axes: int):
        super().__init__()
        self.estimator, self.axes = estimator, axes

    def parts(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(t, α)."""
        size = w.abs()
        t = self.estimator(w / nonzero(size.amax(trailing(self.axes), keepdim=True)), role="weight")
        kept = (t != 0).to(w.dtype)
        return t, (size * kept).sum(trailing(self.axes), keepdim=True) / kept.sum(trailing(self.axes), keepdim=True).clamp_min(1)

    def forward(self, w: Tensor) -> Tensor:
        t, scale = self.parts(w)
        return t * scale

    def right_inverse(self, w: Tensor) -> Tensor:
        return w

    def extra_repr(self) -> str:
        return str(self.estimator)


class Uniform(nn.Module):
    """x -> s round((x - β) / s) + β, with s and β from the range of x, which nothing is clipped to."""

    def __init__(self, estimator: Round, *, bits: int, axes: int, affine: bool = False, role: str = "weight"):
        super().__init__()
        self.estimator, self.bits, self.axes, self.affine, self.role = estimator, bits, axes, affine, role

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(s, β); no β where the levels lie evenly around 0."""
        over, eps = trailing(self.axes), torch.finfo(x.dtype).eps
        most = 2**self.bits - 1 if self.affine else 2 ** (self.bits - 1) - 1
        # A quotient in a coarse type (bfloat16 with 8 bits) may round to one level above the last: a wider step takes that back.
        widest = most / (1 + eps) if most * eps >= 0.5 else most
        if not self.affine:
            return nonzero(x.abs().amax(over, keepdim=True) / widest), None
        least = x.amin(over, keepdim=True)
        return nonzero((x.amax(over, keepdim=True) - least) / widest), least

    def forward(self, x: Tensor) -> Tensor:
        step, offset = self.grid(x)
        if offset is None:
            return step * self.estimator(x / step, role=self.role)
        return step * self.estimator((x - offset) / step, role=self.role) + offset

    def right_inverse(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return f"{self.estimator}, bits={self.bits}, affine={self.affine}"


class Levels(nn.Module):
    """x -> max|x| d(x / max|x|), d with levels from -1 to 1."""

    def __init__(self, estimator: DSQ, *, axes: int, role: str = "weight"):
        super().__init__()
        self.estimator, self.axes, self.role = estimator, axes, role

    def scale(self, x: Tensor) -> Tensor:
        """max|x|."""
        return nonzero(x.abs().amax(trailing(self.axes), keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x)
        return self.estimator((x / scale).clamp(-1, 1), role=self.role) * scale

    def right_inverse(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return str(self.estimator)


class Learned(nn.Module):
    """LSQ or LSQ+ with its step (and offset) as trained parameters, set from `like`, or for inputs from the first that are shown (`calibrate`)."""

    def __init__(self, estimator: LSQ, *, like: Tensor, per_channel: bool = False):
        super().__init__()
        self.estimator, self.per_channel = estimator, per_channel
        shape = (like.shape[0], *[1] * (like.ndim - 1)) if per_channel else ()
        self.step = nn.Parameter(like.new_empty(shape))
        if isinstance(estimator, LSQPlus):
            self.offset = nn.Parameter(like.new_zeros(shape))
        self.calibrate(like)

    @torch.no_grad()
    def calibrate(self, like: Tensor) -> None:
        """Set the step for numbers like these: LSQ's 2 mean|v| / √Q_p, or where levels lie on one side of an offset the range over that of the levels."""
        if isinstance(self.estimator, LSQPlus) and not self.estimator.signed:
            over = tuple(range(1, like.ndim)) if self.per_channel else tuple(range(like.ndim))
            least, most = like.amin(over, keepdim=self.per_channel), like.amax(over, keepdim=self.per_channel)
            self.offset.copy_(least)
            self.step.copy_(nonzero((most - least) / self.estimator.range[1]))
        else:
            self.step.copy_(self.estimator.initial(like, axis=0 if self.per_channel else None))

    def grid(self) -> tuple[Tensor, Tensor]:
        """(s, β); an update may take the parameter through 0, the step stays above it."""
        step = nonzero(self.step.abs())
        return step, self.offset if isinstance(self.estimator, LSQPlus) else torch.zeros_like(step)

    def forward(self, x: Tensor) -> Tensor:
        step, offset = self.grid()
        return self.estimator(x, step, offset) if isinstance(self.estimator, LSQPlus) else self.estimator(x, step)

    def right_inverse(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return str(self.estimator)


KINDS = (BinaryWeight, TernaryWeight, Uniform, Levels, Learned)  # what a weight's parametrisation may be


def of_weight(spec: Spec, w: Tensor, *, per_channel: bool) -> nn.Module:
    """The module that makes the quantised weight of `w`, whose first axis counts outputs."""
    axes = w.ndim - 1 if per_channel else w.ndim
    estimator = spec.estimator
    if isinstance(estimator, LSQ):
        return Learned(estimator, like=w, per_channel=per_channel)
    if isinstance(estimator, Round):
        return Uniform(estimator, bits=spec.bits, axes=axes, affine=spec.affine)
    if spec.operation == "uniform" and isinstance(estimator, DSQ):
        return Levels(estimator, axes=axes)
    if spec.operation == "ternary":
        return TernaryWeight(estimator, axes=axes)
    return BinaryWeight(estimator, scale="channel" if per_channel else "tensor")


def of_input(spec: Spec, *, axes: int, like: Tensor) -> nn.Module:
    """The module that quantises the input of a layer, `axes` of whose trailing axes are one example's; `like` says which device and type."""
    estimator = spec.estimator
    if isinstance(estimator, LSQ):
        return Learned(estimator, like=like.new_tensor([0.0, math.sqrt(2 / math.pi), 2.0]))  # of a normal law, until numbers are shown
    if isinstance(estimator, Round):
        return Uniform(estimator, bits=spec.bits, axes=axes, affine=spec.affine, role="activation")
    if spec.operation == "uniform" and isinstance(estimator, DSQ):
        return Levels(estimator, axes=axes, role="activation")
    return SignActivation(estimator)


def trailing(axes: int) -> tuple[int, ...]:
    """The last so many axes."""
    return tuple(range(-axes, 0))


def nonzero(scale: Tensor) -> Tensor:
    """`scale`, of which there is to be a quotient, above 0."""
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)
