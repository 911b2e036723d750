r"""A parameter that acts perturbed: W + L Rᵀ, with thin L [m, r] and R [n, r] that are never multiplied out where a layer has a rule.

Inside torch.func.vmap over a population's members L and R differ from member to member and W does not, so that a layer costs the one dense
product that all members share and two thin ones. What has no rule gets W + L Rᵀ written out, and is counted.

Source: Sarkar et al., "Evolution strategies at the hyperscale" (EGGROLL), section 4.2.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from altgrad.errors import CapabilityError
from altgrad.forward_mode.dual import label
from altgrad.stand_ins import Rules, StandIn, centre_of, on_centres, refuse_writes, tells_form

rule = Rules()
Pairs = Callable[[], tuple[Tensor, Tensor, float]]  # A [D, m, r], B [D, n, r] and σ: what L and R of 2 D members in antithetic pairs are made of


class ChangedInPlace(CapabilityError):
    """A forward pass writes to a parameter: no way of evaluating a population allows it."""


class Perturbed(StandIn):
    """`centre` + (left · rightᵀ) in the shape of `centre`; a tensor of more than two axes is taken as the matrix [shape[0], rest]."""

    supply: Callable[[], tuple[Tensor, Tensor]]  # left [m, r] and right [n, r] of a centre [m, *rest], n = the product of rest
    written_out: Counter[str]  # "parameter: function" -> calls that had no rule
    pairs: Pairs | None  # for layers that take L and R of all members as they lie there
    REFUSAL = ChangedInPlace

    @staticmethod
    def __new__(
        cls, centre: Tensor, supply: Callable[[], tuple[Tensor, Tensor]], *, parameter: str, written_out: Counter[str], pairs: Pairs | None = None
    ) -> "Perturbed":
        self = cls.over(centre, parameter)
        self.supply, self.written_out, self.pairs = supply, written_out, pairs
        return self

    @property
    def left(self) -> Tensor:
        """L [m, r], made when asked for."""
        return self.supply()[0]

    @property
    def right(self) -> Tensor:
        """R [n, r], made when asked for."""
        return self.supply()[1]

    def like(self, centre: Tensor, left: Tensor, right: Tensor) -> "Perturbed":
        """The same parameter seen through a view."""
        return Perturbed(centre, lambda: (left, right), parameter=self.parameter, written_out=self.written_out)

    def dense(self) -> Tensor:
        """W + L Rᵀ, written out."""
        left, right = self.supply()
        return self.centre + torch.matmul(left, right.mT).reshape(self.centre.shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = rule.answer(func, args, kwargs)
        if result is not NotImplemented:
            return result
        name = getattr(func, "__name__", "")
        if name == "__get__" and label(func) in {"T", "mT"}:
            return transpose(args[0])
        if tells_form(func):
            return on_centres(func, args, kwargs)
        if name == "detach":
            return args[0]
        refuse_writes(func, args, kwargs)
        return func(*tree_map(written_out_for(func), args), **tree_map(written_out_for(func), kwargs))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Perturbed({self.parameter}, shape={tuple(self.centre.shape)}, rank={self.left.shape[-1]})"


class Shifted(StandIn):
    """A parameter with dense noise: a vector, or a matrix that has no rank; its value is made when a function asks for it."""

    supply: Callable[[], Tensor]  # the value, in the shape of `centre`
    REFUSAL = ChangedInPlace

    @staticmethod
    def __new__(cls, centre: Tensor, supply: Callable[[], Tensor], *, parameter: str) -> "Shifted":
        self = cls.over(centre, parameter)
        self.supply = supply
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if tells_form(func):
            return on_centres(func, args, kwargs)
        if getattr(func, "__name__", "") == "detach":
            return args[0]
        refuse_writes(func, args, kwargs)
        return func(*tree_map(value_of, args), **tree_map(value_of, kwargs))


def value_of(value: Any) -> Any:
    """The value of a parameter with dense noise; anything else as it is."""
    return value.supply() if isinstance(value, Shifted) else value


def plain(value: Any) -> Any:
    """A perturbed tensor in the place of an input: written out, and noted."""
    return written_out_for("as an input")(value_of(value))


def written_out_for(func: Any) -> Callable[[Any], Any]:
    """Writes perturbed parameters out for a function that has no rule, and notes it."""

    def write(value: Any) -> Any:
        if not isinstance(value, Perturbed):
            return value
        value.written_out[f"{value.parameter}: {func if isinstance(func, str) else label(func)}"] += 1
        return value.dense()

    return write


@rule(torch.t, torch.Tensor.t)
def transpose(weight: Perturbed) -> Any:
    """(W + L Rᵀ)ᵀ = Wᵀ + R Lᵀ."""
    return weight.like(weight.centre.mT, weight.right, weight.left) if weight.ndim == 2 else NotImplemented


@rule(torch.transpose, torch.Tensor.transpose)
def transpose_axes(input: Perturbed, dim0: int, dim1: int) -> Any:
    if input.ndim != 2 or {dim0 % 2, dim1 % 2} != {0, 1}:
        return NotImplemented
    return transpose(input)


@rule(torch.swapaxes, torch.Tensor.swapaxes)
def swap_axes(input: Perturbed, axis0: int, axis1: int) -> Any:
    return transpose_axes(input, axis0, axis1)


@rule(torch.Tensor.__getitem__)
def rows(weight: Any, index: Any) -> Any:
    """Some rows and columns: (W + L Rᵀ)[rows, columns] = W[rows, columns] + L[rows] R[columns]ᵀ."""
    if not isinstance(weight, Perturbed):
        return NotImplemented
    if isinstance(index, tuple) and len(index) == weight.ndim == 2 and all(isinstance(part, slice) for part in index):
        return weight.like(weight.centre[index], weight.left[index[0]], weight.right[index[1]])
    if not isinstance(index, slice):
        return NotImplemented
    return weight.like(weight.centre[index], weight.left[index], weight.right)


@rule(torch.chunk, torch.Tensor.chunk)
def chunk(input: Perturbed, chunks: int, dim: int = 0) -> Any:
    if dim != 0:
        return NotImplemented
    return tuple(input.like(part, left, input.right) for part, left in zip(input.centre.chunk(chunks), input.left.chunk(chunks), strict=True))


@rule(torch.split, torch.Tensor.split)
def split(tensor: Perturbed, split_size: Any, dim: int = 0) -> Any:
    if dim != 0:
        return NotImplemented
    return tuple(tensor.like(part, left, tensor.right) for part, left in zip(tensor.centre.split(split_size), tensor.left.split(split_size), strict=True))


@rule(torch.Tensor.contiguous, torch.Tensor.requires_grad_)
def itself(weight: Perturbed, *args: Any, **kwargs: Any) -> Perturbed:
    return weight


def casting(func: Any) -> Callable[..., Any]:
    """Another precision or device: of W, L and R alike."""

    def run(weight: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(weight, Perturbed):
            return NotImplemented
        args = tree_map(centre_of, args)
        return weight.like(*(func(part, *args, **kwargs) for part in (weight.centre, weight.left, weight.right)))

    return run


for method in (torch.Tensor.to, torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.type_as):
    rule(method)(casting(method))
