"""A training run as a value: its settings, what they build, and what a checkpoint of it holds.

All randomness is addressed by (seed, step), so a checkpoint holds tensors and counters and no generator's state.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altgrad import checkpoint, optimizer_state, optimizers, registry, runs
from altgrad.engine import Engine, Tree, fit_check
from altgrad.errors import CheckpointError, NumericsError, SettingError, near_miss, require
from altgrad.kernels import noise
from altgrad.problem import Problem
from altgrad.rng import Key
from altgrad.schedules import Schedule
from altgrad.world import World

EPOCHS = 10  # where neither epochs nor steps are given and the problem has no default of its own
OPTIMIZER = "Adam"  # where neither the user nor the engine names one
STEPS = 1000  # the same for a problem that has no epochs
FORMS = ("none", "eager", "compiled")  # how normals on the CPU are drawn
COUNTS = ("forwards", "backwards")  # metrics that are summed over the run


def option(default: Any, meaning: str) -> Any:
    """A settings field with its meaning."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class TrainSettings:
    """What to train, by which rule and for how long; JSON values throughout."""

    problem: str = option("digits", "name, or package.module:attribute")
    problem_settings: dict[str, Any] = field(default_factory=dict, metadata={"help": "settings of the problem"})
    model: str | None = option(None, "name, or package.module:attribute; none for the problem's own")
    model_settings: dict[str, Any] = field(default_factory=dict, metadata={"help": "settings of the model"})
    quantize: dict[str, Any] = field(default_factory=dict, metadata={"help": "quantisers put on the model, as altgrad.quantize takes them; none if empty"})
    engine: str = option("forward", "name, or package.module:attribute")
    engine_settings: dict[str, Any] = field(default_factory=dict, metadata={"help": "settings of the engine"})
    optimizer: str | None = option(None, "name in torch.optim or pytorch_optimizer; none for the one the engine is made for, Adam for most")
    optimizer_settings: dict[str, Any] = field(default_factory=dict, metadata={"help": "settings of the optimizer"})
    lr: float | None = option(None, "learning rate; none for the problem's default, or the optimizer's where another optimizer is chosen")
    schedule: str = option("constant", "how the learning rate changes along the run: constant, cosine or linear")
    warmup: float = option(0.0, "share of the run in which the learning rate rises to its full height, in [0, 1)")
    epochs: int | None = option(None, "passes over the data; none for the problem's default, unless steps is given")
    steps: int | None = option(None, "updates, instead of epochs")
    seed: int = option(0, "names all randomness: weights, order, noise; 0 to 2^64 - 1")
    clip: float | None = option(None, "largest norm of the whole gradient; none for no limit")
    save_every: int | None = option(None, "steps between checkpoints; none for an epoch")
    evaluate_every: int | None = option(None, "steps between looks at the test set; none for an epoch; the last step is always followed by one")
    log_every: int = option(1, "steps between rows of metrics.jsonl")
    data_dir: str | None = option(None, "where the user's own data files are")

    def __post_init__(self) -> None:
        require(self.epochs is None or self.steps is None, "steps", self.steps, f"absent where epochs={self.epochs} is given")
        for name in ("epochs", "steps", "save_every", "evaluate_every", "log_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "1 or more")
        require(0 <= self.seed < 2**64, "seed", self.seed, "in [0, 2^64)")
        require(self.clip is None or self.clip > 0, "clip", self.clip, "above 0")
        require(self.lr is None or self.lr >= 0, "lr", self.lr, "0 or more")
        Schedule(self.schedule, self.warmup)
        for entry in fields(self):  # JSON has no tuples: the same value before and after config.json
            if isinstance(getattr(self, entry.name), dict):
                object.__setattr__(self, entry.name, {key: tupled(value) for key, value in getattr(self, entry.name).items()})

    @staticmethod
    def of(values: dict[str, Any]) -> "TrainSettings":
        """The settings in a config.json."""
        known = [entry.name for entry in fields(TrainSettings)]
        for name in values:
            if name not in known:
                raise SettingError(f"{runs.CONFIG}: " + near_miss("setting", name, known))
        return TrainSettings(**values)


@dataclass
class Training:
    """A run between two steps. `build` makes one at step 0, `resume` one from a run folder, trainer.step moves it on."""

    settings: TrainSettings
    problem: Problem
    engine: Engine
    optimizer: torch.optim.Optimizer
    params: Tree  # leaf tensors: the problem's parameters (sharing their memory) and the engine's own trainables
    state: Tree
    total_steps: int
    world: World
    rates: tuple[float, ...] = ()  # the base learning rate of every parameter group; empty where it never changes
    share: Callable[["Training"], float] | None = None  # the share of the run that is done, where something other than its steps decides
    step: int = 0
    seconds: float = 0.0  # in steps alone, without evaluation and saving
    counts: Tree = field(default_factory=lambda: {name: torch.zeros((), dtype=torch.float64) for name in COUNTS})
    figures: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    noise: str | None = None  # FORMS, settled after the first step: it decides the last bits, so it is part of what resuming restores
    run: runs.Run | None = None

    @property
    def key(self) -> Key:
        """The address of this step's noise."""
        return Key(self.settings.seed).fold("estimate").at(self.step)

    @property
    def schedule(self) -> Schedule:
        """How the learning rate changes."""
        return Schedule(self.settings.schedule, self.settings.warmup)

    @property
    def fraction(self) -> float:
        """The share of the run that is done, in [0, 1]."""
        return min(1.0, self.share(self) if self.share is not None else self.step / self.total_steps)

    @property
    def epoch(self) -> int:
        """Epochs done, counting the one at hand; 0 where there are none."""
        return -(-self.step // self.problem.steps_per_epoch) if self.problem.steps_per_epoch else 0

    def values(self) -> Tree:
        """The trainables as engines see them: without gradients, so that no reverse graph is recorded by accident."""
        return {name: tensor.detach() for name, tensor in self.params.items()}

    def count(self, name: str) -> int:
        """How many "forwards" or "backwards" the run has spent."""
        return round(self.counts[name].item())

    def predict(self, inputs: Any) -> Any:
        """The engine's read-out."""
        return self.engine.predict(self.problem, self.values(), self.state, inputs)


def build(settings: TrainSettings, *, world: World | None = None) -> Training:
    """What `settings` describe, before its first step.

    Raises:
        UsageError: unknown names or settings, values out of range, an engine that the problem cannot feed.
        ShapeError, DataError, NumericsError: the model, the loss and the data do not fit together, or the data hold NaN.
    """
    key, world = Key(settings.seed), world or World()
    engine = registry.engine(settings.engine, settings.engine_settings)
    factory = registry.problem(settings.problem, settings.problem_settings)
    problem = build_problem(factory, settings, key.fold("problem"))
    fit_check(engine, problem, alternatives=registry.needs)
    for _, rule, view in engine.members(problem):
        view.check_engine(rule)
    problem.check_batch(problem.batch(0, World()))  # the whole of it on every rank, with the first weights: the same answers whenever a run is resumed
    params = {name: leaf(tensor) for name, tensor in {**problem.params(), **engine.aux(problem, key.fold("aux"))}.items()}
    defaults = getattr(factory, "defaults", {})
    chosen = settings.optimizer or engine.defaults.get("optimizer", OPTIMIZER)
    made_for = [own for own in (engine.defaults, defaults) if own.get("optimizer", "").lower() == chosen.lower()]  # a rate is tuned for one optimizer
    lr = settings.lr if settings.lr is not None or not made_for else made_for[0].get("lr")
    optimizer = optimizers.build(chosen, params, lr=lr, settings=settings.optimizer_settings)
    resolved = replace(
        settings,
        engine_settings={**settings.engine_settings, **engine.settings()},
        problem_settings={entry.name: getattr(factory, entry.name) for entry in fields(factory)},
        optimizer=chosen,
        lr=lr if lr is not None else default_lr(optimizer),
        epochs=defaults.get("epochs", EPOCHS) if settings.epochs is None and settings.steps is None and problem.steps_per_epoch else settings.epochs,
    )
    total = resolved.steps or (resolved.epochs * problem.steps_per_epoch if resolved.epochs and problem.steps_per_epoch else STEPS)
    values = {name: tensor.detach() for name, tensor in params.items()}
    device = next(iter(params.values())).device
    problem.progress = 0.0
    return Training(
        settings=resolved,
        problem=problem,
        engine=engine,
        optimizer=optimizer,
        params=params,
        state=engine.init(problem, values, key.fold("init")),
        total_steps=total,
        world=world,
        rates=Schedule(settings.schedule, settings.warmup).rates(optimizer.param_groups, optimizer=chosen),
        counts={name: torch.zeros((), dtype=torch.float64, device=device) for name in COUNTS},
    )


def build_problem(factory: Any, settings: TrainSettings, key: Key) -> Problem:
    """factory.build with as many of model, model_settings and data_dir as are given."""
    given = {"model": settings.model, "model_settings": settings.model_settings or None, "data_dir": settings.data_dir}
    accepted = inspect.signature(factory.build).parameters
    for name, value in given.items():
        if value is not None and name not in accepted:
            raise SettingError(f"{name}={value!r} is not allowed: problem {settings.problem} takes no {name}. Leave it out.")
    problem = factory.build(key, **{name: value for name, value in given.items() if value is not None})
    if settings.quantize:
        from altgrad.quantisation.applying import quantize_problem

        quantize_problem(problem, settings.quantize)
    return problem  # type: ignore[no-any-return]


def save(training: Training, *, keep: int = 3) -> Path | None:
    """Write a checkpoint to the run folder, if there is one and this rank writes.

    Raises:
        NumericsError: a parameter is NaN or infinite; earlier checkpoints stay.
    """
    for name, tensor in training.params.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericsError(
                f"parameter {name!r} is no longer finite after the update of step {training.step - 1} (engine {training.settings.engine}, optimizer "
                f"{training.settings.optimizer}, lr={training.settings.lr}); no checkpoint of it is written. Lower lr, or set clip."
            )
    if training.run is None or not training.world.is_main:
        return None
    packed, skeleton = optimizer_state.pack(training.optimizer.state_dict(), prefix="optimizer/")
    groups = {"params": training.values(), "buffers": training.problem.buffers(), "state": training.state}
    meta = {
        "engine": training.settings.engine,
        "optimizer": type(training.optimizer).__name__,
        "optimizer_state": skeleton,
        "counts": {name: training.count(name) for name in COUNTS},
        "seconds": training.seconds,
        "figures": training.figures,
        "noise": training.noise,
    }
    tensors = {f"{group}/{name}": tensor for group, tree in groups.items() for name, tensor in tree.items()}
    training.run.sync()
    return checkpoint.save(training.run.checkpoints, step=training.step, tensors={**tensors, **packed}, meta=meta, keep=keep)


def resume(run_folder: str | Path, *, fallback: bool = False, world: World | None = None) -> Training:
    """The training that `run_folder` holds, at its newest checkpoint (or at step 0 before the first); bit for bit as it was.

    Args:
        fallback: where the newest checkpoint is damaged, take the newest good one before it, with a warning.

    Raises:
        UsageError: no run folder. CheckpointError: a damaged or foreign checkpoint; nothing has been changed.
    """
    training = opened(run_folder, fallback=fallback, world=world)
    run = runs.find(run_folder)
    if training.world.is_main:
        run.truncate(training.step)
    training.run = run
    return training


def opened(run_folder: str | Path, *, fallback: bool = False, world: World | None = None) -> Training:
    """As `resume`, to look at only: the run folder is not written to, now or later."""
    run = runs.find(run_folder)
    training = build(TrainSettings.of(run.config()), world=world)
    before, now = run.environment(), runs.environment()
    changed = [f"{name} {before[name]} -> {now.get(name)}" for name in before if before[name] != now.get(name)]
    if changed:
        warnings.warn(f"{run.folder} was made elsewhere ({', '.join(changed)}); resuming is bit-exact only where these agree.", stacklevel=3)
    if checkpoint.available(run.checkpoints) or (run.checkpoints / checkpoint.LATEST).exists():
        restore(training, checkpoint.load_latest(run.checkpoints, fallback=fallback))
    return training


def restore(training: Training, saved: checkpoint.Checkpoint) -> None:
    """Put a checkpoint's contents into `training`.

    Raises:
        CheckpointError: it is of another model, engine or optimizer; `training` is unchanged.
    """
    groups: dict[str, Tree] = {"params": {}, "buffers": {}, "state": {}, "optimizer": {}}
    for path, tensor in saved.tensors.items():
        group, _, name = path.partition("/")
        groups[group][name] = tensor
    wrong = "Was config.json changed, or the model's code? Give the run folder that the checkpoint was made in."
    for kind, here in (("engine", training.settings.engine), ("optimizer", type(training.optimizer).__name__)):
        if saved.meta[kind] != here:
            raise CheckpointError(f"the checkpoint of step {saved.step} was made with {kind} {saved.meta[kind]}, not {here}. {wrong}")
    for group, own in (("params", training.params), ("buffers", training.problem.buffers())):
        for name in sorted({*own, *groups[group]}):
            there, now = (f"{tuple(t[name].shape)} {t[name].dtype}" if name in t else "absent" for t in (groups[group], own))
            if there != now:
                raise CheckpointError(f"the checkpoint of step {saved.step} does not fit: {group} {name!r} is {there} in it and {now} here. {wrong}")
    state_dict = optimizer_state.unpack(saved.tensors, saved.meta["optimizer_state"])
    device = next(iter(training.params.values())).device
    with torch.no_grad():
        for name, tensor in training.params.items():
            tensor.copy_(groups["params"][name])
    training.problem.load(training.values(), groups["buffers"])
    optimizer_state.restore(training.optimizer, state_dict)
    training.state = {name: tensor.to(device) for name, tensor in groups["state"].items()}
    training.counts = {name: torch.tensor(float(value), dtype=torch.float64, device=device) for name, value in saved.meta["counts"].items()}
    training.step, training.seconds, training.figures = saved.step, saved.meta["seconds"], saved.meta["figures"]
    training.noise = saved.meta.get("noise")
    if training.noise in {"eager", "compiled"} and not noise.follows(training.noise == "compiled"):
        warnings.warn(f"the run drew {training.noise} noise, which ALTGRAD_COMPILE now forbids: going on is exact to rounding only.", stacklevel=2)


def settle_noise(training: Training, normals: int) -> None:
    """Decide, once a run, whether `normals` a step on the CPU are worth compiling for; all ranks agree."""
    device = next(iter(training.params.values())).device

    def mean(value: float) -> float:
        return float(training.world.mean(torch.tensor(float(value), device=device)))

    share = round(mean(normals))
    wanted = share > 0 and noise.worth_compiling(share, training.total_steps)
    with noise.compiled(wanted):  # compiles now
        failed = wanted and mean(noise.compile_failures()) > 0
    training.noise = "none" if share == 0 else "compiled" if wanted and not failed else "eager"


def resolved(training: Training) -> dict[str, Any]:
    """The settings with every default filled in, as config.json holds them."""
    return asdict(training.settings)


def leaf(tensor: Tensor) -> Tensor:
    """A leaf over the same memory, for an optimizer to hold."""
    return tensor.detach().requires_grad_(tensor.is_floating_point() or tensor.is_complex())


def default_lr(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate an optimizer chose for itself."""
    value = optimizer.param_groups[0].get("lr")
    return float(value) if isinstance(value, int | float | Tensor) else None


def tupled(value: Any) -> Any:
    """Lists as tuples, at any depth."""
    return tuple(tupled(part) for part in value) if isinstance(value, list | tuple) else value
