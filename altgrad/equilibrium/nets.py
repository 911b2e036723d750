r"""Nets of dense matrices that settle: continuous Hopfield nets, in layers or with any graph.

    layers   up_l(s) = W_l s + b_l,  down_l = W_{l+1}ᵀ s_{l+1}   (layered.py)
    graph    s ← ρ(W s + U x + b), the last units are the output;  with W = Wᵀ it has the energy Σ G(s) - ½ sᵀWs - sᵀ(Ux + b)

Source: Hopfield 1984, PNAS 81; Scellier and Bengio 2017, arXiv 1602.05179; Laborieux and Zenke 2022, arXiv 2209.00530.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from altgrad.engine import Tree
from altgrad.equilibrium.layered import RANGES, READOUTS, Driven, Layered, activation, beyond, check_activation, first_weights, integral
from altgrad.equilibrium.relaxation import State
from altgrad.errors import SettingError, near_miss, require
from altgrad.rng import Key


class LayeredHopfield(Layered):
    """A Hopfield net in layers, whose neighbours act on one another by one matrix and its transpose.

    Args:
        sizes: units of the input, the hidden layers and the output.
        key: addresses the first weights.
        hidden: activation of the hidden layers, "sigmoid" or "tanh".
        output: of the output, "linear", "sigmoid" or "tanh".
        sweeps: of the plain forward pass, from ρ(0).
        readout: "inside", the output settles with the rest, or "outside", it is a linear map of the last hidden layer.
    """

    def __init__(self, sizes: Sequence[int], *, key: Key, hidden: str = "sigmoid", output: str = "linear", sweeps: int = 30, readout: str = "inside"):
        check_activation("hidden", hidden)
        check_activation("output", output)
        check_readout(readout, output)
        outside = readout == "outside"
        least = 3 if outside else 2
        require(len(sizes) >= least and min(sizes) >= 1, "sizes", tuple(sizes), f"{least} or more: of the input, hidden layers and the output, each at least 1")
        settling = list(sizes[:-1]) if outside else list(sizes)
        kinds = [hidden] * (len(sizes) - 2) + [output] * (not outside)
        super().__init__([(size,) for size in settling[1:]], kinds, key=key, sweeps=sweeps, classes=sizes[-1] if outside else None)
        self.sizes = tuple(sizes)
        pairs = list(itertools.pairwise(settling))
        self.weights = nn.ParameterList(first_weights(key, f"weights.{number}", (after, before), 0.5) for number, (before, after) in enumerate(pairs))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(after)) for after in settling[1:])

    affine = True  # the drive, in the state

    def up(self, params: Tree, number: int, below: Tensor) -> Tensor:
        return below.flatten(1) @ params[f"weights.{number}"].T + params[f"biases.{number}"]

    def down(self, params: Tree, number: int, own: Tensor, above: Tensor) -> Tensor:
        return above @ params[f"weights.{number + 1}"]


def check_readout(readout: str, output: str) -> None:
    """Raise SettingError for a read-out that there is not, or one outside that is to have an activation."""
    if readout not in READOUTS:
        raise SettingError(near_miss("readout", readout, READOUTS))
    require(readout == "inside" or output == "linear", "output", output, "'linear' with readout='outside', which is a linear map and does not settle")


class GraphNet(nn.Module):
    """A recurrent net whose units act on one another by any matrix; it has no energy, and is a vector field (see GraphHopfield).

    Args:
        inputs, units, outputs: how many; the outputs are the last of the units.
        key: addresses the first weights.
        hidden: the units' activation.
        gain: of the recurrent weights: below 1 the net settles.
        symmetric: W is replaced by (W + Wᵀ) / 2.
        edges: bool [units, units], which units may act on which; none for all.
        sweeps: of the plain forward pass, from zeros.

    A sweep goes group by group: the two colours of a graph that has two, so that no unit acts on another of its group; else the first half of the units and the
    rest, each half at once.
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
        shape = None if edges is None else tuple(edges.shape)
        require(shape in {None, (units, units)}, "edges", shape, f"a bool tensor of shape ({units}, {units})")
        self.kind, self.outputs, self.units, self.sweeps, self.symmetric = hidden, outputs, units, sweeps, symmetric
        self.recurrent = first_weights(key, "recurrent", (units, units), gain)
        self.input = first_weights(key, "input", (units, inputs), 1.0)
        self.bias = nn.Parameter(torch.zeros(units))
        edges = torch.ones(units, units, dtype=torch.bool) if edges is None else edges.bool()
        found = two_colours(edges)
        self.two_coloured = found is not None
        colours = torch.arange(units) * 2 >= units if found is None else found
        self.register_buffer("edges", edges, persistent=False)
        for number in range(2):
            self.register_buffer(f"group_{number}", (colours == bool(number)).nonzero()[:, 0], persistent=False)

    @property
    def range(self) -> tuple[float, float]:
        """Between what the outputs lie."""
        return RANGES[self.kind]

    def rest(self, params: Tree, x: Tensor) -> State:
        return (params["bias"].new_zeros(x.shape[0], self.units),)

    def output(self, s: State) -> Tensor:
        return s[0][:, -self.outputs :]

    def matrix(self, params: Tree) -> Tensor:
        """W [units, units]."""
        weight = torch.where(self.get_buffer("edges"), params["recurrent"], 0)
        return (weight + weight.T) / 2 if self.symmetric else weight

    def prepared(self, params: Tree, x: Tensor) -> Driven:
        """What a relaxation needs of the inputs, worked out once."""
        return Driven(x.flatten(1) @ params["input"].T + params["bias"])

    def step(self, params: Tree, s: State, x: Tensor | Driven, force: State | None = None) -> State:
        (drive,) = self.drive(params, s, x)
        return (activation(self.kind, drive if force is None else drive + force[0]),)

    affine = True  # the drive, in the state

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Weights that join the same units both ways: the matrix and its transpose, where they are not one."""
        return [] if self.symmetric else [("recurrent", "recurrent")]

    def drive(self, params: Tree, s: State, x: Tensor | Driven) -> State:
        """What every unit is told."""
        given = x if isinstance(x, Driven) else self.prepared(params, x)
        return (s[0] @ self.matrix(params).T + given.drive,)

    @property
    def relaxation(self) -> float:
        """Of sweeps, unless told otherwise: units of one group that act on one another overshoot together, and a field may not settle at all."""
        return 1.1 if self.symmetric and self.two_coloured else 1.0

    def sweep(self, params: Tree, s: State, x: Tensor | Driven, force: State | None = None, relaxation: float = 1.0) -> State:
        """Group by group, each moved by `relaxation` times what would put it to rest."""
        given, weight, own = x if isinstance(x, Driven) else self.prepared(params, x), self.matrix(params), s[0]
        for number in range(2):
            units = self.get_buffer(f"group_{number}")
            drive = own @ weight[units].T + given.drive[:, units]
            told = activation(self.kind, drive if force is None else drive + force[0][:, units])
            own = own.index_copy(1, units, *beyond((own[:, units],), (told,), relaxation))
        return (own,)

    def forward(self, x: Tensor) -> Tensor:
        params: Tree = dict(self.named_parameters())
        s, given = self.rest(params, x), self.prepared(params, x)
        for _ in range(self.sweeps):
            s = self.step(params, s, given)
        return self.output(s)


class GraphHopfield(GraphNet):
    """A continuous Hopfield net with any graph: symmetric weights, no unit acts on itself, so that there is an energy; arguments as in GraphNet.

    With two colours no sweep raises the energy; with halves it may, where units of one half excite one another strongly.
    """

    def __init__(
        self, inputs: int, units: int, outputs: int, *, key: Key, hidden: str = "sigmoid", gain: float = 0.7, edges: Tensor | None = None, sweeps: int = 60
    ):
        both = torch.ones(units, units, dtype=torch.bool) if edges is None else edges.bool() | edges.bool().T
        super().__init__(
            inputs, units, outputs, key=key, hidden=hidden, gain=gain, symmetric=True, edges=both & ~torch.eye(units, dtype=torch.bool), sweeps=sweeps
        )

    def energy(self, params: Tree, s: State, x: Tensor | Driven) -> Tensor:
        """E [N]."""
        own, given = s[0], x if isinstance(x, Driven) else self.prepared(params, x)
        return (integral(self.kind, own) - own * (own @ self.matrix(params) / 2 + given.drive)).sum(1)


def two_colours(edges: Tensor) -> Tensor | None:
    """bool [units], unlike at both ends of every edge; None where a graph has no such colouring. A unit's edge to itself does not count."""
    joined = (edges | edges.T).cpu() & ~torch.eye(len(edges), dtype=torch.bool)
    colours = torch.full((len(edges),), -1, dtype=torch.int8)
    for first in range(len(edges)):
        if colours[first] >= 0:
            continue
        colours[first], front = 0, torch.tensor([first])
        while len(front):
            reached = joined[front].any(0)
            wanted = 1 - colours[front[0]]
            if bool((colours[reached] == 1 - wanted).any()):
                return None
            front = (reached & (colours < 0)).nonzero()[:, 0]
            colours[front] = wanted
    return colours.bool()


__all__ = ["RANGES", "GraphHopfield", "GraphNet", "LayeredHopfield", "activation", "check_activation", "check_readout", "two_colours"]
