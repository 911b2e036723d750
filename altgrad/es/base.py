"""Strategies: settings that turn a state into a population (ask), and a population with its fitness into the next state (tell).

A strategy is a frozen dataclass of settings; what changes is in a `State`, which is returned and never altered. A population is a function of
the state: its numbers have the address (seed, generation, member, coordinate), so no generator is stored and a loaded state goes on with the same bits.
"""

from dataclasses import dataclass, field, replace
from math import log
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from altgrad.errors import SettingError, ShapeError, require
from altgrad.es import ranking
from altgrad.rng import Key


@dataclass(frozen=True, eq=False)
class State:
    """What every strategy knows. Arrays are float64 and never written to."""

    seed: int
    generation: int
    evaluations: int
    mean: np.ndarray  # [n]
    sigma: float
    told: np.ndarray  # [λ] bool: members of this generation whose fitness is known
    waiting: np.ndarray  # [λ, n] those members; [0, n] while none is
    waiting_fitness: np.ndarray  # [λ]; [0] while none is
    best: np.ndarray  # [n] the best point so far; the first mean before there is one
    best_fitness: float
    top: np.ndarray  # [k, n] the k best points so far, best first
    top_fitness: np.ndarray  # [k]
    average: np.ndarray  # [n] exponential moving average of the mean over generations

    @property
    def key(self) -> Key:
        """The address of this generation's numbers."""
        return Key(self.seed, self.generation)


S = TypeVar("S", bound=State)

RANGE = (1e-140, 1e140)  # of standard deviations: their squares are numbers of float64


