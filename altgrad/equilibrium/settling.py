"""A problem made of a net that settles: the views ENERGY and FIXED_POINT, and backprop through the sweeps for comparison."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad.engine import Needs, Tree
from altgrad.equilibrium.energies import Sweep
from altgrad.equilibrium.relaxation import State
from altgrad.errors import CapabilityError, DataError
from altgrad.problem import Batch, Problem
from altgrad.problems.supervised import Supervised

NETS = ("rest", "output", "step")


class Settling(Supervised):
    """`loss(output of the state at rest, targets)`, averaged over examples; arguments as in Supervised.

    The model is an nn.Module with rest(params, x) -> state, output(state) and step(params, state, x), a state being a tuple of tensors [N, ...];
    with energy(params, state, x) -> [N] it has the energy form too, relaxed by its own sweep(params, state, x, force) where it has one. It may have
    readout(params, state, x) in place of output, whose parameters are not part of the system and get the loss's ordinary gradient, and
    prepared(params, x), what its sweeps and steps take in place of x, worked out once a relaxation.
    Its forward(x) is the read-out after a fixed number of sweeps, which backprop unrolls.

    Raises:
        CapabilityError: a model without these methods. DataError: targets that the outputs cannot reach (squared errors alone).
    """

    def __init__(self, model: nn.Module, loss: Any, **rest: Any):
        missing = [name for name in NETS if not callable(getattr(model, name, None))]
        if missing:
            raise CapabilityError(
                f"{type(model).__name__} has no {' and no '.join(missing)}(…); a net that settles has rest, output and step (altgrad.equilibrium.nets)."
            )
        super().__init__(model, loss, **rest)

    @property
    def provides(self) -> Needs:
        found = super().provides & ~(Needs.BLOCKS | Needs.LABELS)
        return found if hasattr(self.model, "energy") else found & ~Needs.ENERGY

    def rest(self, params: Tree, x: Any) -> State:
        """Where a relaxation begins."""
        return self.model.rest(params, x)  # type: ignore[operator, no-any-return]

    def output(self, s: State) -> Any:
        """What is read out of a state."""
        return self.model.output(s)  # type: ignore[operator]

    def step(self, params: Tree, s: State, x: Any) -> State:
        return self.model.step(params, s, x)  # type: ignore[operator, no-any-return]

    def energy(self, params: Tree, s: State, x: Any) -> Tensor:
        return self.model.energy(params, s, x)  # type: ignore[operator, no-any-return]

    @property
    def readout(self) -> Any:
        """The net's read-out (params, state, x) outside the system, where it has one."""
        return getattr(self.model, "readout", None)

    @property
    def coupling(self) -> Any:
        """The net's energy but for what no parameter enters, where it gives that."""
        return getattr(self.model, "coupling", None)

    @property
    def prepared(self) -> Any:
        """The net's (params, x) -> what its sweeps need of the inputs, where it has one."""
        return getattr(self.model, "prepared", None)

    @property
    def sweep(self) -> Sweep | None:
        """The net's own sweep under a force."""
        return getattr(self.model, "sweep", None)

    @property
    def together(self) -> Sweep | None:
        """The net's sweep of all layers at once, under a force."""
        return getattr(self.model, "step", None) if self.sweep else None

    def blocks(self, cut: str = "") -> list[Any]:
        raise CapabilityError(
            f"{type(self.model).__name__} settles: it has no chain of blocks. Use equilibrium, or rules that need none, as backprop or eggroll."
        )

    def check_batch(self, batch: Batch) -> None:
        self.reachable(batch.targets if self.dataset is None else self.dataset.train_targets)
        super().check_batch(batch)

    def reachable(self, targets: Any) -> None:
        """Raise DataError for numbers as targets that the output's activation does not reach."""
        low, high = getattr(self.model, "range", (-math.inf, math.inf))
        if isinstance(targets, Tensor) and targets.is_floating_point() and len(targets):
            least, most = float(targets.min()), float(targets.max())
            if least < low or most > high:
                raise DataError(
                    f"targets run from {least:.4g} to {most:.4g}, but the outputs lie between {low:g} and {high:g}; scale the targets, or take output='linear'."
                )


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """½ ‖o - y‖² of every example [N]; y [N, outputs], or labels [N] as one-hot vectors."""
    wanted = F.one_hot(targets, outputs.shape[1]).to(outputs.dtype) if targets.dtype == torch.int64 else targets
    return 0.5 * (outputs - wanted).square().sum(1)


def starts(problem: Problem) -> tuple[Callable[[Tree, Any], State], Callable[[Tree, State, Any], Any]]:
    """(rest, readout) of a problem with an energy or a step.

    Raises:
        CapabilityError: it does not say where relaxations begin, or what is read out.
    """
    rest, output, readout = (getattr(problem, name, None) for name in ("rest", "output", "readout"))
    if rest is None or (output is None and readout is None):
        raise CapabilityError(
            f"{type(problem).__name__} must say where relaxations begin and what is read out: implement rest(params, x) -> state, a tuple of tensors [N, …], "
            "and output(state), or readout(params, state, x)."
        )
    return rest, readout if readout is not None else lambda params, state, x: output(state)  # type: ignore[misc]


def direct_gradient(problem: Problem, params: Tree, state: State, batch: Batch) -> Tree:
    """The gradient of the mean loss in the parameters of a read-out outside the system, the state held still; nothing where there are none."""
    readout = getattr(problem, "readout", None)
    if readout is None:
        return {}
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    with torch.enable_grad():
        loss = problem.score(readout(leaves, tuple(leaf.detach() for leaf in state), batch.inputs), batch.targets).mean()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if loss.requires_grad else []
    return {name: grad for name, grad in zip(leaves, found, strict=False) if grad is not None}


def refuse_kinks(problem: Problem, who: str) -> None:
    """Raise CapabilityError where a net says that complex nudges cannot pass it."""
    kink = getattr(getattr(problem, "model", None), "kink", "")
    if kink:
        raise CapabilityError(f"{who} nudges with complex numbers, and {type(problem.model).__name__} is not holomorphic: {kink}, or nudge='symmetric'.")  # type: ignore[attr-defined]


__all__ = ["Settling", "direct_gradient", "refuse_kinks", "squared_error", "starts"]
