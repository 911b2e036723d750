r"""Random rounding: a value between two levels becomes the upper one with the probability that keeps its mean.

    q = ⌊x⌋ + 1[u < x - ⌊x⌋],   E q = x

so h = 1 is the exact derivative of the mean. Nothing is saved but x.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from altgrad.rng import Key
from altgrad.surrogates.draws import uniform
from altgrad.surrogates.estimator import Estimator, positive, setting
from altgrad.surrogates.pointwise import with_derivative


@dataclass(frozen=True)
class Randomised(Estimator):
    """A number rounded at random to one of the two levels around it."""

    kind: ClassVar[str] = "stochastic"

    def value(self, x: Tensor, u: Tensor) -> Tensor:
        """q(x; u)."""
        raise NotImplementedError

    def derivative(self, x: Tensor) -> Tensor:
        """dE q/dx."""
        raise NotImplementedError

    def __call__(self, x: Tensor, *, key: Key | None = None, noise: Tensor | None = None) -> Tensor:
        """q(x; u), arguments and errors as for Categorical; x and the noise have any shape."""
        return with_derivative(x, self, self, uniform(self.name, x, key, noise))


@dataclass(frozen=True)
class StochasticRounding(Randomised):
    """Whole multiples of `step`; h = 1, exact for the mean."""

    step: float = setting(1.0, "distance between levels, > 0")

    name: ClassVar[str] = "stochastic-rounding"
    source: ClassVar[str] = "Gupta, Agrawal, Gopalakrishnan, Narayanan 2015, arXiv 1502.02551"

    def __post_init__(self) -> None:
        positive("step", self.step)

    def value(self, x: Tensor, u: Tensor) -> Tensor:
        scaled = x / self.step
        low = scaled.floor()
        return self.step * (low + (u < scaled - low).to(x.dtype))

    def derivative(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


@dataclass(frozen=True)
class StochasticSign(Randomised):
    """+1 with probability (1 + clip(x, -1, 1)) / 2, else -1; h = 1 where |x| <= 1, 0 beyond: exact for the mean."""

    name: ClassVar[str] = "stochastic-sign"
    source: ClassVar[str] = "Courbariaux, Bengio, David 2015, arXiv 1511.00363"

    def value(self, x: Tensor, u: Tensor) -> Tensor:
        return 2 * (u < 0.5 * (1 + x.clamp(-1, 1))).to(x.dtype) - 1

    def derivative(self, x: Tensor) -> Tensor:
        return (x.abs() <= 1).to(x.dtype)
