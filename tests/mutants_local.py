"""Planted bugs of rules with local losses."""

from collections.abc import Callable
from typing import Any

import torch
from mutants_form import Mutant, altered, patched, scaled

from altgrad.engines.local import Local
from altgrad.engines.mono_forward import MonoForward
from altgrad.local import step as local_step
from altgrad.local.losses import predsim


def one_sweep(*, detach: bool) -> Callable[..., Any]:
    """Blocks whose losses are added up and swept at once at the end."""

    def stream(blocks, params, inputs, buffers, objective, *, heads, bridge, **rest):
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        total = 0.0
        with torch.enable_grad():
            for position, block in enumerate(blocks):
                output = block.apply(leaves, inputs, buffers)
                total = total + objective(position, output, leaves, slice(0, len(output)))
                inputs = bridge(position, output.detach() if detach else output)
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}

    return stream


def frozen_similarities(x):
    """Similarities without a gradient: the block follows prediction alone, its loss says otherwise."""
    return SIMILARITIES(x.detach())


SIMILARITIES = predsim.similarities

MUTANTS = [
    Mutant(
        "blocks in one graph",
        MonoForward(),
        ("every_block_follows_its_own_loss_alone", "what_later_blocks_are_does_not_move_a_blocks_gradient", "saved_bytes_do_not_grow_with_depth"),
        patched(local_step, "stream", one_sweep(detach=False)),
    ),
    Mutant("losses added up before one sweep", MonoForward(), ("saved_bytes_do_not_grow_with_depth",), patched(local_step, "stream", one_sweep(detach=True))),
    Mutant(
        "similarities without a gradient",
        Local(loss="predsim"),
        ("every_block_follows_its_own_loss_alone",),
        patched(predsim, "similarities", frozen_similarities),
    ),
    Mutant("wrong sign, local", altered(MonoForward, scaled(-1)), ("every_block_follows_its_own_loss_alone",)),
]
