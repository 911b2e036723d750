r"""Warm starts: every training example's free state is kept, and its next relaxation begins there.

The states are part of the engine's own state, one tensor [examples, ...] a layer: they are saved with it, so that a resumed run goes on bit by bit, and take
examples · units numbers (MNIST on 784-512-10: 60,000 · 522 · 4 bytes = 125 MB), which every step copies. They begin at ρ(0), where cold relaxations do. With
several ranks each adds what its own examples have moved by; the mean over ranks, which the trainer takes of an engine's state, puts them together.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from altgrad.engine import Tree
from altgrad.equilibrium.relaxation import State
from altgrad.equilibrium.settling import starts
from altgrad.errors import CapabilityError
from altgrad.problem import Batch, Problem, first_tensor
from altgrad.world import World

NAME = "warm.{}"  # of layer
LIMIT = 2**31  # bytes


def check_warm(problem: Problem, who: str) -> None:
    """Raise CapabilityError where training examples cannot be told from one another, or there are too many of them to keep."""
    count = examples(problem)
    if count is None or problem.batch(0, World()).numbers is None:
        why = "has no data of its own" if count is None else "augments its inputs at random"
        raise CapabilityError(f"{who}: {problem.name!r} {why}, so that no example is met again to start from where it was. Use warm_start=False.")
    size = sum(leaf[0].numel() * leaf.element_size() for leaf in one(problem, problem.params())) * count
    if size > LIMIT:
        raise CapabilityError(
            f"{who}: the free states of {count} examples are {size / 1e9:.1f} GB, {LIMIT / 1e9:.1f} GB at most are kept and copied. Use warm_start=False."
        )


def examples(problem: Problem) -> int | None:
    """How many training examples a problem has, where it has data of its own."""
    dataset = getattr(problem, "dataset", None)
    return None if dataset is None else len(first_tensor(dataset.train_inputs))


def one(problem: Problem, params: Tree) -> State:
    """Where the relaxation of one example begins."""
    return starts(problem)[0]({name: value.detach() for name, value in params.items()}, problem.example()[:1])


def first_states(problem: Problem, params: Tree) -> Tree:
    """The engine state before the first step."""
    count = examples(problem) or 0
    return {NAME.format(number): leaf.expand(count, *leaf.shape[1:]).clone() for number, leaf in enumerate(one(problem, params))}


def recalled(state: Mapping[str, Tensor], batch: Batch) -> State | None:
    """Where the batch's examples were at rest; None where nothing is kept of them."""
    if not state or batch.numbers is None:
        return None
    return tuple(state[NAME.format(number)][batch.numbers.to(state[NAME.format(number)].device)] for number in range(len(state)))


def kept(state: Tree, batch: Batch, found: State, world: World) -> Tree:
    """The engine state with the batch's free states; an example that has not come to finite numbers keeps its old one."""
    before = recalled(state, batch)
    if before is None or batch.numbers is None:
        return state
    share = world.shares(len(found[0]))[world.rank]
    after = {}
    for number, (old, new) in enumerate(zip(before, found, strict=True)):
        whole, at = state[NAME.format(number)], batch.numbers.to(old.device)
        moved = new if world.size == 1 else old + (new - old) / share
        after[NAME.format(number)] = whole.index_copy(0, at, torch.where(torch.isfinite(new), moved, old).to(whole.dtype))
    return after


__all__ = ["check_warm", "first_states", "kept", "recalled"]
