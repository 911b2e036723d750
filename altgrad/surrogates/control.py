r"""REBAR and RELAX: unbiased for every loss, by a score-function estimate with a control variate that is differentiated through.

    b = onehot argmax z,   z = θ' + g(u),    θ' = log softmax θ          z̃ ~ p(z | b) from fresh noise v:
    z̃_b = -ln(-ln v_b),    z̃_i = -ln(-ln v_i / p_i - ln v_b)  elsewhere

    ĝ = (f(b) - c(z̃)) ∇ log p(b) + ∇c(z) - ∇c(z̃),    c(z) = η f(softmax(z / λ)) + r(z)

REBAR has r = 0; RELAX a trained r. E ĝ = ∇E f(b) for any c. The estimate is the gradient of the scalar that a call returns, whose value is f(b).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from altgrad.errors import ShapeError, require
from altgrad.rng import Key
from altgrad.surrogates.draws import gumbel, uniform
from altgrad.surrogates.estimator import Estimator, positive, setting
from altgrad.surrogates.stochastic import indicator

Loss = Callable[[Tensor], Tensor]  # [..., classes] -> [...]


@dataclass(frozen=True)
class Rebar(Estimator):
    """`estimator(logits, loss=f, key=…)`: f(b) with the unbiased estimate as its gradient; f takes relaxed samples too."""

    temperature: float = setting(0.5, "λ of the relaxed sample, > 0")
    eta: float = setting(1.0, "weight η of the control variate; any is unbiased")

    kind: ClassVar[str] = "stochastic"
    name: ClassVar[str] = "rebar"
    source: ClassVar[str] = "Tucker, Mnih, Maddison, Lawson, Sohl-Dickstein 2017, arXiv 1703.07370"

    def __post_init__(self) -> None:
        positive("temperature", self.temperature)
        require(isinstance(self.eta, (int, float)) and abs(self.eta) < float("inf"), "eta", self.eta, "a number")

    def control(self, loss: Loss, z: Tensor, residual: Loss | None) -> Tensor:
        """c(z)."""
        found = self.eta * loss(torch.softmax(z / self.temperature, -1))
        return found if residual is None else found + residual(z)

    def __call__(
        self, logits: Tensor, *, loss: Loss, key: Key | None = None, noise: tuple[Tensor, Tensor] | None = None, residual: Loss | None = None
    ) -> Tensor:
        """f(b), one for each leading index of the logits, with ĝ as the gradient with respect to them.

        Args:
            logits: θ [..., classes].
            loss: f: [..., classes] -> [...], differentiable, defined between the corners.
            key: the address of u and v; noise: (u, v) in (0, 1), each in the shape of the logits, instead of it.
            residual: r: [..., classes] -> [...] of RELAX; its own parameters are to be trained to make ĝ² small, on a second derivative.

        Raises:
            UsageError: neither key nor noise. ShapeError: f does not return one value an example.
        """
        given = (None, None) if noise is None else noise
        folds = (key, key) if key is None else (key.fold("u"), key.fold("v"))
        u, v = (uniform(self.name, logits, own, draw) for own, draw in zip(folds, given, strict=True))
        log_p = torch.log_softmax(logits, -1)
        z = log_p + gumbel(u.to(logits.dtype))
        sample = indicator(z.detach().argmax(-1, keepdim=True), logits)
        conditional = resampled(log_p, sample, v.to(logits.dtype))
        value, at_z, at_conditional = loss(sample), self.control(loss, z, residual), self.control(loss, conditional, residual)
        if value.shape != logits.shape[:-1]:
            raise ShapeError(f"the loss gave shape {tuple(value.shape)} for samples of shape {tuple(sample.shape)}; it must give {tuple(logits.shape[:-1])}.")
        score = (sample * log_p).sum(-1)
        gradient = (value - at_conditional).detach() * score + at_z - at_conditional
        return value + gradient - gradient.detach()


@dataclass(frozen=True)
class Relax(Rebar):
    """REBAR with a trained part r(z) in the control variate, given as `residual`."""

    name: ClassVar[str] = "relax"
    source: ClassVar[str] = "Grathwohl, Choi, Wu, Roeder, Duvenaud 2018, arXiv 1711.00123"


def resampled(log_p: Tensor, sample: Tensor, v: Tensor) -> Tensor:
    """z̃, of the law of z given that argmax z is `sample`."""
    exponential = -torch.log(v)  # [..., classes]
    own = (sample * exponential).sum(-1, keepdim=True)
    return -torch.log(torch.where(sample > 0, exponential, exponential * torch.exp(-log_p) + own))
