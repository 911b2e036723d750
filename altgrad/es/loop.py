"""minimize: ask, evaluate, tell, until there is a reason to stop; with bounds, restarts and checkpoints."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from altgrad.errors import SettingError, require
from altgrad.es import restarts as restarting
from altgrad.es.base import State, Strategy, is_number, is_whole, vector
from altgrad.es.bounds import Bounds
from altgrad.es.search import Progress, Search
from altgrad.es.stopping import Stopping
from altgrad.es.table import build

STOPPED = "on_generation asked to stop."
PATIENCE = 10.0  # seconds of a search that may be lost, beside the generation in progress


@dataclass(frozen=True, eq=False)
class Result:
    """What a search came to. Every point lies within the bounds; values are f's own, also where it was maximised."""

    x: np.ndarray = field(metadata={"help": "[n] the best point"})
    fun: float = field(metadata={"help": "f there; infinite where no evaluation gave a finite number"})
    evaluations: int
    reason: str = field(metadata={"help": "why the search ended, as a sentence"})
    mean: np.ndarray = field(metadata={"help": "[n] the mean of the last distribution: the better answer where f is noisy; not evaluated"})
    average: np.ndarray = field(metadata={"help": "[n] the moving average of the mean; not evaluated"})
    top: np.ndarray = field(metadata={"help": "[k, n] the best points, best first"})
    top_fun: np.ndarray = field(metadata={"help": "[k] f at these"})
    generations: int
    restarts: int
    failures: int = field(metadata={"help": "evaluations in which f raised"})
    first_failure: str = field(metadata={"help": "the first of them: member, generation, exception; empty where there was none"})
    reached: bool = field(metadata={"help": "whether the target was reached"})
    state: State = field(metadata={"help": "of the strategy, to go on from"})


def minimize(
    f: Callable[[np.ndarray], Any],
    x0: Any,
    *,
    strategy: str | Strategy[Any] = "cma-es",
    sigma: float | None = None,
    max_evaluations: int,
    target: float | None = None,
    bounds: Bounds | tuple[Any, Any] | None = None,
    population: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    restarts: str = "none",
    maximize: bool = False,
    vectorized: bool = False,
    surrogate: Callable[[np.ndarray], Any] | None = None,
    stopping: Stopping | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    label: str | None = None,
    on_generation: Callable[[dict[str, Any]], object] | None = None,
) -> Result:
    """Search for the x that makes f smallest, by calls of f alone.

    Args:
        f: of x [n] (a copy) -> a real number. Where it raises, or is NaN or infinite, the member takes the worst rank.
        x0: [n], where to start.
        strategy: a name of `STRATEGIES`, or a strategy.
        sigma: first standard deviation; for a strategy given by name.
        max_evaluations: no more calls of f than this.
        target: end when f is this or better.
        bounds: (lower, upper), numbers or [n], which reflects; or `Bounds` for another kind.
        population: members of a generation; the strategy's own number where none is given.
        seed: names all randomness: the same seed, f and arguments give the same result to the bit.
        settings: of the strategy given by name.
        restarts: none, ipop or bipop: start anew where a run has nothing left to find, until evaluations are spent.
        maximize: search for the largest f.
        vectorized: f takes the population [λ, n] and returns [λ].
        surrogate: of x [n] -> gradients [k, n] or [n], for guided-es: any vectors that may point along f's gradient.
        stopping: when a run has nothing left to find.
        checkpoint: .npz or .json; written every `checkpoint_every` generations, sooner where these take more than 10 s, and at the end; gone on from,
            to the same bits, where it exists.
        label: what f is called; with it, a checkpoint of another f is refused.
        on_generation: called with a dict of figures after each generation; returning True ends the search.

    Raises:
        UsageError, SettingError, ShapeError: an argument that cannot be used, or f returned something else than a real number.
        CheckpointError: `checkpoint` is damaged or of another search.
    """
    x0 = vector(x0, "x0")
    require(is_whole(max_evaluations) and max_evaluations >= 1, "max_evaluations", max_evaluations, "a whole number ≥ 1")
    require(target is None or (is_number(target) and not np.isnan(target)), "target", target, "a number")
    require(is_whole(checkpoint_every) and checkpoint_every >= 1, "checkpoint_every", checkpoint_every, "a whole number ≥ 1")
    require(is_whole(seed), "seed", seed, "a whole number")
    require(restarts in restarting.KINDS, "restarts", restarts, "one of " + ", ".join(restarting.KINDS))
    if not callable(f):
        raise SettingError(f"f={f!r} is not allowed; it must be a function of x that returns a number.")
    search = Search(
        f=f,
        x0=x0,
        strategy=chosen(strategy, sigma, population, settings),
        max_evaluations=int(max_evaluations),
        target=None if target is None else (-float(target) if maximize else float(target)),
        bounds=boxed(bounds),
        seed=seed,
        restarts=restarts,
        maximize=maximize,
        vectorized=vectorized,
        surrogate=surrogate,
        stopping=stopping or Stopping(),
        label=label,
    )
    progress = search.begin(checkpoint)
    reason = search.ended(progress) or search.exhausted(progress)
    saved = time.monotonic()
    while reason is None:
        progress, reason, row = search.step(progress)
        due = reason is not None or progress.generations % checkpoint_every == 0 or time.monotonic() - saved > PATIENCE
        if checkpoint is not None and due:
            search.save(checkpoint, progress)
            saved = time.monotonic()
        if on_generation is not None and on_generation(row) is True:
            reason = reason or STOPPED
    if checkpoint is not None:
        search.save(checkpoint, progress)
    return result_of(search, progress, reason)


def result_of(search: Search, progress: Progress, reason: str) -> Result:
    """The result of a search that has come to its end."""
    sign = -1.0 if search.maximize else 1.0
    found = len(progress.top) > 0
    best = float(progress.top_fitness[0]) if found else np.inf
    inside = search.bounds.inside
    return Result(
        x=progress.top[0] if found else search.x0,
        fun=sign * best,
        evaluations=progress.evaluations,
        reason=reason,
        mean=inside(progress.state.mean),
        average=inside(progress.state.average),
        top=progress.top,
        top_fun=sign * progress.top_fitness,
        generations=progress.generations,
        restarts=progress.run.number,
        failures=progress.failures,
        first_failure=progress.first_failure,
        reached=search.target is not None and best <= search.target,
        state=progress.state,
    )


def chosen(strategy: str | Strategy[Any], sigma: float | None, population: int | None, settings: Mapping[str, Any] | None) -> Strategy[Any]:
    """The strategy the arguments name."""
    if isinstance(strategy, Strategy):
        given = [name for name, value in (("sigma", sigma), ("population", population), ("settings", settings or None)) if value is not None]
        if given:
            raise SettingError(f"{given[0]} was given beside a {type(strategy).__name__}, which has its own; give it there, or name the strategy by a string.")
        return strategy
    if not isinstance(strategy, str):
        raise SettingError(f"strategy={strategy!r} is not allowed; it must be a name or a strategy, for instance 'cma-es' or CMAES(sigma=0.5).")
    more = {**(settings or {}), **({} if sigma is None else {"sigma": sigma}), **({} if population is None else {"population": population})}
    return build(strategy, more)


def boxed(bounds: Bounds | tuple[Any, Any] | None) -> Bounds:
    """Bounds of any form."""
    if bounds is None:
        return Bounds(how="none")
    if isinstance(bounds, Bounds):
        return bounds
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise SettingError(f"bounds={bounds!r} is not allowed; it must be (lower, upper), each a number or a vector, or altgrad.es.Bounds.")
    return Bounds(*bounds)
