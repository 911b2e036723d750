"""Engines side by side on one problem: the same budget, the same tuning, the same seeds, and what each of them cost."""

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from altgrad import robustness, runs, trainer
from altgrad.alignment import alignment
from altgrad.budget import Budget, equivalents
from altgrad.compare_row import Row
from altgrad.compare_settings import ALL, Choice, CompareSettings
from altgrad.comparison import Comparison
from altgrad.data import Dataset
from altgrad.errors import AltgradError, CapabilityError, NumericsError, SettingError, UsageError
from altgrad.local import reading
from altgrad.metrics import live_bytes, saved_bytes
from altgrad.problem import Problem
from altgrad.rng import Key, permutation
from altgrad.schedules import Schedule
from altgrad.training import Training
from altgrad.verdict import method

GRIDS = {"sgd": (0.01, 0.03, 0.1, 0.3)}  # learning rates to try, by optimizer
GRID = (3e-4, 1e-3, 3e-3, 1e-2)  # for all other optimizers, whose steps are about lr long (Adam and its kin)
DRAWS = 8  # estimates of one batch over which the cosine is taken
BEST = "best"  # the read-out that was most accurate on the held-out data of the tuning run


class Progress(NamedTuple):
    """Where a comparison is: `fraction` of run number `run` of `runs`."""

    stage: str  # "measure", "tune" or "train"
    label: str
    seed: int
    lr: float | None
    fraction: float
    run: int
    runs: int


class Outcome(NamedTuple):
    """One finished run: its curve, whose last point is where it ended."""

    curve: list[dict[str, Any]]
    lr: float
    diverged: bool
    fgsm: Mapping[str, float | None] = {}  # epsilon -> accuracy; none where there is no direction to take
    readouts: Mapping[str, float] = {}  # accuracy by read-out, for rules that have several; on held-out training data while tuning


def compare(settings: CompareSettings, *, progress: Callable[[Progress], Any] | None = None, on_row: Callable[[Comparison], Any] | None = None) -> Comparison:
    """Measure every engine once, tune it, train it with every seed.

    Args:
        progress: called now and then with where the comparison is.
        on_row: called with the comparison so far whenever an engine is done, so that a long one can be kept piece by piece.

    Raises:
        UsageError: an unknown name or setting, or an engine that the problem cannot feed; before any training.
        Interrupted: SIGINT or SIGTERM.
    """
    tell, budget = progress or (lambda at: None), Budget.parse(settings.budget)
    first, costs, skipped = settings.seeds[0], {}, {}
    grid: tuple[float, ...] = ()
    for number, choice in enumerate(settings.choices()):
        tell(Progress("measure", choice.label, first, None, 0.0, number, len(settings.choices())))
        try:
            training = trainer.build(settings.train_settings(choice, seed=first, lr=settings.lr))
            if budget.kind == "epochs" and not training.problem.steps_per_epoch:
                raise SettingError(f"budget={settings.budget!r} is not allowed: problem {settings.problem} has no epochs. Use forwards=… or seconds=….")
            if settings.fgsm:
                robustness.attackable(training.problem)
            costs[choice.label] = measure(training)
        except CapabilityError as error:
            if choice not in ALL:
                raise
            skipped[choice.label] = str(error)
            continue
        grid = rates_to_try(settings, training.problem)
    if not costs:
        raise UsageError(f"there is nothing to compare: problem {settings.problem} is not for backprop, and no other engine was named.")
    chosen = [choice for choice in settings.choices() if choice.label in costs]
    fixed = {*settings.rates, *settings.made_for()}  # labels that are not tuned
    total = sum(len(settings.seeds) + len(grid) * (choice.label not in fixed) for choice in chosen)
    comparison = Comparison(runs.finite(asdict(settings)), runs.environment(), [*method(settings, grid, draws=DRAWS), *scheduled(settings)], [], skipped)
    done = 0
    for choice in chosen:
        tuning: dict[float, Outcome] = {}
        for lr in grid if choice.label not in fixed else ():
            report = reporter(tell, "tune", choice.label, settings.tuning_seed, lr, done, total)
            tuning[lr] = run(settings, choice, seed=settings.tuning_seed, lr=lr, tuning=True, report=report)
            done += 1
        chosen_lr = max(tuning, key=lambda lr: rank(tuning[lr])) if tuning else settings.rates.get(choice.label, settings.lr)
        outcomes = []
        for seed in settings.seeds:
            report = reporter(tell, "train", choice.label, seed, chosen_lr, done, total)
            outcomes.append(run(settings, choice, seed=seed, lr=chosen_lr, tuning=False, report=report))
            done += 1
        best = best_readout(tuning[chosen_lr]) if tuning and chosen_lr is not None else None
        comparison.rows.append(row_of(choice, outcomes, tuning, costs[choice.label], best=best))
        if on_row is not None:
            on_row(comparison)
    return comparison


