r"""Jacobian homeostasis: a loss that makes a net's Jacobian symmetric, without forming it.

    L = E_ε [‖Jε‖² - εᵀJ²ε] / dim = ½ ‖J - Jᵀ‖²_F / dim,   ε ~ N(0, I), by two Jacobian-vector products a probe

Source: Laborieux and Zenke 2023, arXiv 2309.02214, equation 12.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from altgrad.engine import Tree
from altgrad.equilibrium.relaxation import State
from altgrad.kernels import noise
from altgrad.problem import Batch, Problem
from altgrad.rng import Key, tensor_id


def homeostasis(step: Callable[[State], State], state: State, probes: State, *, affine: bool = False) -> Tensor:
    """The estimate of every example [N] from one probe each; differentiable in whatever `step` closes over.

    Args:
        step: s ↦ f(s), a tuple of tensors [N, ...], examples apart; the decay of f(s) - s changes J - Jᵀ by nothing.
        state: where; taken for a constant.
        probes: standard normal, shaped like the state.
        affine: f is affine in s, so that J v = f(s + v) - f(s): two plain evaluations, which rules without derivatives can make too.
    """
    at = tuple(leaf.detach().contiguous() for leaf in state)
    push = difference if affine else pushed
    once = push(step, at, probes)
    twice = push(step, at, once)
    size = sum(leaf[0].numel() for leaf in at)
    squares = sum(part.square().flatten(1).sum(1) for part in once)
    crossed = sum((probe * part).flatten(1).sum(1) for probe, part in zip(probes, twice, strict=True))
    return (squares - crossed) / size  # type: ignore[return-value]


def map_of(problem: Problem) -> Callable[[Tree, State, Any], State]:
    """What J is of: the net's drive where it tells it (J is then symmetric where its weights are), its step otherwise."""
    return getattr(getattr(problem, "model", None), "drive", None) or problem.step


def pushed(step: Callable[[State], State], at: State, along: State) -> State:
    """J v."""
    found: tuple[State, ...] = torch.func.jvp(lambda *leaves: step(leaves), at, along)
    return tuple(found[1])


def difference(step: Callable[[State], State], at: State, along: State) -> State:
    """J v of an affine f."""
    there, here = step(tuple(leaf + way for leaf, way in zip(at, along, strict=True))), step(at)
    return tuple(one - other for one, other in zip(there, here, strict=True))


def probes(point: State, key: Key, batch: Batch) -> State:
    """Standard normal probes shaped like the state, an example's own whichever rank draws them."""
    return tuple(
        noise.draw(
            "normal",
            key.fold("probes"),
            tensor_id(f"layer {number}"),
            [0],
            leaf.shape,
            start=batch.first * leaf[0].numel(),
            dtype=leaf.real.dtype,
            device=leaf.device,
        )[0]
        for number, leaf in enumerate(point)
    )


__all__ = ["homeostasis", "map_of", "probes"]
