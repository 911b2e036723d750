"""The loss of every member of a population on a batch, by the best rung that the model and the objective allow."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from altgrad.engine import Tree
from altgrad.errors import SettingError, require
from altgrad.kernels.memory import available, human
from altgrad.population.credited import Credit
from altgrad.population.draws import Chunk, Draws
from altgrad.population.evaluate import REFUSALS, Notes, each_member, in_order, members_of, passing, row
from altgrad.population.parameters import ChangedInPlace
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers, replaying
from altgrad.world import World

RUNGS = ("vmap", "objective", "member")
SHARE = 0.8  # of the memory at hand that a chunk may take: the rest of the program needs some too
UNCHECKED = 64 << 20  # bytes: what is surely smaller is not measured


class Evaluation:
    """Members' losses on one batch.

    Args:
        problem: what is trained.
        draws: the members' perturbations.
        batch: the data of the step.
        key: the step's, for dropout and other samplers (the same draws for every member).
        groups: the batch is cut into so many parts, and the population into as many groups, each seeing its own part.
        index: the group of each member, [P], where there are several.
        notes: what had no rule.
        credit: where members' losses are local ones, what becomes of them: a row a member in place of a loss.
    """

    def __init__(
        self,
        problem: Problem,
        draws: Draws,
        batch: Batch,
        key: Key,
        notes: Notes,
        *,
        groups: int = 1,
        index: Tensor | None = None,
        credit: Credit | None = None,
    ):
        self.problem, self.draws, self.batch, self.key, self.notes, self.groups, self.index = problem, draws, batch, key, notes, groups, index
        self.credit, self.fact = credit, "population rung" if credit is None else "population rung of local losses"
        examples = problem.batch_size_of(batch)
        require(examples % groups == 0, "groups", groups, f"a divisor of the batch's {examples} examples")
        self.examples = examples // groups
        if groups > 1:
            self.parts = tree_map(self.cut, (batch.inputs, batch.targets))

    def cut(self, leaf: Any) -> Any:
        """[N, …] as [groups, N/groups, …]; what does not count examples is everybody's."""
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            return leaf
        if len(leaf) != self.groups * self.examples:
            return leaf.expand(self.groups, *leaf.shape)
        return leaf.reshape(self.groups, -1, *leaf.shape[1:])

    def samplers(self) -> AddressedSamplers:
        return AddressedSamplers(self.key.fold("samplers"), first=self.batch.first, examples=self.examples)

    def run(self, within: range) -> Tensor:
        """The losses (with credit: the rows) of the members of the directions `within`, float32 or better, laid out as members are."""
        results = [self.chunk(first, count) for first, count in self.draws.chunks(within)]
        if not results:  # more ranks than directions
            return torch.zeros(0, *([] if self.credit is None else [self.credit.width]), device=next(iter(self.draws.params.values())).device)
        return results[0] if len(results) == 1 else in_order(results, self.draws)

    def chunk(self, first: int, count: int) -> Tensor:
        part = self.draws.chunk(first, count)
        rung = self.problem.recall(self.fact, lambda: "vmap")
        extra = None if self.groups == 1 else self.rows(first, count)
        for name in RUNGS[RUNGS.index(rung) :]:
            if name == "objective" and self.credit is not None:  # which is one number
                continue
            try:
                with passing(self.samplers):
                    losses = getattr(self, f"by_{name}")(part, extra)
                break
            except REFUSALS as error:
                if name == RUNGS[-1] or isinstance(error, (torch.OutOfMemoryError, ChangedInPlace)):
                    self.problem.facts[self.fact] = rung  # that no rung helps says nothing about the next batch
                    raise
                self.notes.reason = self.notes.reason or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                self.problem.facts[self.fact] = RUNGS[RUNGS.index(name) + 1]
        return losses.detach() if self.credit is None else self.credit.rows(losses.detach())

    def rows(self, first: int, count: int) -> Any:
        """Each member's own part of the batch, leaves [P, N/groups, …]."""
        assert self.index is not None
        own = self.index[first : first + count]
        own = torch.cat([own, own]) if self.draws.antithetic else own
        return tree_map(lambda leaf: leaf[own.to(leaf.device)] if isinstance(leaf, Tensor) and leaf.ndim else leaf, self.parts)

    def at(self, own: Any) -> Batch:
        return self.batch if own is None else self.batch._replace(inputs=own[0], targets=own[1])

    def loss(self, values: Tree, own: Any = None) -> Tensor:
        """One member's loss, a scalar; with credit its local losses [N, P]."""
        if self.credit is not None:
            return wide(self.problem.losses(values, self.at(own), self.problem.fresh_buffers()))
        return self.problem.objective(values, self.at(own), self.problem.fresh_buffers())

    def by_vmap(self, part: Chunk, extra: Any) -> Tensor:
        return members_of(self.draws, part, self.loss, self.notes, extra=extra)

    def by_objective(self, part: Chunk, extra: Any) -> Tensor:
        """The model by vmap, then the objective on each member's outputs."""

        def forward(values: Tree, own: Any = None) -> Any:
            return self.problem.forward(values, self.at(own).inputs, self.problem.fresh_buffers())

        outputs = members_of(self.draws, part, forward, self.notes, extra=extra)
        size = len(next(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)))
        self.notes.objective_loops += size
        found = []
        for index in range(size):
            with replaying():
                found.append(self.problem.judge(row(outputs, index), self.at(row(extra, index))).detach())
        return torch.stack(found)

    def by_member(self, part: Chunk, extra: Any) -> Tensor:
        found = each_member(self.draws, part, self.loss, extra=extra)
        self.notes.member_loops += len(found)
        return torch.stack(found)


