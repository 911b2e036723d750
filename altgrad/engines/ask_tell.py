r"""Any strategy of altgrad.es on a torch problem: members are points of the parameters' space, the estimate is the strategy's move.

    ask        x_1 … x_λ around the mean m, from the step's key (altgrad.es, NumPy, float64)
    evaluate   f(x_k) on the step's batch, the same for all members and ranks; members evaluated `chunk` at once (altgrad/population)
    tell       m, σ, … → m', σ', …
    estimate   ĝ = θ - m', a displacement and no derivative: SGD with lr=1 lands on m'. Other optimizers make another step of it

θ and m are the same point while SGD(lr=1) is used; m is kept in float64 beside it, so that a move smaller than θ's rounding is not lost. Where
something else has moved θ, the search goes on from θ and says so once: what the strategy knows of its own path is then about another step.

The space is that of all parameters, of those that `parameters` names, or with `dimension` a random subspace of these (engines/subspace.py).
A generation holds λ points of n float64 numbers, whatever the chunk.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from altgrad import metrics as meters
from altgrad import registry
from altgrad.engine import Bias, Engine, Estimate, Needs, Split, Tree
from altgrad.engines.subspace import InSubspace, RandomSubspace
from altgrad.errors import SettingError, near_miss, require
from altgrad.es import storage, table
from altgrad.es.base import State, Strategy
from altgrad.es.bounds import Bounds
from altgrad.population.evaluate import Notes
from altgrad.population.fitness import Evaluation, check_memory, shared_among, told
from altgrad.population.points import Points, Space
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers
from altgrad.world import World

STATE = "es."  # before the names of the strategy's state
DRAWN = ("seed", "told", "waiting", "waiting_fitness")  # of a state: from the step's key, or empty between generations


def option(default: Any, meaning: str) -> Any:
    """A settings field with its meaning."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class AskTell(Engine):
    """A strategy of altgrad.es moves the parameters: rank-based searches with step sizes of their own, from nothing but losses.

    The estimate is a displacement: use SGD with lr=1 (the default of `altgrad train`), no momentum, no clipping. `forwards` is λ + 1: the members,
    and one pass at the mean for the loss that is reported and for running statistics.

    Raises:
        SettingError: an unknown strategy or setting, one out of range, a pattern that no parameter matches, more dimensions than the strategy takes
        (the message offers others, and `dimension`), a start outside the bounds, or a chunk that the memory does not hold.

    Source: the strategy's own, as its class in altgrad/es states it.
    """

    strategy: str = option("sep-cma-es", "which: " + ", ".join(sorted(table.STRATEGIES)))
    strategy_settings: str = option("", "of the strategy, as active=false,keep=1 (or with ; between them)")
    sigma: float = option(0.1, "first standard deviation of every coordinate, in units of the parameters, > 0")
    population: int | None = option(None, "members a step, λ; None for the strategy's own choice, 4 + floor(3 ln n) for most")
    parameters: str = option("*", "which are searched: names or patterns, as 0.weight,2.*; the others stay as they are")
    dimension: int | None = option(None, "search a random subspace of so many dimensions; None for the whole space")
    chunk: int | None = option(None, "members evaluated at once; bounds memory, does not change the result")
    maximize: bool = option(False, "the objective is a reward")
    lower: float | None = option(None, "smallest value of every searched coordinate; None for no bound")
    upper: float | None = option(None, "largest value of every searched coordinate; None for no bound")
    bounds: str = option("reflect", "how bounds are kept: none, clip, reflect, transform or penalty")

    bias: ClassVar[Bias] = Bias.DISPLACEMENT  # type: ignore[misc]
    split: ClassVar[Split] = Split.POPULATION  # type: ignore[misc]
    needs: ClassVar[Needs] = Needs.VALUE  # type: ignore[misc]
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "SGD", "lr": 1.0}

    def __post_init__(self) -> None:
        given: Any = self.strategy_settings
        if isinstance(given, Mapping):  # kept as text: settings are plain values
            object.__setattr__(self, "strategy_settings", ",".join(f"{name}={value}" for name, value in given.items()))
        require(self.chunk is None or self.chunk >= 1, "chunk", self.chunk, "None or a whole number >= 1")
        require(self.dimension is None or self.dimension >= 1, "dimension", self.dimension, "None or a whole number >= 1")
        require(bool(self.patterns), "parameters", self.parameters, "names or patterns of parameters, with commas between them; * is all")
        self.rule, self.box  # noqa: B018 - checks the settings

    @cached_property
    def rule(self) -> Strategy[Any]:
        """The strategy, with its settings."""
        pairs = registry.split_pairs([part for part in re.split(r"[,;\s]+", self.strategy_settings) if part])
        for name in pairs:
            require(name not in {"sigma", "population"}, "strategy_settings", self.strategy_settings, f"without {name}, which is a setting of the engine")
        return table.build(self.strategy, {**pairs, "sigma": self.sigma, "population": self.population})

    @cached_property
    def box(self) -> Bounds:
        """The bounds of every coordinate."""
        free = self.lower is None and self.upper is None
        return Bounds(
            -np.inf if self.lower is None else self.lower,
            np.inf if self.upper is None else self.upper,
            "none" if free and self.bounds == "reflect" else self.bounds,
        )

    @cached_property
    def patterns(self) -> list[str]:
        return [part for part in re.split(r"[,;\s]+", self.parameters) if part]

    @property
    def name(self) -> str:
        return "ask-tell"

    @property
    def source(self) -> str:
        return f"{self.strategy}: {self.rule.source}"

    # -- the space -----------------------------------------------------------------------------------------------------------------

    def chosen(self, problem: Problem) -> list[str]:
        """The parameters that are searched, in the problem's order.

        Raises:
            SettingError: a pattern that matches none.
        """
        names = list(problem.params())
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SettingError(f"parameters={self.parameters!r}: " + near_miss("parameter", pattern, names))
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in self.patterns)]

    def part(self, problem: Problem, params: Tree) -> Problem:
        """`problem` as a function of the parameters that are searched."""
        names = self.chosen(problem)
        return problem if names == list(problem.params()) else OfSome(problem, params, names)

    def inside(self, problem: Problem, params: Tree, state: Tree) -> Problem:
        """`problem` as a function of what is trained."""
        part = self.part(problem, params)
        return part if self.dimension is None else self.subspace.inside(part, params, state)

    @cached_property
    def subspace(self) -> "Inside":
        """The same search in a random subspace."""
        assert self.dimension is not None
        return Inside(self.dimension, search=replace(self, dimension=None, parameters="*"))

    def aux(self, problem: Problem, key: Key) -> Tree:
        return {} if self.dimension is None else self.subspace.aux(self.part(problem, problem.params()), key)

    def init(self, problem: Problem, params: Tree, key: Key) -> Tree:
        part = self.part(problem, params)
        if self.dimension is not None:
            return self.subspace.init(part, params, key)
        space = Space({name: params[name] for name in part.params()})
        try:
            state = self.rule.init(key, self.box.start(space.vector()))
        except SettingError as error:
            if space.size > getattr(self.rule, "max_dimension", space.size):
                raise SettingError(f"{error} Or search less: dimension=200 is a random subspace, parameters=NAME some of the tensors.") from error
            raise
        return tensors_of(state)

    # -- a step --------------------------------------------------------------------------------------------------------------------

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        part = self.part(problem, params)
        if self.dimension is not None:
            return self.subspace.estimate(part, params, state, batch, key, world)
        space = Space({name: params[name].detach() for name in part.params()})
        now = self.followed(problem, space, state_of(self.rule, state, key), key)
        asked = self.rule.ask(now)
        points, notes = Points(space, self.box.inside(asked), chunk=self.chunk), Notes()
        problem.recall(("population memory", self, problem.batch_size_of(batch)), lambda: self.fit_memory(part, points, batch, key))
        own = Evaluation(part, points, batch, key, notes).run(world.share(points.count))
        fitness = shared_among(own, points, world)
        buffers = problem.fresh_buffers()
        with torch.no_grad(), AddressedSamplers(key.fold("samplers"), first=batch.first, examples=problem.batch_size_of(batch)):
            clean = part.objective(space.params, batch, buffers)
        values = fitness.double().cpu().numpy() * (-1.0 if self.maximize else 1.0)
        self.warn_if_equal(problem, values, key)
        after = self.box.kept(self.rule.tell(now, self.box.told(asked), self.box.charged(asked, values)))
        mean, deviation, odd = told(fitness, None)
        # A mean that stands where the objective has no value is no end of the search while members have one.
        loss = torch.where(clean.isfinite() | ~mean.isfinite(), clean, mean.to(clean))
        sign = -1.0 if self.maximize else 1.0
        metrics = {
            "forwards": torch.tensor(points.count + 1, dtype=torch.float64),
            "backwards": torch.zeros(()),
            "best_fitness": torch.tensor(sign * after.best_fitness, dtype=torch.float64),  # since the start, each on its own batch
            "fitness_deviation": deviation,
            "sigma": torch.tensor(after.sigma, dtype=torch.float64),
            "members_not_finite": odd,
            **{name: torch.tensor(count) for name, count in notes.metrics().items()},
        }
        return Estimate(loss.detach(), space.moves(self.box.inside(after.mean)), tensors_of(after), metrics, buffers)

    def followed(self, problem: Problem, space: Space, state: State, key: Key) -> State:
        """`state` with the parameters as its mean, where they are not that already."""
        here, mean = space.vector(), self.box.inside(state.mean)
        # A step of SGD rounds the move and the sum, by half an eps of each.
        scale = np.linalg.norm(here) + np.linalg.norm(mean) + 10 * state.sigma * np.sqrt(space.size)  # the last is more than a move is long
        if np.linalg.norm(here - mean) <= space.rounding * scale:
            return state
        if self.box.how != "none":
            here = np.clip(here, *self.box.faces(space.size))
        start = self.box.start(here)
        if state.generation == 0:  # weights that were loaded after init
            return replace(state, mean=start, best=start, average=start)
        if "parameters moved" not in problem.facts:
            problem.facts["parameters moved"] = True
            warnings.warn(
                f"the parameters are not where {self.strategy} moved them (step {key.step}): its estimate is a displacement, for torch.optim.SGD with lr=1, "
                "without momentum, weight decay or clipping. The search goes on from the parameters as they are.",
                stacklevel=2,
            )
        return replace(state, mean=start)

    def fit_memory(self, problem: Problem, points: Points, batch: Batch, key: Key) -> bool:
        """Measure one member, and refuse a chunk that would not fit."""

        def measure() -> int:
            with meters.live_bytes(exclude=points.params.values()) as meter:
                Evaluation(problem, Points(points.space, points.rows[:1]), batch, key, Notes()).run(range(1))
            return meter.peak

        check_memory(measure, points, setting=self.chunk)
        return True

    def warn_if_equal(self, problem: Problem, values: np.ndarray, key: Key) -> None:
        """Say once that ranks mean nothing where no member differs."""
        if "members equal" not in problem.facts and len(values) > 1 and values[0] == values.min() == values.max():
            problem.facts["members equal"] = True
            words = "Raise sigma, use a larger batch, or an objective that tells members apart."
            warnings.warn(f"all {len(values)} members have the loss {abs(values[0]):.6g} at step {key.step}: their order is chance. {words}", stacklevel=2)

    def predict(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> Any:
        if self.dimension is None:
            return super().predict(problem, params, state, inputs)
        return self.subspace.predict(self.part(problem, params), params, state, inputs)

    def bake(self, problem: Problem, params: Tree, state: Tree) -> Tree:
        return params if self.dimension is None else self.subspace.bake(self.part(problem, params), params, state)


@dataclass(frozen=True)
class Inside(RandomSubspace):
    """A random subspace searched by an engine that is there already."""

    search: AskTell = field(default_factory=AskTell)

    @property
    def rule(self) -> Engine:  # type: ignore[override]
        return self.search


class OfSome(InSubspace):
    """`base` as a function of some of its parameters; the others stay as they are."""

    def __init__(self, base: Problem, params: Tree, names: Sequence[str]):
        self.base, self.names = base, names
        self.values = {name: params[name].detach() for name in base.params()}
        self.name, self.differentiable, self.horizon, self.steps_per_epoch = base.name, base.differentiable, base.horizon, base.steps_per_epoch

    @property
    def facts(self) -> dict[Any, Any]:
        found: dict[Any, Any] = self.base.recall(("facts of some", tuple(self.names)), dict)
        return found

    def at(self, params: Tree) -> Tree:
        return {**self.values, **{name: params[name] for name in self.names}}

    def params(self) -> Tree:
        return {name: self.values[name] for name in self.names}


def tensors_of(state: State) -> Tree:
    """A strategy's state between two generations as tensors by name: float64, and int64 for counts."""
    counts, arrays = storage.flatten(state)
    whole = {name: torch.tensor(value, dtype=torch.int64) for name, value in counts.items() if name not in DRAWN}
    return {STATE + name: value for name, value in (whole | {name: torch.tensor(array) for name, array in arrays.items() if name not in DRAWN}).items()}


def state_of(rule: Strategy[Any], tensors: Tree, key: Key) -> State:
    """The state that `tensors_of` wrote, with the step's numbers ahead of it."""
    known = {name.removeprefix(STATE): value.cpu() for name, value in tensors.items()}
    arrays = {name: value.double().numpy() for name, value in known.items() if value.is_floating_point()}
    counts = {name: int(value) for name, value in known.items() if not value.is_floating_point()}
    n = len(arrays["mean"])
    between = {"told": np.zeros(rule.members(n), dtype=bool), "waiting": np.empty((0, n)), "waiting_fitness": np.empty(0)}
    made: State = storage.rebuild(rule.state_class, {**counts, "seed": key.fold("ask-tell", key.step).seed}, {**arrays, **between}, Path("the engine's state"))
    return made


__all__ = ["AskTell"]
