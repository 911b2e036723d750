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
from altgrad.forward_mode.dual import Dual
from altgrad.linearised import no_saved_hooks

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
    return (
        tensor.requires_grad or isinstance(tensor, Dual) or forward_ad._current_level >= 0
    )  # its tangent cannot be asked for at every level of torch.func: take it to have one


searching = threading.local()  # .finders: those at work in this thread, outermost first


def own(tensor: Tensor) -> None:
    """Tell the finders at work that `tensor` was made inside: the output of a custom rule passes no mode."""
    for finder in getattr(searching, "finders", ()):
        finder.made[id(tensor)] = tensor


def inside_another() -> bool:
    """Whether this runs inside the F of an outer call: other modes (samplers, say) put no tensor in another's place."""
    return any(isinstance(mode, (Finder, Swapper)) for mode in torch.overrides._get_current_function_mode_stack())


def swapped(swap: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> tuple[Any, Any]:
    """`args` and `kwargs` with each leaf put through `swap`; most operations hold no container, and need no walk."""
    if not kwargs and not any(isinstance(arg, list | tuple | dict) for arg in args):
        return tuple([swap(arg) for arg in args]), {}
    return tree_map(swap, (args, kwargs or {}))


class Finder(TorchFunctionMode):
    """Notes the outside tensors that carry a derivative and puts their detached values in place."""

    def __init__(self, given: Sequence[Tensor]):
        super().__init__()
        self.level = functorch.maybe_current_level() or 0
        self.made = {id(tensor): tensor for tensor in given}  # holds them: an id lives as long as its tensor
        self.found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # the tensor that F names, what it stands for, its detached value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = swapped(self.swap, args, kwargs)
        result = func(*args, **kwargs)
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
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
        nested = inside_another()
        actual = value.view_as(value) if nested else value
        if not nested and not carries(actual, self.level):
            return value
        stand_in = actual.detach()
        self.found[id(value)] = (value, actual, stand_in)
        self.made[id(stand_in)] = stand_in
        return stand_in


class Swapper(TorchFunctionMode):
    """Puts given values in the place of outside tensors."""

    def __init__(self, places: dict[int, int], values: Sequence[Tensor], *, whole: bool = False):
        super().__init__()
        self.places, self.values, self.whole = places, values, whole
        self.met: set[int] = set()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        super().__exit__(kind, *rest)
        if self.whole and kind is None and len(self.met) < len(self.places):
            raise replaced(len(self.places) - len(self.met))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = swapped(self.swap, args, kwargs)
        return func(*args, **kwargs)

    def swap(self, value: Any) -> Any:
        if id(value) not in self.places:
            return value
        self.met.add(id(value))
        return self.values[self.places[id(value)]]


def closed(function: Callable[..., Any], *args: Any) -> tuple[Any, list[Tensor], Callable[..., AbstractContextManager[Any]]]:
    """(f(*args), the outside tensors it uses, values -> a context in which those values take their place).

    Where all that carries a derivative is handed over, the common case, a run without the mode tells.

    Args:
        function: any callable; it runs here once, and up to twice more where it uses outside tensors.
        args: pytrees whose tensors carry no derivative (detached).

    Errors: CapabilityError where a parameter takes part in a way that no mode sees (a scripted function, say).
    """
    if uncaptured():
        with torch.enable_grad(), no_saved_hooks():
            result = function(*args)
        leaves = (result,) if isinstance(result, Tensor) else tree_leaves(result)
        if not any(isinstance(leaf, Dual) or (isinstance(leaf, Tensor) and leaf.requires_grad) for leaf in leaves):
            return result, [], lambda values, whole=True: nullcontext()  # nothing from outside carries a derivative into it
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

    def swap(values: Sequence[Tensor], *, whole: bool = True) -> AbstractContextManager[Any]:
        """`whole`: what runs inside is the function, which must meet every one of them again."""
        assert len(values) == len(originals)  # and `originals` stay alive here, which keeps their ids theirs
        return Swapper(places, values, whole=whole) if places else nullcontext()

    return result, outside, swap


def uncaptured() -> bool:
    """Whether autograd alone would carry a derivative or a batch from outside: no transform, no forward mode, no outer call at work."""
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0 and not inside_another()


def lost(tensor: Tensor) -> CapabilityError:
    return CapabilityError(
        f"a tensor of shape {tuple(tensor.shape)} that carries a derivative takes part where it cannot be seen (a scripted function, or an autograd.Function "
        "of your own), and its gradient would be lost. Write that part in plain PyTorch operations, or detach it."
    )


def replaced(count: int) -> CapabilityError:
    return CapabilityError(
        f"{count} of the outside tensors that the function used at first are not those that it uses now, and their gradients would be lost. This happens where "
        "torch.func.functional_call has put a module's own parameters back before the backward pass: take them when the function is made, "
        "values = dict(module.named_parameters()), and call functional_call(module, values, ...) inside it, or hand them in as arguments."
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