def wide(losses: Tensor) -> Tensor:
    """In float32 or better."""
    return losses.to(torch.promote_types(losses.dtype, torch.float32))


def check_memory(measure: Callable[[], int], draws: Draws, *, setting: int | None) -> None:
    """Refuse a chunk that would not fit the memory at hand, before it is tried (Linux grants what it does not have, then ends the program).

    Args:
        measure: the peak bytes of one direction's members.
        draws: whose `size` directions are to be evaluated at once.
        setting: the engine's `chunk`.

    Raises:
        SettingError: names the chunk that fits.
    """
    device = next(iter(draws.params.values())).device
    room = available(device)
    if room is None:
        return
    each = measure()
    if each * draws.size <= max(UNCHECKED, SHARE * room):
        return
    fits = max(1, int(SHARE * room / each))
    each_members = 2 if draws.antithetic else 1
    raise SettingError(
        f"chunk={setting!r} is not allowed: {draws.size} directions ({draws.size * each_members} members) at once need about {human(each * draws.size)}, "
        f"and {human(room)} are free. Set chunk={fits} or less (directions in memory at once; the result stays the same)."
    )


def told(fitness: Tensor, quiet: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The mean and deviation of the finite losses of perturbed members, and how many members were not finite; nothing finite gives NaN."""
    values = fitness.double()
    finite = values.isfinite()
    counted = finite if quiet is None else finite & ~torch.cat([quiet, quiet]).to(finite.device)
    mean = torch.where(counted, values, 0.0).sum() / counted.sum()
    return mean, (torch.where(counted, values - mean, 0.0).square().sum() / counted.sum()).sqrt(), (~finite).sum()


def shared_among(own: Tensor, draws: Draws, world: World, *, dtype: torch.dtype | None = None) -> Tensor:
    """Every rank's rows [own members, …] as one [P, …], in the order of the members.

    Args:
        dtype: to send them in. By default what suits losses, the parameters' own or float32 if that is wider: a rank without members has none to tell it.
    """
    if world.size == 1:
        return own
    halves, longest = 2 if draws.antithetic else 1, -(-draws.count // world.size)
    counts = [len(World(rank, world.size).share(draws.count)) for rank in range(world.size)]
    dtype = dtype or torch.promote_types(next(iter(draws.params.values())).dtype, torch.float32)
    padded = own.new_zeros(halves, longest, *own.shape[1:], dtype=dtype)  # ranks send one shape
    padded[:, : counts[world.rank]] = own.reshape(halves, counts[world.rank], *own.shape[1:])
    parts = [part[:, :count] for part, count in zip(world.gather(padded), counts, strict=True)]
    return torch.cat(parts, 1).flatten(0, 1)
