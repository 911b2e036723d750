r"""Surrogates of the sign that sharpen along the run: from near the identity, whose gradients are calm, to near the sign, whose error is small."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from altgrad.errors import require
from altgrad.surrogates.estimator import clamped, positive, setting
from altgrad.surrogates.pointwise import Pointwise, emptied, within
from altgrad.surrogates.smooth import bump


@dataclass(frozen=True)
class EDE(Pointwise):
    """h = k t (1 - tanh²(t x)), k = max(1/t, 1): the derivative of k tanh(t x).

    `at(share)`: t = 10^(log start + share (log end - log start)).
    """

    t: float = setting(1.0, "sharpness t, > 0; `at` moves it")
    start: float = setting(0.1, "t at the beginning of the run, > 0")
    end: float = setting(10.0, "t at its end, > 0")

    name: ClassVar[str] = "ede"
    source: ClassVar[str] = "Qin, Gong, Liu, Shen, Wei, Yu, Song 2020, arXiv 1909.10788 (IR-Net)"

    def __post_init__(self) -> None:
        for name in ("t", "start", "end"):
            positive(name, getattr(self, name))

    def at(self, share: float) -> Self:
        low, high = math.log10(self.start), math.log10(self.end)
        return replace(self, t=10 ** (low + clamped(share) * (high - low)))

    def derivative(self, x: Tensor) -> Tensor:
        return bump(2 * self.t * x).mul_(4 * max(1.0, self.t))  # 1 - tanh² u = 4 σ'(2u)

    def primitive(self, x: Tensor) -> Tensor:
        return max(1 / self.t, 1.0) * torch.tanh(self.t * x)


@dataclass(frozen=True)
class ReSTE(Pointwise):
    r"""The derivative of sign(x) |x|^(1/o), cut off at t and straightened near 0, where it has no bound.

        h = m^((1-o)/o)          |x| <= m     the chord of the power function on [0, m]
        h = |x|^((1-o)/o) / o    m < |x| <= t
        h = 0                    t < |x|

    o = 1 is the clipped identity, o → ∞ the sign. `at(share)`: o = 1 + (end - 1)(1 - cos(π share / 2)).
    """

    o: float = setting(3.0, "power o, >= 1; `at` moves it")
    t: float = setting(1.5, "beyond which |x| the derivative is 0, > m")
    m: float = setting(0.1, "up to which |x| the chord takes the power function's place, > 0")
    end: float = setting(3.0, "o at the end of the run, >= 1; it begins at 1")

    name: ClassVar[str] = "reste"
    source: ClassVar[str] = "Wu, Gong, Xia, Zheng, Liu 2023, arXiv 2308.06689"

    def __post_init__(self) -> None:
        for name in ("o", "end"):
            value = getattr(self, name)
            require(isinstance(value, (int, float)) and 1 <= value < math.inf, name, value, "a number of at least 1")
        positive("m", self.m)
        require(isinstance(self.t, (int, float)) and self.m < self.t < math.inf, "t", self.t, f"a number above m={self.m}")

    @property
    def kinks(self) -> tuple[float, ...]:
        return -self.t, -self.m, self.m, self.t

    def at(self, share: float) -> Self:
        return replace(self, o=1 + (self.end - 1) * (1 - math.cos(0.5 * math.pi * clamped(share))))

    def derivative(self, x: Tensor) -> Tensor:
        if self.o == 1:
            return within(x, self.t)
        power = (1 - self.o) / self.o
        size = torch.threshold_(emptied(x, self.t).neg_(), self.m, self.m * self.o ** (1 / power))  # the number whose curve is at the chord's height
        return size.log2_().mul_(power).sub_(math.log2(self.o)).exp2_().to(x.dtype)  # not pow, which takes twice the time

    def primitive(self, x: Tensor) -> Tensor:
        size = x.abs()
        curved = torch.sign(x) * size.clamp(self.m, self.t).pow(1 / self.o)
        return torch.where(size <= self.m, x * self.m ** ((1 - self.o) / self.o), curved)

    def soft_sign(self, x: Tensor) -> Tensor:
        """f(x) = sign(x) |x|^(1/o), without cut or chord: what ReSTE's estimating error ‖f(w) - sign(w)‖ is measured against."""
        return torch.sign(x) * x.abs().pow(1 / self.o)
