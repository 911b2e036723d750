"""A problem's blocks as a chain: that it is the model, and which of them must see all examples at once. Each is looked at once a problem."""

from collections.abc import Sequence
from typing import Any

import torch

from altgrad.blocks import Block, alike, chained, replay
from altgrad.engine import Tree
from altgrad.local.streaming import independent
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers


def sampling(problem: Problem, batch: Batch, key: Key) -> AddressedSamplers:
    """The random draws of a pass over the batch: the same in every pass of a step."""
    return AddressedSamplers(key.fold("samplers"), first=batch.first, examples=problem.batch_size_of(batch))


def hold_to_model(problem: Problem, cut: str, params: Tree, blocks: Sequence[Block], batch: Batch, key: Key) -> None:
    """Once: the blocks one after another give the model's output on this batch.

    Raises:
        CapabilityError: they do not; says where.
    """
    model = getattr(problem, "model", None)
    fact = ("replayed", cut, getattr(model, "training", True))
    if model is None or fact in problem.facts:
        return

    def run(whole: bool) -> Any:
        with torch.no_grad(), sampling(problem, batch, key):
            buffers = problem.fresh_buffers()
            return problem.forward(params, batch.inputs, buffers) if whole else chained(blocks, params, batch.inputs, buffers)

    replay(model, blocks, lambda: run(True), lambda: run(False))
    problem.facts[fact] = True


def mixing(problem: Problem, cut: str, rows: int, params: Tree, blocks: Sequence[Block], batch: Batch, key: Key) -> set[int]:
    """Positions of the blocks in which examples see one another; looked at on a batch of more than `rows`."""
    mode = getattr(getattr(problem, "model", None), "training", True)

    def find() -> set[int]:
        with sampling(problem, batch, key):
            alone = list(independent(blocks, params, batch.inputs, problem.fresh_buffers(), rows, alike))
        return {position for position, same in enumerate(alone) if not same}

    found: set[int] = problem.recall(("mixed blocks", cut, rows, mode), find)
    return found


__all__ = ["hold_to_model", "mixing", "sampling"]
