r"""Evolution strategies: the gradient of a smoothed loss from the losses of perturbed models; no derivative of anything is taken.

    members       θ_p = θ + σ s_p E_p,  antithetic pairs s = ±1 share E;   E = A Bᵀ/√r (rank r) or dense, unit variance elementwise
    losses        f_p = f(θ_p), all members in one pass that shares every dense product (altgrad/population)
    estimate      ĝ = (1/σ) Σ_p w_p s_p E_p,   w = shaping(f); shaping="raw" gives the gradient of E f(θ + σE), unscaled
    credit        where the problem says which elements touch which local losses, w is an element's own (altgrad.population.credited)

Presets of one rule: `es` (dense noise), `eggroll` (rank 1), `spsa` (one pair, dense: MeZO's estimate).
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from altgrad import metrics as meters
from altgrad import shaping as shapings
from altgrad import sigma as sigmas
from altgrad.credit import Influence
from altgrad.engine import Bias, Engine, Estimate, Needs, Split, Tree
from altgrad.errors import CapabilityError, SettingError, near_miss, require
from altgrad.kernels import scratch
from altgrad.perturb import KURTOSIS
from altgrad.population import Draws, Notes, truncated
from altgrad.population.credited import Credit
from altgrad.population.fitness import Evaluation, check_memory, shared_among, told, wide
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers
from altgrad.world import World

STATE = "log_sigma"


def option(default: Any, meaning: str) -> Any:
    """A settings field with its meaning."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Evolution(Engine):
    """What `es`, `eggroll` and `spsa` share.

    Raises:
        SettingError: a setting out of range, two that exclude each other, an odd population with antithetic pairs, a rank above that of every
        matrix, or a chunk that the memory does not hold (the message names one that fits).
    """

    population: int = option(256, "members a step; even with antithetic pairs")
    rank: int | None = option(None, "of a matrix's perturbation A Bᵀ/√r; None for dense noise")
    sigma: float = option(0.01, "noise scale in units of the parameters, > 0; the same meaning at every rank")
    noise: str = option("normal", "law of the noise (of A and B): 'normal', 'sign' or 'uniform'")
    shaping: str = option("z-score", "losses to weights: " + ", ".join(shapings.SHAPINGS) + "; 'raw' leaves the estimate unscaled")
    antithetic: bool = option(True, "pairs θ ± σE; False: one-sided, beside the clean loss where the shaping needs it")
    maximize: bool = option(False, "the objective is a reward: move up")
    groups: int = option(1, "cut batch and population into so many groups, each seeing its own part of the batch")
    chunk: int | None = option(None, "directions in memory at once; bounds memory, does not change the result")
    noise_reuse: int = option(1, "steps that share their noise")
    sigma_schedule: str = option("constant", "'constant', 'linear', 'cosine' or 'exponential'")
    sigma_decay: float = option(0.999, "exponential: factor of a step")
    sigma_floor: float = option(0.1, "share of sigma that a schedule never goes below")
    sigma_steps: int = option(0, "linear and cosine: steps down to the floor")
    truncation: str = option("none", "for episodes cut into truncations, members' states running on: 'none', 'pes' or 'nres'")
    adapt: str = option("none", "'none', 'nes' (one sigma) or 'nes-per-tensor': sigma follows its own natural gradient")
    seed: int | None = option(None, "of the noise alone; None takes the run's")

    def __post_init__(self) -> None:
        least = 2 if self.antithetic else 1
        require(isinstance(self.population, int) and self.population >= least, "population", self.population, f"a whole number >= {least}")
        for name in ("rank", "chunk"):
            value = getattr(self, name)
            require(value is None or (isinstance(value, int) and value >= 1), name, value, "None or a whole number >= 1")
        for name in ("groups", "noise_reuse"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, name, value, "a whole number >= 1")
        for name in ("antithetic", "maximize"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        if str(self.noise) not in KURTOSIS:
            raise SettingError(near_miss("noise law", str(self.noise), KURTOSIS))
        shapings.check(self.shaping, self.population, pairs=self.antithetic, groups=self.groups if self.grouped else None)
        require(self.directions % self.groups == 0, "groups", self.groups, f"a divisor of the {self.directions} directions")
        require(str(self.adapt) in {"none", "nes", "nes-per-tensor"}, "adapt", self.adapt, "'none', 'nes' or 'nes-per-tensor'")
        self.schedule  # noqa: B018 - checks its settings
        if self.adapt != "none":
            require(self.sigma_schedule == "constant", "sigma_schedule", self.sigma_schedule, "'constant' where sigma adapts")
            sigmas.check_adaptation(law=self.noise, rank=self.rank, shaping=self.shaping)
        truncated.check(self)
        require(self.seed is None or (isinstance(self.seed, int) and 0 <= self.seed < 2**64), "seed", self.seed, "None or in [0, 2^64)")

    @property
    def grouped(self) -> bool:
        return self.groups > 1 and self.shaping in shapings.TAKES_GROUPS

    @property
    def directions(self) -> int:
        return self.population // 2 if self.antithetic else self.population

    @property
    def schedule(self) -> sigmas.Schedule:
        return sigmas.Schedule(self.sigma_schedule, sigma=self.sigma, decay=self.sigma_decay, floor=self.sigma_floor, steps=self.sigma_steps)

    @property
    def needs(self) -> Needs:
        return Needs.VALUE if self.truncation == "none" else Needs.UNROLL

    @property
    def split(self) -> Split:
        return Split.POPULATION

    @property
    def bias(self) -> Bias:
        return Bias.SMOOTHED

    def init(self, problem: Problem, params: Tree, key: Key) -> Tree:
        matrices = {name: min(p.shape[0], p.shape[1:].numel()) for name, p in params.items() if p.ndim >= 2 and p.numel()}
        if self.rank is not None and matrices and self.rank > max(matrices.values()):
            widest = max(matrices, key=lambda name: matrices[name])
            raise SettingError(
                f"rank={self.rank} is not allowed: the widest matrix, {widest!r}, is {tuple(params[widest].shape)} and has rank {matrices[widest]}; "
                f"it must be at most {matrices[widest]}, or None for dense noise."
            )
        if self.truncation != "none":
            return truncated.first_state(problem, self.population)
        if self.adapt == "none":
            return {}
        count = len(params) if self.adapt == "nes-per-tensor" else 1
        return {STATE: torch.full((count,), math.log(self.sigma), dtype=torch.float64, device=next(iter(params.values())).device)}

    def draws(self, params: Tree, state: Tree, key: Key, *, silent: Tensor | None = None) -> Draws:
        """This step's perturbations."""
        source = key if self.seed is None else Key(self.seed)
        detached = {name: value.detach() for name, value in params.items()}
        return Draws(
            source.fold("evolution").at(key.step // self.noise_reuse),
            detached,
            self.directions,
            sigma=self.scales(detached, state, key),
            rank=self.rank,
            law=self.noise,
            antithetic=self.antithetic,
            chunk=self.chunk,
            silent=silent,
        )

    def scales(self, params: Tree, state: Tree, key: Key) -> float | Tree:
        """σ: a number, or one tensor a parameter where it adapts."""
        if self.adapt == "none":
            return self.schedule.at(key.step)
        logs = state[STATE].expand(len(params))
        return {name: logs[place].exp().to(value.dtype) for place, (name, value) in enumerate(params.items())}

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        scratch.turn()  # buffers of steps before the last one
        influence = self.influence(problem, params, batch)
        if self.truncation != "none":
            return truncated.estimate(self, problem, params, state, batch, key, world)
        index = shapings.group_index(self.population, self.groups, pairs=self.antithetic) if self.groups > 1 else None
        quiet = shapings.silent(self.shaping, self.population, index if self.grouped else None)[: self.directions] if self.shaping == "baseline-pair" else None
        draws, notes = self.draws(params, state, key, silent=quiet), Notes()
        credit = Credit(influence, draws, shaping=self.shaping) if influence else None
        evaluation = Evaluation(problem, draws, batch, key, notes, groups=self.groups, index=index, credit=credit)
        problem.recall(("population memory", self, problem.batch_size_of(batch)), lambda: self.fit_memory(problem, params, state, batch, key))
        rows = shared_among(evaluation.run(world.share(self.directions)), draws, world)
        level, buffers = self.clean(problem, draws, batch, key, credit)
        fitness, clean = (rows, level) if credit is None else (rows[:, 0], None if level is None else level[0])
        weights = shapings.shape(self.shaping, fitness, pairs=self.antithetic, clean=clean, groups=index if self.grouped else None, maximize=self.maximize)
        own = {} if credit is None else credit.shaped(rows, pairs=self.antithetic, clean=level, maximize=self.maximize)
        self.warn_if_equal(problem, fitness, torch.stack([found.any() for found in (weights, *own.values())]) if own else weights, key)
        mean, deviation, odd = told(fitness, quiet)
        loss = clean if clean is not None else mean
        passes = self.population / self.groups + (clean is not None)
        metrics = {
            "forwards": torch.tensor(passes, dtype=torch.float64),
            "backwards": torch.zeros(()),
            "fitness_deviation": deviation,
            "sigma": torch.as_tensor(draws.scale(next(iter(params))), dtype=torch.float64),
            "members_not_finite": odd,
            **{name: torch.tensor(count) for name, count in notes.metrics().items()},
        }
        moves = Moves(draws, weights, own, influence)
        return Estimate(loss.detach(), moves, self.next_state(draws, state, weights), metrics, buffers)

    def influence(self, problem: Problem, params: Tree, batch: Batch) -> Mapping[str, Influence]:
        """The problem's influence maps, where these settings have a use for them.

        Raises:
            SettingError, CapabilityError: they have none.
        """
        with torch.no_grad():
            found = problem.influence({name: value.detach() for name, value in params.items()}, batch)
        if found:
            require(self.groups == 1, "groups", self.groups, "1 where the problem has influence maps, which are of the whole batch")
            require(self.adapt == "none", "adapt", self.adapt, "'none' where the problem has influence maps: sigma adapts to one loss a member")
            if self.truncation != "none":
                raise CapabilityError(f"truncation={self.truncation!r} has no use for influence maps, which are of losses(…); set truncation='none'.")
        return found

    def clean(self, problem: Problem, draws: Draws, batch: Batch, key: Key, credit: Credit | None = None) -> tuple[Tensor | None, Tree]:
        """The unperturbed loss (with credit: its row) and the buffers it leaves, where the shaping or the buffers need that pass."""
        buffers = problem.fresh_buffers()
        if self.antithetic and not buffers:
            return None, {}
        with torch.no_grad(), AddressedSamplers(key.fold("samplers"), first=batch.first, examples=problem.batch_size_of(batch)):
            if credit is None:
                return problem.objective(draws.params, batch, buffers), buffers
            return credit.rows(wide(problem.losses(draws.params, batch, buffers))[None])[0], buffers

    def next_state(self, draws: Draws, state: Tree, weights: Tensor) -> Tree:
        if self.adapt == "none":
            return state
        squares, sizes = [], []
        for name, value in draws.params.items():
            squares.append(draws.squares(name))
            sizes.append(value.numel())
        each = torch.stack(squares, 1)  # [D, T]
        total = sum(sizes)
        if self.adapt == "nes":
            each = (each @ torch.tensor(sizes, dtype=torch.float64, device=each.device) / total)[:, None]
        each = torch.cat([each, each]) if self.antithetic else each
        weights = weights.to(each.device)
        if draws.silent is not None:
            loud = ~torch.cat([draws.silent, draws.silent]).to(each.device)
            weights, each = weights[loud], each[loud]
        return {STATE: sigmas.adapt(state[STATE], weights, each, dimension=total)}

    def warn_if_equal(self, problem: Problem, fitness: Tensor, weights: Tensor, key: Key) -> None:
        """Say once that nothing is learnt where no member differs; a look at the device now and then, not every step."""
        if "members equal" in problem.facts or len(fitness) < 2 or (fitness.is_cuda and key.step % 100):
            return
        if bool(weights.any()) or (self.antithetic and not bool(fitness.isfinite().any())):  # where nothing at all is finite the step is refused
            return
        problem.facts["members equal"] = True
        if not bool(fitness.isfinite().any()):
            warnings.warn(f"no member has a finite loss at step {key.step}: the update is zero. Lower sigma.", stacklevel=2)
            return
        low, high = float(fitness.min()), float(fitness.max())
        seen = f"have the loss {low:.6g}" if low == high else f"cannot be told apart (losses from {low:.6g} to {high:.6g})"
        warnings.warn(
            f"all {len(fitness)} members {seen} at step {key.step}: the update is zero. "
            "Raise sigma, use a larger batch, or an objective that tells members apart.",
            stacklevel=2,
        )

    def fit_memory(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key) -> bool:
        """Measure one direction, and refuse a chunk that would not fit."""
        draws = self.draws(params, state, key)

        def measure() -> int:
            probe = Draws(draws.key, draws.params, 1, sigma=draws.sigma, rank=self.rank, law=self.noise, antithetic=self.antithetic)
            index = torch.zeros(2 if self.antithetic else 1, dtype=torch.int64) if self.groups > 1 else None
            influence = self.influence(problem, params, batch)
            credit = Credit(influence, probe, shaping=self.shaping) if influence else None
            with meters.live_bytes(exclude=draws.params.values()) as meter:
                Evaluation(problem, probe, batch, key, Notes(), groups=self.groups, index=index, credit=credit).run(range(1))
            return meter.peak

        check_memory(measure, draws, setting=self.chunk)
        return True


class Moves(Mapping[str, Tensor]):
    """ĝ = (1/σ) Σ_p w_p s_p E_p, one tensor at a time as it is asked for.

    Args:
        weights: w [P].
        own: the weights [P, groups] of parameters with influence maps, and those maps.
    """

    def __init__(self, draws: Draws, weights: Tensor, own: Tree | None = None, influence: Mapping[str, Influence] | None = None):
        self.draws, self.weights, self.own, self.influence = draws, weights, own or {}, influence or {}

    def __getitem__(self, name: str) -> Tensor:
        value = self.draws.params[name]
        weights, sigma = self.own.get(name, self.weights).to(value.device), self.draws.scale(name)
        weights = weights / (sigma.to(weights) if isinstance(sigma, Tensor) else sigma)  # σ in the short factor
        if weights.ndim == 2 and weights.shape[1] > 1:
            return self.draws.combine_groups(name, weights, self.influence[name].index).to(value.dtype)
        return self.draws.combine(name, weights if weights.ndim == 1 else weights[:, 0]).to(value.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.draws.params)

    def __len__(self) -> int:
        return len(self.draws.params)


@dataclass(frozen=True)
class ES(Evolution):
    """Dense noise in every parameter.

    Source: Salimans et al. 2017, arXiv 1703.03864.
    """

    @property
    def name(self) -> str:
        return "es"

    @property
    def source(self) -> str:
        return "Salimans et al. 2017, arXiv 1703.03864, algorithm 1"


@dataclass(frozen=True)
class Eggroll(Evolution):
    """Low-rank noise in every matrix, dense noise in vectors: a population at the speed of inference.

    Source: Sarkar et al. 2025 (EGGROLL), equations 4 to 6.
    """

    rank: int | None = option(1, "of a matrix's perturbation A Bᵀ/√r; None for dense noise")

    @property
    def name(self) -> str:
        return "eggroll"

    @property
    def source(self) -> str:
        return "Sarkar et al. 2025, EGGROLL, arXiv 2511.16652, equation 6"


@dataclass(frozen=True)
class SPSA(Evolution):
    """Simultaneous perturbation with m draws: population = 2 m (central) or m with antithetic=False (one-sided).

    sign-m: shaping="sign". FZOO: antithetic=False, noise="sign", shaping="z-score" (losses over their deviation).

    Source: Spall 1992; Malladi et al. 2023 (MeZO), arXiv 2305.17333, definition 1.
    """

    population: int = option(2, "2 m for m central draws; m with antithetic=False")
    sigma: float = option(1e-3, "step of the finite difference in units of the parameters, > 0")
    shaping: str = option("raw", "losses to weights: " + ", ".join(shapings.SHAPINGS))

    @property
    def name(self) -> str:
        return "spsa"

    @property
    def source(self) -> str:
        return "Malladi et al. 2023, MeZO, arXiv 2305.17333, definition 1"
