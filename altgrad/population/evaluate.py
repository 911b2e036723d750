r"""A function of perturbed parameters, evaluated for every member of a population: f(θ + σ s_p E_p), p = 1 … P.

The model is not touched and no weight is ever changed. Rungs, from the best to the last resort (the last two are counted):
    vmap         all members of a chunk at once; matrices act as W + L Rᵀ, what members share is computed once
    objective    the model by vmap, the objective member by member (it cannot be batched: .item(), NumPy, …)
    member       model and objective member by member, with weights written out
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import _add_batch_dim, maybe_current_level
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from altgrad.engine import Tree
from altgrad.errors import AltgradError
from altgrad.population.attention import attend
from altgrad.population.custom import running_custom_functions
from altgrad.population.draws import Chunk, Draws
from altgrad.population.layers import TAKEN_APART
from altgrad.population.parameters import Perturbed, Shifted, plain
from altgrad.samplers import AddressedSamplers, replaying

REFUSALS = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError, KeyError, AltgradError)
Function = Callable[..., Any]
PLACE = object()  # stands where a tensor was


class Notes:
    """What had no rule, and which rung was taken."""

    def __init__(self) -> None:
        self.written_out: Counter[str] = Counter()  # "parameter: function" -> calls
        self.objective_loops = 0  # objectives evaluated member by member
        self.member_loops = 0  # members evaluated one by one
        self.reason = ""  # why, in the words of the first error

    def metrics(self) -> dict[str, int]:
        """Counts of the fallbacks that were taken."""
        found = {
            "fallback_dense_weights": sum(self.written_out.values()),
            "fallback_objective_loop": self.objective_loops,
            "fallback_member_loop": self.member_loops,
        }
        return {name: count for name, count in found.items() if count}


class Population(TorchFunctionMode):
    """Functions that need another form where members are batched.

    Batch norm in training normalises each member's batch by that batch's own statistics and leaves the running ones alone; they follow the
    unperturbed pass. Recurrent layers and attention are taken apart or folded, as their fused kernels have no batched form.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return batch_norm(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return attend(*args, **kwargs)
        if func in TAKEN_APART and not any(isinstance(leaf, Perturbed) for leaf in tree_leaves((args, kwargs))):
            return TAKEN_APART[func](*args, **kwargs)
        return func(*args, **kwargs)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.batch_norm that writes no statistics: (x - μ)/√(v + ε) · weight + bias, in float32 or better."""
    axes, shape = [axis for axis in range(x.ndim) if axis != 1], (1, -1, *(1 for _ in range(x.ndim - 2)))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if training or running_mean is None or running_var is None:
        variance, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
    else:
        mean, variance = running_mean.reshape(shape), running_var.reshape(shape)
    value = (wide - mean) * torch.rsqrt(variance + eps)
    if weight is not None:
        value = value * weight.reshape(shape)
    return (value if bias is None else value + bias.reshape(shape)).to(x.dtype)


@contextmanager
def passing(samplers: Callable[[], AddressedSamplers] | None) -> Iterator[None]:
    """One pass of a model for a population: no graph, addressed samplers, batched forms."""
    with torch.no_grad():
        if samplers is None:
            with Population():
                yield
        else:
            with samplers(), Population():
                yield


def taken_apart(tree: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors of a nest, and what puts others in their places; anything else in it must be plain."""
    leaves, spec = tree_flatten(tree)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, bool, int, float, str, type(None))):
            raise TypeError(f"members cannot be told apart in a {type(leaf).__name__}; use tensors, tuples, lists and dicts.")

    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    rest = [PLACE if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # keeps no tensor alive

    def rebuilt(others: Sequence[Tensor]) -> Any:
        supply = iter(others)
        return tree_unflatten([next(supply) if leaf is PLACE else leaf for leaf in rest], spec)

    return tensors, rebuilt


def members_of(draws: Draws, part: Chunk, call: Function, notes: Notes, *, extra: Any = None) -> Any:
    """`call(parameters[, extra_p])` for all members of a chunk by one vmap; outputs [P, …]."""
    means = draws.params
    given, rebuilt = taken_apart(extra)
    known: dict[str, Any] = {}  # how the outputs are put together again

    def member(place: Tensor, own: list[Tensor]) -> list[Tensor]:
        level = maybe_current_level()
        assert level is not None

        def factors(name: str) -> tuple[Tensor, Tensor]:
            left, right = part.thin[name]
            return _add_batch_dim(left, 0, level), _add_batch_dim(right, 0, level)

        def value(name: str) -> Tensor:
            return _add_batch_dim(part.full[name], 0, level)

        pairs = part.pairs
        values: Tree = {
            name: Perturbed(
                mean, partial(factors, name), parameter=name, written_out=notes.written_out, pairs=None if pairs is None else partial(pairs.__getitem__, name)
            )
            if name in part.thin
            else Shifted(mean, partial(value, name), parameter=name)
            for name, mean in means.items()
        }
        outputs = call(values) if extra is None else call(values, rebuilt(own))
        tensors, known["rebuilt"] = taken_apart(tree_map(plain, outputs))
        return tensors

    with running_custom_functions():
        outputs = torch.func.vmap(member)(torch.arange(count_of(draws, part)), given)
    return known["rebuilt"](outputs)


def each_member(draws: Draws, part: Chunk, call: Function, *, extra: Any = None) -> list[Any]:
    """`call` with plain tensors, member by member: any model and objective runs so. Every member meets the same samplers."""
    results = []
    for index in range(count_of(draws, part)):
        values: Tree = {}
        for name, mean in draws.params.items():
            if name in part.full:
                values[name] = part.full[name][index]
            else:
                left, right = part.thin[name]
                values[name] = mean + (left[index] @ right[index].mT).reshape(mean.shape)
        with replaying():
            results.append(call(values) if extra is None else call(values, row(extra, index)))
    return results


def count_of(draws: Draws, part: Chunk) -> int:
    """The members of a chunk."""
    return part.directions * (2 if draws.antithetic else 1)


def row(tree: Any, index: int) -> Any:
    """One member's part of a nest [P, …]."""
    return tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, tree)


