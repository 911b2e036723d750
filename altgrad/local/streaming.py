r"""Blocks trained one after another in the memory of one: forward, own objective, own gradient, free, next.

    h_k = f_k(detach h_{k-1}; W_k),   g_k = ∂ objective_k(h_k) / ∂W_k

No graph reaches from one block into another, so what is saved for a backward sweep is one block's at a time and does not grow with depth.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from altgrad.blocks import Block
from altgrad.engine import Tree
from altgrad.samplers import ACTIVE, AddressedSamplers

Objective = Callable[[int, Any, Tree, slice], Tensor | None]


def stream(
    blocks: Sequence[Block],
    params: Tree,
    inputs: Any,
    buffers: Tree,
    objective: Objective,
    *,
    heads: Sequence[Sequence[str]] = (),
    trained: Collection[int] | None = None,
    bridge: Callable[[int, Any], Any] | None = None,
    rows: int | None = None,
    whole: Collection[int] = (),
    sampler: AddressedSamplers | None = None,
) -> Tree:
    """The gradient of every block's own objective, by name; parameters that no objective touches are left out.

    Args:
        blocks: in order.
        params: where; the model's parameters and the heads.
        inputs: what the first block takes.
        buffers: clones, written in place by the one pass.
        objective: (position, output, leaves by name, rows) -> the mean over those rows, a scalar to be minimised by that block alone, or None.
        heads: names of the further parameters of every block's objective.
        trained: positions of the blocks that get gradients; None for all. Blocks after the last of them are not run.
        bridge: (position, detached output) -> what the next block is given.
        rows: examples that are run through a block at a time, which bounds what is saved; None for all of them.
        whole: positions of blocks whose examples see one another, so that they are run all at once.
        sampler: active while blocks run (that it is not in the rest saves time); None where the caller has one active.
    """
    found: Tree = {}
    wanted = range(len(blocks)) if trained is None else trained
    carried = tree_map(detached, inputs)
    for position, block in enumerate(blocks[: max(wanted, default=-1) + 1]):
        train = position in wanted
        names = [name for name in (*block.parameters, *(heads[position] if heads else ())) if name in params]
        total = count_of(carried)
        outputs: list[Any] = []
        for part in parts_of(total, None if position in whole else rows):
            leaves = {name: params[name].detach().requires_grad_(train) for name in names}
            given = rows_of(carried, part, total)
            with torch.set_grad_enabled(train):
                with sampler or nullcontext(), drawing(part, total):
                    output = block.apply(leaves, given, buffers)
                value = objective(position, output, leaves, part)
            if train and value is not None and value.requires_grad:
                share = (part.stop - part.start) / total if total else 1.0
                grads = torch.autograd.grad(value if share == 1.0 else value * share, list(leaves.values()), allow_unused=True)
                for name, grad in zip(leaves, grads, strict=True):
                    if grad is not None:
                        found[name] = found[name].add_(grad) if name in found else grad
            del value  # and with it the graph
            outputs.append(tree_map(detached, output))
            del output
        carried = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if bridge is not None and position + 1 < len(blocks):
            carried = bridge(position, carried)
    return found


def independent(blocks: Sequence[Block], params: Tree, inputs: Any, buffers: Tree, rows: int, same: Callable[[Any, Any], bool]) -> Iterator[bool]:
    """For every block whether it gives each example the same when it is run `rows` at a time, and writes no buffer; from a pass without gradients."""
    with torch.no_grad():
        for block in blocks:
            total, start = count_of(inputs), ACTIVE[-1].calls if ACTIVE else 0
            written = {name: value.clone() for name, value in buffers.items()}
            found = block.apply(params, inputs, written)
            still = all(torch.equal(written[name], buffers[name]) for name in block.buffers if name in buffers)
            after = ACTIVE[-1].calls if ACTIVE else 0
            alone: list[Any] = []
            for part in parts_of(total, rows):
                if ACTIVE:
                    ACTIVE[-1].calls = start
                with drawing(part, total):
                    alone.append(block.apply(params, rows_of(inputs, part, total), {name: value.clone() for name, value in buffers.items()}))
            if ACTIVE:
                ACTIVE[-1].calls = after
            lengths = [len(output) if isinstance(output, Tensor) and output.ndim else -1 for output in alone]
            yield still and lengths == [part.stop - part.start for part in parts_of(total, rows)] and same(found, torch.cat(alone))
            inputs = found


def count_of(inputs: Any) -> int:
    """The examples in what a block is given."""
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    return leaves[0].shape[0] if leaves else 0


def parts_of(total: int, rows: int | None) -> list[slice]:
    """Runs of examples of about equal length, none longer than `rows`."""
    count = 1 if rows is None or total <= rows else -(-total // rows)
    return [slice(total * number // count, total * (number + 1) // count) for number in range(count)]


def rows_of(tree: Any, part: slice, total: int) -> Any:
    """The examples `part` of everything whose first axis counts `total` examples."""
    if part.stop - part.start == total:
        return tree
    return tree_map(lambda leaf: leaf[part] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == total else leaf, tree)


@contextmanager
def drawing(part: slice, total: int) -> Iterator[None]:
    """Random draws inside are those that the examples `part` get when all are run at once."""
    if not ACTIVE or part.stop - part.start == total:
        yield
        return
    sampler = ACTIVE[-1]
    first, examples, calls = sampler.first, sampler.examples, sampler.calls
    sampler.first, sampler.examples = first + part.start, part.stop - part.start
    try:
        yield
    finally:
        sampler.first, sampler.examples = first, examples
        if part.stop < total:
            sampler.calls = calls  # the next part draws at the same addresses


def detached(leaf: Any) -> Any:
    """A tensor without its graph; anything else as it is."""
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


__all__ = ["count_of", "independent", "rows_of", "stream"]