def scheduled(settings: CompareSettings) -> list[str]:
    """The sentence on the schedule, where there is one."""
    schedule = Schedule(settings.schedule, settings.warmup)
    return [f"Learning rates follow one schedule for every engine, over the share of the budget that is spent: {schedule}."] if schedule.moves else []


def reporter(tell: Callable[[Progress], Any], stage: str, label: str, seed: int, lr: float | None, number: int, total: int) -> Callable[[float], Any]:
    """`tell` with everything but the fraction filled in."""
    return lambda fraction: tell(Progress(stage, label, seed, lr, fraction, number, total))


def run(
    settings: CompareSettings, choice: Choice, *, seed: int, lr: float | None, tuning: bool, report: Callable[[float], Any] = lambda fraction: None
) -> Outcome:
    """One run to the end of the budget; while `tuning` it sees nothing of the test data, and "test" figures are the validation split's."""
    budget = Budget.parse(settings.budget)
    training = trainer.build(settings.train_settings(choice, seed=seed, lr=lr))
    if tuning:
        training.problem = held_out(training.problem, settings)
    epoch, curve, diverged = training.problem.steps_per_epoch, {}, False
    training.share = lambda now: budget.share(trainer.base_row(now), epoch)  # LIMIT steps are no measure of how far the run is
    curve[0] = point(training, trainer.evaluate(training))

    def on_step(now: Training, row: Mapping[str, Any]) -> bool:
        if equivalents(row) <= 0:
            raise AltgradError(f"engine {choice.engine} reports no forwards in its metrics, so that its cost cannot be compared.")
        spent = budget.share(row, epoch)
        report(min(1.0, spent))
        over = spent >= 1 - 1e-12
        if not over and spent * settings.points >= len(curve):
            curve[now.step] = point(now, trainer.evaluate(now))
        return over

    try:
        trainer.fit(training, on_step=on_step, on_evaluate=lambda now, row: curve.__setitem__(now.step, point(now, row)))
    except NumericsError:
        diverged = True
        curve[training.step] = point(training, trainer.evaluate(training))
    attacked = {} if tuning else under_attack(training, settings.fgsm)
    trained = (training.engine, training.problem, training.values(), training.state)
    read = reading.accuracies(*trained)
    read.update(reading.probed(*trained) if read and not tuning else {})
    return Outcome([curve[step] for step in sorted(curve)], float(training.settings.lr or 0), diverged, attacked, read)


def best_readout(tuned: Outcome) -> str | None:
    """The read-out that was most accurate on what the tuning run had held out; none for a rule that has one alone."""
    return max(tuned.readouts, key=lambda name: tuned.readouts[name], default=None)


def under_attack(training: Training, epsilons: Sequence[float]) -> dict[str, float | None]:
    """The test accuracy under FGSM by epsilon; none for a model without a derivative, or one that diverged."""
    try:
        return {f"{epsilon:g}": found.accuracy for epsilon, found in robustness.attack(training, epsilons=epsilons).items()} if epsilons else {}
    except (CapabilityError, NumericsError):
        return dict.fromkeys(f"{epsilon:g}" for epsilon in epsilons)


def point(training: Training, figures: Mapping[str, Any]) -> dict[str, Any]:
    """A point of a curve."""
    counts = {"step": training.step, "forwards": training.count("forwards"), "backwards": training.count("backwards"), "seconds": training.seconds}
    return {**counts, **{name: value for name, value in figures.items() if name.startswith("test_")}}


def rank(outcome: Outcome) -> tuple[bool, float, float]:
    """The greater the better: not diverged, then accuracy, then less loss."""
    end = outcome.curve[-1]
    loss = end.get("test_loss", 0.0)
    return not outcome.diverged, end.get("test_accuracy", 0.0), -loss if math.isfinite(loss) else -math.inf


def rates_to_try(settings: CompareSettings, problem: Problem) -> tuple[float, ...]:
    """The grid every engine is tuned on; empty where learning rates are given, or there is no data to hold out.

    Raises:
        SettingError: a grid is asked for, and the problem has no data to hold out.
    """
    if settings.lr is not None:
        return ()
    if getattr(problem, "dataset", None) is None:
        if settings.lrs:
            raise SettingError(f"lrs={settings.lrs} is not allowed: problem {settings.problem} has no training data to hold out. Give one lr instead.")
        return ()
    return settings.lrs or GRIDS.get(settings.optimizer.lower(), GRID)


