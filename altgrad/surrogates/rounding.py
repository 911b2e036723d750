r"""Random rounding: a value between two levels becomes the upper one with the probability that keeps its mean.

    q = ⌊x⌋ + 1[u < x - ⌊x⌋],   E q = x

so h = 1 is the exact derivative of the mean. Nothing is saved but x.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from altgrad.rng import Key
from altgrad.surrogates.draws import uniform
from altgrad.surrogates.estimator import Estimator, positive, setting


class Reversed(torch.autograd.Function):
    """(x, u, estimator) -> q, by reverse mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, u: Tensor, estimator: Any) -> Tensor:  # type: ignore[override]
        return estimator.value(x, u)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, ctx.estimator = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * ctx.estimator.derivative(x), None, None


class Rounded(Reversed):
    """The same by forward mode too, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return tangent * ctx.estimator.derivative(x)


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
        rule = Reversed if torch.compiler.is_compiling() else Rounded
        return rule.apply(x, uniform(self.name, x, key, noise), self)  # type: ignore[no-any-return]


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
