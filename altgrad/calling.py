"""A module called with other tensors than its own, and the buffers that its forward writes kept, however it writes them."""

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from altgrad.engine import Tree


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


__all__ = ["called"]
