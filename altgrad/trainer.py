"""One training step as a straight line, and the loop around it."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altgrad import checkpoint, optimizer_state, pictures, runs, signals
from altgrad.engine import Estimate, Tree, data_ranks, dense, over_ranks
from altgrad.errors import Interrupted, NumericsError, ShapeError
from altgrad.kernels import noise
from altgrad.local.readouts import OWN
from altgrad.optimizers import wants_closure
from altgrad.problem import Batch, not_finite
from altgrad.training import COUNTS, Training, TrainSettings, build, resolved, resume, save, settle_noise

Row = dict[str, Any]  # one line of metrics.jsonl


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    test_accuracy: float | None
    test_loss: float | None
    figures: dict[str, float]  # all that the problem measured on held-out data
    steps: int
    forwards: int
    backwards: int
    seconds: float  # in steps alone
    peak_memory_bytes: int
    seed: int
    settings: dict[str, Any]
    noise: dict[str, Any]  # how normals were drawn, with what compiling came to in this process

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def step(training: Training) -> Mapping[str, Tensor]:
    """One update: learning rate → key → batch → estimate → mean over ranks → finite check → p.grad → clip → optimizer → state and buffers → metrics.

    Raises:
        NumericsError: the loss or a gradient is NaN or infinite; names it, the engine and the step. The parameters are as before.
    """
    training.schedule.apply(training.optimizer.param_groups, training.rates, fraction=training.fraction)  # all evaluations of a closure share it
    training.problem.progress = training.fraction
    batch = training.problem.batch(training.step, data_ranks(training.engine, training.world))
    estimate = fill(training, batch)
    if wants_closure(training.optimizer):
        descend(training, batch, estimate)
    else:
        training.optimizer.step()
    training.state = estimate.state
    training.problem.load({}, estimate.buffers)
    training.step += 1
    return {**estimate.metrics, "loss": estimate.loss}


def fill(training: Training, batch: Batch) -> Estimate:
    """Estimate the gradient and put it, checked and clipped, into p.grad; a parameter that the engine left out keeps None."""
    training.optimizer.zero_grad(set_to_none=True)  # before the estimate, which needs the memory
    estimate = training.engine.estimate(training.problem, training.values(), training.state, batch, training.key, training.world)
    estimate = over_ranks(training.engine, estimate, training.world, training.problem.batch_size_of(batch))
    gradients: Tree = {}
    for name in estimate.grads:
        gradient, parameter = dense(estimate.grads[name]), training.params.get(name)
        if parameter is None or gradient.shape != parameter.shape:
            expected = "no such parameter" if parameter is None else f"a parameter of shape {tuple(parameter.shape)}"
            raise ShapeError(f"engine {training.settings.engine} gave a gradient of shape {tuple(gradient.shape)} for {name!r}: there is {expected}.")
        parameter.grad = gradients[name] = gradient.detach().to(parameter.dtype)
    norm = total_norm(gradients)
    if not bool(torch.isfinite(norm) & torch.isfinite(estimate.loss)):  # one number: the only wait for the device in a step
        refuse(training, batch, estimate.loss, gradients)
        norm = total_norm(gradients, dtype=torch.float64)  # every entry is finite: their squares ran over
    if training.settings.clip is not None:
        factor = (training.settings.clip / (norm + 1e-6)).clamp(max=1.0)
        for name, gradient in gradients.items():  # not in place: an engine may keep what it gave in its state
            training.params[name].grad = (gradient * factor).to(gradient.dtype)
    for name in COUNTS:
        if name in estimate.metrics:
            training.counts[name] = training.counts[name] + estimate.metrics[name]
    return estimate


def descend(training: Training, batch: Batch, first: Estimate) -> None:
    """A step of an optimizer that evaluates the loss itself: every evaluation repeats the batch and the noise, the first is `first`."""
    snapshot = [tensor.detach().clone() for tensor in training.params.values()]
    unused = [first]

    def closure() -> Tensor:
        return (unused.pop() if unused else fill(training, batch)).loss

    try:
        training.optimizer.step(closure)  # type: ignore[arg-type]
    except NumericsError:
        with torch.no_grad():
            for tensor, value in zip(training.params.values(), snapshot, strict=True):
                tensor.copy_(value)
        raise


def total_norm(gradients: Tree, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """√Σ g² over all gradients, 0-d, accumulated in `dtype` or better; 0 where there are none."""
    norms = [torch.linalg.vector_norm(gradient, dtype=accumulator(gradient, dtype)).double() for gradient in gradients.values()]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])) if norms else torch.zeros(())


def accumulator(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which to sum squares of `tensor`."""
    wide = torch.promote_types(tensor.dtype, dtype)
    return wide if wide.is_complex or wide.is_floating_point else dtype


