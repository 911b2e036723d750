"""The frozen blocks before the one that is trained: run in evaluation mode, and kept for the whole training set where nothing about them is random."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from altgrad.blocks import Block
from altgrad.engine import Tree
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers

CHUNK = 1000  # examples at a time, in the data's order: a resumed run makes the same bits again
FACT = "frozen prefix"
Run = Callable[[Any, int], Tensor]


@dataclass(frozen=True)
class Kept:
    """What the first `depth` blocks give for every training example; None where it may not be kept."""

    depth: int
    stamps: tuple[Any, ...]  # one a block: another value of a tensor is another stamp
    outputs: Tensor | None


def frozen_output(problem: Problem, params: Tree, blocks: Sequence[Block], run: Run, batch: Batch, key: Key, *, limit: float) -> tuple[Tensor, bool]:
    """(what the frozen blocks give for the batch, whether it had been kept).

    It is kept where the batch says which training examples it holds (it does not where they are augmented at random), where two passes under
    different random numbers agree, and where it fits into `limit` bytes.

    Args:
        blocks: all of them frozen.
        run: (inputs, first) -> what blocks[first:] make of them, in evaluation mode.
    """
    data = getattr(problem, "dataset", None)
    if batch.numbers is not None and data is not None and limit > 0:
        kept = problem.facts.get(FACT)
        stamps = tuple(stamp(problem, params, block) for block in blocks)
        if kept is None or kept.stamps != stamps:
            kept = problem.facts[FACT] = keep(kept, data.train_inputs, run, stamps, limit)
        if kept.outputs is not None:
            return kept.outputs[batch.numbers], True
    with AddressedSamplers(key, first=batch.first, examples=problem.batch_size_of(batch)):
        return run(batch.inputs, 0), False


def keep(kept: Kept | None, inputs: Tensor, run: Run, stamps: tuple[Any, ...], limit: float) -> Kept:
    """What the blocks give for all `inputs`, from what was kept of the blocks before where that still holds."""
    depth = len(stamps)
    start = kept.depth if kept is not None and kept.outputs is not None and kept.depth < depth and kept.stamps == stamps[: kept.depth] else 0
    source = kept.outputs if start and kept is not None and kept.outputs is not None else inputs
    twice = []
    for number in range(2):
        with AddressedSamplers(Key(number)):
            twice.append(run(source[:CHUNK], start))
    first, other = twice
    if not torch.equal(first, other) or first[0].nbytes * len(inputs) > limit:
        return Kept(depth, stamps, None)
    with AddressedSamplers(Key(0)):
        return Kept(depth, stamps, torch.cat([first, *(run(part, start) for part in source[CHUNK:].split(CHUNK))] if len(inputs) > CHUNK else [first]))


def stamp(problem: Problem, params: Tree, block: Block) -> tuple[Any, ...]:
    """Changes with every write to a tensor of the block."""
    buffers = problem.buffers()
    tensors = [*(params[name] for name in block.parameters if name in params), *(buffers[name] for name in block.buffers)]
    return (block.name, *((tensor.data_ptr(), tensor._version) for tensor in tensors))


@contextmanager
def evaluating(problem: Problem) -> Iterator[None]:
    """The problem's model in evaluation mode meanwhile, every module's own mode put back."""
    model = getattr(problem, "model", None)
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


__all__ = ["evaluating", "frozen_output"]
