"""Closure conversion: the tensors that a function uses without being handed them become arguments.

A custom derivative rule sees only its arguments; a weight of a module that F calls would silently get no gradient. So F runs once under a mode that sees
every PyTorch operation, notes the tensors from outside that carry a derivative, and from then on swaps them for values it is given.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from altgrad.errors import CapabilityError

functorch = torch._C._functorch


def levels(tensor: Tensor) -> Iterable[int]:
    """The torch.func levels that a tensor is wrapped in, outermost first."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        yield functorch.maybe_get_level(tensor)
        tensor = functorch.get_unwrapped(tensor)


def carries(tensor: Tensor, level: int) -> bool:
    """Whether a derivative or a batch from outside may flow through `tensor`: what is wrapped deeper than `level` was made inside."""
    if not tensor.is_floating_point() or tensor.dtype.is_complex:
        return functorch.is_functorch_wrapped_tensor(tensor) and max(levels(tensor)) <= level
    if functorch.is_functorch_wrapped_tensor(tensor):
        return max(levels(tensor)) <= level
    return tensor.requires_grad or forward_ad._current_level >= 0  # its tangent cannot be asked for at every level of torch.func: take it to have one


searching = threading.local()  # .finders: those at work in this thread, outermost first


def own(tensor: Tensor) -> None:
    """Tell the finders at work that `tensor` was made inside: the output of a custom rule passes no mode."""
    for finder in getattr(searching, "finders", ()):
        finder.made[id(tensor)] = tensor


class Finder(TorchFunctionMode):
    """Notes the outside tensors that carry a derivative and puts their detached values in place."""

    def __init__(self, given: Sequence[Tensor]):
        super().__init__()
        self.level = functorch.maybe_current_level() or 0
        self.made = {id(tensor): tensor for tensor in given}  # holds them: an id lives as long as its tensor
        self.found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # the tensor that F names, what it stands for, its detached value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self.swap, (args, kwargs or {}))
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.made[id(leaf)] = leaf
        return result

    def swap(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in self.made:
            return value
        if id(value) in self.found:
            return self.found[id(value)][-1]
        # Inside the F of an outer call that call's mode is at work too: what it puts in this place is what counts. It does so in any operation, and
        # only while that F runs, so here every tensor is taken.
        nested = torch._C._len_torch_function_stack() > 0
        actual = value.view_as(value) if nested else value
        if not nested and not carries(actual, self.level):
            return value
        stand_in = actual.detach()
        self.found[id(value)] = (value, actual, stand_in)
        self.made[id(stand_in)] = stand_in
        return stand_in


class Swapper(TorchFunctionMode):
    """Puts given values in the place of outside tensors."""

    def __init__(self, places: dict[int, int], values: Sequence[Tensor]):
        super().__init__()
        self.places, self.values = places, values
        self.met: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self.swap, (args, kwargs or {}))
        return func(*args, **kwargs)

    def swap(self, value: Any) -> Any:
        if id(value) not in self.places:
            return value
        self.met.add(id(value))
        return self.values[self.places[id(value)]]


def closed(function: Callable[..., Any], *args: Any) -> tuple[Any, list[Tensor], Callable[[Sequence[Tensor]], AbstractContextManager[Any]]]:
    """(f(*args), the outside tensors it uses, values -> a context in which those values take their place).

    Args:
        function: any callable; it runs here once, and once more where it uses outside tensors.
        args: pytrees whose tensors carry no derivative (detached).

    Errors: CapabilityError where a parameter takes part in a way that no mode sees (a scripted function, say).
    """
    finder = Finder([leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)])
    searching.finders = [*getattr(searching, "finders", ()), finder]
    try:
        with finder, torch.enable_grad():
            result = function(*args)
    finally:
        searching.finders = searching.finders[:-1]
    originals = [original for original, _, _ in finder.found.values()]
    outside = [actual for _, actual, _ in finder.found.values()]
    for leaf in tree_leaves(result):
        plain = isinstance(leaf, Tensor) and leaf.requires_grad and not functorch.is_functorch_wrapped_tensor(leaf)
        hidden = unseen(leaf, finder.made) if plain else None
        if hidden is not None:
            raise lost(hidden)
    places = {id(original): index for index, original in enumerate(originals)}
    if places:  # once more: what is not met again was no outside tensor but made inside, by something unseen, from a tensor that carries a derivative
        again = Swapper(places, [stand_in for _, _, stand_in in finder.found.values()])
        with again, torch.enable_grad():
            function(*args)
        for original in originals:
            if id(original) not in again.met:
                raise lost(original)

    def swap(values: Sequence[Tensor]) -> AbstractContextManager[Any]:
        assert len(values) == len(originals)  # and `originals` stay alive here, which keeps their ids theirs
        return Swapper(places, values) if places else nullcontext()

    return result, outside, swap


def lost(tensor: Tensor) -> CapabilityError:
    return CapabilityError(
        f"a tensor of shape {tuple(tensor.shape)} that carries a derivative takes part where it cannot be seen (a scripted function, or an autograd.Function "
        "of your own), and its gradient would be lost. Write that part in plain PyTorch operations, or detach it."
    )


def unseen(result: Tensor, made: dict[int, Tensor]) -> Tensor | None:
    """A leaf that requires grad, in the graph behind `result`, which was neither noted nor made inside; None where there is none."""
    if result.grad_fn is None:
        return None if id(result) in made else result
    queue, known = [result.grad_fn], {result.grad_fn}
    while queue:
        node = queue.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in made:
            return variable
        for following, _ in node.next_functions:
            if following is not None and following not in known:
                known.add(following)
                queue.append(following)
    return None
