"""Parameters that answer torch functions themselves: which layer's rule takes a call, and what every such parameter does with the rest.

A model sees a stand-in in the place of its parameter; the model's own code stays as it is. A function of the tensor's form is asked of
the unperturbed tensor, writes in place are refused, and what the kind of stand-in does with other functions is its own.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from altgrad.errors import CapabilityError
from altgrad.forward_mode.dual import label, writes_in_place

Rule = Callable[..., Any]


class Rules:
    """Rules of one kind of stand-in by torch function: rule(*args, **kwargs), which may answer NotImplemented."""

    def __init__(self) -> None:
        self.table: dict[Any, tuple[Rule, frozenset[str] | None]] = {}  # with the names a rule takes, where not all: a call with others has no rule

    def __call__(self, *functions: Any) -> Callable[[Rule], Rule]:
        """Register a rule for torch functions."""

        def register(rule: Rule) -> Rule:
            taken = inspect.signature(rule).parameters
            any_name = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
            for target in functions:
                self.table[target] = rule, None if any_name else frozenset(taken)
            return rule

        return register

    def products(self, rule: Rule) -> Rule:
        """Register rule(x, y) for x @ y under all its names, also where y is asked first."""
        self(torch.Tensor.__rmatmul__)(lambda second, first: rule(first, second))
        return self(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)(rule)

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The rule's result, or NotImplemented where there is no rule for the call."""
        rule, names = self.table.get(func, NO_RULE)
        if rule is None or (kwargs and names is not None and not kwargs.keys() <= names):
            return NotImplemented
        return rule(*args, **kwargs)


NO_RULE = (None, None)


class StandIn(torch.Tensor):
    """A parameter on the pass of several models at once."""

    centre: Tensor  # unperturbed
    parameter: str
    WORDS: ClassVar[tuple[str, str]] = ("perturbed", "perturbation")  # what it is, what it carries
    SHARERS: ClassVar[str] = "a population of models cannot share"
    REFUSAL: ClassVar[type[CapabilityError]] = CapabilityError  # raised where a forward pass writes to a parameter

    @classmethod
    def over(cls, centre: Tensor, parameter: str) -> Self:
        """One with the form of `centre`."""
        self = torch.Tensor._make_wrapper_subclass(cls, centre.shape, strides=centre.stride(), dtype=centre.dtype, device=centre.device)
        self.centre, self.parameter = centre, parameter
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        found, carried = cls.WORDS
        raise CapabilityError(f"a {found} parameter reached {func} without passing a torch function; its {carried} would be lost.")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.parameter}, shape={tuple(self.centre.shape)})"


def centre_of(value: Any) -> Any:
    """The unperturbed tensor."""
    return value.centre if isinstance(value, StandIn) else value


def on_centres(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` of the unperturbed tensors."""
    return func(*tree_map(centre_of, args), **tree_map(centre_of, kwargs))


def tells_form(func: Any) -> bool:
    """Whether a function tells of a tensor's shape, dtype and the like, and nothing of its values."""
    name = getattr(func, "__name__", "")
    return name in SHAPES or (name == "__get__" and label(func) in ATTRIBUTES)


def refuse_writes(func: Any, args: Any, kwargs: Any) -> None:
    """Raise the stand-in's REFUSAL where `func` would write to it."""
    name = getattr(func, "__name__", "")
    target = kwargs.get("out", args[0] if args and (writes_in_place(name) or kwargs.get("inplace")) else None)
    for leaf in tree_leaves(target):
        if isinstance(leaf, StandIn):
            raise leaf.REFUSAL(
                f"{name} would change the parameter {leaf.parameter!r} in place during the forward pass, which {leaf.SHARERS}; "
                "change it between steps, or out of place."
            )


SHAPES = frozenset(
    "size dim ndimension numel nelement stride storage_offset element_size is_floating_point is_complex is_contiguous get_device __len__ is_signed "
    "new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like empty_like full_like result_type __hash__ is_cuda".split()
)
ATTRIBUTES = frozenset(
    "shape dtype device ndim requires_grad is_cuda is_leaf layout is_sparse is_quantized is_meta is_mkldnn is_cpu names itemsize nbytes grad_fn grad "
    "is_nested is_mps".split()
)
