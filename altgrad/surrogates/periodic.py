r"""BiPer: a square wave of the weight, whose stand-in is the sine that it is the sign of."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from altgrad.surrogates.estimator import positive, setting
from altgrad.surrogates.pointwise import Pointwise, sign


@dataclass(frozen=True)
class BiPer(Pointwise):
    """q = sign(sin ωw), h = ω cos ωw: for weights; a sine does for the first share of the run (`real_weights` of the engine straight-through).

    The mean square between the sine and its sign is 3/2 - 4/π over a period, at any ω; ω sets how far a weight moves before it flips.
    """

    omega: float = setting(20.0, "angular frequency ω, > 0; a weight's sign flips every π / ω")

    name: ClassVar[str] = "biper"
    source: ClassVar[str] = "Vargas, Correa, Hinojosa, Arguello 2024, arXiv 2404.01278"
    operation: ClassVar[str] = "square-wave"

    def __post_init__(self) -> None:
        positive("omega", self.omega)

    def value(self, x: Tensor) -> Tensor:
        return sign(torch.sin(self.omega * x))

    def derivative(self, x: Tensor) -> Tensor:
        return self.omega * torch.cos(self.omega * x)

    def primitive(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * x)

    def penalty(self, x: Tensor) -> Tensor:
        """mean sin² ωw, a scalar: the term that the published code adds to the loss, 0.037 to 0.0468 times; least where the sine is 0."""
        return torch.sin(self.omega * x).square().mean()

    QUANTISATION_ERROR: ClassVar[float] = 1.5 - 4 / math.pi
