r"""Claims about engines that train with a stand-in derivative: that the estimate is exact for it, on a network that quantises weights and activations.

The reference is made another way: each quantiser q with the surrogate h = F' becomes F(x) + (q(x) - F(x)), the bracket taken for a constant, and autograd
differentiates F.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from altgrad.conformance.claim import KEY, Subject, claim, hold
from altgrad.conformance.probes import CLASSES, Probe, data
from altgrad.engine import Bias, Engine
from altgrad.surrogates import get, pointwise_of
from altgrad.surrogates.pointwise import Pointwise
from altgrad.world import World

Quantiser = Callable[[Tensor, str], Tensor]  # (x, "activation" or "weight") -> q(x)
ROUNDING = 1e-9  # relative, in float64
RUN = 10  # updates of the run whose step the probe stands at


class Activation(nn.Module):
    """q(x)."""

    def __init__(self, quantiser: Quantiser) -> None:
        super().__init__()
        self.quantiser = quantiser

    def forward(self, x: Tensor) -> Tensor:
        return self.quantiser(x, "activation")


class Layer(nn.Linear):
    """x · (mean|W| q(W))ᵀ + b."""

    quantiser: Quantiser

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.abs().mean() * self.quantiser(self.weight, "weight"), self.bias)


def model(quantiser: Quantiser) -> nn.Sequential:
    """3-6-5-3, the middle layer's weights and both hidden layers' outputs quantised."""
    middle = Layer(6, 5)
    middle.quantiser = quantiser
    return nn.Sequential(nn.Linear(3, 6), Activation(quantiser), middle, Activation(quantiser), nn.Linear(5, CLASSES))


def quantising(quantiser: Quantiser | None = None) -> Probe:
    """The network with ReSTE for weights and activations, or with another quantiser."""
    own = get("reste", o=2.0)
    return Probe(lambda: model(quantiser or (lambda x, role: own(x, role=role))), data("network", 3), dtype=torch.float64)


def replaces_derivatives(engine: Engine) -> bool:
    """Whether an engine gives quantisers their derivative; it says where its own settings are found by the names `estimator` and `real_weights`."""
    return engine.bias is Bias.SURROGATE and hasattr(engine, "estimator") and hasattr(engine, "real_weights")


def stand_in(engine: Engine, share: float) -> Quantiser:
    """The quantiser by hand, as the engine's settings say that it is at `share` of the run."""
    named = engine.settings()
    chosen: Pointwise = get("reste", o=2.0) if named["estimator"] == "own" else pointwise_of(named["estimator"])
    if named.get("schedule") == "own":
        chosen = chosen.at(share)

    def quantiser(x: Tensor, role: str) -> Tensor:
        soft = chosen.primitive(x)
        if role == "weight" and share < named["real_weights"]:
            return soft
        return soft + (torch.where(x >= 0, 1.0, -1.0) - soft).detach()

    return quantiser


@claim(applies=replaces_derivatives)
def is_exact_for_the_stand_in_derivative(subject: Subject) -> None:
    """At three places of a run of RUN updates."""
    for step in (0, 3, 8):
        problem, other = quantising(), quantising(stand_in(subject.engine, step / RUN))
        problem.progress = step / RUN
        found = subject.bench(problem).estimate(KEY.at(step))
        loss = other.loss(other.params(), other.batch(0, World()), {})
        own = dict(zip(other.params(), torch.autograd.grad(loss, list(other.params().values())), strict=True))
        hold(
            abs(float(found.loss) - float(loss.detach())) <= ROUNDING, f"at step {step} the loss is {float(found.loss)}; by hand it is {float(loss.detach())}."
        )
        for name, grad in own.items():
            distance = float((found.grads[name] - grad).norm() / grad.norm().clamp_min(1e-30))
            hold(distance <= ROUNDING, f"at step {step} the gradient of {name} is {distance:.2g} away, relative, from that of the stand-in derivative.")
