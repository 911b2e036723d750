"""A module called with other tensors than its own: what its forward writes into buffers is kept, and what it computes twice comes out the same twice.

A forward may checkpoint its activations itself (torch.utils.checkpoint): the backward pass then runs a part of it again, after its own tensors are back in
place and the pass has drawn all its random numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn
from torch.func import functional_call

from altgrad.engine import Tree
from altgrad.samplers import ACTIVE, AddressedSamplers

GENERATOR = "_checkpoint_without_reentrant_generator"  # torch.utils.checkpoint's own, which runs the function it is handed in the backward pass


def called(module: nn.Module, params: Tree, buffers: Tree, inputs: Any, *, tie_weights: bool = True) -> Any:
    """The output of `module` with these tensors in place of its own.

    Args:
        params: by the module's names.
        buffers: likewise; written in place, also where the forward assigns a new tensor (self.mean = …), which functional_call alone would lose.
        inputs: a tuple (positional arguments), a dict (keyword arguments), or one argument.
        tie_weights: as functional_call's.
    """
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    handle = module.register_forward_hook(Writing(buffers)) if buffers else None
    try:
        with twice_alike(module, params, buffers):
            return functional_call(module, {**params, **buffers}, args, kwargs, tie_weights=tie_weights)
    finally:
        if handle is not None:
            handle.remove()


class Writing:
    """Writes what a forward has put in a buffer's place into the buffer."""

    def __init__(self, buffers: Tree):
        self.buffers = buffers

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        for name, found in module.named_buffers(remove_duplicate=False):
            given = self.buffers.get(name)
            if isinstance(given, Tensor) and found is not given:
                given.copy_(found)


@contextmanager
def twice_alike(module: nn.Module, params: Tree, buffers: Tree) -> Iterator[None]:
    """Within it, what torch.utils.checkpoint is given to run runs again with the tensors and the random draws of its first run."""
    generator = getattr(torch_checkpoint, GENERATOR, None)
    if generator is None or not torch.is_grad_enabled():
        yield
        return

    def remembering(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        own = function if getattr(function, "remembers", False) else remembered(function, module, params, buffers)
        return generator(own, *args, **kwargs)

    setattr(torch_checkpoint, GENERATOR, remembering)
    try:
        yield
    finally:
        setattr(torch_checkpoint, GENERATOR, generator)


def remembered(function: Callable[..., Any], module: nn.Module, params: Tree, buffers: Tree) -> Callable[..., Any]:
    """`function` as it runs again, in a backward pass: with the tensors, draws and modes of its first run, which alone wrote into the buffers."""
    modes = torch.overrides._get_current_function_mode_stack()
    calls = ACTIVE[-1].calls if ACTIVE else 0

    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(swapped(module, {**params, **{name: value.clone() for name, value in buffers.items()}}))
            for mode in modes:
                if isinstance(mode, AddressedSamplers):
                    stack.enter_context(AddressedSamplers(mode.key, first=mode.first, examples=mode.examples, copies=mode.copies)).calls = calls
                elif mode not in torch.overrides._get_current_function_mode_stack():
                    stack.enter_context(mode)
            return function(*args, **kwargs)

    return run


@contextmanager
def swapped(module: nn.Module, values: Tree) -> Iterator[None]:
    """The module with other tensors in place of its parameters and buffers."""
    with torch.nn.utils.stateless._reparametrize_module(module, values):
        yield


__all__ = ["called", "swapped"]
