r"""Evolution strategies for long episodes, cut into truncations with a parameter update after each; the state runs on across the cuts.

Truncation t of an episode (t = 0 … horizon - 1) has the loss L_t, and every member p its own state, which its own perturbed parameters made:

    PES     ε_{p,t} = σ_t s_p E_{p,t} afresh each truncation,  ĝ_t = Σ_{τ≤t} (1/σ_τ) Σ_p w_{p,t} s_p E_{p,τ}       (= 1/(σ² N) Σ_p ξ_{p,t} L_t)
    NRES    ε_p = σ s_p E_p once an episode,                   ĝ_t = (1/σ) Σ_p w_{p,t} s_p E_p

with ξ_{p,t} = Σ_{τ≤t} ε_{p,τ} and w = shaping(L_t). Both have, summed over an episode with θ at rest, the smoothed gradient of Σ_t L_t as their
mean; an estimate that starts each truncation from a common state has not, for it misses what θ did to that state. NRES has the least variance of
a family that holds both, under the assumptions of its paper, and draws noise once an update, PES t + 1 times.

ξ is never stored: the noise of an episode's earlier truncations is drawn again from its address. What is stored, as engine state, is the state
of every member, [population, …]; `chunk` bounds what an evaluation adds to it. Ranks divide the evaluation and send each other losses and states,
so that all hold the same engine state and a checkpoint can be resumed by any number of ranks.

A member whose loss or state is no longer finite has the worst rank, and starts again at the next truncation, with a ξ of its own; it is counted.
Buffers (running statistics) are read and left as they are.

Source: Vicol, Metz, Sohl-Dickstein 2021 (PES), arXiv 2112.13835; Li et al. 2023 (NRES), arXiv 2304.12180.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from altgrad import metrics as meters
from altgrad import shaping as shapings
from altgrad.engine import Estimate, Tree
from altgrad.errors import SettingError, ShapeError, near_miss, require
from altgrad.population.draws import Chunk, Draws
from altgrad.population.evaluate import REFUSALS, Notes, each_member, in_order, members_of, passing, rows_of
from altgrad.population.fitness import check_memory, shared_among, told
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers
from altgrad.world import World

if TYPE_CHECKING:
    from altgrad.engines.evolution import Evolution

TRUNCATIONS = ("none", "pes", "nres")
AGE, CARRY = "episode.age", "episode.carry."  # names in the engine's state: truncations since each member's start, and its state


def check(engine: "Evolution") -> None:
    """Raise SettingError unless the settings of `engine` go with its `truncation`."""
    if engine.truncation not in TRUNCATIONS:
        raise SettingError(near_miss("truncation", str(engine.truncation), TRUNCATIONS))
    if engine.truncation == "none":
        return
    label = f"with truncation={engine.truncation!r}"
    require(engine.antithetic, "antithetic", engine.antithetic, f"True {label}, whose estimates have no clean loss to subtract")
    require(engine.groups == 1, "groups", engine.groups, f"1 {label}: every member has a state of its own already")
    require(engine.noise_reuse == 1, "noise_reuse", engine.noise_reuse, f"1 {label}, which says itself how long noise lasts")
    require(engine.adapt == "none", "adapt", engine.adapt, f"'none' {label}: earlier noise is drawn again, and needs the sigma it had; use sigma_schedule")


def first_state(problem: Problem, population: int) -> Tree:
    """Every member at the start of an episode."""
    begun = problem.start(problem.batch(0, World()))
    if not isinstance(begun, dict) or not begun or not all(isinstance(value, Tensor) for value in begun.values()):
        raise ShapeError(f"{type(problem).__name__}.start returned {type(begun).__name__}; it must return a dict of tensors by name, with one tensor at least.")
    carry = {CARRY + name: value.detach().expand(population, *value.shape).clone() for name, value in begun.items()}
    return {AGE: torch.zeros(population, dtype=torch.int64, device=next(iter(begun.values())).device), **carry}


class Unrolled:
    """One truncation of every member: losses [P] and next states [P, …], by vmap or, where the problem has no batched form, member by member."""

    def __init__(self, problem: Problem, draws: Draws, carry: Tree, batch: Batch, key: Key, notes: Notes):
        self.problem, self.draws, self.carry, self.batch, self.key, self.notes = problem, draws, carry, batch, key, notes

    def run(self, within: range) -> tuple[Tensor, Tree]:
        """The members of the directions `within`, laid out as members are."""
        parts = [self.chunk(first, count) for first, count in self.draws.chunks(within)]
        if not parts:  # more ranks than directions
            return torch.zeros(0, device=next(iter(self.draws.params.values())).device), {name: value[:0] for name, value in self.carry.items()}
        return parts[0] if len(parts) == 1 else tree_map(lambda *leaves: in_order(list(leaves), self.draws), *parts)

    def samplers(self) -> AddressedSamplers:
        return AddressedSamplers(self.key.fold("samplers"), first=self.batch.first, examples=self.problem.batch_size_of(self.batch))

    def member(self, values: Tree, carry: Tree) -> tuple[Tensor, Tree]:
        return self.problem.unroll(values, carry, self.batch, self.problem.fresh_buffers())

    def chunk(self, first: int, count: int) -> tuple[Tensor, Tree]:
        part, carry = self.draws.chunk(first, count), rows_of(self.carry, self.draws, first, count)
        losses, moved = self.by_vmap(part, carry)
        size = len(next(iter(carry.values())))
        if losses.shape != (size,):
            raise ShapeError(f"{type(self.problem).__name__}.unroll returned a loss of shape {tuple(losses.shape[1:])}; it must be a scalar.")
        shown = [{name: (tuple(value.shape[1:]), value.dtype) for name, value in tree.items()} for tree in (carry, moved)]
        if shown[0] != shown[1]:
            raise ShapeError(f"{type(self.problem).__name__}.unroll took a state of {shown[0]} and returned {shown[1]}; names, shapes and dtypes must stay.")
        return losses.detach(), {name: moved[name].detach() for name in carry}

    def by_vmap(self, part: Chunk, carry: Tree) -> tuple[Tensor, Tree]:
        if self.problem.recall("unroll rung", lambda: "vmap") == "vmap":
            try:
                with passing(self.samplers):
                    return members_of(self.draws, part, self.member, self.notes, extra=carry)
            except torch.OutOfMemoryError:
                raise
            except REFUSALS as error:
                self.notes.reason = self.notes.reason or f"{type(error).__name__}: {error}"
                self.problem.facts["unroll rung"] = "member"
        with passing(self.samplers):
            found = each_member(self.draws, part, self.member, extra=carry)
        self.notes.member_loops += len(found)
        return tree_map(lambda *leaves: torch.stack(leaves), *found)


class Moves(Mapping[str, Tensor]):
    """ĝ = Σ_τ (1/σ_τ) Σ_p w_{p,τ} s_p E_{p,τ}, one tensor at a time as it is asked for.

    Args:
        draws: the perturbations that the members' states are made of, one a step.
        weights: [P] for each of them.
    """

    def __init__(self, draws: list[Draws], weights: list[Tensor]):
        self.draws, self.weights = draws, weights

    def __getitem__(self, name: str) -> Tensor:
        value = self.draws[0].params[name]
        total: Tensor | None = None
        for draws, weights in zip(self.draws, self.weights, strict=True):
            moved = draws.combine(name, weights.to(value.device)) / draws.scale(name)
            draws.kept.pop(name, None)  # an episode's noise is never held at once
            total = moved if total is None else total.add_(moved)
        assert total is not None
        return total.to(value.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.draws[0].params)

    def __len__(self) -> int:
        return len(self.draws[0].params)


def estimate(engine: "Evolution", problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
    """The estimate of truncation key.step mod horizon, and the members' states after it."""
    assert problem.horizon is not None
    place = key.step % problem.horizon
    fresh = engine.truncation == "pes"
    quiet = shapings.silent(engine.shaping, engine.population)[: engine.directions] if engine.shaping == "baseline-pair" else None
    # draws[k]: the noise of k truncations ago; with NRES there is only that of the episode, which has its first step's address.
    steps = [key.step - back for back in range(place + 1)] if fresh else [key.step - place]
    draws, notes = [engine.draws(params, state, key.at(step), silent=quiet) for step in steps], Notes()
    begun = {CARRY + name: value for name, value in problem.start(batch).items()}
    age = state[AGE] if place else torch.zeros_like(state[AGE])
    carry = {name.removeprefix(CARRY): where(age == 0, value, state[name]) for name, value in begun.items()}  # [P, …]
    evaluation = Unrolled(problem, draws[0], carry, batch, key, notes)
    problem.recall(("truncated memory", engine, problem.batch_size_of(batch)), lambda: fit_memory(engine, evaluation))
    own_fitness, own_carry = evaluation.run(world.share(engine.directions))
    fitness = shared_among(own_fitness, draws[0], world)
    moved = {name: shared_among(value, draws[0], world, dtype=value.dtype) for name, value in own_carry.items()}
    weights = shapings.shape(engine.shaping, fitness, pairs=True, maximize=engine.maximize)
    engine.warn_if_equal(problem, fitness, weights, key)
    mean, deviation, odd = told(fitness, quiet)
    broken = ~fitness.isfinite()
    for value in moved.values():
        if value.is_floating_point():
            broken = broken | ~value.flatten(1).isfinite().all(1)
    after = {AGE: torch.where(broken.to(age.device), 0, age + 1), **{CARRY + name: value for name, value in moved.items()}}
    taking_part = [weights.where(age.to(weights.device) >= back, 0.0) for back in range(len(draws))]  # a member that began later has no part in it
    metrics = {
        "forwards": torch.tensor(engine.population, dtype=torch.float64),
        "backwards": torch.zeros(()),
        "fitness_deviation": deviation,
        "sigma": torch.tensor(draws[0].sigma, dtype=torch.float64),
        "members_not_finite": odd,
        "restarts": broken.sum(),
        **{name: torch.tensor(count) for name, count in notes.metrics().items()},
    }
    return Estimate(mean, Moves(draws, taking_part), after, metrics, {})


def where(condition: Tensor, begun: Tensor, carried: Tensor) -> Tensor:
    """`begun` […] for the members [P] of the condition, their own of `carried` [P, …] for the others."""
    return torch.where(condition.reshape(-1, *(1 for _ in begun.shape)), begun.detach(), carried)


def fit_memory(engine: "Evolution", evaluation: Unrolled) -> bool:
    """Measure one direction, and refuse a chunk that would not fit."""
    draws = evaluation.draws

    def measure() -> int:
        probe = Draws(draws.key, draws.params, 1, sigma=draws.sigma, rank=draws.rank, law=draws.law, antithetic=True)
        carry = {name: value[[0, draws.count]] for name, value in evaluation.carry.items()}
        with meters.live_bytes(exclude=draws.params.values()) as meter:
            Unrolled(evaluation.problem, probe, carry, evaluation.batch, evaluation.key, Notes()).run(range(1))
        return meter.peak

    check_memory(measure, draws, setting=engine.chunk)
    return True
