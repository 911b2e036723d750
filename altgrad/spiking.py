r"""Spiking networks: leaky integrate-and-fire units, whose hard spikes carry a declared stand-in derivative.

    u_t = λ u_{t-1} + I_t - θ s_{t-1},    s_t = H(u_t - θ),    u_0 = s_0 = 0

H, the step, has no derivative that is of use. Engines that differentiate see the surrogate's h'(u - θ) in its place, by reverse and by forward mode
alike, so that backprop on such a network is surrogate-gradient training; engines that look at losses alone see the step and nothing else.

    fast-sigmoid   h'(x) = 1 / (1 + k |x|)²                arctan   h'(x) = (k / 2) / (1 + (π k x / 2)²)

Time is the second axis, [examples, steps, units], and each layer runs through all steps before the next one starts: a linear layer is called once.

Source: Neftci, Mostafa, Zenke 2019, arXiv 1901.09948 (surrogate gradients); Zenke, Ganguli 2018, arXiv 1705.11146 (fast sigmoid); Fang et al. 2021,
arXiv 2007.05785 (arctan).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from altgrad.errors import SettingError, near_miss, require
from altgrad.networks import Shape, setting, whole, widths
from altgrad.surrogates.pointwise import Pointwise, with_derivative
from altgrad.surrogates.smooth import ATan, FastSigmoid

SURROGATES: dict[str, Callable[[float], Pointwise]] = {
    "fast-sigmoid": lambda slope: FastSigmoid(slope=slope),
    "arctan": lambda slope: ATan(alpha=slope),
}
CODES = ("direct", "rate", "latency")


class Step:
    """H(x): 1 where x >= 0, 0 below."""

    @staticmethod
    def value(x: Tensor) -> Tensor:
        return (x >= 0).to(x.dtype)


def spike(x: Tensor, surrogate: Pointwise) -> Tensor:
    """H(x), with the derivative of a surrogate."""
    return with_derivative(x, Step, surrogate)


class LeakyIntegrateAndFire(nn.Module):
    """Currents [examples, steps, units] -> spikes, 0 or 1, of the same shape.

    Args:
        decay: λ, the share of a membrane potential that is left after a step, in [0, 1].
        threshold: θ, above 0: a unit fires where its potential reaches it, which takes θ off the potential of the next step.
        surrogate: one of SURROGATES; slope: its k, above 0.
    """

    def __init__(self, decay: float = 0.9, threshold: float = 1.0, *, surrogate: str = "fast-sigmoid", slope: float = 5.0):
        super().__init__()
        require(0 <= decay <= 1, "decay", decay, "in [0, 1]")
        require(0 < threshold < math.inf, "threshold", threshold, "above 0")
        require(0 < slope < math.inf, "slope", slope, "above 0")
        if surrogate not in SURROGATES:
            raise SettingError(near_miss("surrogate", surrogate, SURROGATES))
        self.decay, self.threshold, self.surrogate, self.slope = float(decay), float(threshold), surrogate, float(slope)
        self.estimator = SURROGATES[surrogate](self.slope)

    def forward(self, currents: Tensor) -> Tensor:
        potential, spikes = torch.zeros_like(currents[:, 0]), torch.zeros_like(currents[:, 0])  # [examples, units]
        fired = []
        for current in currents.unbind(1):
            potential = self.decay * potential + current - self.threshold * spikes
            spikes = spike(potential - self.threshold, self.estimator)
            fired.append(spikes)
        return torch.stack(fired, 1)

    def extra_repr(self) -> str:
        return f"decay={self.decay:g}, threshold={self.threshold:g}, surrogate={self.surrogate}, slope={self.slope:g}"


class Held(nn.Module):
    """[examples, units] -> [examples, steps, units]: the same current at every step."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1).expand(-1, self.steps, -1)


class SpikeCode(nn.Module):
    r"""[examples, features] -> spikes [examples, steps, features]; p is a feature's place in its example's own range, in [0, 1].

    rate      s_t = ⌊t p⌋ - ⌊(t - 1) p⌋, t = 1 … T: evenly spaced spikes, T p of them; nothing is drawn
    latency   one spike, at step 1 + round((1 - p)(T - 1)): the stronger, the earlier; none where p = 0
    """

    def __init__(self, steps: int, *, code: str):
        super().__init__()
        self.steps, self.code = steps, code

    def forward(self, x: Tensor) -> Tensor:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        share = ((x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)).unsqueeze(1)  # p [examples, 1, features]
        step = torch.arange(1, self.steps + 1, dtype=x.dtype, device=x.device)[:, None]
        if self.code == "rate":
            return (step * share).floor() - ((step - 1) * share).floor()
        return ((step - 1 == ((1 - share) * (self.steps - 1)).round()) & (share > 0)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.steps}, code={self.code}"


class MeanOverSteps(nn.Module):
    """[examples, steps, units] -> [examples, units]: the share of steps in which a unit fires."""

    def forward(self, spikes: Tensor) -> Tensor:
        return spikes.mean(1)


@dataclass(frozen=True)
class Spiking:
    """Layers of leaky integrate-and-fire units; read by units that sum up their input over all steps, W Σ s_t / T + b, and neither leak nor fire."""

    hidden: str = setting("128", "units of the spiking layers")
    steps: int = setting(8, "time steps of an example")
    code: str = setting("direct", "how an example enters: direct (a current, the same at every step), rate or latency (spikes)")
    decay: float = setting(0.9, "share of a membrane potential that is left after a step, in [0, 1]")
    threshold: float = setting(1.0, "potential at which a unit fires, and what firing takes off it, > 0")
    surrogate: str = setting("fast-sigmoid", "the derivative that differentiating engines see: fast-sigmoid or arctan")
    slope: float = setting(5.0, "how steep the surrogate is, > 0")

    def build(self, input_shape: Shape, classes: int) -> nn.Module:
        whole("steps", self.steps)
        if self.code not in CODES:
            raise SettingError(near_miss("code", self.code, CODES))
        layers: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
        if self.code != "direct":
            layers.append(SpikeCode(self.steps, code=self.code))
        width = math.prod(input_shape)
        for place, wider in enumerate(widths("hidden", self.hidden)):
            layers.append(nn.Linear(width, wider))
            if self.code == "direct" and place == 0:
                layers.append(Held(self.steps))  # behind the layer: its current is computed once
            layers.append(LeakyIntegrateAndFire(self.decay, self.threshold, surrogate=self.surrogate, slope=self.slope))
            width = wider
        return nn.Sequential(*layers, MeanOverSteps(), nn.Linear(width, classes))
