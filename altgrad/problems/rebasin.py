r"""Two networks, trained apart, brought into one basin: hidden units of the second are permuted until the straight line between the two no longer climbs.

    θ_t = (1 - t) A + t π(B),   π(B): W_l -> P_l W_l P_{l-1}ᵀ, b_l -> P_l b_l,   P_l = sinkhorn(-X_l, λ)
    barrier = max_t [ L(θ_t) - (1 - t) L(A) - t L(B) ]

X_l are trained; gradients go through the Sinkhorn layers implicitly. Figures are those of the nearest permutations, no soft ones.

Source: Ainsworth, Hayase, Srinivasa 2022, arXiv 2209.04836 (the task); Peña et al. 2022, arXiv 2212.12042 (Sinkhorn layers for it).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad import data, models
from altgrad.engine import Tree
from altgrad.errors import SettingError, near_miss, require
from altgrad.implicit.transport import sinkhorn
from altgrad.kernels import noise
from altgrad.networks import MLP, widths
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key, permutation, tensor_id

OBJECTIVES = ("weights", "midpoint", "both")
POINTS = 25  # of the path, ends included
TOL = 1e-6  # of a plan's rows: far below what a step of the matching moves
START = 0.01  # deviation of the first X: no permutation is preferred


class Matching(nn.Module):
    """X_l, one square matrix a hidden layer."""

    def __init__(self, sizes: list[int], key: Key):
        super().__init__()
        drawn = [noise.draw("normal", key.fold("matching"), tensor_id(f"layer {number}"), [0], (size, size))[0] for number, size in enumerate(sizes)]
        self.scores = nn.ParameterList([nn.Parameter(START * part) for part in drawn])


Layers = list[tuple[Tensor, Tensor]]  # (weight [out, in], bias [out]) of every linear layer


def run(layers: Layers, inputs: Tensor) -> Tensor:
    """The outputs of the network: relu between its layers."""
    hidden = inputs.flatten(1)
    for number, (weight, bias) in enumerate(layers):
        hidden = F.linear(torch.relu(hidden) if number else hidden, weight, bias)
    return hidden


def permuted(layers: Layers, plans: list[Tensor]) -> Layers:
    """π: hidden units moved by plans [n, n], one a hidden layer."""
    found: Layers = []
    for number, (weight, bias) in enumerate(layers):
        if number:
            weight = weight @ plans[number - 1].T
        found.append((plans[number] @ weight, plans[number] @ bias) if number < len(plans) else (weight, bias))
    return found


def between(first: Layers, second: Layers, t: float) -> Layers:
    return [(torch.lerp(w, v, t), torch.lerp(b, c, t)) for (w, b), (v, c) in zip(first, second, strict=True)]


def nearest_permutation(plan: Tensor) -> Tensor:
    """The permutation of greatest Σ P ⊙ plan that exchanges of two rows find, from the greedy one; exact where the plan is nearly one."""
    left, size = plan.detach().double().clone(), len(plan)
    chosen = torch.empty(size, dtype=torch.int64)
    for _ in range(size):
        place = int(left.argmax())
        row, column = divmod(place, size)
        chosen[row] = column
        left[row], left[:, column] = -torch.inf, -torch.inf
    scores = plan.detach().double()
    while True:
        own = scores[torch.arange(size), chosen]
        gain = scores[:, chosen] + scores[:, chosen].T - own[:, None] - own[None, :]
        best = int(gain.argmax())
        if float(gain.flatten()[best]) <= 1e-12:
            break
        row, other = divmod(best, size)
        chosen[[row, other]] = chosen[[other, row]]
    return F.one_hot(chosen, size).to(plan.dtype)


class RebasinProblem(Supervised):
    """The matching of B to A, whose loss is that of the midpoint, the distance of the weights, or both."""

    def __init__(self, first: Layers, second: Layers, settings: "Rebasin", dataset: data.Dataset, key: Key):
        super().__init__(Matching([len(bias) for _, bias in first[:-1]], key), F.cross_entropy, dataset=dataset, batch_size=settings.batch_size, key=key)
        self.name, self.first, self.second, self.settings = settings.name, first, second, settings

    def plans(self, params: Tree) -> list[Tensor]:
        """P_l [n, n], rows and columns of sum 1."""
        strength = self.settings.regularisation
        # In float64: hard plans have systems that float32 cannot tell from singular ones.
        return [sinkhorn(-params[name].double(), regularisation=strength, tol=TOL).to(params[name]) for name in self.params()]

    def moved(self, params: Tree) -> Layers:
        """π(B), softly."""
        return permuted(self.second, self.plans(params))

    def forward(self, params: Tree, inputs: Any, buffers: Tree) -> Any:
        """The outputs halfway between A and π(B)."""
        return run(between(self.first, self.moved(params), 0.5), inputs)

    def distance(self, moved: Layers) -> Tensor:
        """‖A - π(B)‖² / ‖A‖²."""
        pairs = [(own, other) for one, two in zip(self.first, moved, strict=True) for own, other in zip(one, two, strict=True)]
        off = torch.stack([(own - other).square().sum() for own, other in pairs]).sum()
        return off / torch.stack([own.square().sum() for own, _ in pairs]).sum()

    def losses(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        """[N]: cross-entropy of the midpoint, plus the distance of the weights."""
        moved, objective = self.moved(params), self.settings.objective
        count = self.batch_size_of(batch)
        found = batch.inputs.new_zeros(count)
        if objective != "weights":
            found = found + F.cross_entropy(run(between(self.first, moved, 0.5), batch.inputs), batch.targets, reduction="none")
        return found + self.distance(moved) if objective != "midpoint" else found

    def loss(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        return self.losses(params, batch, buffers).mean()

    def check_batch(self, batch: Batch) -> None:
        """Nothing to find out: networks, data and loss are the problem's own."""
        self.split_loss = "mean"

    def path(self, moved: Layers, *, split: str = "test") -> tuple[Tensor, Tensor]:
        """(losses, accuracies) [POINTS] along the line from A to `moved`."""
        assert self.dataset is not None
        inputs, targets = getattr(self.dataset, f"{split}_inputs"), getattr(self.dataset, f"{split}_targets")
        losses, accuracies = [], []
        with torch.no_grad():
            for t in torch.linspace(0, 1, POINTS).tolist():
                outputs = run(between(self.first, moved, t), inputs)
                losses.append(F.cross_entropy(outputs, targets))
                accuracies.append((outputs.argmax(1) == targets).float().mean())
        return torch.stack(losses), torch.stack(accuracies)

    def figures(self, params: Tree, *, split: str = "test") -> dict[str, float]:
        """Barriers along the path before and after, the share removed, and how near the soft plans are to permutations (1 is one)."""
        with torch.no_grad():
            soft = self.plans(params)
            (before, _), (after, accuracy) = (
                self.path(self.second, split=split),
                self.path(permuted(self.second, list(map(nearest_permutation, soft))), split=split),
            )
        old, new = barrier(before), barrier(after)
        return {
            "accuracy": float(accuracy[POINTS // 2]),
            "loss": float(after[POINTS // 2]),
            "barrier": new,
            "barrier_before": old,
            "reduction": 1 - new / old if old > 0 else 0.0,
            "hardness": float(torch.stack([plan.square().sum() / len(plan) for plan in soft]).mean()),
        }

    def evaluate(self, predict: Any, *, split: str = "test", chunk: int = 1000) -> dict[str, float]:
        """`figures` of the problem's own matching; accuracy and loss are those of the midpoint."""
        return self.figures({name: value.detach() for name, value in self.params().items()}, split=split)


def barrier(losses: Tensor) -> float:
    """How far the losses along a path rise over the straight line between its ends, 0 or more."""
    t = torch.linspace(0, 1, len(losses), dtype=torch.float64)
    return float((losses.double() - (1 - t) * losses[0] - t * losses[-1]).max())


def trained(network: nn.Module, dataset: data.Dataset, settings: "Rebasin", key: Key) -> Layers:
    """The layers of an mlp after Adam on the training set, in an order of its own."""
    models.initialise(network, key)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr)
    count = len(dataset.train_inputs)
    with torch.enable_grad():
        for epoch in range(settings.epochs):
            order = torch.from_numpy(permutation(key.fold("order").at(epoch), "epoch", count).copy())
            for part in order.split(settings.batch_size):
                network.zero_grad()
                F.cross_entropy(network(dataset.train_inputs[part]), dataset.train_targets[part]).backward()
                optimizer.step()
    return [(layer.weight.detach(), layer.bias.detach()) for layer in network.modules() if isinstance(layer, nn.Linear)]


@dataclass(frozen=True)
class Rebasin:
    """Two digits networks trained apart are aligned by permuting hidden units, through implicit Sinkhorn layers.

    Defaults of the command line: two 64-64-64-10 mlps, engine implicit, Adam, lr 0.1, batch 64, 5 epochs.
    """

    hidden: str = field(default="64-64", metadata={"help": "widths of the networks' hidden layers"})
    epochs: int = field(default=20, metadata={"help": "of the two networks' own training, by Adam"})
    lr: float = field(default=1e-3, metadata={"help": "of the two networks' own training"})
    batch_size: int = field(default=64, metadata={"help": "examples a step, there and in the matching"})
    regularisation: float = field(default=0.5, metadata={"help": "λ of the Sinkhorn layers, > 0; the smaller, the nearer to permutations"})
    objective: str = field(default="both", metadata={"help": "midpoint (its loss), weights (their distance, no data) or both"})

    name: ClassVar[str] = "rebasin"
    defaults: ClassVar[Mapping[str, Any]] = {"engine": "implicit", "optimizer": "Adam", "lr": 0.1, "epochs": 5}

    def __post_init__(self) -> None:
        widths("hidden", self.hidden)
        for label in ("epochs", "batch_size"):
            value = getattr(self, label)
            require(isinstance(value, int) and value >= 1, label, value, "an integer of at least 1")
        for label in ("lr", "regularisation"):
            value = getattr(self, label)
            require(isinstance(value, (int, float)) and 0 < value < float("inf"), label, value, "a number above 0")
        if self.objective not in OBJECTIVES:
            raise SettingError(near_miss("objective", str(self.objective), OBJECTIVES))

    def build(self, key: Key, *, data_dir: str | Path | None = None) -> RebasinProblem:
        """The problem; `key` addresses the first weights of both networks, the orders of their data, and the matching's start. Trains both: seconds."""
        digits = data.load("digits", data_dir=data_dir)
        digits = digits._replace(train_inputs=digits.train_inputs.flatten(1), test_inputs=digits.test_inputs.flatten(1))
        parts = []
        for label in ("first", "second"):
            with torch.random.fork_rng(devices=[]):  # what PyTorch's constructors draw is overwritten
                network = MLP(hidden=self.hidden).build((digits.train_inputs.shape[1],), digits.classes)
            parts.append(trained(network, digits, self, key.fold(label)))
        return RebasinProblem(parts[0], parts[1], self, digits, key)