def in_order(parts: list[Tensor], draws: Draws) -> Tensor:
    """Chunks' results as one: with pairs each holds [+, -] halves, and the whole is to be [all +, all -]."""
    if not draws.antithetic:
        return torch.cat(parts)
    halves = [part.chunk(2) for part in parts]
    return torch.cat([plus for plus, _ in halves] + [minus for _, minus in halves])


def population(
    function: Callable[..., Any],
    draws: Draws,
    *,
    inputs: Any = None,
    samplers: Callable[[], AddressedSamplers] | None = None,
    notes: Notes | None = None,
) -> Any:
    """`function(parameters)` for every member -> outputs [P, …], in the order of the members.

    Args:
        function: of a dict of parameters by name; with `inputs`, of that and one member's inputs.
        draws: the members' perturbations; its `chunk` bounds the memory and does not change the result.
        inputs: tensors [P, …], one row a member, where members do not see the same data.
        samplers: makes the mode that serves dropout and the like, the same draws for every member.
        notes: collects what had no rule.

    Example:
        draws = Draws(Key(0), params, 128, sigma=0.01, rank=1, law="normal", antithetic=True)
        outputs = population(lambda values: torch.func.functional_call(model, values, x), draws)     # [256, N, classes]
    """
    notes = notes or Notes()
    results = []
    for first, count in draws.chunks():
        extra = None if inputs is None else rows_of(inputs, draws, first, count)
        with passing(samplers):
            results.append(members_of(draws, draws.chunk(first, count), function, notes, extra=extra))
    if len(results) == 1:
        return results[0]
    return tree_map(lambda *leaves: in_order(list(leaves), draws) if isinstance(leaves[0], Tensor) else leaves[0], *results)


def rows_of(inputs: Any, draws: Draws, first: int, count: int) -> Any:
    """The inputs of a chunk's members."""
    if count == draws.count:
        return inputs

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        plus = leaf[first : first + count]
        return torch.cat([plus, leaf[draws.count + first : draws.count + first + count]]) if draws.antithetic else plus

    return tree_map(cut, inputs)
