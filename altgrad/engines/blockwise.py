r"""Blocks trained by losses of their own: no gradient crosses from one into another, and memory does not grow with depth.

    h_k = f_k(detach h_{k-1}; W_k),   (W_k, V_k) follow ∂/∂(W_k, V_k) mean_n L_k(h_k,n, y_n; V_k),   k = 1 … n-1

with V_k the local loss's own head. The last block is the model's head: it follows the problem's own loss on what the blocks before give.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from altgrad.blocks import Block, check_shared
from altgrad.engine import Bias, Engine, Estimate, Needs, Split, Tree, describe
from altgrad.errors import CapabilityError, DataError, SettingError, near_miss, require
from altgrad.local import readouts
from altgrad.local.chain import hold_to_model, mixing
from altgrad.local.joining import Reading, joined
from altgrad.local.losses.frame import FEATURES, LocalLoss, Site, flat
from altgrad.local.prefix import evaluating
from altgrad.local.step import PREFIX, TRAINED, Step, by_block, chosen, heads_trained
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers
from altgrad.world import World

SCHEDULES = ("joint", "sequential", "interleaved")
IGNORED = -100  # the label that PyTorch's losses leave out


def option(default: Any, meaning: str) -> Any:
    """A settings field with its meaning."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Blockwise(Engine):
    """What rules with local losses share; `rule` is the loss.

    Raises:
        SettingError: a setting out of range, or a run whose length the sequential schedule would have to know.
        CapabilityError: a model that is one block, that cannot be cut, or whose blocks share parameters.
        DataError: labels that are none, or out of range.
    """

    schedule: str = option("joint", "'joint' (all blocks at every step), 'sequential' (one to its end, then the next) or 'interleaved' (in turns)")
    block_steps: int | None = option(None, "steps of a block's turn; none for an equal share of the run (sequential) or an epoch (interleaved)")
    cut: str = option("", "names of the modules at which blocks start, separated by commas; none for a cut at every layer")
    readout: str = option("sum", "what predicts: " + ", ".join(readouts.READOUTS) + ", or a block's name")
    rows: int = option(1024, "examples that are run through a block at a time, where they do not see one another; bounds memory, changes rounding only")
    cache: float = option(1.0, "sequential: GiB that the outputs of frozen blocks may take; 0 computes them at every step")

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise SettingError(near_miss("schedule", str(self.schedule), SCHEDULES))
        steps = self.block_steps
        require(steps is None or (isinstance(steps, int) and steps >= 1), "block_steps", steps, "None or a whole number >= 1")
        require(isinstance(self.rows, int) and self.rows >= 1, "rows", self.rows, "a whole number >= 1")
        require(isinstance(self.cut, str), "cut", self.cut, "text such as 'stem,layer1.0'")
        require(isinstance(self.readout, str), "readout", self.readout, "text")
        require(0 <= self.cache < math.inf, "cache", self.cache, "a number of GiB >= 0")

    looks: ClassVar[type[Step]] = Step  # how one step is made

    @property
    def rule(self) -> LocalLoss:
        """What every block but the last minimises."""
        raise NotImplementedError

    @property
    def needs(self) -> Needs:
        return Needs.REVERSE | Needs.BLOCKS

    @property
    def bias(self) -> Bias:
        return Bias.LOCAL

    @property
    def split(self) -> Split:
        return Split.DATA

    @property
    def readouts(self) -> tuple[str, ...]:
        return tuple(name for name in readouts.READOUTS if name != self.readout)

    # -- before the first step ---------------------------------------------------------------------------------------------------

    def check(self, problem: Problem) -> None:
        blocks = problem.blocks(self.cut)
        check_shared(blocks, describe(self))
        if len(blocks) < 2:
            whole = f"{blocks[0].name!r} holds all of it" if blocks else "there is nothing to train in it"
            raise CapabilityError(
                f"{describe(self)} needs a model of two blocks or more, of which the last is the model's head; {whole}. Where a value is used again further "
                "down there can be no cut. Use backprop, or a model with another layer."
            )
        for block in blocks:
            if not block.parameters:
                raise CapabilityError(f"{describe(self)}: block {block.name!r} has no trainable parameter; leave it out of cut, and it joins the block before.")
        with evaluating(problem):
            other = [block.name for block in problem.blocks(self.cut)]
        if other != [block.name for block in blocks]:
            raise CapabilityError(
                f"{describe(self)}: the model has the blocks {', '.join(block.name for block in blocks)} in training and {', '.join(other)} in evaluation "
                "mode; name modules that run in both, cut='…'."
            )
        self.check_readout([block.name for block in blocks[:-1]])

    def check_readout(self, blocks: Sequence[str]) -> None:
        """Raise SettingError unless `readout` is one that the rule has, for a model whose blocks have these names."""
        readouts.check(self.readout, blocks)

    def sites(self, problem: Problem) -> list[Site]:
        """What is known of every block with a local loss; measured once, on `problem.example()`."""
        return problem.recall(("sites", self.cut), lambda: self.find_sites(problem))

    def find_sites(self, problem: Problem) -> list[Site]:
        outputs: list[Tensor] = []
        with torch.no_grad(), AddressedSamplers(Key(0)), evaluating(problem):
            blocks = problem.blocks(self.cut)
            carried = tree_map(lambda leaf: leaf[:2] if isinstance(leaf, Tensor) and leaf.ndim else leaf, problem.example())
            buffers = problem.fresh_buffers()
            for block in blocks:
                carried = block.apply(problem.params(), carried, buffers)
                if not isinstance(carried, Tensor) or carried.ndim == 0 or not carried.is_floating_point():
                    kind = f"{carried.dtype} of shape {tuple(carried.shape)}" if isinstance(carried, Tensor) else type(carried).__name__
                    raise CapabilityError(f"{describe(self)}: block {block.name!r} gives {kind}, not activities [N, …]; cut elsewhere (cut='…').")
                outputs.append(carried)
        found = tuple(outputs[-1].shape[1:])
        classes = problem.classes or (found[0] if len(found) == 1 else None)
        if self.rule.labels and (classes is None or classes < 2):
            raise CapabilityError(f"{describe(self)} scores classes, two or more, but the model gives outputs of shape {found} an example; {self.instead()}")
        return [
            Site(block.name, number, len(blocks) - 1, tuple(output.shape[1:]), classes, found, output.dtype, output.device)
            for number, (block, output) in enumerate(zip(blocks[:-1], outputs[:-1], strict=True))
        ]

    def instead(self) -> str:
        """What to use where there are no classes."""
        return "use the engine local with loss=greedy, which takes any loss, or backprop."

    def aux(self, problem: Problem, key: Key) -> Tree:
        sites = self.sites(problem)
        return {f"{PREFIX}{short}.{site.name}": value for site in sites for short, value in self.rule.heads(site, key.fold("head")).items()}

    def init(self, problem: Problem, params: Tree, key: Key) -> Tree:
        sites = self.sites(problem)
        state = {f"{PREFIX}{short}.{site.name}": value for site in sites for short, value in self.rule.first_state(site).items()}
        if self.schedule != "joint":
            state[TRAINED] = torch.zeros(len(sites), device=next(iter(params.values())).device)  # which heads have been trained at all
        return state

    # -- a step ------------------------------------------------------------------------------------------------------------------

    def turn(self, problem: Problem, key: Key, count: int) -> int | None:
        """The one block that is trained at this step; None for all of them."""
        if self.schedule == "joint":
            return None
        if self.schedule == "interleaved":
            return key.step // (self.block_steps or problem.steps_per_epoch or 1) % count
        if self.block_steps is not None:
            return min(key.step // self.block_steps, count - 1)
        if problem.progress is None:
            raise SettingError("schedule='sequential' must know how long a block is trained; set block_steps. (altgrad train and compare know their length.)")
        return min(int(problem.progress * count), count - 1)

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        blocks, sites = problem.blocks(self.cut), self.sites(problem)
        params = {name: value.detach() for name, value in params.items()}
        self.check_targets(problem, sites[0], batch, key)
        hold_to_model(problem, self.cut, params, blocks, batch, key)
        turn = self.turn(problem, key, len(blocks))
        step = self.looks(self, problem, blocks, sites, params, state, batch, key, self.mixed_blocks(problem, params, blocks, batch, key))
        return step.jointly() if turn is None else step.alone(turn)

    def mixed_blocks(self, problem: Problem, params: Tree, blocks: Sequence[Block], batch: Batch, key: Key) -> set[int]:
        """Positions of the blocks that must see all examples at once; looked at once, on a batch of more than `rows`."""
        count = problem.batch_size_of(batch)
        if count <= self.rows or self.rule.sees != "none":
            return set(range(len(blocks)))
        if getattr(problem, "split_loss", "none") is None:  # found out now, so that the first step is cut as the others are
            site = self.sites(problem)[0]
            problem.score(torch.zeros(count, *site.outputs, dtype=site.dtype, device=site.device), batch.targets)
        found = mixing(problem, self.cut, self.rows, params, blocks, batch, key)
        last = set() if getattr(problem, "split_loss", None) in {"mean", "each"} else {len(blocks) - 1}  # the loss sees the batch as a whole
        return found | last | (set() if self.rule.by_rows else set(range(len(blocks) - 1)))

    def check_targets(self, problem: Problem, site: Site, batch: Batch, key: Key) -> None:
        """Labels int64 [N] in [0, classes) where the rule asks for them; a look at their values at every step on a CPU, now and then elsewhere."""
        labels = batch.targets
        if not self.rule.labels:
            return
        count = problem.batch_size_of(batch)
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (count,):
            seen = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(f"{describe(self)} takes class labels, int64 of shape ({count},), but the targets are {seen}; {self.instead()}")
        if labels.is_cuda and key.step % 100:
            return
        known = labels[labels != IGNORED]
        low, high = (int(known.min()), int(known.max())) if len(known) else (0, 0)
        if low < 0 or high >= int(site.classes or 0):
            raise DataError(
                f"labels run from {low} to {high} at step {key.step}, but there are {site.classes} classes; they must be in [0, {(site.classes or 0) - 1}]."
            )
        if low == high and count > 1 and "one class" not in problem.facts:
            problem.facts["one class"] = True
            warnings.warn(
                f"all {count} examples of the batch at step {key.step} have the label {low}: every block learns from it to answer {low}. Shuffle the data.",
                stacklevel=2,
            )

    # -- read-outs ---------------------------------------------------------------------------------------------------------------

    def scores(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> tuple[dict[str, Tensor], Tensor]:
        """(every head's scores by block, the model's own output) from one pass; heads that have never been trained are left out."""
        sites, blocks, buffers = self.sites(problem), problem.blocks(self.cut), problem.fresh_buffers()
        trained = heads_trained(state, len(sites))
        found: dict[str, Tensor] = {}
        heads = by_block(params)
        for site, block in zip(sites, blocks, strict=False):
            inputs = block.apply(params, inputs, buffers)
            own = self.rule.scores(inputs, chosen(params, heads.get(site.name, {})), site) if trained[site.position] else None
            if own is not None:
                found[site.name] = own
            inputs = self.rule.bridge(inputs)
        return found, blocks[-1].apply(params, inputs, buffers)

    def predict(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> Any:
        return readouts.read(self.readout, *self.scores(problem, params, state, inputs))

    def reads(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> dict[str, Any]:
        heads, own = self.scores(problem, params, state, inputs)
        names = readouts.READOUTS if heads else (readouts.OWN,)
        return {**heads, **{name: readouts.read(name, heads, own) for name in names}}

    def activities(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> dict[str, Tensor]:
        found, buffers = {}, problem.fresh_buffers()
        inputs = self.entry(problem, inputs)
        for site, block in zip(self.sites(problem), problem.blocks(self.cut), strict=False):
            inputs = block.apply(params, inputs, buffers)
            found[site.name] = flat(inputs, FEATURES, site.shape)
            inputs = self.rule.bridge(inputs)
        return found

    def entry(self, problem: Problem, inputs: Any) -> Any:
        """What the first block is given of plain inputs."""
        return inputs

    def export(self, problem: Problem, params: Tree, state: Tree) -> Any:
        self.check(problem)  # the read-out may be another one than before
        own = type(self).scores is Blockwise.scores and type(self).predict is Blockwise.predict
        return joined(self, problem, params, state) if own else Reading(self, problem, params, state)
