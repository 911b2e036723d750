r"""Nets that settle: continuous Hopfield nets, in layers or with any graph.

    layers   E(s) = Σ_l [ Σ_i G(s_l,i) - s_lᵀ (W_l s_{l-1} + b_l) ],   s_0 = x,   G' = ρ⁻¹;     ∂E/∂s_l = 0  ⇔  s_l = ρ(W_l s_{l-1} + W_{l+1}ᵀ s_{l+1} + b_l)
    graph    s ← ρ(W s + U x + b), the last units are the output;  with W = Wᵀ it has the energy Σ G(s) - ½ sᵀWs - sᵀ(Ux + b)

ρ(z) = σ(4z - 2) or tanh(z); of the layered net's output, ρ(z) = z unless told otherwise. All are holomorphic about the real axis.

Source: Hopfield 1984, PNAS 81; Scellier and Bengio 2017, arXiv 1602.05179; Laborieux and Zenke 2022, arXiv 2209.00530.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from altgrad.engine import Tree
from altgrad.equilibrium.relaxation import State
from altgrad.errors import SettingError, near_miss, require
from altgrad.kernels import noise
from altgrad.rng import Key, tensor_id

RANGES = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "linear": (-math.inf, math.inf)}


def activation(kind: str, value: Tensor) -> Tensor:
    """ρ(z)."""
    return torch.sigmoid(4 * value - 2) if kind == "sigmoid" else torch.tanh(value) if kind == "tanh" else value


def integral(kind: str, s: Tensor) -> Tensor:
    """G(s), the integral of ρ⁻¹, up to a constant."""
    least = torch.finfo(s.dtype).tiny  # 0 ln 0 = 0
    if kind == "sigmoid":
        return (s * torch.log(s + least) + (1 - s) * torch.log(1 - s + least)) / 4 + s / 2
    if kind == "tanh":
        return ((1 + s) * torch.log(1 + s + least) + (1 - s) * torch.log(1 - s + least)) / 2
    return s * s / 2


def check_activation(setting: str, kind: str) -> None:
    if kind not in RANGES:
        raise SettingError(near_miss(setting, kind, RANGES))


def first_weights(key: Key, name: str, shape: Sequence[int], gain: float) -> nn.Parameter:
    """Normal, standard deviation gain / √fan in."""
    return nn.Parameter(noise.draw("normal", key.fold("model"), tensor_id(name), [0], shape)[0] * (gain / math.sqrt(shape[-1])))


class LayeredHopfield(nn.Module):
    """A Hopfield net in layers, whose neighbours act on one another by one matrix and its transpose.

    Args:
        sizes: units of the input, the hidden layers and the output.
        key: addresses the first weights.
        hidden: activation of the hidden layers, "sigmoid" or "tanh".
        output: of the output, "linear", "sigmoid" or "tanh".
        sweeps: of the plain forward pass, from zeros.
    """

    def __init__(self, sizes: Sequence[int], *, key: Key, hidden: str = "sigmoid", output: str = "linear", sweeps: int = 30):
        super().__init__()
        require(len(sizes) >= 2 and min(sizes) >= 1, "sizes", tuple(sizes), "units of the input, of hidden layers and of the output, each at least 1")
        check_activation("hidden", hidden)
        check_activation("output", output)
        require(isinstance(sweeps, int) and sweeps >= 1, "sweeps", sweeps, "a whole number >= 1")
        self.sizes, self.kinds, self.sweeps = tuple(sizes), [hidden] * (len(sizes) - 2) + [output], sweeps
        pairs = list(itertools.pairwise(sizes))
        self.weights = nn.ParameterList(first_weights(key, f"weights.{number}", (after, before), 0.5) for number, (before, after) in enumerate(pairs))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(after)) for after in sizes[1:])

    @property
    def range(self) -> tuple[float, float]:
        """Between what the outputs lie."""
        return RANGES[self.kinds[-1]]

    def rest(self, params: Tree, x: Tensor) -> State:
        """Where a relaxation begins: hidden layers and output [N, units] at ρ(0)."""
        zeros = [params["weights.0"].new_zeros(x.shape[0], size) for size in self.sizes[1:]]
        return tuple(activation(kind, zero) for kind, zero in zip(self.kinds, zeros, strict=True))

    def output(self, s: State) -> Tensor:
        return s[-1]

    def energy(self, params: Tree, s: State, x: Tensor) -> Tensor:
        """E [N]."""
        below, total = x.flatten(1), x.new_zeros(())
        for number, (kind, own) in enumerate(zip(self.kinds, s, strict=True)):
            drive = below @ params[f"weights.{number}"].T + params[f"biases.{number}"]
            total = total + (integral(kind, own) - own * drive).sum(1)
            below = own
        return total

    def step(self, params: Tree, s: State, x: Tensor, force: State | None = None, layers: Sequence[int] | None = None) -> State:
        """ρ of what every layer is told by its neighbours and the force; of `layers` alone, where given."""
        found = list(s)
        for number in range(len(s)) if layers is None else layers:
            below = x.flatten(1) if number == 0 else s[number - 1]
            drive = below @ params[f"weights.{number}"].T + params[f"biases.{number}"]
            if number + 1 < len(s):
                drive = drive + s[number + 1] @ params[f"weights.{number + 1}"]
            found[number] = activation(self.kinds[number], drive if force is None else drive + force[number])
        return tuple(found)

    def sweep(self, params: Tree, s: State, x: Tensor, force: State | None = None) -> State:
        """Every second layer, then the others: each is put where E is least given its neighbours, so that E never rises."""
        return self.step(params, self.step(params, s, x, force, range(0, len(s), 2)), x, force, range(1, len(s), 2))

    def forward(self, x: Tensor) -> Tensor:
        params: Tree = dict(self.named_parameters())
        s = self.rest(params, x)
        for _ in range(self.sweeps):
            s = self.sweep(params, s, x)
        return self.output(s)


class GraphNet(nn.Module):
    """A recurrent net whose units act on one another by any matrix; without `symmetric` it has no energy, and is a vector field.

    Args:
        inputs, units, outputs: how many; the outputs are the last of the units.
        key: addresses the first weights.
        hidden: the units' activation.
        gain: of the recurrent weights: below 1 the net settles.
        symmetric: W is replaced by (W + Wᵀ) / 2.
        edges: bool [units, units], which units may act on which; none for all.
        sweeps: of the plain forward pass, from zeros.
    """

    def __init__(
        self,
        inputs: int,
        units: int,
        outputs: int,
        *,
        key: Key,
        hidden: str = "tanh",
        gain: float = 0.7,
        symmetric: bool = False,
        edges: Tensor | None = None,
        sweeps: int = 60,
    ):
        super().__init__()
        require(1 <= outputs <= units, "outputs", outputs, f"between 1 and units={units}")
        check_activation("hidden", hidden)
        require(isinstance(sweeps, int) and sweeps >= 1, "sweeps", sweeps, "a whole number >= 1")
        self.kind, self.outputs, self.units, self.sweeps, self.symmetric = hidden, outputs, units, sweeps, symmetric
        self.recurrent = first_weights(key, "recurrent", (units, units), gain)
        self.input = first_weights(key, "input", (units, inputs), 1.0)
        self.bias = nn.Parameter(torch.zeros(units))
        self.register_buffer("edges", torch.ones(units, units, dtype=torch.bool) if edges is None else edges, persistent=False)

    @property
    def range(self) -> tuple[float, float]:
        """Between what the outputs lie."""
        return RANGES[self.kind]

    def rest(self, params: Tree, x: Tensor) -> State:
        return (params["bias"].new_zeros(x.shape[0], self.units),)

    def output(self, s: State) -> Tensor:
        return s[0][:, -self.outputs :]

    def step(self, params: Tree, s: State, x: Tensor, force: State | None = None, layers: Sequence[int] | None = None) -> State:
        weight = torch.where(self.get_buffer("edges"), params["recurrent"], 0)
        weight = (weight + weight.T) / 2 if self.symmetric else weight
        drive = s[0] @ weight.T + x.flatten(1) @ params["input"].T + params["bias"]
        return (activation(self.kind, drive if force is None else drive + force[0]),)

    def forward(self, x: Tensor) -> Tensor:
        params: Tree = dict(self.named_parameters())
        s = self.rest(params, x)
        for _ in range(self.sweeps):
            s = self.step(params, s, x)
        return self.output(s)


__all__ = ["RANGES", "GraphNet", "LayeredHopfield", "activation"]
