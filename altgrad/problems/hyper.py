r"""Bilevel learning: hyper-parameters trained on a validation loss, through the weights that minimise the training loss under them.

    min_θ mean f(w*(θ)),   w*(θ) = argmin_w g(θ, w)        dL/dθ = ∂f/∂θ − (d²g/dθdw)ᵀ (d²g/dw²)⁻¹ ∂f/∂w

The inner weights are the state of a fixed point, w = w − ∇_w g / L with L a bound of g's curvature, so that engine `implicit` has every adjoint for it; other
engines see the validation loss alone, whose `losses` solve the inner problem.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from altgrad import data
from altgrad.engine import Engine, Tree
from altgrad.errors import NotConvergedError, NotConvergedWarning, SettingError, ShapeError, UsageError, near_miss, require
from altgrad.hyper.corruption import corrupted_labels
from altgrad.hyper.gradient import gradient
from altgrad.hyper.inner import Found, Inner, minimise
from altgrad.hyper.logistic import Cleaning, Decay, Logistic
from altgrad.hyper.task import Parts, Task
from altgrad.implicit import fixed_point
from altgrad.implicit.adjoints import parse
from altgrad.problem import Batch, Problem
from altgrad.rng import Key, permutation
from altgrad.world import World

TASKS = ("weight-decay", "cleaning")
BEGINS = ("solved", "warm", "zeros")
INNER = "inner."  # buffers: the weights that the last solve ended at


class HyperProblem(Problem):
    """A task (altgrad.hyper.Task) as a problem: its hyper-parameters are trained, its inner weights are the state.

    Args:
        task: both losses and the data.
        inner: how the inner problem is solved; LBFGS by default.
        adjoint: of the gradient that `losses` carry, for backprop and forward, and for the cosine in `altgrad compare`.
        begin: where engine `implicit` begins: "solved", at the inner optimizer's answer; "warm", at the last solution; "zeros", at the task's first weights.
        strict: raise NotConvergedError, in place of a warning once a problem, where the inner answer is not stationary.
        batch_size: validation examples a step.
        key: the order of the validation examples.
    """

    batch_dims = 0  # the whole batch shares the inner weights

    def __init__(
        self, task: Task, *, inner: Inner | None = None, adjoint: str = "cg", begin: str = "solved", strict: bool = False, batch_size: int = 479,
        key: Key | None = None, name: str = "hyper",
    ):  # fmt: skip
        self.task, self.adjoint, self.begin, self.strict, self.batch_size, self.name = task, adjoint, begin, strict, batch_size, name
        self.theta = {name: value.detach().clone().requires_grad_() for name, value in task.params().items()}
        self.first = {name: value.detach() for name, value in task.weights().items()}
        self.kept = {INNER + name: value.clone() for name, value in self.first.items()}
        self.inner = inner or Inner()
        self.key = key or Key(0)
        self.steps_per_epoch = max(1, len(task.parts.validation_inputs) // batch_size)

    def params(self) -> Tree:
        return self.theta

    def buffers(self) -> Tree:
        return self.kept

    def batch(self, step: int, world: World) -> Batch:
        """Validation examples of a step, in a new order every epoch."""
        epoch, place = divmod(step, self.steps_per_epoch or 1)
        total = len(self.task.parts.validation_inputs)
        count = min(self.batch_size, total)
        require(count >= world.size, "batch_size", count, f"at least the number of processes, {world.size}")
        share = world.share(count)
        order = torch.from_numpy(permutation(self.key.fold("order").at(epoch), "epoch", total).copy())
        index = order[place * count + share.start : place * count + share.stop]
        return Batch(self.task.parts.validation_inputs[index], self.task.parts.validation_targets[index], share.start, index)

    def check_engine(self, engine: Engine) -> None:
        """The adjoints that trace a solve need a solve: from the inner optimizer's answer there is nothing left to trace."""
        given = getattr(engine, "adjoint", None)
        if given is not None and parse(given).name in ("unroll", "checkpoint") and self.begin == "solved":
            raise SettingError(
                f"adjoint={given!r} traces the engine's own solve, but begin='solved' hands it a solution and no step would be traced; set begin=zeros or "
                "begin=warm for the problem, and solver=iteration for the engine."
            )

    # The inner problem

    def training_loss(self, params: Tree, weights: Tree) -> Tensor:
        """g(θ, w).

        Raises:
            ShapeError: the task returned no scalar.
        """
        value = self.task.inner(params, weights)
        if not isinstance(value, Tensor) or value.ndim:
            seen = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"{type(self.task).__name__}.inner returned {seen}; it must return a scalar, the training loss.")
        return value

    def solve(self, params: Tree, start: Tree) -> Found:
        """The inner optimizer's answer from `start`, detached; says where it is not stationary."""
        params = {name: value.detach() for name, value in params.items()}
        found = minimise(lambda weights: self.training_loss(params, weights), start, curvature=self.task.curvature(params), inner=self.inner)
        if not found.converged:
            self.complain(found)
        return found

    def complain(self, found: Found) -> None:
        """Say that an answer is not stationary: raise where strict, else warn once a problem."""
        words = (
            f"the inner problem is not solved: residual {float(found.residual):.1e} after {found.steps} steps of {self.inner.optimizer}, tol "
            f"{self.inner.tol:.1e}. An implicit gradient is off by about the residual times the condition number; raise inner_steps, choose another "
            "inner_optimizer or inner_lr, or an adjoint that traces the steps (unroll, with begin=zeros and solver=iteration)."
        )
        if self.strict:
            raise NotConvergedError(words)
        if "not stationary" not in self.facts:
            self.facts["not stationary"] = True
            warnings.warn(words, NotConvergedWarning, stacklevel=4)

    def step(self, params: Tree, s: Tree, x: Any) -> Tree:
        """w − ∇_w g / L: a contraction where g is strongly convex."""
        slopes = gradient(lambda weights: self.training_loss(params, weights), s)
        rate = 1 / self.task.curvature({name: value.detach() for name, value in params.items()})  # its derivative is multiplied by ∇g = 0
        return {name: value - rate * slopes[name] for name, value in s.items()}

    def rest(self, params: Tree, x: Any) -> Tree:
        """Where engine `implicit` begins."""
        if self.begin == "zeros":
            return dict(self.first)
        warm = self.warm(self.kept)
        return self.solve(params, warm).weights if self.begin == "solved" else warm

    def warm(self, buffers: Tree) -> Tree:
        """The weights that the last solve ended at."""
        return {name: buffers[INNER + name].detach().clone() for name in self.first}

    def remember(self, s: Tree) -> Tree:
        """The buffers that a solution leaves behind: the next solve begins there."""
        return {INNER + name: value.detach() for name, value in s.items()}

    def solution(self, params: Tree, buffers: Tree) -> Tree:
        """w*(θ) with its implicit derivative; the buffers are written where the solution is a plain tensor (under vmap each member begins at the same)."""

        def solver(_: Any, start: Tree, theta: Tree) -> Tree:
            return self.solve(theta, start).weights

        own = {name: torch.add(params[name], 0) for name in self.theta}  # a perturbed parameter becomes a plain tensor
        if not torch.is_grad_enabled() and forward_ad._current_level < 0 and torch._C._functorch.maybe_current_level() is None:
            return self.left(self.solve(own, self.warm(buffers)).weights, buffers)
        found = fixed_point(
            lambda w, theta: self.step(theta, w, None), self.warm(buffers), own, solver=solver, adjoint=self.adjoint, tol=math.inf, adjoint_tol=self.inner.tol,
            strict=self.strict,
        )  # fmt: skip
        return self.left(found, buffers)

    def left(self, found: Tree, buffers: Tree) -> Tree:
        """`found`, which the buffers keep where it is a plain tensor."""
        if not any(torch._C._functorch.is_functorch_wrapped_tensor(value) for value in found.values()):
            with torch.no_grad():
                for name, value in self.remember(found).items():
                    buffers[name].copy_(value)
        return found

    # The outer problem

    def forward(self, params: Tree, inputs: Any, buffers: Tree) -> Any:
        """The outputs of w*(θ) on inputs."""
        return self.task.predict(self.solution(params, buffers), inputs)

    def readout(self, params: Tree, s: Tree, x: Any) -> Any:
        """The outputs of the inner weights on validation inputs."""
        return self.task.predict(s, x)

    def score(self, outputs: Any, targets: Any) -> Tensor:
        return self.task.losses(outputs, targets)

    def losses(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        return self.score(self.forward(params, batch.inputs, buffers), batch.targets)

    def evaluate(self, predict: Any, *, split: str = "test") -> dict[str, float]:
        """The loss on a split, the task's own figures, and the residual of the inner solution under the present hyper-parameters."""
        parts = self.task.parts
        inputs, targets = (parts.test_inputs, parts.test_targets) if split == "test" else (parts.validation_inputs, parts.validation_targets)
        params = {name: value.detach() for name, value in self.theta.items()}
        with torch.no_grad():
            outputs = predict(inputs)
            loss = float(self.score(outputs, targets).mean())
        found = self.solve(params, self.warm(self.kept))
        return {"loss": loss, **self.task.figures(params, outputs, targets), "inner_residual": float(found.residual)}


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters by their gradient: weight decay of every feature, or the weight of every training example whose label may be wrong.

    Two thirds of the training set are for the inner problem (logistic regression), one third is for validation; the test set is the data set's own.
    Defaults of the command line: engine implicit (solver rest, adjoint cg, tol 1e-6), Adam, lr 0.1, batch 479 (digits' whole validation set), 100 epochs.
    """

    task: str = field(
        default="weight-decay", metadata={"help": "weight-decay (what to learn: its logarithm), or cleaning (the logit of every example's weight)"}
    )
    data: str = field(default="digits", metadata={"help": "digits, mnist, fashion-mnist or cifar10"})
    examples: int | None = field(default=None, metadata={"help": "how many of the training set are used, validation among them; none for all"})
    validation: float = field(default=1 / 3, metadata={"help": "share of these held out for the outer loss, in (0, 1)"})
    corruption: float = field(default=0.5, metadata={"help": "cleaning: share of the inner examples whose label is replaced by a wrong one, in [0, 1)"})
    share: str = field(default="feature", metadata={"help": "weight-decay: one for each feature, or each weight"})
    first: float | None = field(default=None, metadata={"help": "where it begins: the weight decay (1e-2), or the logit of the examples' weights (0)"})
    ridge: float = field(default=1e-2, metadata={"help": "weight decay that is not learnt, above 0: of the bias, and in cleaning of all inner weights"})
    inner_optimizer: str = field(default="LBFGS", metadata={"help": "of the inner problem, by name: torch.optim or pytorch_optimizer"})
    inner_lr: float | None = field(default=None, metadata={"help": "its learning rate; none for its own default"})
    inner_steps: int = field(default=50, metadata={"help": "its updates at most; one of LBFGS is up to 20 iterations"})
    inner_settings: str = field(default="", metadata={"help": "its other settings, as momentum=0.9,nesterov=true"})
    inner_tol: float = field(default=5e-7, metadata={"help": "residual at which it stops, above 0"})
    begin: str = field(
        default="solved", metadata={"help": "engine implicit begins at the inner optimizer's answer (solved), the last solution (warm) or zeros"}
    )
    adjoint: str = field(default="cg", metadata={"help": "of backprop's and forward's gradient, and of the exact one in comparisons"})
    strict: bool = field(default=False, metadata={"help": "an error, not a warning, where the inner answer is not stationary"})
    precision: str = field(default="float64", metadata={"help": "float64, or float32, in which residuals below 1e-5 may be out of reach"})
    batch_size: int = field(default=479, metadata={"help": "validation examples a step"})

    name: ClassVar[str] = "hyper"
    defaults: ClassVar[Mapping[str, Any]] = {
        "optimizer": "Adam", "lr": 0.1, "epochs": 100, "engine": "implicit", "engine_settings": {"solver": "rest", "adjoint": "cg", "tol": 1e-6},
    }  # fmt: skip

    def __post_init__(self) -> None:
        for label, allowed in {"task": TASKS, "begin": BEGINS, "share": ("feature", "weight"), "precision": ("float32", "float64")}.items():
            value = getattr(self, label)
            if value not in allowed:
                raise SettingError(near_miss(label, str(value), allowed))
        require(0 < self.validation < 1, "validation", self.validation, "in (0, 1)")
        require(0 < self.ridge < math.inf, "ridge", self.ridge, "above 0 and finite")
        require(0 <= self.corruption < 1, "corruption", self.corruption, "in [0, 1)")
        require(self.examples is None or (isinstance(self.examples, int) and self.examples >= 2), "examples", self.examples, "none, or 2 or more")
        require(isinstance(self.batch_size, int) and self.batch_size >= 1, "batch_size", self.batch_size, "an integer of at least 1")
        require(self.first is None or self.task == "cleaning" or 0 < self.first < math.inf, "first", self.first, "above 0: a weight decay")
        if parse(self.adjoint).name in ("unroll", "checkpoint", "truncated"):
            raise SettingError(
                f"adjoint={self.adjoint!r} is not allowed here: it traces a solver's steps. Use engine implicit with it, or cg, gmres, neumann(k)."
            )

    @property
    def inner(self) -> Inner:
        return Inner(self.inner_optimizer, self.inner_lr, self.inner_settings, self.inner_steps, self.inner_tol)

    def build(self, key: Key, *, model: str | None = None, model_settings: Mapping[str, Any] | None = None, data_dir: str | Path | None = None) -> HyperProblem:
        """The problem; `key` addresses the split, the corruption and the order. There is no model to choose (UsageError)."""
        if model or model_settings:
            raise UsageError(f"hyper trains what it is about; model={model or dict(model_settings or {})!r} was given, leave it out.")
        return HyperProblem(
            self.build_task(key, data_dir), inner=self.inner, adjoint=self.adjoint, begin=self.begin, strict=self.strict, batch_size=self.batch_size, key=key
        )

    def build_task(self, key: Key, data_dir: str | Path | None) -> Logistic:
        """The task: the training set split into inner and validation examples by `key`, labels corrupted by it."""
        found = data.load(self.data, data_dir=data_dir)
        count = len(found.train_inputs) if self.examples is None else self.examples
        require(count <= len(found.train_inputs), "examples", count, f"at most the training set's {len(found.train_inputs)}")
        order = torch.from_numpy(permutation(key.fold("split"), "examples", len(found.train_inputs)).copy())[:count]
        held = round(count * self.validation)
        require(0 < held < count, "validation", self.validation, f"a share that leaves examples on both sides of {count}")
        flat = [part.flatten(1).to(getattr(torch, self.precision)) for part in (found.train_inputs[order], found.test_inputs)]
        labels = found.train_targets[order]
        parts = Parts(flat[0][:held], labels[:held], flat[1], found.test_targets)
        if self.task == "weight-decay":
            first = 1e-2 if self.first is None else self.first
            return Decay(flat[0][held:], labels[held:], parts, classes=found.classes, ridge=self.ridge, share=self.share, first=first)
        given, corrupted = corrupted_labels(labels[held:], self.corruption, found.classes, key.fold("corruption"))
        return Cleaning(flat[0][held:], given, parts, classes=found.classes, ridge=self.ridge, corrupted=corrupted, first=self.first or 0.0)


__all__ = ["Hyper", "HyperProblem"]
