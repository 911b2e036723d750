"""torch.autograd.Function in forward mode.

`Function.apply` runs the user's forward under no_grad and tells no one: tangents would end there without a word. Within
`following_custom_functions` it is a function like any other: its own `jvp` where it has one, a central difference otherwise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd import Function
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction

from altgrad.forward_mode.dual import Dual, dispatch


class Applied:
    """`apply` of one Function class, under the class's name."""

    def __init__(self, cls: Any, call: Any):
        self.__name__, self.cls, self.call = cls.__name__.rstrip("_"), cls, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Applied) and self.cls is other.cls

    def __hash__(self) -> int:
        return hash(self.cls)


@contextmanager
def following_custom_functions() -> Iterator[None]:
    """Within it, tangents pass through custom Functions; reentrant checkpoints, which forward mode has no use for, just run."""
    original = Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            return args[0](*args[2:])
        call = original.__get__(None, cls)
        if any(isinstance(leaf, Dual) for leaf in tree_leaves((args, kwargs))):
            return dispatch(Applied(cls, call), args, kwargs)
        return call(*args, **kwargs)

    Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        Function.apply = original  # type: ignore[method-assign]
