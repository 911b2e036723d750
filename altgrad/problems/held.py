"""A problem of which some parameters are trained and all the others held where they are."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from altgrad.credit import Influence
from altgrad.engine import Engine, Needs, Tree
from altgrad.equilibrium.relaxation import as_complex
from altgrad.problem import Batch, Problem
from altgrad.world import World

SETTLING = ("rest", "sweep", "together", "readout", "prepared", "coupling")  # what a net that settles says of its parameters (equilibrium/settling.py)
WHOLE = Needs.BLOCKS | Needs.DISCRETE  # views that speak of all parameters, and have no form for some of them


class Held(Problem):
    """`base` as a function of the parameters in `names`; the others are constants.

    What is found out about it (`facts`) is kept apart from what is found out about `base` and about other shares of it. Attributes that are no
    view of a problem (`model`, `dataset`, …) are those of `base`, and isinstance asks about `base`.

    Args:
        names: of the share; the order is that of `base`.
        values: every parameter of `base` by name; those outside `names` stay at these values and get no graph.
    """

    def __init__(self, base: Problem, names: Iterable[str], values: Tree):
        own = set(names)
        self.base = base
        self.names = tuple(name for name in values if name in own)
        self.constants = {name: value.detach() for name, value in values.items()}  # those of the share too: they keep the order of the whole
        self.own = {name: values[name] for name in self.names}
        self.name, self.differentiable, self.horizon, self.steps_per_epoch = base.name, base.differentiable, base.horizon, base.steps_per_epoch

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self.base.__class__

    def __getattr__(self, name: str) -> Any:
        if name == "base" or name.startswith("__"):  # not set yet (a copy in the making), or Python's own question
            raise AttributeError(name)
        found = getattr(self.base, name)
        if name in SETTLING and found is not None:
            return lambda params, *rest, **named: found(self.all(params), *rest, **named)
        return found

    def all(self, params: Tree) -> Tree:
        """The parameters of `base`, with those of an engine's own behind them; all complex where the share is."""
        wide = any(value.is_complex() for value in params.values())
        return {**({name: as_complex(value) for name, value in self.constants.items()} if wide else self.constants), **params}

    @property
    def facts(self) -> dict[Any, Any]:
        found: dict[Any, Any] = self.base.recall(("facts of a share", self.names), dict)
        return found

    @property
    def provides(self) -> Needs:
        return self.base.provides & ~WHOLE

    @property
    def classes(self) -> int | None:
        return self.base.classes

    def params(self) -> Tree:
        return self.own

    def buffers(self) -> Tree:
        return self.base.buffers()

    def load(self, params: Tree, buffers: Tree) -> None:
        self.base.load(params, buffers)

    @property
    def progress(self) -> float | None:  # type: ignore[override]
        return self.base.progress

    def check_engine(self, engine: Engine) -> None:
        self.base.check_engine(engine)

    def example(self) -> Any:
        return self.base.example()

    def pictures(self, params: Tree) -> Mapping[str, Tensor]:
        return self.base.pictures(self.all(params))

    def batch(self, step: int, world: World) -> Batch:
        return self.base.batch(step, world)

    def check_batch(self, batch: Batch) -> None:
        self.base.check_batch(batch)

    def batch_size_of(self, batch: Batch) -> int:
        return self.base.batch_size_of(batch)

    def forward(self, params: Tree, inputs: Any, buffers: Tree) -> Any:
        return self.base.forward(self.all(params), inputs, buffers)

    def losses(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        return self.base.losses(self.all(params), batch, buffers)

    def loss(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        return self.base.loss(self.all(params), batch, buffers)

    def objective(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        return self.base.objective(self.all(params), batch, buffers)

    def influence(self, params: Tree, batch: Batch) -> Mapping[str, Influence]:
        return {name: found for name, found in self.base.influence(self.all(params), batch).items() if name in self.own}

    def judge(self, outputs: Any, batch: Batch) -> Tensor:
        return self.base.judge(outputs, batch)

    def score(self, outputs: Any, targets: Any) -> Tensor:
        return self.base.score(outputs, targets)

    def energy(self, params: Tree, s: Any, x: Any) -> Tensor:
        return self.base.energy(self.all(params), s, x)

    def step(self, params: Tree, s: Any, x: Any) -> Any:
        return self.base.step(self.all(params), s, x)

    def start(self, batch: Batch) -> Tree:
        return self.base.start(batch)

    def unroll(self, params: Tree, carry: Tree, batch: Batch, buffers: Tree) -> tuple[Tensor, Tree]:
        return self.base.unroll(self.all(params), carry, batch, buffers)

    def with_label(self, x: Any, y: Tensor) -> Any:
        return self.base.with_label(x, y)

    def evaluate(self, predict: Any, *, split: str = "test") -> dict[str, float]:
        return self.base.evaluate(predict, split=split)
