"""The one interface: what an engine needs, how its estimate may differ from backprop, and what an estimate is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum, Flag, auto
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from altgrad.errors import CapabilityError
from altgrad.rng import Key, tensor_id
from altgrad.world import World

if TYPE_CHECKING:
    from altgrad.problem import Batch, Problem

Tree = dict[str, Tensor]  # flat, keyed by dotted parameter name


class Needs(Flag):
    """What an engine asks of a problem; a problem provides a need by implementing its view."""

    VALUE = auto()
    TANGENT = auto()
    REVERSE = auto()
    BLOCKS = auto()
    LABELS = auto()
    ENERGY = auto()
    FIXED_POINT = auto()
    DISCRETE = auto()
    UNROLL = auto()


class Bias(Enum):
    """How an estimate may differ from backprop's gradient; decides which conformance checks apply."""

    EXACT = "equal up to rounding"
    UNBIASED = "its mean equals it"
    SMOOTHED = "unbiased for the smoothed loss"
    LIMIT = "its error vanishes at a declared order"
    LOCAL = "exact for each block's own loss"
    ALIGNED = "errors take other matrices than the transposed weights; learning aligns the two"
    SURROGATE = "exact for a declared stand-in derivative"
    DISPLACEMENT = "a move, not a derivative"
    GUIDED = "a projection on guessed directions: shrunk, never reversed"


class Split(Enum):
    """What ranks divide among themselves."""

    DATA = "data"
    POPULATION = "population"


class Estimate(NamedTuple):
    """What one look at a problem gives."""

    loss: Tensor  # scalar, detached
    grads: Mapping[str, Tensor]  # may be lazy, tensor by tensor; a name left out = "do not touch", never zeros
    state: Tree  # the next engine state; tensors only
    metrics: Mapping[str, Tensor]  # 0-d, on device; always has "forwards"
    buffers: Tree  # batch-norm statistics and the like: updated once, from the unperturbed pass


@dataclass(frozen=True)
class Engine:
    """A learning rule: settings (the fields of a frozen dataclass) plus pure methods.

    Subclasses set `name`, `needs`, `bias`, `split`, `source` as class attributes, or as properties where settings decide.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}  # "optimizer" and "lr" that the rule is made for, where the user names none

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def needs(self) -> Needs:
        raise NotImplementedError

    @property
    def bias(self) -> Bias:
        raise NotImplementedError

    @property
    def split(self) -> Split:
        return Split.DATA

    @property
    def source(self) -> str:
        """Paper, arXiv id, equation."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The settings as plain values, for logs and checkpoints."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def check(self, problem: "Problem") -> None:
        """Refuse a problem that provides the needs and still does not fit, before step 0.

        Raises:
            CapabilityError: says what is in the way and what to do.
        """

    def aux(self, problem: "Problem", key: Key) -> Tree:
        """Extra trainables the rule brings along (a local head, say); they join the parameters under these names."""
        return {}

    def init(self, problem: "Problem", params: Tree, key: Key) -> Tree:
        """The engine's first state."""
        return {}

    def estimate(self, problem: "Problem", params: Tree, state: Tree, batch: "Batch", key: Key, world: World) -> Estimate:
        """The loss on `batch` and an estimate of its gradient with respect to `params`; pure."""
        raise NotImplementedError

    def exact(self, problem: "Problem", params: Tree, batch: "Batch", key: Key) -> Tree | None:
        """The gradient that estimates are held to where autograd's of the problem's losses is not it (a state that has come to rest, not so many sweeps)."""
        return None

    def predict(self, problem: "Problem", params: Tree, state: Tree, inputs: Any) -> Any:
        """The engine's own read-out; most engines read the model's outputs."""
        return problem.forward(params, inputs, problem.buffers())

    def bake(self, problem: "Problem", params: Tree, state: Tree) -> Tree:
        """`params` such that the model alone computes what `predict` reads out, where that can be had: most engines train the model itself."""
        return params

    def export(self, problem: "Problem", params: Tree, state: Tree) -> Any:
        """A plain nn.Module, in evaluation mode, that gives what `predict` reads out: copies, which training does not move.

        Raises:
            CapabilityError: there is no model, or the read-out cannot be written without the rule.
        """
        from altgrad.export import whole

        return whole(problem, self.bake(problem, params, state))

    def reads(self, problem: "Problem", params: Tree, state: Tree, inputs: Any) -> Mapping[str, Any]:
        """What every read-out gives, by name, from one pass; nothing where there is `predict` alone."""
        return {}

    def activities(self, problem: "Problem", params: Tree, state: Tree, inputs: Any) -> dict[str, Tensor]:
        """The blocks' activities [N, n] by name, for linear probes; nothing where the rule has no blocks."""
        return {}

    @property
    def readouts(self) -> tuple[str, ...]:
        """Other values of the setting `readout`, each of whose held-out figures is reported beside those of `predict`.

        `reads` gives all of them by name, and "own", which stands in for those that nothing has been trained for.
        """
        return ()

    def at(self, pattern: str, other: Any) -> "Engine":
        """This engine for all parameters but those that `pattern` matches, which go to `other` (see engines/mixed.py).

        Args:
            pattern: of a parameter's name, or of a module's, which takes all below it: "head", "body.*.weight".
            other: an engine, its name, its name with settings as in "forward,tangents=8", or (name, {setting: value}).

        Raises:
            UsageError: no such engine. SettingError: a wrong setting, or a rule that cannot be mixed.
        """
        from altgrad.engines.mixed import Mixed

        return Mixed(self).at(pattern, other)

    def members(self, problem: "Problem") -> "list[tuple[str, Engine, Problem]]":
        """(how an error is to begin, rule, what it sees) of every rule that this one is made of; most are one."""
        return [("", self, problem)]


