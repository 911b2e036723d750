r"""Surrogates of the sign made of smooth functions with one slope setting; σ is the logistic function.

tanh and cosh are written by σ, which does not overflow and is several times faster on a CPU than tanh.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from altgrad.surrogates.estimator import positive, setting
from altgrad.surrogates.pointwise import Pointwise


@dataclass(frozen=True)
class SwishSign(Pointwise):
    """h = β (2 - βx tanh(βx/2)) / (1 + cosh βx), the derivative of 2σ(βx)(1 + βx(1 - σ(βx))) - 1; negative for |βx| > 2.3994."""

    beta: float = setting(5.0, "slope β, > 0; h(0) = β")

    name: ClassVar[str] = "swish-sign"
    source: ClassVar[str] = "Darabi, Belbahri, Courbariaux, Partovi Nia 2018, arXiv 1812.11800 (BNN+)"

    def __post_init__(self) -> None:
        positive("beta", self.beta)

    def derivative(self, x: Tensor) -> Tensor:
        u = self.beta * x
        s = torch.sigmoid(u)  # tanh(u/2) = 2s - 1, 1 / (1 + cosh u) = 2 s (1 - s)
        return (2 * s).sub_(1).mul_(u).mul_(-2 * self.beta).add_(4 * self.beta).mul_(torch.addcmul(s, s, s, value=-1))

    def primitive(self, x: Tensor) -> Tensor:
        u = self.beta * x
        return torch.tanh(u / 2) + 2 * u * bump(self.beta * x)


@dataclass(frozen=True)
class ATan(Pointwise):
    """h = (α/2) / (1 + (π α x / 2)²), the derivative of arctan(π α x / 2) / π: area 1."""

    alpha: float = setting(2.0, "slope α, > 0; h(0) = α / 2")

    name: ClassVar[str] = "atan"
    source: ClassVar[str] = "Fang, Yu, Chen, Masquelier, Huang, Tian 2021, arXiv 2007.05785"

    def __post_init__(self) -> None:
        positive("alpha", self.alpha)

    def derivative(self, x: Tensor) -> Tensor:
        return x.square().mul_(0.5 * math.pi**2 * self.alpha).add_(2 / self.alpha).reciprocal_()

    def primitive(self, x: Tensor) -> Tensor:
        return torch.atan(0.5 * math.pi * self.alpha * x) / math.pi


@dataclass(frozen=True)
class Sigmoid(Pointwise):
    """h = k σ(kx) (1 - σ(kx)), the derivative of σ(kx) - 1/2: area 1."""

    slope: float = setting(4.0, "slope k, > 0; h(0) = k / 4")

    name: ClassVar[str] = "sigmoid"
    source: ClassVar[str] = "Zenke, Ganguli 2018, arXiv 1705.11146"

    def __post_init__(self) -> None:
        positive("slope", self.slope)

    def derivative(self, x: Tensor) -> Tensor:
        return bump(self.slope * x).mul_(self.slope)

    def primitive(self, x: Tensor) -> Tensor:
        return 0.5 * torch.tanh(0.5 * self.slope * x)


@dataclass(frozen=True)
class FastSigmoid(Pointwise):
    """h = 1 / (1 + k |x|)², the derivative of x / (1 + k |x|)."""

    slope: float = setting(25.0, "slope k, > 0; h(0) = 1")

    name: ClassVar[str] = "fast-sigmoid"
    source: ClassVar[str] = "Zenke, Ganguli 2018, arXiv 1705.11146"

    def __post_init__(self) -> None:
        positive("slope", self.slope)

    @property
    def kinks(self) -> tuple[float, ...]:
        return (0.0,)

    def derivative(self, x: Tensor) -> Tensor:
        return x.abs().mul_(self.slope).add_(1).pow_(-2)

    def primitive(self, x: Tensor) -> Tensor:
        return x / (1 + self.slope * x.abs())


@dataclass(frozen=True)
class Erf(Pointwise):
    """h = α exp(-α² x²) / √π, the derivative of erf(αx) / 2: a normal density, area 1."""

    alpha: float = setting(2.0, "slope α = 1 / (√2 standard deviation), > 0")

    name: ClassVar[str] = "erf"
    source: ClassVar[str] = "Yin, Corradi, Bohté 2021"

    def __post_init__(self) -> None:
        positive("alpha", self.alpha)

    def derivative(self, x: Tensor) -> Tensor:
        return x.square().mul_(-(self.alpha**2)).add_(math.log(self.alpha / math.sqrt(math.pi))).exp_()

    def primitive(self, x: Tensor) -> Tensor:
        return 0.5 * torch.erf(self.alpha * x)


@dataclass(frozen=True)
class Exponential(Pointwise):
    """h = (α/2) exp(-α |x|), the derivative of sign(x) (1 - exp(-α |x|)) / 2: area 1."""

    alpha: float = setting(2.0, "slope α, > 0; h(0) = α / 2")

    name: ClassVar[str] = "exponential"
    source: ClassVar[str] = "Shrestha, Orchard 2018 (SLAYER)"

    def __post_init__(self) -> None:
        positive("alpha", self.alpha)

    @property
    def kinks(self) -> tuple[float, ...]:
        return (0.0,)

    def derivative(self, x: Tensor) -> Tensor:
        return x.abs().mul_(-self.alpha).add_(math.log(0.5 * self.alpha)).exp_()

    def primitive(self, x: Tensor) -> Tensor:
        return -0.5 * torch.sign(x) * torch.expm1(-self.alpha * x.abs())


def bump(u: Tensor) -> Tensor:
    """σ(u) σ(-u) = σ'(u) = (1 - tanh²(u/2)) / 4; u, a tensor of the caller's own, is written over."""
    s = u.sigmoid_()
    return torch.addcmul(s, s, s, value=-1)
