"""A parameter whose layer's output is perturbed in its stead; where no layer takes it, it is perturbed itself, and that is counted."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from altgrad.forward_mode.dual import label
from altgrad.stand_ins import Rules, StandIn, on_centres, refuse_writes, tells_form

if TYPE_CHECKING:
    from altgrad.noisy.trace import NoisyTrace

View = Callable[[Tensor], Tensor]
rule = Rules()


class Noisy(StandIn):
    """`centre`, a view of the parameter `whole`, on a pass that `made_on` keeps track of."""

    whole: Tensor
    made_on: "NoisyTrace"
    through: View | None  # whole -> the shape of centre; None where centre is the whole
    WORDS = ("noisy", "noise")
    SHARERS = "the copies of a pass share"

    @staticmethod
    def __new__(cls, centre: Tensor, trace: "NoisyTrace", *, parameter: str, whole: Tensor | None = None, view: View | None = None) -> "Noisy":
        self = cls.over(centre, parameter)
        self.whole, self.made_on, self.through = centre if whole is None else whole, trace, view
        return self

    def seen(self, centre: Tensor, view: View | None) -> "Noisy":
        """The same parameter through a further view (None: another precision only)."""
        before = self.through
        after = before if view is None else view if before is None else lambda whole: view(before(whole))
        return Noisy(centre, self.made_on, parameter=self.parameter, whole=self.whole, view=after)

    def perturbed(self) -> Tensor:
        """The value with noise of its own, for functions that no layer rule answers."""
        value = self.made_on.fallen(self.parameter, self.whole)
        return (value if self.through is None else self.through(value)).to(self.centre.dtype)

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the whole parameter from that of this view: the entries go where they came from, the others are zero."""
        if self.through is None:
            return grad.reshape(self.whole.shape)
        places = self.through(torch.arange(self.whole.numel(), device=grad.device).reshape(self.whole.shape))
        return grad.new_zeros(self.whole.numel()).index_add_(0, places.reshape(-1), grad.reshape(-1)).reshape(self.whole.shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = rule.answer(func, args, kwargs)
        if result is not NotImplemented:
            return result
        name = getattr(func, "__name__", "")
        if name in CASTS and isinstance(args[0], Noisy):
            return args[0].seen(on_centres(func, args, kwargs), None)
        if (name in VIEWS or (name == "__get__" and label(func) in {"T", "mT"})) and isinstance(args[0], Noisy):
            return viewed(func, args, kwargs)
        if tells_form(func):
            return on_centres(func, args, kwargs)
        if name in {"detach", "requires_grad_", "contiguous"}:
            return args[0]
        refuse_writes(func, args, kwargs)
        return func(*tree_map(value_of, args), **tree_map(value_of, kwargs))


def viewed(func: Any, args: Any, kwargs: Any) -> Any:
    """A view, or the views, of a noisy parameter."""
    own, rest = args[0], args[1:]

    def run(value: Tensor) -> Any:
        return func(value, *rest, **kwargs)

    found = run(own.centre)
    if isinstance(found, Tensor):
        return own.seen(found, run)
    return tuple(own.seen(part, lambda value, place=place: run(value)[place]) for place, part in enumerate(found))


def value_of(value: Any) -> Any:
    """A noisy parameter as the perturbed tensor it stands for; anything else as it is."""
    return value.perturbed() if isinstance(value, Noisy) else value


CASTS = frozenset("to float double half bfloat16 type_as".split())
VIEWS = frozenset(
    "t transpose swapaxes swapdims movedim permute __getitem__ chunk split tensor_split unbind narrow select reshape view flatten unflatten squeeze "
    "unsqueeze expand".split()
)