@dataclass(frozen=True, eq=False)
class Strategy(Generic[S]):
    """Base of all strategies. A subclass sets `name`, `source`, `state_class` and overrides `extras`, `sample` and `update`."""

    sigma: float = field(metadata={"help": "first standard deviation of every coordinate: a third or so of the distance to where the optimum may be"})
    population: int | None = field(default=None, metadata={"help": "members of a generation, λ; 4 + floor(3 ln n) where none is given"})
    keep: int = field(default=5, metadata={"help": "how many of the best points are kept"})
    averaging: float = field(default=0.9, metadata={"help": "decay of the moving average of the mean, a generation"})

    name: ClassVar[str]
    source: ClassVar[str]
    state_class: ClassVar[type[State]] = State
    antithetic: ClassVar[bool] = False  # members come as pairs mean ± ε, so λ is even
    fewest: ClassVar[int] = 2
    stands_clipping: ClassVar[bool] = True  # False: points laid onto a face of the box flatten what it learns of directions

    def __post_init__(self) -> None:
        # Squares of it, a factor of 1e-12 smaller or 1e8 larger, must be numbers of float64.
        require(is_number(self.sigma) and 1e-100 <= self.sigma <= 1e100, "sigma", self.sigma, "a number above 0, from 1e-100 to 1e100")
        if self.population is not None:
            require(is_whole(self.population) and self.population >= self.fewest, "population", self.population, f"a whole number ≥ {self.fewest}")
            require(not self.antithetic or self.population % 2 == 0, "population", self.population, f"even: {self.name} evaluates pairs mean ± ε")
        require(is_whole(self.keep) and self.keep >= 1, "keep", self.keep, "a whole number ≥ 1")
        require(is_number(self.averaging) and 0 <= self.averaging < 1, "averaging", self.averaging, "in [0, 1)")

    def members(self, dimension: int) -> int:
        """λ, the members of a generation in so many dimensions."""
        if self.population is not None:
            return self.population
        usual = self.usual(dimension)
        return usual + usual % 2 if self.antithetic else usual

    def usual(self, dimension: int) -> int:
        """λ where none is given: 4 + floor(3 ln n)."""
        return 4 + int(3 * log(dimension))

    def init(self, key: Key, mean: np.ndarray) -> S:
        """The first state: `mean` [n], finite, is where the search starts; `key` names all its randomness.

        Raises:
            ShapeError: `mean` is not a vector of finite numbers. SettingError: n is more than this strategy can take.
        """
        mean = vector(mean, "mean")
        self.check_dimension(len(mean))
        count = self.members(len(mean))
        common: dict[str, Any] = {
            "seed": key.seed if key.step == 0 else key.fold("step", key.step).seed,
            "generation": 0,
            "evaluations": 0,
            "mean": mean,
            "sigma": float(self.sigma),
            "told": np.zeros(count, dtype=bool),
            "waiting": np.empty((0, len(mean))),
            "waiting_fitness": np.empty(0),
            "best": mean,
            "best_fitness": np.inf,
            "top": np.empty((0, len(mean))),
            "top_fitness": np.empty(0),
            "average": mean,
        }
        return self.state_class(**common, **self.extras(mean))  # type: ignore[return-value]

    def ask(self, state: S) -> np.ndarray:
        """This generation's population, [λ, n]. The state decides it: asking twice, or between partial tells, gives the same."""
        return self.sample(state, len(state.told))

    def tell(self, state: S, population: np.ndarray, fitness: np.ndarray, index: np.ndarray | None = None) -> S:
        """The next state.

        Args:
            population: [λ, n], or [k, n] with `index`: the points that were evaluated, as asked for or altered.
            fitness: [λ] or [k], smaller is better; NaN and infinities take the worst rank.
            index: [k] the members that are told, in any order; the generation is complete when every member has been told.

        Raises:
            ShapeError: a wrong shape, or points that are not finite. SettingError: an index out of range, or told already.
        """
        population, fitness = self.checked(state, population, fitness, index)
        state = self.recorded(state, population, fitness)
        if index is not None or state.told.any():
            state = merged(state, population, fitness, index)
            if not state.told.all():
                return state
            population, fitness = state.waiting, state.waiting_fitness
        ranked = ranking.worst_last(fitness)
        # A generation without one finite value says nothing about where to go; the next one draws other numbers.
        moved = self.updated(state, population, ranked) if np.isfinite(ranked).any() else state
        dimension = len(state.mean)
        return replace(
            moved,
            generation=state.generation + 1,
            told=np.zeros(len(ranked), dtype=bool),
            waiting=np.empty((0, dimension)),
            waiting_fitness=np.empty(0),
            average=self.averaging * state.average + (1 - self.averaging) * moved.mean,
        )

    # -- what a strategy overrides -----------------------------------------------------------------------------------------------

    def check_dimension(self, dimension: int) -> None:
        """Refuse what this strategy cannot take."""

    def extras(self, mean: np.ndarray) -> dict[str, Any]:
        """The first values of the fields its state adds."""
        return {}

    def sample(self, state: S, members: int) -> np.ndarray:
        """The population, [members, n]."""
        raise NotImplementedError

    def update(self, state: S, population: np.ndarray, fitness: np.ndarray) -> S:
        """The state after a whole generation, of which at least one fitness is finite and the others +inf."""
        raise NotImplementedError

    def deviations(self, state: S) -> np.ndarray | float:
        """Standard deviations of the coordinates, [n] or one number."""
        return state.sigma

    # -- shared ------------------------------------------------------------------------------------------------------------------

    def updated(self, state: S, population: np.ndarray, fitness: np.ndarray) -> S:
        """`update`, or `state` where that would leave what float64 can hold: on a flat f, a search that nobody stops wanders without end."""
        try:
            with np.errstate(all="ignore"):
                after = self.update(state, population, fitness)
                deviations = np.asarray(self.deviations(after))
        except np.linalg.LinAlgError:
            return state
        sound = np.isfinite(after.mean).all() and float(deviations.min()) >= RANGE[0] and float(deviations.max()) <= RANGE[1]
        return after if sound else state

    def checked(self, state: S, population: Any, fitness: Any, index: Any) -> tuple[np.ndarray, np.ndarray]:
        """Both as float64, or the error that says what is wrong with them."""
        population, fitness = numbers(population, "population"), numbers(fitness, "fitness")
        count = len(state.told) if index is None else len(checked_index(state, index))
        if population.shape != (count, len(state.mean)):
            raise ShapeError(f"tell got a population of shape {population.shape}; it must be {(count, len(state.mean))}: {shape_words(index)}.")
        if fitness.shape != (count,):
            raise ShapeError(f"tell got fitness of shape {fitness.shape}; it must be {(count,)}: one number a member.")
        if not np.isfinite(population).all():
            raise ShapeError("tell got a population with NaN or infinite coordinates. Give the points that were evaluated, as ask returned them.")
        if index is None and state.told.any():
            missing = np.flatnonzero(~state.told).tolist()
            raise SettingError(f"tell got a whole population, but part of this generation was told before; tell the rest with index={missing}.")
        return population, fitness

    def recorded(self, state: S, population: np.ndarray, fitness: np.ndarray) -> S:
        """`state` with these members counted, and kept where they are among the best."""
        counted = replace(state, evaluations=state.evaluations + len(fitness))
        top, values = ranking.best_of(state.top, state.top_fitness, population, ranking.worst_last(fitness), self.keep)
        return counted if top is state.top else replace(counted, best=top[0], best_fitness=float(values[0]), top=top, top_fitness=values)


