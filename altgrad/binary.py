r"""A binary multilayer perceptron: signs for activations and for weights, with batch norm before every sign.

    x -> W_1 x -> BN -> [ sign -> α sign(W_l) -> BN ] … -> sign -> W_L

The first and the last layer keep real weights by default, as is usual: they hold few of the weights and much of the accuracy.
"""

import itertools
import math
from dataclasses import dataclass

from torch import nn

from altgrad.errors import SettingError, near_miss, require
from altgrad.networks import Shape, setting, widths

REAL = "real"
EXEMPT = ("first-last", "first", "none")


@dataclass(frozen=True)
class BinaryMLP:
    """Fully connected layers with binary weights and activations; `weights` and `activations` name a surrogate (altgrad.surrogates) or "real"."""

    hidden: str = setting("256-256-256", "widths of the hidden layers")
    weights: str = setting("clipped", 'surrogate of the weights, as in "reste" or "reste,o=2"; or real')
    activations: str = setting("bireal", "surrogate of the activations; or real, which is a hard tanh")
    scale: str = setting("tensor", "factor of binary weights, mean|w|: of the layer (tensor), of each output (channel), or none")
    exempt: str = setting("first-last", "layers with real weights: first-last, first or none")

    def build(self, input_shape: Shape, classes: int) -> nn.Module:
        from altgrad.surrogates import pointwise_of
        from altgrad.surrogates.modules import SCALES, BinaryLinear, SignActivation

        for name, value, allowed in (("scale", self.scale, SCALES), ("exempt", self.exempt, EXEMPT)):
            if value not in allowed:
                raise SettingError(near_miss(name, str(value), allowed))
        require(bool(str(self.weights)) and bool(str(self.activations)), "weights", self.weights, "the name of a surrogate, or real")
        if self.activations != REAL:
            pointwise_of(self.activations, operations=("sign",))
        sizes = [math.prod(input_shape), *widths("hidden", self.hidden), classes]
        last = len(sizes) - 2
        real = {"first-last": {0, last}, "first": {0}, "none": set()}[self.exempt]
        layers: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
        for place, (inner, outer) in enumerate(itertools.pairwise(sizes)):
            if place in real or self.weights == REAL:
                layers.append(nn.Linear(inner, outer))
            else:
                layers.append(BinaryLinear(inner, outer, estimator=self.weights, scale=self.scale))
            if place < last:
                layers += [nn.BatchNorm1d(outer), nn.Hardtanh() if self.activations == REAL else SignActivation(self.activations)]
        return nn.Sequential(*layers)
