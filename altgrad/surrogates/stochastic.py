r"""Estimators of a random choice: a one-hot sample D of p = softmax θ over the last axis, whose stand-in derivative is a sum of softmax Jacobians.

    D = onehot argmax(θ + g),  g = -ln(-ln u)          θ̄ = Σ_i c_i J(q_i) ȳ,   J(q) = diag(q) - q qᵀ

J is symmetric, so forward mode is the same product: θ̇ -> Σ_i c_i J(q_i) θ̇.

    straight-through   J(p)                                     unbiased where the loss is linear in D
    gumbel-softmax     J(softmax((θ + g)/τ)) / τ                biased, less noise; the derivative of the relaxed sample
    reinmax            2 J((softmax(θ/τ) + D)/2) - J(p)/2       at τ = 1 unbiased where the loss is quadratic in D

u is drawn at an address (draws.py); a test may hand it in. Saved: θ and u.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from altgrad.errors import require
from altgrad.rng import Key
from altgrad.surrogates.draws import gumbel, uniform
from altgrad.surrogates.estimator import Estimator, positive, setting

Terms = list[tuple[float, Tensor]]  # (c, q)


class Reversed(torch.autograd.Function):
    """(θ, u, estimator) -> D, by reverse mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, u: Tensor, estimator: "Categorical") -> Tensor:  # type: ignore[override]
        return one_hot(logits, u)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        logits, u, ctx.estimator = inputs
        ctx.save_for_backward(logits, u)
        ctx.save_for_forward(logits, u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return ctx.estimator.product(*ctx.saved_tensors, grad), None, None


class Chosen(Reversed):
    """The same by forward mode too, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return ctx.estimator.product(*ctx.saved_tensors, tangent)


@dataclass(frozen=True)
class Categorical(Estimator):
    """A one-hot sample; subclasses give `terms`."""

    kind: ClassVar[str] = "stochastic"

    def terms(self, logits: Tensor, u: Tensor) -> Terms:
        """(c_i, q_i), q_i in the shape of the logits."""
        raise NotImplementedError

    def product(self, logits: Tensor, u: Tensor, vector: Tensor) -> Tensor:
        """Σ_i c_i J(q_i) vector."""
        parts = [c * q * (vector - (q * vector).sum(-1, keepdim=True)) for c, q in self.terms(logits, u)]
        return sum(parts[1:], parts[0])

    def __call__(self, logits: Tensor, *, key: Key | None = None, noise: Tensor | None = None) -> Tensor:
        """D, one-hot, with the stand-in derivative.

        Args:
            logits: θ [..., classes].
            key: the address of the noise; within an engine's pass it may be left out.
            noise: u in (0, 1) in the shape of the logits, instead of a key.

        Raises:
            UsageError: neither key nor noise. SettingError: fewer than two classes.
        """
        require(logits.ndim >= 1 and logits.shape[-1] >= 2, "logits", tuple(logits.shape), "of shape [..., classes], with two classes or more")
        rule = Reversed if torch.compiler.is_compiling() else Chosen
        return rule.apply(logits, uniform(self.name, logits, key, noise).to(logits.dtype), self)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class StraightThroughSample(Categorical):
    """J(p): the derivative of the mean E D = p."""

    name: ClassVar[str] = "straight-through"
    source: ClassVar[str] = "Bengio, Léonard, Courville 2013, arXiv 1308.3432"

    def terms(self, logits: Tensor, u: Tensor) -> Terms:
        return [(1.0, torch.softmax(logits, -1))]


@dataclass(frozen=True)
class GumbelSoftmax(Categorical):
    """J(softmax((θ + g)/τ)) / τ: the derivative of the relaxed sample, as in torch.nn.functional.gumbel_softmax(hard=True)."""

    tau: float = setting(1.0, "temperature τ, > 0: low is close to the sample and noisy, high is smooth and biased")

    name: ClassVar[str] = "gumbel-softmax"
    source: ClassVar[str] = "Jang, Gu, Poole 2017, arXiv 1611.01144; Maddison, Mnih, Teh 2017, arXiv 1611.00712"

    def __post_init__(self) -> None:
        positive("tau", self.tau)

    def terms(self, logits: Tensor, u: Tensor) -> Terms:
        return [(1 / self.tau, torch.softmax((logits + gumbel(u)) / self.tau, -1))]


@dataclass(frozen=True)
class ReinMax(Categorical):
    """2 J((softmax(θ/τ) + D)/2) - J(p)/2: Heun's rule in place of the straight-through estimator's Euler step."""

    tau: float = setting(1.0, "temperature τ, >= 1; above 1 there is less noise, and bias even for linear losses")

    name: ClassVar[str] = "reinmax"
    source: ClassVar[str] = "Liu, Dong, Liu, Yu, Gao 2023, arXiv 2304.08612"

    def __post_init__(self) -> None:
        positive("tau", self.tau)
        require(self.tau >= 1, "tau", self.tau, "at least 1")

    def terms(self, logits: Tensor, u: Tensor) -> Terms:
        tempered = 0.5 * (torch.softmax(logits / self.tau, -1) + one_hot(logits, u))
        return [(2.0, tempered), (-0.5, torch.softmax(logits, -1))]


def one_hot(logits: Tensor, u: Tensor) -> Tensor:
    """onehot argmax(θ + g)."""
    return indicator((logits + gumbel(u)).argmax(-1, keepdim=True), logits)


def indicator(chosen: Tensor, like: Tensor) -> Tensor:
    """One-hot rows of `like`'s shape and dtype from indices [..., 1]; F.one_hot looks at its values, which vmap does not allow."""
    return (torch.arange(like.shape[-1], device=like.device) == chosen).to(like.dtype)
