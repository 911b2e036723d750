"""Surrogates of the sign made of polynomials: h is zero beyond a bound, or one everywhere."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from altgrad.surrogates.estimator import positive, setting
from altgrad.surrogates.pointwise import Pointwise, within


@dataclass(frozen=True)
class Identity(Pointwise):
    """h = 1: the derivative of x."""

    name: ClassVar[str] = "identity"
    source: ClassVar[str] = "Bengio, Léonard, Courville 2013, arXiv 1308.3432"

    def derivative(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)

    def primitive(self, x: Tensor) -> Tensor:
        return x.clone()


@dataclass(frozen=True)
class Clipped(Pointwise):
    """h = 1 where |x| <= width, 0 beyond: the derivative of clip(x, -width, width), whose ends count as inside."""

    width: float = setting(1.0, "up to which |x| the derivative is 1, > 0")

    name: ClassVar[str] = "clipped"
    source: ClassVar[str] = "Courbariaux, Hubara, Soudry, El-Yaniv, Bengio 2016, arXiv 1602.02830"

    def __post_init__(self) -> None:
        positive("width", self.width)

    @property
    def kinks(self) -> tuple[float, ...]:
        return -self.width, self.width

    def derivative(self, x: Tensor) -> Tensor:
        return within(x, self.width)

    def primitive(self, x: Tensor) -> Tensor:
        return x.clamp(-self.width, self.width)


@dataclass(frozen=True)
class BiReal(Pointwise):
    """h = 2 - 2|x| where |x| <= 1, 0 beyond: the derivative of x (2 - |x|), a parabola on either side."""

    name: ClassVar[str] = "bireal"
    source: ClassVar[str] = "Liu, Wu, Luo, Yang, Liu, Cheng 2018, arXiv 1808.00278"

    @property
    def kinks(self) -> tuple[float, ...]:
        return -1.0, 0.0, 1.0

    def derivative(self, x: Tensor) -> Tensor:
        return x.abs().mul_(-2).add_(2).clamp_min_(0)

    def primitive(self, x: Tensor) -> Tensor:
        inside = x.clamp(-1, 1)
        return inside * (2 - inside.abs())


@dataclass(frozen=True)
class Triangle(Pointwise):
    """h = max(0, α - α² |x|): a triangle of area 1 and height α."""

    alpha: float = setting(1.0, "height α, and one over half the width, > 0")

    name: ClassVar[str] = "triangle"
    source: ClassVar[str] = "Esser et al. 2016; Bellec et al. 2018"

    def __post_init__(self) -> None:
        positive("alpha", self.alpha)

    @property
    def kinks(self) -> tuple[float, ...]:
        return -1 / self.alpha, 0.0, 1 / self.alpha

    def derivative(self, x: Tensor) -> Tensor:
        return x.abs().mul_(-(self.alpha**2)).add_(self.alpha).clamp_min_(0)

    def primitive(self, x: Tensor) -> Tensor:
        inside = (self.alpha * x).clamp(-1, 1)
        return inside * (1 - inside.abs() / 2)


@dataclass(frozen=True)
class Rectangle(Pointwise):
    """h = 1 / width where |x| <= width / 2, 0 beyond: area 1."""

    width: float = setting(1.0, "width, > 0")

    name: ClassVar[str] = "rectangle"
    source: ClassVar[str] = "Wu, Deng, Li, Zhu, Shi 2018"

    def __post_init__(self) -> None:
        positive("width", self.width)

    @property
    def kinks(self) -> tuple[float, ...]:
        return -self.width / 2, self.width / 2

    def derivative(self, x: Tensor) -> Tensor:
        return within(x, self.width / 2).div_(self.width)

    def primitive(self, x: Tensor) -> Tensor:
        return (x / self.width).clamp(-0.5, 0.5)
