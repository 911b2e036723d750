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


class Energy:
    """An energy at its free state.

    Args:
        energy: (params, state, inputs) -> [N].
        sweep: one sweep of the relaxation, under a force that is added to -∂E/∂s.
    """

    def __init__(self, energy: EnergyOf, sweep: Sweep, params: Tree, start: State, inputs: Any, outputs: Callable[[State], Any], **relaxing: Any):
        self.energy, self.sweep, self.params, self.inputs, self.outputs = energy, sweep, params, inputs, outputs
        self.wide: tuple[Tree, Any] | None = None
        with torch.no_grad():
            self.settled = relax(lambda state: sweep(params, state, inputs, None), start, **relaxing)
        self.rest, self.passes = self.settled.state, self.settled.ran
        self.point = tuple(leaf.detach().requires_grad_() for leaf in self.rest)

    def nudged(
        self, nudge: Nudge, force: State, *, steps: int, tolerance: float, damping: float, corrected: bool = False, disturb: Disturb | None = None
    ) -> Settled:
        """The state under β · force, force = -∂L/∂s. There is nothing to correct: second derivatives of an energy are symmetric."""
        if nudge.beta == 0:
            return self.settled
        start, params, inputs = self.rest, self.params, self.inputs
        if isinstance(nudge.beta, complex):
            start = tuple(as_complex(leaf) for leaf in self.rest)
            self.wide = self.wide or (tree_map(as_complex, dict(params)), tree_map(as_complex, inputs))
            params, inputs = self.wide
        pushed = tuple(nudge.beta * part for part in force)
        with torch.no_grad(), holomorphic():
            found = relax(lambda state: self.sweep(params, state, inputs, pushed), start, steps=steps, tolerance=tolerance, damping=damping, disturb=disturb)
        self.passes += found.ran
        return found

    def gradient(self, told: Sequence[tuple[Nudge, State]]) -> Tree:
        """∂/∂θ of Σ Re(weight · mean_n E(θ, s_β))."""
        leaves = {name: value.detach().requires_grad_() for name, value in self.params.items()}
        with torch.enable_grad():
            total: Any = 0.0
            for nudge, state in told:
                if isinstance(nudge.beta, complex):
                    value = self.energy(tree_map(as_complex, dict(leaves)), state, tree_map(as_complex, self.inputs))
                    total = total + (nudge.weight * value.mean()).real
                else:
                    total = total + complex(nudge.weight).real * self.energy(leaves, state, self.inputs).mean()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
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
