r"""Energies, nudged: the gradient is the change of ∂E/∂θ with the nudge.

    s_β = argmin_s E(θ, s, x) + β L(s),     ∂L/∂θ (s₀) = d/dβ ∂E/∂θ (s_β) at β = 0

with L replaced by its linear part at s₀, which has the same derivative and asks nothing of the loss.

Source: Scellier and Bengio 2017, arXiv 1602.05179, theorem 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from altgrad.engine import Tree
from altgrad.equilibrium.fields import holomorphic
from altgrad.equilibrium.nudges import Nudge
from altgrad.equilibrium.relaxation import Disturb, Settled, State, as_complex, relax

EnergyOf = Callable[[Tree, State, Any], Tensor]  # [N]
Sweep = Callable[[Tree, State, Any, State | None], State]  # params, state, inputs, force
Prepared = Callable[[Tree, Any], Any] | None


class Energy:
    """An energy at its free state.

    Args:
        energy: (params, state, inputs) -> [N].
        sweep: one sweep of the relaxation, under a force that is added to -∂E/∂s.
        prepared: (params, inputs) -> what `energy` and `sweep` take in place of the inputs.
        coupling: the energy but for what no parameter enters, for the gradient; the energy where there is none.
    """

    def __init__(
        self,
        energy: EnergyOf,
        sweep: Sweep,
        params: Tree,
        start: State,
        inputs: Any,
        outputs: Callable[[State], Any],
        *,
        prepared: Prepared = None,
        coupling: EnergyOf | None = None,
        **relaxing: Any,
    ):
        self.coupling = coupling or energy
        self.energy, self.sweep, self.params, self.inputs, self.outputs = energy, sweep, params, inputs, outputs
        self.wide: tuple[Tree, Any] | None = None
        self.leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        with torch.enable_grad():  # the graph of what the inputs tell is made once, for all relaxations and the gradient
            self.told = inputs if prepared is None else prepared(self.leaves, inputs)
        self.given = given = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, self.told)
        with torch.no_grad():
            self.settled = relax(lambda state: sweep(params, state, given, None), start, **relaxing)
        self.rest, self.passes = self.settled.state, self.settled.ran
        self.point = tuple(leaf.detach().requires_grad_() for leaf in self.rest)

    def nudged(
        self,
        nudge: Nudge,
        force: State,
        *,
        steps: int,
        tolerance: float,
        damping: float,
        corrected: bool = False,
        disturb: Disturb | None = None,
        start: State | None = None,
        acceleration: str = "none",
    ) -> Settled:
        """The state under β · force, force = -∂L/∂s, relaxed from `start`, the free state unless told otherwise.

        There is nothing to correct: second derivatives of an energy are symmetric.
        """
        if nudge.beta == 0 and start is None:
            return self.settled
        start, params, inputs = self.rest if start is None else start, self.params, self.given
        if isinstance(nudge.beta, complex):
            start = tuple(as_complex(leaf) for leaf in start)
            self.wide = self.wide or (tree_map(as_complex, dict(params)), tree_map(as_complex, inputs))
            params, inputs = self.wide
        pushed = tuple(nudge.beta * part for part in force)
        with torch.no_grad(), holomorphic():
            found = relax(
                lambda state: self.sweep(params, state, inputs, pushed),
                start,
                steps=steps,
                tolerance=tolerance,
                damping=damping,
                disturb=disturb,
                acceleration=acceleration,
            )
        self.passes += found.ran
        return found

    def gradient(self, told: Sequence[tuple[Nudge, State]]) -> Tree:
        """∂/∂θ of Σ Re(weight · mean_n E(θ, s_β))."""
        leaves = self.leaves
        with torch.enable_grad():
            total: Any = 0.0
            for nudge, state in told:
                if isinstance(nudge.beta, complex):
                    value = self.coupling(tree_map(as_complex, dict(leaves)), state, tree_map(as_complex, self.told))
                    total = total + (nudge.weight * value.mean()).real
                else:
                    total = total + complex(nudge.weight).real * self.coupling(leaves, state, self.told).mean()
        found = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
        return {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}


def descent(energy: EnergyOf) -> Sweep:
    """s ← s - ∂E/∂s + force: a sweep for energies that give none of their own; unit length suits E = ½‖s‖² - …, damping shortens it."""

    def sweep(params: Tree, state: State, inputs: Any, force: State | None) -> State:
        leaves = tuple(leaf.detach().requires_grad_() for leaf in state)
        with torch.enable_grad():
            value = energy(params, leaves, inputs)
            slopes = torch.autograd.grad(value, leaves, torch.ones_like(value))
        found = [leaf.detach() - slope.conj() for leaf, slope in zip(leaves, slopes, strict=True)]  # PyTorch conjugates holomorphic derivatives
        return tuple(found) if force is None else tuple(leaf + push for leaf, push in zip(found, force, strict=True))

    return sweep


__all__ = ["Energy", "descent"]
