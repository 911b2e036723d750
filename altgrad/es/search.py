"""One search as steps: `Search` is what the user asked for, `Progress` how far it has come; a step is a function of both and of f."""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from altgrad.errors import CheckpointError, SettingError
from altgrad.es import ranking, storage
from altgrad.es import restarts as restarting
from altgrad.es.base import State, Strategy
from altgrad.es.bounds import Bounds
from altgrad.es.evaluation import evaluate
from altgrad.es.stopping import LONGEST, Stopping, stagnant
from altgrad.rng import Key


@dataclass(frozen=True, eq=False)
class Progress:
    """All that a search goes on from. Points are inside the bounds; fitness is what is minimised."""

    state: State
    run: restarting.Run
    begun: int  # evaluations when the run began
    evaluations: int
    generations: int
    top: np.ndarray  # [k, n] best points over all runs
    top_fitness: np.ndarray  # [k]
    recent: np.ndarray  # [generations of this run, at most LONGEST] best fitness of each
    barren: int  # generations in a row without a finite fitness
    failures: int
    first_failure: str
    finished: str  # why the last run has nothing left to find; empty while it goes on


@dataclass(frozen=True, eq=False)
class Search:
    """f and the settings; see `minimize` for their meaning."""

    f: Callable[[np.ndarray], Any]
    x0: np.ndarray
    strategy: Strategy[Any]
    max_evaluations: int
    target: float | None
    bounds: Bounds
    seed: int
    restarts: str
    maximize: bool
    vectorized: bool
    surrogate: Callable[[np.ndarray], Any] | None
    stopping: Stopping
    label: str | None = None

    def begin(self, checkpoint: str | Path | None) -> Progress:
        """The first progress, or that of `checkpoint` where the file exists."""
        self.bounds.start(self.x0)
        members = self.strategy.members(len(self.x0))
        if members > self.max_evaluations:
            raise SettingError(f"max_evaluations={self.max_evaluations} is less than one generation of {members} members; allow more, or set population.")
        if self.surrogate is not None and not hasattr(self.strategy, "guide"):
            raise SettingError(f"surrogate was given to {self.strategy.name}, which has no use for it; use guided-es.")
        if self.bounds.how == "clip" and not self.strategy.stands_clipping:
            words = "can end early where the optimum lies on a face: clipped points flatten its matrix. Bounds of the kind reflect or penalty do not."
            warnings.warn(f"{self.strategy.name} with clipped bounds {words}", stacklevel=4)
        if checkpoint is not None:
            storage.check_suffix(Path(checkpoint))
            if Path(checkpoint).exists():
                return self.load(checkpoint)
        run = restarting.first(members, float(self.strategy.sigma))
        empty = np.empty((0, len(self.x0)))
        return Progress(self.start(run), run, 0, 0, 0, empty, np.empty(0), np.empty(0), 0, 0, "", "")

    def exhausted(self, progress: Progress) -> str | None:
        """Why not one more generation fits into the evaluations that are left; None where one does."""
        if progress.evaluations + progress.run.members <= self.max_evaluations:
            return None
        left = self.max_evaluations - progress.evaluations
        few = f", and {left} are too few for a generation of {progress.run.members}" if left > 0 else ""
        return f"The evaluations are spent: {progress.evaluations} of {self.max_evaluations}{few}."

    def step(self, progress: Progress) -> tuple[Progress, str | None, dict[str, Any]]:
        """One generation: the progress after it, why the search ends there (None where it goes on), and figures of the generation."""
        strategy, state = self.running(progress.run), progress.state
        if self.surrogate is not None:
            state = strategy.guide(state, self.surrogate(self.bounds.inside(state.mean)))  # type: ignore[attr-defined]
        asked = strategy.ask(state)
        points = self.bounds.inside(asked)
        raw, failed, first = evaluate(self.f, points, generation=progress.generations, vectorized=self.vectorized, silent=progress.failures > 0)
        fitness = ranking.worst_last(-raw if self.maximize else raw)
        state = self.bounds.kept(strategy.tell(state, self.bounds.told(asked), self.bounds.charged(asked, fitness)))
        top, values = ranking.best_of(progress.top, progress.top_fitness, points, fitness, self.strategy.keep)
        finite = fitness[np.isfinite(fitness)]
        after = replace(
            progress,
            state=state,
            evaluations=progress.evaluations + len(points),
            generations=progress.generations + 1,
            top=top,
            top_fitness=values,
            recent=np.append(progress.recent[-LONGEST + 1 :], fitness.min()),
            barren=0 if len(finite) else progress.barren + 1,
            failures=progress.failures + failed,
            first_failure=progress.first_failure or first,
        )
        reason = self.ended(after) or self.exhausted(after)
        if reason is None and (done := self.run_ended(strategy, after, fitness)) is not None:
            if self.restarts == "none":
                after, reason = replace(after, finished=done), done
            else:
                after = self.anew(after)
                reason = self.exhausted(after)
        return after, reason, self.figures(progress, after, finite, strategy)

    def ended(self, progress: Progress) -> str | None:
        """Why the whole search ends, beside its evaluations."""
        if progress.finished:
            return progress.finished
        if self.target is not None and len(progress.top) and progress.top_fitness[0] <= self.target:
            sign = -1 if self.maximize else 1
            return f"The target {sign * self.target:g} was reached: f = {sign * progress.top_fitness[0]:.6g} after {progress.evaluations} evaluations."
        if progress.barren >= self.stopping.barren:
            why = f"; the first failure was at {progress.first_failure}" if progress.first_failure else ""
            return f"{progress.barren} generations in a row gave not one finite fitness{why}."
        return None

    def run_ended(self, strategy: Strategy[Any], progress: Progress, fitness: np.ndarray) -> str | None:
        """Why this run has nothing left to find."""
        found = self.stopping.reason(strategy, progress.state, progress.recent, fitness)
        if found or self.restarts == "none":
            return found
        if progress.run.limit and progress.evaluations - progress.begun >= progress.run.limit:
            return "The run has spent its share of the evaluations."
        return stagnant(progress.state, progress.recent)

    # -- runs --------------------------------------------------------------------------------------------------------------------

    def running(self, run: restarting.Run) -> Strategy[Any]:
        """The strategy with the population and the step of `run`."""
        return self.strategy if run.number == 0 else replace(self.strategy, population=run.members, sigma=run.sigma)

    def start(self, run: restarting.Run) -> State:
        """The first state of `run`."""
        key = Key(self.seed)
        lower, upper = self.bounds.faces(len(self.x0))
        point = restarting.start(self.x0, float(self.strategy.sigma), lower, upper, key.fold("start"), run.number)
        strategy = self.running(run)
        return strategy.init(key if run.number == 0 else key.fold("run", run.number), self.bounds.start(point))

    def anew(self, progress: Progress) -> Progress:
        """The next run."""
        base = restarting.first(self.strategy.members(len(self.x0)), float(self.strategy.sigma))
        spent = progress.evaluations - progress.begun
        run = restarting.following(self.restarts, progress.run, spent, base, Key(self.seed).fold("restarts"), even=self.strategy.antithetic)
        return replace(progress, state=self.start(run), run=run, begun=progress.evaluations, recent=np.empty(0))

    # -- figures and files -------------------------------------------------------------------------------------------------------

    def figures(self, before: Progress, after: Progress, finite: np.ndarray, strategy: Strategy[Any]) -> dict[str, Any]:
        """A row of the log. `before` names the run the generation belongs to."""
        sign = -1.0 if self.maximize else 1.0
        return {
            "generation": after.generations,
            "evaluations": after.evaluations,
            "run": before.run.number,
            "population": before.run.members,
            "best": sign * float(after.top_fitness[0]) if len(after.top) else None,
            "generation_best": sign * float(finite.min()) if len(finite) else None,
            "generation_median": sign * float(np.median(finite)) if len(finite) else None,
            "sigma": float(after.state.sigma),
            "largest_deviation": float(np.max(strategy.deviations(after.state))) if after.run is before.run else float(after.state.sigma),
            "failures": after.failures,
        }

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on; evaluations and target may change from one call to the next."""
        lower, upper = self.bounds.faces(len(self.x0))
        box = hashlib.sha256(np.concatenate([lower, upper, self.x0]).tobytes()).hexdigest()
        names = {
            "function": self.label,
            "strategy": self.strategy.name,
            "settings": storage.settings_of(self.strategy),
            "dimension": len(self.x0),
            "x0 and bounds": box,
        }
        return {**names, "kind of bounds": self.bounds.how, "seed": self.seed, "restarts": self.restarts, "maximize": self.maximize}

    def save(self, path: str | Path, progress: Progress) -> None:
        """Write the progress to a .npz or .json file."""
        storage.write(path, {"search": self.identity()}, progress)

    def load(self, path: str | Path) -> Progress:
        """The progress of `save`, if it is one of this search."""
        about, scalars, arrays = storage.read(path)
        found, own = about.get("search"), self.identity()
        if not isinstance(found, dict):
            raise CheckpointError(f"{path} holds a state of a strategy, not a search of minimize. Read it with altgrad.es.load.")
        different = [f"{name} {found.get(name)!r} instead of {value!r}" for name, value in own.items() if found.get(name) != value]
        if different:
            raise CheckpointError(f"{path} is of another search: {different[0]}. Give another path, or the arguments it was begun with.")
        inner: dict[str, type] = {"state": self.strategy.state_class, "run": restarting.Run}
        return storage.rebuild(Progress, scalars, arrays, Path(path), inner=inner)
