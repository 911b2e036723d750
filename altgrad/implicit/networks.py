"""The command line's implicit models: a deep equilibrium network for any inputs, and a convergent solver for graphs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from altgrad.errors import SettingError, UsageError, near_miss, require
from altgrad.fixed_point import METHODS
from altgrad.graphs import Graph
from altgrad.implicit.adjoints import parse
from altgrad.implicit.cells import Contracting, Plain, Subhomogeneous, bounded
from altgrad.implicit.layers import DEQ

ACTIVATIONS: Mapping[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}
KINDS = ("plain", "normalised", "contracting", "subhomogeneous")


def setting(default: Any, meaning: str) -> Any:
    """A field with its default and its meaning."""
    return field(default=default, metadata={"help": meaning})


def check_solve(solver: str, adjoint: str, max_steps: int) -> None:
    """Refuse what no solve takes."""
    if solver not in METHODS:
        raise SettingError(near_miss("solver", solver, METHODS))
    parse(adjoint)
    require(isinstance(max_steps, int) and max_steps >= 1, "max_steps", max_steps, "a whole number, 1 or more")


@dataclass(frozen=True)
class DeepEquilibrium:
    """A linear layer, a deep equilibrium layer, a linear layer: an infinitely deep network with one layer's weights."""

    width: int = setting(64, "of the equilibrium state")
    kind: str = setting("plain", "plain, normalised (layer norm), contracting (norm-bounded) or subhomogeneous (positive weights): the last two have one state")
    activation: str = setting("tanh", "tanh, relu or gelu; contracting: tanh or relu; subhomogeneous: power, or tanh with a shift")
    bound: float = setting(0.9, "in (0, 1): contracting: the norm of the weights; subhomogeneous with a power: the exponent")
    solver: str = setting("anderson", "anderson, broyden, iteration, newton or newton-krylov")
    adjoint: str = setting("auto", "as of the engine implicit")
    max_steps: int = setting(100, "of the solver")

    def __post_init__(self) -> None:
        require(isinstance(self.width, int) and self.width >= 1, "width", self.width, "an integer of at least 1")
        if self.kind not in KINDS:
            raise SettingError(near_miss("kind", str(self.kind), KINDS))
        allowed = {"contracting": ("tanh", "relu"), "subhomogeneous": ("power", "tanh")}.get(self.kind, tuple(ACTIVATIONS))
        if self.activation not in allowed:
            raise SettingError(f"kind={self.kind!r}: " + near_miss("activation", str(self.activation), allowed))
        require(0 < self.bound < 1, "bound", self.bound, "in (0, 1)")
        check_solve(self.solver, self.adjoint, self.max_steps)

    def cell(self) -> nn.Module:
        if self.kind == "contracting":
            return Contracting(self.width, self.activation, kappa=self.bound)
        if self.kind == "subhomogeneous":
            return Subhomogeneous(self.width, self.activation, mu=self.bound)
        return Plain(self.width, ACTIVATIONS[self.activation](), norm=self.kind == "normalised")

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
        layer = DEQ(self.cell(), solver=self.solver, adjoint=self.adjoint, max_steps=self.max_steps)
        return nn.Sequential(*layers, nn.Linear(math.prod(input_shape), self.width), layer, nn.Linear(self.width, classes))


class GraphCell(nn.Module):
    """γ Â z W_cᵀ + u, ‖W_c‖ ≤ 1; ‖Â‖ ≤ 1, so that it contracts at rate γ."""

    def __init__(self, graph: Graph, width: int, gamma: float):
        super().__init__()
        self.graph, self.gamma, self.linear = graph, gamma, nn.Linear(width, width, bias=False)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return self.graph.mix(z @ bounded(self.linear.weight, self.gamma).T) + u


class GraphSolver(nn.Module):
    r"""Scores of nodes from the solution of a linear system over the whole graph, with learnt coefficients:

        z = γ Â z W_cᵀ + X Uᵀ + b,   scores = relu(z) Vᵀ + c

    so that every node hears from every other, however far, through weights that do not grow with the distance.

    Args:
        features: X [nodes, features].
        graph: Â.
        width: of z. classes: number of scores. gamma: γ in (0, 1).
        solver, adjoint, max_steps: as of DEQ.

    Source: Park, Choo, Park 2022, "Convergent graph solvers", arXiv 2106.01680 (the contraction by construction; here with one norm-bounded matrix).
    """

    def __init__(self, features: Tensor, graph: Graph, *, width: int, classes: int, gamma: float, solver: str, adjoint: str, max_steps: int):
        super().__init__()
        self.features = features  # a constant, and no buffer: those are a model's state
        self.input = nn.Linear(features.shape[1], width)
        self.solve = DEQ(GraphCell(graph, width, gamma), solver=solver, adjoint=adjoint, max_steps=max_steps, batch_dims=0)
        self.output = nn.Linear(width, classes)

    def forward(self, nodes: Tensor) -> Tensor:
        z = self.solve(self.input(self.features.to(self.input.weight)))  # [all nodes, width]
        return self.output(torch.relu(z[nodes]))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ConvergentGraph:
    """A contracting linear system over a whole graph, solved and differentiated implicitly; for the problem digits-graph."""

    width: int = setting(32, "of a node's state")
    gamma: float = setting(0.9, "in (0, 1): how much of a neighbour's state is passed on; the farther a node, the more powers of it")
    solver: str = setting("anderson", "anderson, broyden, iteration or newton-krylov")
    adjoint: str = setting("gmres", "as of the engine implicit; the system has a number of unknowns of nodes times width")
    max_steps: int = setting(200, "of the solver")

    reads: ClassVar[str] = "graph"

    def __post_init__(self) -> None:
        require(isinstance(self.width, int) and self.width >= 1, "width", self.width, "an integer of at least 1")
        require(0 < self.gamma < 1, "gamma", self.gamma, "in (0, 1)")
        check_solve(self.solver, self.adjoint, self.max_steps)

    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        raise UsageError("graph-solver reads a graph, which this problem has not; use it with the problem digits-graph.")

    def on(self, features: Tensor, graph: Graph, classes: int) -> nn.Module:
        """The model of a graph's nodes."""
        return GraphSolver(
            features,
            graph,
            width=self.width,
            classes=classes,
            gamma=self.gamma,
            solver=self.solver,
            adjoint=self.adjoint,
            max_steps=self.max_steps,
        )
