"""torch.autograd.Function for all members at once: no graph is kept, so that its forward may run as the plain function it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import Function
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointFunction

from altgrad.inner import differentiated
from altgrad.population.parameters import plain


class Unused:
    """A context that nobody reads: what is saved for a backward sweep is dropped."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: Any) -> None:
        pass

    save_for_forward = mark_dirty = mark_non_differentiable = save_for_backward

    def set_materialize_grads(self, value: bool) -> None:
        pass


@contextmanager
def running_custom_functions() -> Iterator[None]:
    """Within it, Functions that have no rule for vmap run their forward, and reentrant checkpoints what they hold.

    A model that differentiates within its own forward pass gets what a Function's own rules say, or vmap's refusal.
    """
    original, recording = Function.__dict__["apply"], torch.is_grad_enabled()

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            return args[0](*args[2:])
        args, kwargs = tree_map(plain, (args, kwargs))  # a Function sees values, not parameters that answer functions themselves
        if cls.vmap is not Function.vmap or cls.generate_vmap_rule or differentiated() or (torch.is_grad_enabled() and not recording):
            return original.__get__(None, cls)(*args, **kwargs)
        with_context = cls.setup_context is Function.setup_context
        return cls.forward(*((Unused(), *args) if with_context else args), **kwargs)

    Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        Function.apply = original  # type: ignore[method-assign]