def flag_names(needs: Needs) -> str:
    """The flags of `needs`, comma separated."""
    return ", ".join(flag.name or "" for flag in Needs if flag in needs) or "nothing"


def dense(grad: Tensor) -> Tensor:
    """A gradient in the layout of its parameter; that of an embedding with sparse=True comes as a list of rows, which few optimizers take."""
    return grad if grad.layout is torch.strided else grad.to_dense()


def over_ranks(engine: Engine, estimate: Estimate, world: World, examples: int) -> Estimate:
    """The estimate of all ranks together, the same bits on each: Σ_r (n_r / Σ n) · what rank r found on its n_r `examples`.

    Where ranks divide the data this holds for loss, gradients, buffers and state (which an engine makes from its own gradients, and which
    would part otherwise); where they divide a population the engine has seen to it.
    """
    if world.size == 1 or engine.split is not Split.DATA:
        return estimate
    shares = world.shares(examples, device=estimate.loss.device)
    grads, state, buffers = (world.mean_tree(tree, shares=shares) for tree in (estimate.grads, estimate.state, estimate.buffers))
    return estimate._replace(loss=world.mean(estimate.loss, shares=shares), grads=grads, state=dict(state), buffers=dict(buffers))


def data_ranks(engine: Engine, world: World) -> World:
    """The ranks among whom a step's examples are divided: all of them, or this one alone where a population is divided instead."""
    return world if engine.split is Split.DATA else World()


def fit_check(engine: Engine, problem: "Problem", *, alternatives: Callable[[], Mapping[str, Needs]] | None = None) -> None:
    """Refuse, before step 0, an engine that `problem` cannot feed.

    Args:
        engine: the learning rule, with its settings.
        problem: what it is to train.
        alternatives: gives the needs of every other engine by name, to offer those that do fit; called only where this one does not.

    Raises:
        CapabilityError: a need is not provided, or two parameter names share one 32-bit noise address, or the engine's own `check` says no.
        SettingError: a mix whose patterns do not fit.
    """
    for where, rule, view in engine.members(problem):
        missing = rule.needs & ~view.provides
        if missing:
            others = alternatives() if alternatives is not None else {}
            fitting = sorted(name for name, needs in others.items() if not needs & ~view.provides)
            views = "; ".join(VIEWS[flag] for flag in Needs if flag in missing)
            offer = f", or use one of: {', '.join(fitting)}." if fitting else "."
            raise CapabilityError(
                f"{where}{describe(rule)} needs {flag_names(missing)}, which {type(problem).__name__}{' with parameters held' * bool(where)} does not provide "
                f"(it provides {flag_names(view.provides)}). {views}{offer}"
            )
    seen: dict[int, str] = {}
    for name in problem.params():
        other = seen.setdefault(tensor_id(name), name)
        if other != name:
            raise CapabilityError(f"parameters {other!r} and {name!r} have the same 32-bit noise address; rename one of them.")
    for where, rule, view in engine.members(problem):
        try:
            rule.check(view)
        except CapabilityError as error:
            if not where:
                raise
            raise type(error)(f"{where}{error}") from error


def describe(engine: Engine) -> str:
    """`Forward(space='weights')`: the engine with the settings that differ from their defaults."""
    changed = [f"{f.name}={getattr(engine, f.name)!r}" for f in fields(engine) if getattr(engine, f.name) != f.default]
    return f"{type(engine).__name__}({', '.join(changed)})"


VIEWS = {
    Needs.VALUE: "Implement losses(params, batch)",
    Needs.TANGENT: "Implement losses(params, batch) with differentiable tensor operations and leave `differentiable` true",
    Needs.REVERSE: "Implement losses(params, batch) with differentiable tensor operations and leave `differentiable` true",
    Needs.BLOCKS: "Implement blocks()",
    Needs.LABELS: "Implement classes and with_label(x, y)",
    Needs.ENERGY: "Implement energy(params, s, x)",
    Needs.FIXED_POINT: "Implement step(params, s, x)",
    Needs.DISCRETE: "Set discrete = True and say which parameters take which values",
    Needs.UNROLL: "Implement start(batch) and unroll(params, carry, batch, buffers), and set `horizon`, or leave truncation='none'",
}