def refuse(training: Training, batch: Batch, loss: Tensor, gradients: Tree) -> None:
    """Raise NumericsError for the first tensor that is not finite, if there is one."""
    suspects = {"the loss": loss, **{f"the gradient of {name!r}": gradient for name, gradient in gradients.items()}}
    for what, tensor in suspects.items():
        wrong = int((~torch.isfinite(tensor)).sum())
        if wrong:
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinite"
            training.optimizer.zero_grad(set_to_none=True)
            inputs = not_finite(batch.inputs)
            advice = f"In this batch {inputs}" if inputs else "Lower lr, or set clip."
            raise NumericsError(
                f"{what} is {kind} ({wrong} of {tensor.numel()} entries) at step {training.step} (engine {training.settings.engine}, "
                f"optimizer {training.settings.optimizer}, lr={training.settings.lr}). The update was not made. {advice}"
            )


def evaluate(training: Training) -> dict[str, float]:
    """The problem's held-out figures as the engine reads out, for instance {"test_accuracy": 0.97, "test_loss": 0.1}, and in other ways where it has some.

    One pass over the test set is enough for all of them.
    """
    engine, problem = training.engine, training.problem
    told: list[Mapping[str, Any]] = []  # what every read-out gave, part by part of the test set

    def figures(predict: Callable[[Any], Any], ending: str = "") -> dict[str, float]:
        return {f"test_{name}{ending}": float(value) for name, value in problem.evaluate(predict, split="test").items()}

    def kept(inputs: Any) -> Any:
        told.append(engine.reads(problem, training.values(), training.state, inputs))
        return chosen(told[-1], engine.readout)  # type: ignore[attr-defined]

    def repeated(name: str) -> Callable[[Any], Any]:
        again = iter(told)
        return lambda _: chosen(next(again), name)

    def chosen(given: Mapping[str, Any], name: str) -> Any:
        return given.get(name, given[OWN])  # what has not been trained yet has no say

    if not engine.readouts:
        return figures(training.predict)
    found = figures(kept)
    for other in engine.readouts:
        found |= figures(repeated(other), f"_{other}")
    return found


def fit(
    training: Training,
    *,
    run_folder: str | Path | None = None,
    overwrite: bool = False,
    keep: int = 3,
    on_step: Callable[[Training, Row], Any] | None = None,
    on_evaluate: Callable[[Training, Row], Any] | None = None,
) -> Result:
    """Train to the end of the settings' epochs or steps.

    Args:
        run_folder: where config, metrics, checkpoints and result go; None: where a resumed run came from, or nowhere.
        overwrite: replace an earlier run there.
        keep: checkpoints to keep.
        on_step: called with the training and the row of each step; a true answer ends the run after that step.
        on_evaluate: called with the training and each row of held-out figures.

    Raises:
        UsageError: the folder holds something already. NumericsError: diverged, before the update; checkpoints stay, and without any
        the run is withdrawn (runs.withdraw). Interrupted: SIGINT or SIGTERM; the step was finished and a checkpoint written.
    """
    existed = run_folder is not None and Path(run_folder).exists()
    if run_folder is not None and training.world.is_main:
        training.run = runs.create(run_folder, resolved(training), overwrite=overwrite)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        with signals.StopSignals() as stop:
            loop(training, stop, keep=keep, on_step=on_step, on_evaluate=on_evaluate)
    except NumericsError as error:
        if training.run is None:
            raise
        if checkpoint.available(training.run.checkpoints):
            raise NumericsError(f"{error} The last good checkpoint stays in {training.run.checkpoints}.") from error
        kept = runs.withdraw(training.run, existed=existed) if run_folder is not None else training.run.folder
        raise NumericsError(f"{error} No checkpoint had been written{f'; what was logged is in {kept}' if kept else ''}.") from error
    except Interrupted:
        raise
    except Exception:
        if run_folder is not None and training.run is not None and not checkpoint.available(training.run.checkpoints) and not training.run.rows():
            runs.withdraw(training.run, existed=existed)
        raise
    result = Result(
        test_accuracy=training.figures.get("test_accuracy"),
        test_loss=training.figures.get("test_loss"),
        figures=dict(training.figures),
        steps=training.step,
        forwards=training.count("forwards"),
        backwards=training.count("backwards"),
        seconds=training.seconds,
        peak_memory_bytes=runs.peak_memory(),
        seed=training.settings.seed,
        settings=resolved(training),
        noise={"form": training.noise, "compile_seconds": noise.compile_seconds(), "compile_failures": noise.compile_failures()},
    )
    if training.run is not None and training.world.is_main:
        training.run.write_result(result.as_dict())
    return result


