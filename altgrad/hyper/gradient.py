"""The gradient of a scalar inside a function that is differentiated again, whichever way that happens."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from altgrad.engine import Tree
from altgrad.implicit.closing import own, searching
from altgrad.linearised import no_saved_hooks


def gradient(function: Callable[[Tree], Tensor], at: Tree) -> Tree:
    """∇f by name, itself differentiable: by torch.func, which composes with its other transforms, or under hooks on saved tensors, which torch.func refuses
    (activation checkpointing), by torch.autograd.
    """
    looking = bool(getattr(searching, "finders", ()))  # a run that only looks which tensors are used; nothing of its graph is kept
    if looking or torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        with no_saved_hooks() if looking else nullcontext():
            slopes: Tree = torch.func.grad(function)(at)
        for slope in slopes.values():
            own(slope)  # torch.func makes it where no mode sees it
        return slopes
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = {name: value if value.requires_grad else value.detach().requires_grad_() for name, value in at.items()}
        found = torch.autograd.grad(function(leaves), list(leaves.values()), create_graph=wanted, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