def merged(state: S, population: np.ndarray, fitness: np.ndarray, index: Any) -> S:
    """`state` with these members waiting for the rest of their generation."""
    members, dimension = len(state.told), len(state.mean)
    told = state.told.copy()
    waiting, values = (state.waiting.copy(), state.waiting_fitness.copy()) if told.any() else (np.zeros((members, dimension)), np.zeros(members))
    told[index], waiting[index], values[index] = True, population, fitness
    return replace(state, told=told, waiting=waiting, waiting_fitness=values)


def checked_index(state: State, index: Any) -> np.ndarray:
    """`index` as a vector of members that have not been told."""
    found = np.asarray(index)
    if found.ndim != 1 or not (np.issubdtype(found.dtype, np.integer) or found.size == 0):
        raise ShapeError(f"index must be a vector of whole numbers, the members that are told; it is {index!r}.")
    require(
        bool(((found >= 0) & (found < len(state.told))).all()), "index", found.tolist(), f"between 0 and {len(state.told) - 1}, the members of a generation"
    )
    require(len(np.unique(found)) == len(found), "index", found.tolist(), "without repeats")
    again = [int(place) for place in found if state.told[place]]
    require(not again, "index", found.tolist(), f"of members that were not told before in this generation; {again} were")
    return found


def shape_words(index: Any) -> str:
    """What the two numbers of a population's shape are."""
    return "(members λ, dimension n)" if index is None else "(members in index, dimension n)"


def numbers(value: Any, label: str) -> np.ndarray:
    """`value` as float64."""
    try:
        found = np.asarray(value)
        if found.dtype.kind not in "fiu":
            raise TypeError(f"its type is {found.dtype}")
        return found.astype(np.float64, copy=False)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"{label} must be an array of real numbers; {error}.") from error


def vector(value: Any, label: str) -> np.ndarray:
    """`value` as a copy in float64, a vector of finite numbers."""
    found = numbers(value, label)
    if found.ndim != 1 or found.size == 0:
        raise ShapeError(f"{label} must be a vector of at least one number; its shape is {found.shape}.")
    if not np.isfinite(found).all():
        raise ShapeError(f"{label} must be finite; entry {int(np.flatnonzero(~np.isfinite(found))[0])} is {found[~np.isfinite(found)][0]}.")
    return found.copy()


def is_number(value: Any) -> bool:
    """Whether `value` is a real number, and no bool."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether `value` is a whole number, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def refuse_above(limit: int, dimension: int, name: str) -> None:
    """A strategy that keeps an n × n matrix says up to where it does."""
    if dimension > limit:
        raise SettingError(
            f"n={dimension} is above the limit of {name}, which is {limit}: it keeps matrices of n × n numbers, {8e-9 * dimension**2:.3g} GB each. "
            f"Use sep-cma-es (diagonal) or lm-ma-es (a few directions), or raise max_dimension."
        )
