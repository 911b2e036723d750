r"""Jacobian homeostasis: a loss that makes a net's Jacobian symmetric, without forming it.

    L = E_ε [‖Jε‖² - εᵀJ²ε] / dim = ½ ‖J - Jᵀ‖²_F / dim,   ε ~ N(0, I), by two Jacobian-vector products a probe

Source: Laborieux and Zenke 2023, arXiv 2309.02214, equation 12.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from altgrad.equilibrium.relaxation import State


def homeostasis(step: Callable[[State], State], state: State, probes: State) -> Tensor:
    """The estimate of every example [N] from one probe each; differentiable in whatever `step` closes over.

    Args:
        step: s ↦ f(s), a tuple of tensors [N, ...], examples apart; the decay of f(s) - s changes J - Jᵀ by nothing.
        state: where; taken for a constant.
        probes: standard normal, shaped like the state.
    """
    at = tuple(leaf.detach().contiguous() for leaf in state)
    once = pushed(step, at, probes)
    twice = pushed(step, at, once)
    size = sum(leaf[0].numel() for leaf in at)
    squares = sum(part.square().flatten(1).sum(1) for part in once)
    crossed = sum((probe * part).flatten(1).sum(1) for probe, part in zip(probes, twice, strict=True))
    return (squares - crossed) / size  # type: ignore[return-value]


def pushed(step: Callable[[State], State], at: State, along: State) -> State:
    """J v."""
    found: tuple[State, ...] = torch.func.jvp(lambda *leaves: step(leaves), at, along)
    return tuple(found[1])


__all__ = ["homeostasis"]
