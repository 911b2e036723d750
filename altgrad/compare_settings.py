"""What to compare, on what, and how much each engine may spend: the settings of `compare`, and the baselines that stand beside every rule."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from altgrad import registry
from altgrad.budget import Budget
from altgrad.engine import Bias, Engine
from altgrad.errors import SettingError, UsageError, near_miss, require
from altgrad.schedules import Schedule
from altgrad.training import TrainSettings, option

REFERENCE = "backprop"  # the label every other row is held against
LIMIT = 2**31  # steps; the budget ends a run long before


class Choice(NamedTuple):
    """A rule to compare: what to call it, the engine's name and its settings."""

    label: str
    engine: str
    settings: Mapping[str, Any] = {}

    def build(self) -> Engine:
        """The engine itself."""
        return registry.engine(self.engine, self.settings)


BASELINES = (
    Choice(REFERENCE, "backprop", {}),
    Choice("backprop + checkpointing", "backprop", {"checkpointing": True}),
    Choice("backprop + accumulation", "backprop", {"accumulation": 4}),
)
DEEP = Choice("backprop + deep supervision", "deep-supervision", {"loss": "greedy"})  # beside rules with local losses, which train heads too
ALL = (*BASELINES, DEEP)


@dataclass(frozen=True)
class CompareSettings:
    """What to compare, on what, and how much each engine may spend."""

    problem: str = option("digits", "name, or package.module:attribute")
    problem_settings: dict[str, Any] = field(default_factory=dict, metadata={"help": "settings of the problem"})
    model: str | None = option(None, "name, or package.module:callable; none for the problem's own")
    model_settings: dict[str, Any] = field(default_factory=dict, metadata={"help": "settings of the model"})
    quantize: dict[str, Any] = field(default_factory=dict, metadata={"help": "quantisers put on the model, the same for every engine; none if empty"})
    engines: tuple[Choice, ...] = option((), "(label, engine, settings) of every rule; the backprop baselines are added")
    baselines: tuple[str, ...] = option(
        tuple(choice.label for choice in ALL), "which baselines; backprop itself always, deep supervision beside local losses only"
    )
    seeds: tuple[int, ...] = option((0, 1, 2), "one run of every engine for each")
    budget: str = option("epochs=10", "what each run may spend: epochs=…, forwards=… or seconds=…")
    optimizer: str = option("Adam", "name in torch.optim or pytorch_optimizer, the same for every engine but those made for one of their own")
    optimizer_settings: dict[str, Any] = field(default_factory=dict, metadata={"help": "settings of the optimizer"})
    lr: float | None = option(None, "one learning rate for every engine, without tuning")
    lrs: tuple[float, ...] = option((), "learning rates tried for every engine on a validation split; none for a grid of four")
    rates: dict[str, float] = field(default_factory=dict, metadata={"help": "label -> learning rate of single engines, which are then not tuned"})
    tuning_seed: int = option(1000, "seed of the tuning runs, one for each learning rate and engine")
    validation: float = option(1 / 6, "share of the training data held out while tuning, in (0, 1)")
    schedule: str = option("constant", "how the learning rate changes along the budget, the same for every engine: constant, cosine or linear")
    warmup: float = option(0.0, "share of the budget in which the learning rate rises to its full height, in [0, 1)")
    batch_size: int | None = option(None, "examples a step; none for the problem's default")
    clip: float | None = option(None, "largest norm of the whole gradient; none for no limit")
    points: int = option(25, "evaluations along each run, for the curves")
    fgsm: tuple[float, ...] = option((), "epsilons, as shares of the inputs' range, under which the trained models are attacked by FGSM as well")
    data_dir: str | None = option(None, "where the user's own data files are")

    def __post_init__(self) -> None:
        for name in ("engines", "baselines", "seeds", "lrs", "fgsm"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "engines", tuple(Choice(*entry) for entry in self.engines))
        Budget.parse(self.budget)
        Schedule(self.schedule, self.warmup)
        require(
            REFERENCE in self.baselines and set(self.baselines) <= {c.label for c in ALL},
            "baselines",
            self.baselines,
            f"{REFERENCE!r} and some of {[c.label for c in ALL[1:]]}",
        )
        require(len(self.seeds) > 0 and len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "one or more different numbers")
        require(self.lr is None or not self.lrs, "lrs", self.lrs, f"absent where lr={self.lr} is given")
        require(all(lr > 0 for lr in self.lrs) and len(set(self.lrs)) == len(self.lrs), "lrs", self.lrs, "different numbers above 0")
        require(0 < self.validation < 1, "validation", self.validation, "in (0, 1)")
        require(self.points >= 1, "points", self.points, "1 or more")
        require(all(0 <= e < math.inf for e in self.fgsm) and len(set(self.fgsm)) == len(self.fgsm), "fgsm", self.fgsm, "different finite numbers, 0 or more")
        labels = [choice.label for choice in self.choices()]
        for label in labels:
            if labels.count(label) > 1:
                raise SettingError(f"two engines are called {label!r}; give each a label of its own.")
        for label in self.rates:
            if label not in labels:
                raise SettingError("rates: " + near_miss("label", label, labels))

    def choices(self) -> list[Choice]:
        """The baselines, then the engines asked for that are not one of them."""
        local = any(choice.build().bias is Bias.LOCAL for choice in self.engines)
        wanted = [choice for choice in (ALL if local else BASELINES) if choice.label in self.baselines]
        known = [choice.build() for choice in wanted]
        return [*wanted, *(choice for choice in self.engines if choice.build() not in known)]

    def made_for(self) -> dict[str, Mapping[str, Any]]:
        """label -> optimizer and learning rate of the engines that are made for their own and not tuned."""
        own = {choice.label: choice.build().defaults for choice in self.choices()}
        return {label: found for label, found in own.items() if found and label not in self.rates}

    def train_settings(self, choice: Choice, *, seed: int, lr: float | None) -> TrainSettings:
        """One run of `choice`, which the budget is to end."""
        sizes = {} if self.batch_size is None else {"batch_size": self.batch_size}
        own = choice.build().defaults
        return TrainSettings(
            problem=self.problem,
            problem_settings={**self.problem_settings, **sizes},
            model=self.model,
            model_settings=self.model_settings,
            quantize=self.quantize,
            engine=choice.engine,
            engine_settings=dict(choice.settings),
            optimizer=own.get("optimizer", self.optimizer),
            optimizer_settings={} if own else self.optimizer_settings,
            lr=own["lr"] if own and choice.label not in self.rates else lr,
            schedule="constant" if own else self.schedule,
            warmup=0.0 if own else self.warmup,
            steps=LIMIT,
            seed=seed,
            clip=self.clip,
            data_dir=self.data_dir,
        )


def choice_of(text: str) -> Choice:
    """ "forward:space=weights:tangents=4" -> Choice: the engine's name, then its settings.

    Raises:
        UsageError: no engine's name.
    """
    parts = [part.strip() for part in text.split(":")]
    pairs = [part for part in parts if "=" in part]
    name = ":".join(part for part in parts if "=" not in part)
    if not name:
        raise UsageError(f"{text!r} names no engine; write it as forward or forward:tangents=4. Engines: {', '.join(registry.names('engine'))}.")
    return Choice(" ".join([name, *pairs]), name, registry.split_pairs(pairs))


__all__ = ["ALL", "BASELINES", "DEEP", "LIMIT", "REFERENCE", "Choice", "CompareSettings", "choice_of"]
