r"""Estimators that act on every number alone: forward q(x), and in the place of q' a surrogate h(x).

    reverse  x̄ = h(x) ȳ        forward  ẏ = h(x) ẋ

h is a factor, so that one rule serves both modes, and forward gradients of a network with hard steps are those that backprop would take. Nothing is
saved but the input.

Values and derivatives are worked out in place, in one fresh tensor where that is possible: at a million numbers a tensor costs more than the arithmetic. A
result that a later derivative needs (that of exp, sigmoid, reciprocal) is never written over.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from altgrad.errors import UsageError
from altgrad.surrogates.estimator import Estimator

ROLES = ("activation", "weight")
ACTIVE: list[Any] = []  # of replacing.Replacing: the innermost decides


class Reversed(torch.autograd.Function):
    """forward.value(x, *drawn), with the derivative slope.derivative(x) by reverse mode; what is drawn has none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, forward: Any, slope: Any, *drawn: Tensor) -> Tensor:  # type: ignore[override]
        return forward.value(x, *drawn)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, ctx.slope, *drawn = inputs
        ctx.drawn = len(drawn)
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * ctx.slope.derivative(x), None, None, *[None] * ctx.drawn


class Quantised(Reversed):
    """The same by forward mode too. torch.compile traces no Function that has a rule for it, so what is compiled goes through the base."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return tangent * ctx.slope.derivative(x)


@dataclass(frozen=True)
class Pointwise(Estimator):
    """q(x) = +1 where x >= 0, -1 below, with a surrogate derivative; subclasses give `derivative` and `primitive`.

    `operation` names q: an estimator takes the place of another one of the same operation only. `kinks` are where h jumps or bends, in the
    settings at hand.
    """

    kind: ClassVar[str] = "pointwise"
    operation: ClassVar[str] = "sign"

    @property
    def kinks(self) -> tuple[float, ...]:
        return ()

    def value(self, x: Tensor) -> Tensor:
        """q(x)."""
        return sign(x)

    def derivative(self, x: Tensor) -> Tensor:
        """h(x)."""
        raise NotImplementedError

    def primitive(self, x: Tensor) -> Tensor:
        """F(x), odd where h is even: the soft function whose derivative h is."""
        raise NotImplementedError

    def __call__(self, x: Tensor, *, role: str = "activation") -> Tensor:
        """q(x) with the derivative h.

        Args:
            x: any shape, float16 to float64.
            role: "activation" or "weight": which of the two `x` is, for who treats them differently (see replacing.py).

        Raises:
            UsageError: x is not of a floating-point type.
        """
        if not x.is_floating_point():
            raise UsageError(f"surrogate {self.name} was called on {x.dtype}; it must be a floating-point tensor.")
        if ACTIVE:
            forward, slope = ACTIVE[-1].chosen(self, role)
        else:
            forward = slope = self
        return with_derivative(x, forward, slope)


def with_derivative(x: Tensor, forward: Any, slope: Any, *drawn: Tensor) -> Tensor:
    """forward.value(x, *drawn), with the derivative slope.derivative(x)."""
    rule = Reversed if torch.compiler.is_compiling() else Quantised
    return rule.apply(x, forward, slope, *drawn)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Soft:
    """The primitive in the place of the quantiser: a smooth network whose own derivative h is."""

    estimator: Pointwise

    def value(self, x: Tensor) -> Tensor:
        return self.estimator.primitive(x)


def within(x: Tensor, bound: float) -> Tensor:
    """1 where |x| <= bound, 0 beyond, in x's type; NaN stays NaN."""
    return x.abs().neg_().add_(bound).sign_().add_(1).clamp_max_(1)


def emptied(x: Tensor, bound: float) -> Tensor:
    """-|x| where |x| <= bound, -inf beyond, where what vanishes at infinity is 0; in float32 or better, a tensor of the caller's own. NaN stays NaN."""
    size = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    if torch.compiler.is_compiling():
        return torch.where(size > bound, -math.inf, -size)
    return torch.threshold_(size.neg_(), below(-bound, size.dtype), -math.inf)


@cache
def below(value: float, dtype: torch.dtype) -> float:
    """The greatest number of this type that is less than `value` as this type has it."""
    low, here = torch.tensor([-math.inf, value], dtype=dtype, device="cpu")
    return torch.nextafter(here, low).item()


def sign(x: Tensor) -> Tensor:
    """+1 where x >= 0 (torch.sign has 0 at 0, which is not binary), -1 below; NaN stays NaN."""
    x = x.detach()
    found = x.sign().add_(0.5).sign_()
    return x.clamp(found, found)  # that is `found`, but NaN where x is
