"""What is trained: a model, a loss and data, seen through views. Implement a view and the problem provides the need."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from altgrad.credit import Influence
from altgrad.engine import Engine, Needs, Tree
from altgrad.world import World


class Batch(NamedTuple):
    """One batch: `inputs` and `targets` are tensors, tuples or dicts whose first axis counts examples."""

    inputs: Any
    targets: Any
    first: int = 0  # global index of the first example in the step's batch, so that ranks address different noise
    numbers: Tensor | None = None  # [N] which of the problem's training examples these are; None where that is unknown, or inputs are augmented at random


class Problem:
    """Base of all problems. Every view that a subclass overrides turns on the need it serves (see `provides`)."""

    name = "problem"
    differentiable = True  # TANGENT and REVERSE
    discrete = False  # DISCRETE
    steps_per_epoch: int | None = None
    horizon: int | None = None  # UNROLL: truncations of an episode
    progress: float | None = None  # the share of the run that is done, in [0, 1]; set where a run's length is known (altgrad train, compare)

    def params(self) -> Tree:
        """The trainable tensors by dotted name (detached or not: engines detach)."""
        raise NotImplementedError

    def buffers(self) -> Tree:
        """The current buffers by dotted name (running statistics and the like)."""
        return {}

    def load(self, params: Tree, buffers: Tree) -> None:
        """Copy values into the problem's own tensors, in place."""
        own = {**self.params(), **self.buffers()}
        with torch.no_grad():
            for name, value in {**params, **buffers}.items():
                if name in own:
                    own[name].copy_(value)

    def batch(self, step: int, world: World) -> Batch:
        """The batch of a step: a pure function of `step` and rank, so that resume needs no saved state."""
        raise NotImplementedError

    def check_batch(self, batch: Batch) -> None:
        """Look at a first batch before anything is trained: refuse what cannot be learnt from, and settle what must not depend on a later batch.

        Raises:
            ShapeError, DataError, NumericsError: the model, the loss or the data do not fit together; says which and how.
        """

    def check_engine(self, engine: Engine) -> None:
        """Refuse, before step 0, settings of an engine under which what the problem says of itself would not hold.

        Raises:
            SettingError: which setting, and what it must be.
        """

    def batch_size_of(self, batch: Batch) -> int:
        """The number of examples in `batch`."""
        return first_tensor(batch.inputs).shape[0]

    def forward(self, params: Tree, inputs: Any, buffers: Tree) -> Any:
        """The model's outputs; names in `params` that are not the model's (an engine's own) are left alone.

        `buffers` may be written in place: hand in clones (`fresh_buffers`).
        """
        raise NotImplementedError

    def losses(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        """The loss of every example [N]; [N, P] where it is the mean of P local ones (see `influence`); or [1], the loss of the whole batch, where
        examples cannot be told apart.
        """
        raise NotImplementedError

    def influence(self, params: Tree, batch: Batch) -> Mapping[str, Influence]:
        """Which elements of a parameter touch which of the losses [N, P], by parameter name; names left out touch all of them.

        Asked once a step, on the unperturbed parameters. What a map leaves out must not change with the group's elements.
        """
        return {}

    def loss(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        """The mean loss of the batch, a scalar."""
        return self.losses(params, batch, buffers).mean()

    def objective(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        """What rules without derivatives look at, a scalar: the mean loss, in float32 or better."""
        return self.loss(params, batch, buffers)

    def judge(self, outputs: Any, batch: Batch) -> Tensor:
        """The objective of outputs that are there already, a scalar; for objectives that no vmap can batch."""
        raise NotImplementedError

    def score(self, outputs: Any, targets: Any) -> Tensor:
        """The losses [N] of outputs against targets, for rules that put heads of their own on a model."""
        raise NotImplementedError

    def blocks(self, cut: str = "") -> list[Any]:
        """The model as altgrad.blocks.Block, in order, in its present mode; `cut` names the modules at which blocks start, "" for a cut at every layer."""
        raise NotImplementedError

    def example(self) -> Any:
        """Inputs of a few examples, to measure shapes on before there is a batch."""
        return self.batch(0, World()).inputs

    def energy(self, params: Tree, s: Any, x: Any) -> Tensor:
        """The energy of every example [N] in state s."""
        raise NotImplementedError

    def step(self, params: Tree, s: Any, x: Any) -> Any:
        """One application of the contraction whose fixed point is the state."""
        raise NotImplementedError

    def start(self, batch: Batch) -> Tree:
        """The state at the beginning of an episode whose first truncation is `batch`: tensors by name."""
        raise NotImplementedError

    def unroll(self, params: Tree, carry: Tree, batch: Batch, buffers: Tree) -> tuple[Tensor, Tree]:
        """One truncation of an episode from the state `carry`: its loss, a scalar, and the next state, of the same names, shapes and dtypes.

        The batch of step t is truncation t mod `horizon` of its episode; what the episode minimises is the sum of its truncations' losses.
        """
        raise NotImplementedError

    @property
    def classes(self) -> int | None:
        """The number of classes, for labelled problems."""
        return None

    def with_label(self, x: Any, y: Tensor) -> Any:
        """`x` with labels put in: y int64 [N], or marks [N, classes], 1/classes each where an example has none."""
        raise NotImplementedError

    def evaluate(self, predict: Any, *, split: str = "test") -> dict[str, float]:
        """Held-out figures of `predict(inputs) -> outputs`, for instance {"accuracy": 0.97, "loss": 0.1}."""
        return {}

    def pictures(self, params: Tree) -> Mapping[str, Tensor]:
        """What there is to look at, by name: [height, width, 3] with colours in [0, 1]. Runs write them at the start and at every evaluation."""
        return {}

    @property
    def facts(self) -> dict[Any, Any]:
        """What has been found out about the problem so far."""
        return self.__dict__.setdefault("found", {})

    def recall(self, fact: Any, find: Callable[[], Any]) -> Any:
        """A fact about the problem, found the first time it is asked for."""
        if fact not in self.facts:
            self.facts[fact] = find()
        return self.facts[fact]

    def fresh_buffers(self) -> Tree:
        """Clones of the buffers, which one forward pass may write."""
        return {name: value.detach().clone() for name, value in self.buffers().items()}

    @property
    def provides(self) -> Needs:
        """Computed from which views the class overrides."""

        def overrides(*names: str) -> bool:
            return all(getattr(type(self), name) is not getattr(Problem, name) for name in names)

        found = Needs(0)
        if overrides("losses"):
            found |= Needs.VALUE
            if self.differentiable:
                found |= Needs.TANGENT | Needs.REVERSE
        for flag, names in {
            Needs.BLOCKS: ("blocks",),
            Needs.LABELS: ("classes", "with_label"),
            Needs.ENERGY: ("energy",),
            Needs.FIXED_POINT: ("step",),
        }.items():
            if overrides(*names):
                found |= flag
        if self.discrete:
            found |= Needs.DISCRETE
        if overrides("start", "unroll") and self.horizon is not None:
            found |= Needs.UNROLL
        return found


def not_finite(inputs: Any) -> str:
    """A sentence if a tensor among the inputs holds NaN or infinity, naming the first example that does; else an empty string."""
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            for start, part in enumerate(leaf.split(4096) if leaf.ndim else [leaf]):  # in parts: a mask of a whole data set is large
                wrong = ~torch.isfinite(part)
                if bool(wrong.any()):
                    kind = "NaN" if bool(torch.isnan(part).any()) else "infinite values"
                    return f"the inputs hold {kind}, first in example {4096 * start + int(wrong.nonzero()[0, 0]) if leaf.ndim else 0}; clean the data."
    return ""


def first_tensor(tree: Any) -> Tensor:
    """The first tensor of a nest of tuples, lists and dicts."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    if not leaves:
        raise TypeError(f"expected at least one tensor in the inputs, got {type(tree).__name__}")
    return leaves[0]


__all__ = ["Batch", "Problem", "first_tensor", "not_finite"]
