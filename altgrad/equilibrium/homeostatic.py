r"""Jacobian homeostasis as part of a problem's losses, so that any rule that trains the problem makes its Jacobian symmetric.

    losses_n = loss(output, target)_n + weight · [‖Jε‖² - εᵀJ²ε]_n / dim,   J at the state after the net's sweeps, taken for a constant

The probes ε are the step's own: what a rule draws for dropout. Every member of a population, every tangent and every rank sees the same.

Source: Laborieux and Zenke 2023, arXiv 2309.02214, equation 12.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from altgrad import samplers
from altgrad.engine import Tree
from altgrad.equilibrium.homeostasis import homeostasis, map_of, probes
from altgrad.equilibrium.relaxation import State
from altgrad.equilibrium.settling import Settling
from altgrad.errors import require
from altgrad.problem import Batch

SWEEPS = 30  # where the model does not say how many its forward pass makes


class Homeostatic(Settling):
    """A Settling whose losses have `homeostasis` times the homeostatic loss added; held-out figures are those of the loss alone.

    Args:
        homeostasis: its weight, >= 0.
    """

    def __init__(self, model: nn.Module, loss: Any, *, homeostasis: float, **rest: Any):
        require(0 <= homeostasis < math.inf, "homeostasis", homeostasis, "a number >= 0")
        super().__init__(model, loss, **rest)
        self.homeostasis = homeostasis

    def settled(self, params: Tree, x: Any) -> State:
        """The state after the net's own sweeps, without a derivative."""
        own = self.params()
        values = {name: value for name, value in params.items() if name in own}
        sweep: Any = self.sweep or self.model.step
        state = self.rest(values, x)
        with torch.no_grad():
            for _ in range(int(getattr(self.model, "sweeps", SWEEPS))):
                state = sweep(values, state, x)
        return tuple(state)

    def penalty(self, params: Tree, batch: Batch) -> Tensor:
        """The weighted homeostatic loss of every example [N]."""
        affine = bool(getattr(self.model, "affine", False))
        if not affine and any(type(value) not in (Tensor, nn.Parameter) for value in params.values()):  # these have no derivative along a state
            raise NotImplementedError("the homeostatic loss needs weights that are written out.")  # which populations then do, member by member
        state = self.settled(params, batch.inputs)
        if samplers.ACTIVE:
            along: State = tuple(samplers.draw("normal", leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in state)
        else:  # nobody says which step this is
            along = probes(state, self.key.fold("homeostasis"), batch)
        return self.homeostasis * homeostasis(lambda s: map_of(self)(params, s, batch.inputs), state, along, affine=affine)

    def loss(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        return super().loss(params, batch, buffers) + self.penalty(params, batch).mean()

    def losses(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        own, extra = super().losses(params, batch, buffers), self.penalty(params, batch)
        return own + (extra if len(own) == len(extra) else extra.mean())

    def objective(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        return super().judge(self.forward(params, batch.inputs, buffers), batch) + self.penalty(params, batch).mean()

    def judge(self, outputs: Any, batch: Batch) -> Tensor:
        raise NotImplementedError("the homeostatic loss is one of the weights, which outputs do not tell.")  # populations then ask for `objective`


__all__ = ["Homeostatic"]
