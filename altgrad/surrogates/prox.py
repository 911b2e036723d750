r"""Estimators that act behind the optimizer: after a step a weight goes part of the way to the nearest level, and no derivative is replaced.

    prox(w) = argmin_x ½ ‖x - w‖² + λ R(x)

    proxquant           R = Σ ||x| - 1|                     sign(w) (1 + sign(|w| - 1) max(0, ||w| - 1| - λ))
    proxquant-ternary   R = ½ Σ (x - tern x)²               (w + λ tern w) / (1 + λ)
    binary-relax        R = ½ Σ (x - sign x)²               (w + λ sign w) / (1 + λ)

λ grows along the run: `at(share)` has λ = share · end. As λ → ∞ the step becomes the projection `hard`; the straight-through estimator with weights
is that projection, made lazily.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from altgrad.errors import require
from altgrad.surrogates.estimator import Estimator, clamped, setting
from altgrad.surrogates.pointwise import sign


@dataclass(frozen=True)
class Prox(Estimator):
    """`estimator(w)`: what a proximal step of strength λ makes of w; subclasses give `distance`, `hard` and the step."""

    strength: float = setting(0.1, "λ, >= 0; `at` moves it")
    end: float = setting(1.0, "λ at the end of the run, >= 0; it begins at 0")

    kind: ClassVar[str] = "prox"
    SOURCE: ClassVar[str] = "Bai, Wang, Liberty 2019, arXiv 1810.00861"

    def __post_init__(self) -> None:
        for name in ("strength", "end"):
            value = getattr(self, name)
            require(isinstance(value, (int, float)) and 0 <= value < float("inf"), name, value, "a number of at least 0")

    def at(self, share: float) -> Self:
        return replace(self, strength=self.end * clamped(share))

    def hard(self, w: Tensor) -> Tensor:
        """The nearest levels."""
        return sign(w)

    def distance(self, x: Tensor) -> Tensor:
        """R, elementwise."""
        return 0.5 * (x - self.hard(x)).square()

    def step(self, w: Tensor, strength: float) -> Tensor:
        """argmin_x ½ (x - w)² + λ R(x)."""
        return (w + strength * self.hard(w)) / (1 + strength)

    def __call__(self, w: Tensor, *, strength: float | None = None) -> Tensor:
        """The proximal step, a new tensor without a graph.

        Args:
            w: weights as the optimizer left them.
            strength: λ >= 0; the estimator's own where it is left out.
        """
        chosen = self.strength if strength is None else strength
        require(isinstance(chosen, (int, float)) and chosen >= 0, "strength", chosen, "a number of at least 0")
        return self.step(w.detach(), float(chosen))


@dataclass(frozen=True)
class ProxQuant(Prox):
    """Soft thresholding towards ±1: each weight comes closer by at most λ."""

    name: ClassVar[str] = "proxquant"
    source: ClassVar[str] = Prox.SOURCE

    def distance(self, x: Tensor) -> Tensor:
        return (x.abs() - 1).abs()

    def step(self, w: Tensor, strength: float) -> Tensor:
        apart = w.abs() - 1
        return sign(w) * (1 + torch.sign(apart) * (apart.abs() - strength).clamp_min(0))


@dataclass(frozen=True)
class ProxTernary(Prox):
    """A part of the way to -1, 0 or 1."""

    threshold: float = setting(0.5, "up to which |w| the level is 0, in (0, 1)")

    name: ClassVar[str] = "proxquant-ternary"
    source: ClassVar[str] = Prox.SOURCE

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.threshold, (int, float)) and 0 < self.threshold < 1, "threshold", self.threshold, "in (0, 1)")

    def hard(self, w: Tensor) -> Tensor:
        return torch.where(w.abs() <= self.threshold, torch.zeros_like(w), torch.sign(w))


@dataclass(frozen=True)
class BinaryRelax(Prox):
    """A part of the way to ±1, in proportion to the distance."""

    name: ClassVar[str] = "binary-relax"
    source: ClassVar[str] = "Yin, Zhang, Lyu, Osher, Qi, Xin 2018, arXiv 1801.06313"
