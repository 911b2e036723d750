r"""Estimators of other steps than the sign: rounding to whole numbers, to three levels, and DSQ's 2^bits levels."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from altgrad.errors import require
from altgrad.surrogates.estimator import setting
from altgrad.surrogates.pointwise import Pointwise, emptied, sign, within
from altgrad.surrogates.smooth import bump


@dataclass(frozen=True)
class Round(Pointwise):
    """q = round(clip(x, low, high)), halves to the even neighbour; h = 1 where low <= x <= high, 0 beyond."""

    low: float = setting(-math.inf, "least value, a whole number or -inf")
    high: float = setting(math.inf, "greatest value, a whole number above low, or inf")

    name: ClassVar[str] = "round"
    source: ClassVar[str] = "Bengio, Léonard, Courville 2013, arXiv 1308.3432; Jacob et al. 2018, arXiv 1712.05877"
    operation: ClassVar[str] = "round"

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            require(isinstance(value, (int, float)) and (math.isinf(value) or value == round(value)), name, value, "a whole number, or infinite")
        require(self.low < self.high, "high", self.high, f"above low={self.low}")

    @property
    def kinks(self) -> tuple[float, ...]:
        return tuple(bound for bound in (self.low, self.high) if math.isfinite(bound))

    def value(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high).round()

    def derivative(self, x: Tensor) -> Tensor:
        return (x == x.clamp(self.low, self.high)).to(x.dtype)

    def primitive(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)


@dataclass(frozen=True)
class Ternary(Pointwise):
    """q = sign(x) where |x| > threshold, 0 within; h = 1 where |x| <= 1, 0 beyond."""

    threshold: float = setting(0.05, "up to which |x| the value is 0, in (0, 1)")

    name: ClassVar[str] = "ternary"
    source: ClassVar[str] = "Li, Zhang, Liu 2016, arXiv 1605.04711"
    operation: ClassVar[str] = "ternary"

    def __post_init__(self) -> None:
        require(isinstance(self.threshold, (int, float)) and 0 < self.threshold < 1, "threshold", self.threshold, "in (0, 1)")

    @property
    def kinks(self) -> tuple[float, ...]:
        return -1.0, 1.0

    def value(self, x: Tensor) -> Tensor:
        return torch.where(x.abs() <= self.threshold, torch.zeros_like(x), torch.sign(x))

    def derivative(self, x: Tensor) -> Tensor:
        return within(x, 1)

    def primitive(self, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)


@dataclass(frozen=True)
class DSQ(Pointwise):
    r"""2^bits levels from low to high; between two of them a tanh whose sharpness α sets stands in for the step.

        Δ = (high - low) / (2^bits - 1),  i = ⌊(x - low) / Δ⌋,  m_i = low + (i + 1/2) Δ,  k = ln(2/α - 1) / Δ,  s = 1 / (1 - α)
        φ = s tanh(k (x - m_i)),   F = low + Δ (i + (φ + 1)/2),   q = low + Δ (i + (sign φ + 1)/2),   h = F' = (Δ/2) s k (1 - tanh²),   0 outside

    F runs through every level, for s tanh(kΔ/2) = 1. One bit from -1 to 1 is the sign.
    """

    bits: int = setting(1, "bits, 1 to 8")
    alpha: float = setting(0.2, "α, in (0, 1): near 0 a step, near 1 a straight line")
    low: float = setting(-1.0, "least level")
    high: float = setting(1.0, "greatest level, above low")

    name: ClassVar[str] = "dsq"
    source: ClassVar[str] = "Gong, Liu, Jiang, Li, Hu, Lin, Yu, Yan 2019, arXiv 1908.05033"

    def __post_init__(self) -> None:
        require(isinstance(self.bits, int) and 1 <= self.bits <= 8, "bits", self.bits, "a whole number from 1 to 8")
        require(isinstance(self.alpha, (int, float)) and 0 < self.alpha < 1, "alpha", self.alpha, "in (0, 1)")
        require(math.isfinite(self.low), "low", self.low, "a number")
        require(math.isfinite(self.high) and self.low < self.high, "high", self.high, f"a number above low={self.low}")

    @property
    def operation(self) -> str:  # type: ignore[override]
        return "sign" if (self.bits, self.low, self.high) == (1, -1, 1) else "levels"

    @property
    def interval(self) -> float:
        """Δ, from one level to the next."""
        return (self.high - self.low) / (2**self.bits - 1)

    @property
    def kinks(self) -> tuple[float, ...]:
        return tuple(self.low + i * self.interval for i in range(2**self.bits))

    def located(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(i, k (x - m_i)) of x, which is clipped to [low, high]."""
        inside, k = x.clamp(self.low, self.high), math.log(2 / self.alpha - 1) / self.interval
        if self.bits == 1:
            return torch.zeros((), dtype=x.dtype, device=x.device), inside.sub_(0.5 * (self.low + self.high)).mul_(k)
        i = ((inside - self.low) / self.interval).floor().clamp_max(2**self.bits - 2)
        return i, inside.sub_(self.low + (i + 0.5) * self.interval).mul_(k)

    def value(self, x: Tensor) -> Tensor:
        if self.operation == "sign":
            return sign(x)
        i, u = self.located(x)
        return self.low + self.interval * (i + 0.5 * (sign(u) + 1))

    def derivative(self, x: Tensor) -> Tensor:
        steepness = math.log(2 / self.alpha - 1)  # k Δ
        height = 0.5 * steepness / (1 - self.alpha)  # (Δ/2) s k
        if self.operation == "sign":
            return bump(emptied(x, 1).mul_(steepness)).mul_(4 * height).to(x.dtype)
        _, u = self.located(x)
        inside = x.sub(x.clamp(self.low, self.high)).abs_().neg_().sign_().add_(1)  # 1 where nothing was clipped off
        return inside.mul_(bump(u.mul_(2)).mul_(4 * height))

    def primitive(self, x: Tensor) -> Tensor:
        i, u = self.located(x)
        return self.low + self.interval * (i + 0.5 * (torch.tanh(u) / (1 - self.alpha) + 1))


def bits_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """(least, greatest) whole number of `bits` bits: -2^(bits-1) … 2^(bits-1) - 1 where signed, 0 … 2^bits - 1 otherwise."""
    require(isinstance(bits, int) and not isinstance(bits, bool) and 1 <= bits <= 8, "bits", bits, "a whole number from 1 to 8")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