def loop(training: Training, stop: signals.StopSignals, *, keep: int, on_step: Any, on_evaluate: Any) -> None:
    """Steps until the end; after each, in this order: row, evaluation, checkpoint, stop. A checkpoint thus has every row up to its step."""
    epoch = training.problem.steps_per_epoch or training.total_steps
    every, look = training.settings.save_every or epoch, training.settings.evaluate_every or epoch
    last = training.step >= training.total_steps
    if training.step == 0:
        pictures.save(training)
    while not last:
        with noise.compiled(training.noise == "compiled"):
            started, compiling, normals = time.perf_counter(), noise.compile_seconds(), noise.drawn()
            metrics = step(training)
            training.seconds += time.perf_counter() - started - (noise.compile_seconds() - compiling)
        if training.noise is None:
            settle_noise(training, noise.drawn() - normals)
        if training.step == 1 and training.run is not None:
            optimizer_state.pack(training.optimizer.state_dict())  # what cannot be stored is refused now, not an epoch later
        last = training.step >= training.total_steps
        log = last or training.step % training.settings.log_every == 0
        if log or on_step is not None:
            row = {**base_row(training), **rate_row(training), **{name: plain(value) for name, value in metrics.items() if name not in COUNTS}}
            if log:
                append(training, row)
            last = bool(on_step is not None and on_step(training, row)) or last
        if last or training.step % look == 0:
            training.figures = evaluate(training)
            row = {**base_row(training), **training.figures}
            append(training, row)
            pictures.save(training)
            if on_evaluate is not None:
                on_evaluate(training, row)
        due = last or training.step % every == 0
        if due:
            save(training, keep=keep)
        number = agreed(training, stop)
        if number:
            if not due:
                save(training, keep=keep)
            where = (
                f"a checkpoint was written. Go on with: altgrad resume {training.run.folder}"
                if training.run
                else "there is no run folder, so nothing was kept."
            )
            raise Interrupted(
                f"{signals.name(number)} arrived: stopped after step {training.step} of {training.total_steps}; {where}", signals.exit_code(number)
            )


def agreed(training: Training, stop: signals.StopSignals) -> int:
    """The signal that any rank received, or 0; ranks ask each other, since they hear it at different steps."""
    own = stop.received or 0
    if training.world.size == 1:
        return own
    device = next(iter(training.params.values())).device
    return math.ceil(float(training.world.mean(torch.tensor(float(own), device=device)))) and (own or signals.WATCHED[-1])


def base_row(training: Training) -> Row:
    """What every row starts with."""
    counts = {name: training.count(name) for name in COUNTS}
    return {"step": training.step, "epoch": training.epoch, **counts, "seconds": training.seconds}


def rate_row(training: Training) -> Row:
    """The learning rate of the step just made, where a schedule changes it."""
    return {"lr": training.optimizer.param_groups[0]["lr"]} if training.rates else {}


def append(training: Training, row: Row) -> None:
    """Write a row, if there is a folder and this rank writes."""
    if training.run is not None and training.world.is_main:
        training.run.append(row)


def plain(value: Tensor) -> float:
    """A 0-d tensor as a number."""
    return float(value)


__all__ = ["Result", "TrainSettings", "Training", "build", "evaluate", "fit", "resume", "save", "step"]