def held_out(problem: Problem, settings: CompareSettings) -> Problem:
    """`problem` with part of its training data in the place of its test data, which is not looked at."""
    carved: Any = copy.copy(problem)
    data, size = carved.dataset, carved.batch_size
    order = torch.from_numpy(permutation(Key(settings.tuning_seed).fold("validation"), "examples", len(data.train_inputs)).copy())
    aside = max(1, round(settings.validation * len(order)))
    rest, valid = order[aside:], order[:aside]
    if len(rest) < size:
        raise SettingError(f"validation={settings.validation} leaves {len(rest)} examples to train on, less than a batch of {size}; lower one of them.")
    # By name, field by field: nothing here may read the test tensors.
    carved.dataset = Dataset(
        name=data.name,
        train_inputs=data.train_inputs[rest],
        train_targets=data.train_targets[rest],
        test_inputs=data.train_inputs[valid],
        test_targets=data.train_targets[valid],
        classes=data.classes,
    )
    carved.orders, carved.steps_per_epoch = {}, max(1, len(rest) // size)
    return carved


class Cost(NamedTuple):
    """What one estimate takes, and how it points."""

    peak_memory_bytes: int
    saved_bytes: int
    cosine: float | None
    cosines: dict[str, float]  # by parameter
    metrics: dict[str, float]  # what the rule says of the estimate, its cost aside


def measure(training: Training) -> Cost:
    """Bytes of one estimate beyond parameters and gradients, and its mean cosine to backprop's gradient, at the first weights."""
    problem, engine, values = training.problem, training.engine, training.values()
    batch = problem.batch(0, training.world)

    def estimate() -> dict[str, torch.Tensor]:
        return dict(engine.estimate(problem, values, training.state, batch, training.key, training.world).grads)

    # The first one is not measured: compilation and caches are not part of a step.
    told = engine.estimate(problem, values, training.state, batch, training.key, training.world).metrics
    metrics = {name: float(value) for name, value in told.items() if name not in {"forwards", "backwards"}}
    given = [*values.values(), *training.state.values(), *(leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor))]
    with saved_bytes(given) as saved:
        estimate()
    device = next(iter(values.values())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        grads = estimate()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before - sum(grad.nbytes for grad in grads.values())
    else:
        with live_bytes(given) as live:
            grads = estimate()
        peak = live.peak_without(grads.values())
    cosine, cosines = None, {}
    if problem.differentiable:
        keys = [training.key.fold("alignment").at(draw) for draw in range(DRAWS)]
        found = alignment(engine, problem, values, batch, keys, state=training.state)
        cosine, cosines = float(found["cosine"]), {name: float(layer["cosine"]) for name, layer in found["layers"].items()}
    return Cost(max(0, peak), saved.peak, cosine, cosines, metrics)


def row_of(choice: Choice, outcomes: Sequence[Outcome], tuning: Mapping[float, Outcome], cost: Cost, *, best: str | None = None) -> Row:
    """The row of an engine's runs; `best` is the read-out that was chosen on held-out data."""
    read = {name: [outcome.readouts.get(name) for outcome in outcomes] for name in outcomes[0].readouts}
    ends = [outcome.curve[-1] for outcome in outcomes]
    accuracies, losses = ([end[name] for end in ends if name in end] for name in ("test_accuracy", "test_loss"))

    def mean(name: str) -> float:
        return statistics.fmean(end[name] for end in ends)

    def validated(outcome: Outcome) -> float | None:
        return None if outcome.diverged else outcome.curve[-1].get("test_accuracy", outcome.curve[-1].get("test_loss"))

    return Row(
        label=choice.label,
        engine=choice.engine,
        settings=choice.build().settings(),
        baseline=choice in ALL,
        accuracy=statistics.fmean(accuracies) if accuracies else None,
        accuracy_spread=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        accuracies=accuracies,
        loss=statistics.fmean(losses) if losses else None,
        loss_spread=statistics.stdev(losses) if len(losses) > 1 else None,
        losses=losses,
        steps=mean("step"),
        forwards=mean("forwards"),
        backwards=mean("backwards"),
        seconds=mean("seconds"),
        **cost._asdict(),
        lr=outcomes[0].lr,
        tuning={str(lr): validated(outcome) for lr, outcome in tuning.items()},
        diverged=sum(outcome.diverged for outcome in outcomes),
        curves=[outcome.curve for outcome in outcomes],
        fgsm={epsilon: [outcome.fgsm[epsilon] for outcome in outcomes] for epsilon in outcomes[0].fgsm},
        readouts={**read, **({BEST: read[best]} if best in read else {})},
        best_readout=best,
    )


__all__ = ["Choice", "CompareSettings", "Outcome", "Progress", "compare", "held_out", "measure", "rank", "run"]
