"""One step of a rule with local losses: all blocks, or the one whose turn it is, each by its own objective."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from altgrad.blocks import Block
from altgrad.engine import Estimate, Tree
from altgrad.errors import ShapeError
from altgrad.local.losses.frame import Look, Site
from altgrad.local.prefix import evaluating, frozen_output
from altgrad.local.streaming import count_of, rows_of, stream
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers

if TYPE_CHECKING:
    from altgrad.engines.blockwise import Blockwise

PREFIX = "local."  # before the short name of a head's tensor and the name of its block
TRAINED = f"{PREFIX}trained"


class Step:
    """One look of a Blockwise engine at one batch."""

    def __init__(
        self,
        engine: "Blockwise",
        problem: Problem,
        blocks: Sequence[Block],
        sites: Sequence[Site],
        params: Tree,
        state: Tree,
        batch: Batch,
        key: Key,
        whole: Collection[int],
    ):
        self.engine, self.rule, self.problem, self.blocks, self.sites = engine, engine.rule, problem, blocks, sites
        self.params, self.state, self.batch, self.key = params, dict(state), batch, key
        self.whole = whole
        self.buffers = problem.fresh_buffers()
        heads, states = by_block(params), by_block(state)
        self.own = [(heads.get(site.name, {}), states.get(site.name, {})) for site in sites]
        self.heads = [list(head.values()) for head, _ in self.own] + [[]]
        self.told = len(sites)  # whose loss is the step's
        self.figures: dict[str, list[tuple[Tensor, int]]] = {}  # (mean over a part of the rows, rows in it)
        self.metrics: dict[str, Tensor] = {}
        self.notes: list[Tensor] = []  # of the blocks so far, or of all where they were looked at before
        self.surveyed = False

    def sampling(self) -> AddressedSamplers:
        """The pass's random draws: the same in every pass of the step."""
        return AddressedSamplers(self.key.fold("samplers"), first=self.batch.first, examples=self.problem.batch_size_of(self.batch))

    def enter(self) -> Any:
        inputs, self.targets = self.rule.enter(self.batch.inputs, self.batch.targets, self.key.fold("enter"), self.sites[0])
        self.total = count_of(inputs)
        return inputs

    def jointly(self) -> Estimate:
        """All blocks."""
        inputs = self.enter()
        if self.rule.sees == "all":
            self.survey(inputs)
        grads = stream(
            self.blocks,
            self.params,
            inputs,
            self.buffers,
            self.objective,
            heads=self.heads,
            bridge=self.bridge,
            rows=self.engine.rows,
            whole=self.whole,
            sampler=self.sampling(),
        )
        return self.estimate(grads, self.buffers)

    def alone(self, turn: int) -> Estimate:
        """One block. Those before are frozen and run in evaluation mode if they stay frozen (sequential); those after are not run."""
        inputs, start, kept = self.enter(), 0, False
        if self.rule.sees == "all" or (self.rule.sees == "before" and self.engine.schedule == "sequential"):
            self.survey(inputs)
        if turn and self.engine.schedule == "sequential":
            plain = inputs is self.batch.inputs  # the rows are the examples
            rows = self.batch._replace(inputs=inputs, numbers=self.batch.numbers if plain else None)
            limit = self.engine.cache * 2**30
            inputs, kept = frozen_output(self.problem, self.params, self.blocks[:turn], self.frozen(turn), rows, self.key.fold("samplers"), limit=limit)
            start = turn

        def objective(position: int, output: Any, leaves: Tree, rows: slice) -> Tensor | None:
            if position + start == turn:
                return self.objective(turn, output, leaves, rows)
            self.passing(position + start, output)
            return None

        def bridge(position: int, output: Any) -> Any:
            return self.bridge(position + start, output)

        self.told = turn
        grads = stream(
            self.blocks[start : turn + 1],
            self.params,
            inputs,
            self.buffers,
            objective,
            heads=self.heads[start:],
            trained={turn - start},
            bridge=bridge,
            rows=self.engine.rows,
            whole={position - start for position in self.whole},
            sampler=self.sampling(),
        )
        if turn < len(self.sites):
            self.state[TRAINED] = self.state[TRAINED].clone().index_fill_(0, torch.tensor(turn, device=self.state[TRAINED].device), 1.0)
        self.metrics["block"] = torch.tensor(turn)
        if self.engine.schedule == "sequential":
            self.metrics["prefix_kept"] = torch.tensor(float(kept))
        moved = {name: self.buffers[name] for block in self.blocks[start : turn + 1] for name in block.buffers}
        return self.estimate(grads, moved)

    def frozen(self, turn: int) -> Any:
        """(inputs, first) -> what blocks[first:turn] make of them in evaluation mode."""

        def run(inputs: Any, first: int) -> Tensor:
            with torch.no_grad(), evaluating(self.problem):
                buffers = self.problem.fresh_buffers()
                for position, block in enumerate(self.problem.blocks(self.engine.cut)[first:turn], first):
                    inputs = self.bridge(position, block.apply(self.params, inputs, buffers))
            return inputs

        return run

    def survey(self, inputs: Any) -> None:
        """What every block notes, from a pass without gradients."""
        with torch.no_grad(), self.sampling():
            buffers = self.problem.fresh_buffers()
            for position, block in enumerate(self.blocks[: len(self.sites)]):
                inputs = block.apply(self.params, inputs, buffers)
                self.noted(position, inputs)
                inputs = self.bridge(position, inputs)
        self.surveyed = True

    def noted(self, position: int, output: Tensor) -> None:
        note = self.rule.note(output.detach(), self.sites[position])
        if note is not None:
            self.notes.append(note)

    def passing(self, position: int, output: Any) -> None:
        """A block that is only passed through."""
        if self.rule.sees == "before" and not self.surveyed:
            self.noted(position, output)

    def bridge(self, position: int, output: Any) -> Any:
        return self.rule.bridge(output) if position < len(self.sites) else output

    def objective(self, position: int, output: Any, leaves: Tree, rows: slice) -> Tensor:
        """The mean local loss of a block over `rows`; of the last block, the problem's own loss."""
        if position == len(self.sites):
            value = self.problem.score(output, rows_of(self.batch.targets, rows, self.problem.batch_size_of(self.batch))).mean()
            self.note_figure("loss", value, rows)
            return value
        site, name = self.sites[position], self.sites[position].name
        before = tuple(self.notes[:position]) if self.rule.sees != "none" else ()
        after = tuple(self.notes[position + 1 :]) if self.rule.sees == "all" else ()
        targets = rows_of(self.targets, rows, self.total)
        head, state = chosen(leaves, self.own[position][0]), chosen(self.state, self.own[position][1])
        judged = self.rule.judge(Look(output, targets, head, state, site, self.problem, before, after, self.key.fold("judge", name)))
        if not isinstance(judged.losses, Tensor) or judged.losses.ndim == 0:
            raise ShapeError(f"local loss {type(self.rule).__name__} gave no losses [rows] for block {name!r}.")
        value = judged.losses.mean()
        for figure, seen in {"loss": value, **judged.metrics}.items():
            self.note_figure(f"{figure}.{name}", seen, rows)
        if position == self.told:
            self.note_figure("loss", value, rows)
        self.state.update({f"{PREFIX}{kept}.{name}": new.detach() for kept, new in judged.state.items()})
        self.passing(position, output)
        return value

    def note_figure(self, name: str, value: Tensor, rows: slice) -> None:
        self.figures.setdefault(name, []).append((value.detach(), rows.stop - rows.start))

    def estimate(self, grads: Tree, buffers: Tree) -> Estimate:
        means = {name: mean_of(parts) for name, parts in self.figures.items()}
        counts = {"forwards": torch.tensor(2 if self.surveyed else 1), "backwards": torch.tensor(1)}
        return Estimate(means.pop("loss"), grads, self.state, {**counts, **self.metrics, **means}, buffers)


def mean_of(parts: Sequence[tuple[Tensor, int]]) -> Tensor:
    """The mean over all rows from the means over some."""
    if len(parts) == 1:
        return parts[0][0]
    return torch.stack([value * count for value, count in parts]).sum() / sum(count for _, count in parts)


def heads_trained(state: Mapping[str, Tensor], count: int) -> list[bool]:
    """Which blocks' heads have been trained at all."""
    return [bool(share) for share in state[TRAINED].tolist()] if TRAINED in state else [True] * count


def by_block(tree: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """block -> short name -> name, of the tensors of heads and states: "local.<short>.<block>"."""
    found: dict[str, dict[str, str]] = {}
    for name in tree:
        if name.startswith(PREFIX):
            short, _, block = name.removeprefix(PREFIX).partition(".")
            found.setdefault(block, {})[short] = name
    return found


def chosen(tree: Mapping[str, Tensor], names: Mapping[str, str]) -> Tree:
    """Tensors by short name."""
    return {short: tree[name] for short, name in names.items()}
