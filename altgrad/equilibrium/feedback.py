r"""A net in layers whose ways up and down have weights of their own: no energy, a field.

    s_l = ρ(W_l s_{l-1} + B_{l+1}ᵀ s_{l+1} + b_l),   s_0 = x;      B_l = cos(angle) W_l + sin(angle) R_l at first, R_l random as W_l is

Source: Laborieux et al. 2021, arXiv 2006.03824, section 3.3; the angle: Laborieux and Zenke 2023, arXiv 2309.02214.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from altgrad.engine import Tree
from altgrad.equilibrium.layered import RANGES, activation, check_activation, first_weights
from altgrad.equilibrium.relaxation import State
from altgrad.errors import require
from altgrad.rng import Key


class LayeredFeedback(nn.Module):
    """A layered net with backward weights of their own.

    Args:
        sizes: units of the input, the hidden layers and the output; without hidden layers nothing goes back.
        key: addresses the first weights.
        hidden: activation of the hidden layers, "sigmoid" or "tanh".
        output: of the output, "linear", "sigmoid" or "tanh".
        angle: between the first weights up and down, in degrees in [0, 180]: 0 is a Hopfield net's, 90 knows nothing of the other.
        gain: of the first weights, whose deviation is gain / √fan in.
        sweeps: of the plain forward pass, from zeros.
    """

    affine = True  # the drive, in the state

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        key: Key,
        hidden: str = "tanh",
        output: str = "linear",
        angle: float = 90.0,
        gain: float = 0.5,
        sweeps: int = 30,
    ):
        super().__init__()
        require(
            len(sizes) >= 3 and min(sizes) >= 1, "sizes", tuple(sizes), "units of the input, of one or more hidden layers and of the output, each at least 1"
        )
        require(0 <= angle <= 180, "angle", angle, "in [0, 180] degrees")
        require(0 < gain < math.inf, "gain", gain, "a number > 0")
        check_activation("hidden", hidden)
        check_activation("output", output)
        require(isinstance(sweeps, int) and sweeps >= 1, "sweeps", sweeps, "a whole number >= 1")
        self.sizes, self.kinds, self.sweeps = tuple(sizes), [hidden] * (len(sizes) - 2) + [output], sweeps
        shapes = [(after, before) for before, after in itertools.pairwise(sizes)]
        self.weights = nn.ParameterList(first_weights(key, f"weights.{number}", shape, gain) for number, shape in enumerate(shapes))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(after)) for after in sizes[1:])
        random = [first_weights(key, f"backward.{number}", shape, gain) for number, shape in enumerate(shapes[1:])]
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        self.backward_weights = nn.ParameterList(nn.Parameter((cos * up + sin * own).detach()) for up, own in zip(list(self.weights)[1:], random, strict=True))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(up, down): the names of weights that join the same units."""
        return [(f"weights.{number + 1}", f"backward_weights.{number}") for number in range(len(self.backward_weights))]

    @property
    def range(self) -> tuple[float, float]:
        """Between what the outputs lie."""
        return RANGES[self.kinds[-1]]

    def rest(self, params: Tree, x: Tensor) -> State:
        return tuple(params["biases.0"].new_zeros(x.shape[0], units) for units in self.sizes[1:])

    def output(self, s: State) -> Tensor:
        return s[-1]

    def drive(self, params: Tree, s: State, x: Tensor) -> State:
        """What every layer is told from below and from above."""
        found = []
        for number in range(len(s)):
            below = x.flatten(1) if number == 0 else s[number - 1]
            told = below @ params[f"weights.{number}"].T + params[f"biases.{number}"]
            found.append(told + s[number + 1] @ params[f"backward_weights.{number}"] if number + 1 < len(s) else told)
        return tuple(found)

    def step(self, params: Tree, s: State, x: Tensor, force: State | None = None) -> State:
        """ρ of the drive and the force, all layers at once."""
        told = self.drive(params, s, x)
        told = told if force is None else tuple(own + push for own, push in zip(told, force, strict=True))
        return tuple(activation(kind, own) for kind, own in zip(self.kinds, told, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        params: Tree = dict(self.named_parameters())
        s = self.rest(params, x)
        for _ in range(self.sweeps):
            s = self.step(params, s, x)
        return self.output(s)


__all__ = ["LayeredFeedback"]
