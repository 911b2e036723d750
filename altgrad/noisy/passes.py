"""Copies of a model in one pass: together under vmap where the model and the loss allow it, one after the other otherwise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from altgrad.credit import per_example
from altgrad.errors import ShapeError
from altgrad.noisy import layers
from altgrad.noisy.parameters import Noisy
from altgrad.population.custom import running_custom_functions
from altgrad.population.evaluate import Population
from altgrad.problem import Batch, Problem
from altgrad.samplers import AddressedSamplers

INTERCEPTED = {F.batch_norm, *layers.TAKEN_APART}


class NoisyPass(Population):
    """Functions that need another form under vmap; those that meet noisy parameters are layers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in INTERCEPTED and any(isinstance(leaf, Noisy) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)  # its rule
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def passing(key: Any, batch: Batch, examples: int) -> Iterator[None]:
    """One pass: no graph, the step's own dropout masks, custom functions as the plain functions they are."""
    with torch.no_grad(), AddressedSamplers(key.fold("samplers"), first=batch.first, examples=examples), NoisyPass(), running_custom_functions():
        yield


def clean(problem: Problem, params: dict[str, Tensor], batch: Batch, key: Any, buffers: dict[str, Tensor], *, local: bool = False) -> Tensor:
    """The losses [N] or [1] (local ones: [N, P]) of the unperturbed model, which writes `buffers`."""
    with torch.no_grad(), AddressedSamplers(key.fold("samplers"), first=batch.first, examples=problem.batch_size_of(batch)):
        return losses_of(problem, params, batch, buffers, local=local).detach()


def losses_of(problem: Problem, params: dict[str, Tensor], batch: Batch, buffers: dict[str, Tensor], *, local: bool = False) -> Tensor:
    """problem.losses in float32 or better, one an example or, where they are to be `local`, [N, P]; the objective as one number where the loss is none of
    PyTorch's.
    """
    if local:
        value = problem.losses(params, batch, buffers)
        return value.to(torch.promote_types(value.dtype, torch.float32))
    if not problem.facts.get("objective only", False):
        try:
            value = problem.losses(params, batch, buffers)
            return per_example(value.to(torch.promote_types(value.dtype, torch.float32)))
        except ShapeError:
            value = problem.objective(params, batch, buffers)
            problem.facts["objective only"] = True
            return value.reshape(1)
    return problem.objective(params, batch, buffers).reshape(1)


def together(count: int, call: Callable[[], Tensor]) -> Tensor:
    """`call` for all copies of a pass under one vmap, [copies, N]; noise that differs between copies is the trace's to bring in."""
    return torch.func.vmap(lambda _: call())(torch.arange(count))
