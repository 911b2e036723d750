"""Directional derivatives by autograd and by tangents, of one score of a module's outputs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from altgrad.forward_mode import Dual, Trace
from altgrad.forward_mode.custom import following_custom_functions
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers

EXACT = 1e-8  # relative, in float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def build(one: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    module, inputs = one.build(generator(1))
    return module.double(), tuple(wide(x) for x in inputs)


def score(outputs: Any) -> Any:
    """Σ over outputs with fixed random weights, so that every output counts."""
    drawn = generator(7)
    floats = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return sum((leaf * torch.randn(leaf.shape, generator=drawn, dtype=torch.float64)).sum() for leaf in floats)


def backprop(module: nn.Module, inputs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the score by autograd, and the buffers after the pass."""
    params = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    with AddressedSamplers(Key(3)):
        value = score(torch.func.functional_call(module, {**params, **buffers}, inputs))
    grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), grads, strict=True)}, buffers


def forward(module: nn.Module, inputs: Any, sources: dict[str, Any], members: int) -> tuple[Any, dict[str, Tensor], Trace]:
    """The score with its tangents; sources are tensors [K, *shape] or Directions."""
    trace = Trace(members)
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    duals = {
        n: Dual(p.detach().clone(), v, trace) if isinstance(v, Tensor) else Dual(p.detach().clone(), None, trace, v)
        for (n, p), v in zip(module.named_parameters(), sources.values(), strict=True)
    }
    with AddressedSamplers(Key(3)), following_custom_functions():
        return score(torch.func.functional_call(module, {**duals, **buffers}, inputs)), buffers, trace


def directions(module: nn.Module, members: int) -> dict[str, Tensor]:
    drawn = generator(5)
    return {n: torch.randn(members, *p.shape, generator=drawn, dtype=p.dtype) for n, p in module.named_parameters()}


def along(grads: dict[str, Tensor], moves: dict[str, Tensor]) -> Tensor:
    return sum(moves[n].reshape(-1, g.numel()) @ g.flatten() for n, g in grads.items())


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().sum() / expected.abs().sum().clamp_min(1e-300))
