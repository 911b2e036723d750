"""The facade for other people's training loops: `learner.backward(x, y)` in place of `loss.backward()`."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from altgrad import export, registry
from altgrad.credit import Influence
from altgrad.engine import Engine, Tree, data_ranks, dense, fit_check, over_ranks
from altgrad.engines.mixed import Mixed
from altgrad.engines.spelling import parts_of
from altgrad.errors import CheckpointError, DataError, NumericsError, UsageError
from altgrad.optimizers import wants_closure
from altgrad.problem import Batch, first_tensor, not_finite
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key
from altgrad.world import World

Apply = Mapping[Tensor, torch.optim.Optimizer] | Callable[[Tensor], Any]
ONE_EACH = "give every parameter its own: {p: torch.optim.SGD([p], lr=0.1) for p in learner.parameters()}"


class Report(NamedTuple):
    """What one backward told: the loss [], and the engine's metrics by name."""

    loss: Tensor
    metrics: Mapping[str, Tensor]


class Learner:
    """A model, a loss and a learning rule; fills `p.grad` so that any torch optimizer can step.

    Args:
        model: any nn.Module, unmodified.
        loss: (outputs, targets) -> a scalar, or losses [N] per example (averaged).
        engine: a name (see `altgrad engines`), or an Engine.
        seed: the address of all noise, 64 bits.
        world: the ranks among whom the data are divided; one process by default.
        example: inputs of a few examples, for rules that bring trainables whose shapes follow from the data (mono-forward); a model that begins with a
            linear layer, or has `example_inputs`, needs none.
        at: other engines for some of the parameters: pattern of parameter or module names -> what Engine.at takes, in this order.
        influence: where `loss` returns [N, P], P local losses an example: which of them each parameter touches, by name, as an altgrad.Influence or a
            bool mask, [P] for the whole tensor or [units, P] for the units of its first axis (es, eggroll, spsa and likelihood-ratio use it).
        settings: the engine's settings (`altgrad describe ENGINE`).

    Raises:
        UsageError: an unknown engine. SettingError: an unknown setting, or one out of range. CapabilityError: the engine needs more
        than a model and a loss provide. ShapeError: an influence map that fits no parameter (one that does not fit the losses: at the first batch).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        *,
        engine: str | Engine = "forward",
        seed: int = 0,
        world: World | None = None,
        example: Any = None,
        at: Mapping[str, Any] | None = None,
        influence: Mapping[str, Influence | Tensor] | None = None,
        **settings: Any,
    ):
        self.engine: Engine = registry.engine(engine, settings) if isinstance(engine, str) else engine
        if at:
            self.engine = Mixed(self.engine, parts_of(at))
        self.problem = Supervised(model, loss, key=Key(seed), influence=influence)
        self.problem.example_inputs = example
        fit_check(self.engine, self.problem, alternatives=registry.needs)
        if not self.problem.params():
            raise UsageError(f"{type(model).__name__} has no parameter with requires_grad=True, so there is nothing to train; unfreeze one.")
        self.key, self.world, self.draws, self.frozen = Key(seed), world or World(), 0, False
        self.aux: Tree = {name: value.requires_grad_() for name, value in self.engine.aux(self.problem, self.key).items()}
        self.state: Tree = self.engine.init(self.problem, self.tensors(), self.key)
        self.checked = self.warned = self.asked_for_all = False

    @property
    def model(self) -> nn.Module:
        """The model, as it was given."""
        return self.problem.model

    def tensors(self) -> Tree:
        """Every trainable by name: the model's parameters and the engine's own."""
        return {**self.problem.params(), **self.aux}

    def parameters(self) -> Iterator[Tensor]:
        """What the optimizer is to step: the model's parameters, then the engine's own (a local head, say)."""
        self.asked_for_all = True
        yield from self.tensors().values()

    def backward(self, x: Any, y: Any, *, apply: Apply | None = None) -> Report:
        """Estimate the gradient of the mean loss on (x, y) and add it to `p.grad`.

        Args:
            x: a tensor, a tuple (positional arguments of the model) or a dict (keyword arguments); the first axis counts examples.
            y: the targets, handed to the loss as they are.
            apply: steps each parameter as soon as its gradient is there, and drops the gradient before the next one is made: the optimizer of
                every parameter, or a function of a parameter whose `grad` is set (what register_post_accumulate_grad_hook takes).

        With `apply` a rule that makes its gradients one by one (es, eggroll, spsa, forward) takes a step in the memory of one tensor's gradient:

            optimizers = {p: torch.optim.Adam([p], lr=1e-3, foreach=False) for p in learner.parameters()}
            learner.backward(x, y, apply=optimizers)        # in place of zero_grad, backward and step

        Raises:
            NumericsError: the loss or an estimate is NaN or infinite; `p.grad` is left as it was. With `apply` and gradients made one by one, the
                parameters before the one that is named have made their step; it and those after it have not.
            ShapeError, DataError: outputs that fit no loss, labels out of range. UsageError: `apply` lacks a parameter's optimizer.
        """
        if isinstance(apply, Mapping):
            check_optimizers(apply)
        if self.aux and not (self.warned or self.asked_for_all):
            self.warned = True
            warnings.warn(f"the optimizer was not built from learner.parameters(), so {', '.join(sorted(self.aux))} will not be trained.", stacklevel=2)
        batch = Batch(x, y)
        examples = self.problem.batch_size_of(batch)
        if not examples:
            raise DataError("the batch has no examples; leave empty batches out (DataLoader's drop_last, a filter before it).")
        if not self.checked:
            self.problem.check_batch(batch)
            self.checked = True
        tensors = self.tensors()
        batch = batch._replace(first=data_ranks(self.engine, self.world).place(examples, device=next(iter(tensors.values())).device))
        estimate = self.engine.estimate(self.problem, tensors, self.state, batch, self.key.at(self.draws), self.world)
        estimate = over_ranks(self.engine, estimate, self.world, examples)
        if not bool(torch.isfinite(estimate.loss)):
            advice = not_finite(x) or "lower the learning rate or look at the batch."
            raise NumericsError(f"the loss is {float(estimate.loss)} in {self.engine.name}, step {self.draws}; {advice}")
        if apply is None:
            self.fill(estimate.grads)
        else:
            self.hand_over(estimate.grads, apply)
        self.state = estimate.state
        self.problem.load({}, estimate.buffers)
        if not self.frozen:
            self.draws += 1
        return Report(estimate.loss, estimate.metrics)

    def fill(self, made: Mapping[str, Tensor]) -> None:
        """Add every gradient to its parameter's, or none of them."""
        tensors, grads = self.tensors(), {name: dense(grad) for name, grad in made.items()}
        bad = first_not_finite(grads)
        if bad is not None:
            raise self.refusal(bad)
        for name, grad in grads.items():
            added(tensors[name], grad)

    def hand_over(self, made: Mapping[str, Tensor], apply: Apply) -> None:
        """Have parameters stepped one by one; what can be known to be wrong is refused before the first."""
        tensors = self.tensors()
        absent = [] if callable(apply) else [name for name in made if tensors[name] not in apply]
        if absent:
            raise UsageError(f"apply has no optimizer for {absent[0]!r}; {ONE_EACH}.")
        weights = getattr(made, "weights", None)  # of a sum of finite directions: where they are finite, so is every gradient, short floats apart
        known: Mapping[str, Tensor] = {"every parameter": weights} if isinstance(weights, Tensor) else {}
        if isinstance(made, dict):
            known = {name: dense(grad) for name, grad in made.items()}
        bad = first_not_finite(known)
        if bad is not None:
            raise self.refusal(bad)
        stepped: list[str] = []
        for name in list(made):
            grad = dense(made.pop(name) if isinstance(made, dict) else made[name])
            if first_not_finite({name: grad}) is not None:
                raise self.refusal(name, stepped)
            parameter = tensors[name]
            added(parameter, grad)
            del grad
            if callable(apply):
                apply(parameter)
            else:
                apply[parameter].step()
            parameter.grad = None
            stepped.append(name)

    def refusal(self, name: str, stepped: Sequence[str] = ()) -> NumericsError:
        """The error for a gradient that is not finite; `stepped` are the parameters that have been moved already."""
        done = f" {', '.join(stepped)} made this step already, {name} and the rest did not." if stepped else ""
        return NumericsError(f"the gradient of {name} is not finite in {self.engine.name}, step {self.draws};{done} lower the learning rate or clip.")

    def bake(self) -> None:
        """Make the model alone compute what `predict` reads out, for rules that train something beside it (random-subspace); training can go on."""
        baked = self.engine.bake(self.problem, self.tensors(), self.state)
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                if baked[name] is not tensor:
                    tensor.copy_(baked[name])

    def export(self, *, readout: str | None = None) -> nn.Module:
        """A plain nn.Module, in evaluation mode, that gives what `predict` reads out: copies, which training does not move.

        It needs nothing of altgrad to run, but for read-outs that take several passes (forward-forward), which need it until torch.export captures them.

        Args:
            readout: another read-out than the engine's own, for rules that have several.

        Raises:
            SettingError: no such read-out. CapabilityError: the read-out cannot be written without the rule.
        """
        found: nn.Module = export.reading(self.engine, readout).export(self.problem, self.tensors(), self.state)
        return found

    @contextmanager
    def frozen_noise(self) -> Iterator[None]:
        """Within it every backward repeats the same noise (for closures that are called several times a step, as LBFGS does)."""
        before, self.frozen = self.frozen, True
        try:
            yield
        finally:
            self.frozen = before
            if not before:
                self.draws += 1

    def predict(self, x: Any) -> Any:
        """The engine's own read-out."""
        with torch.no_grad():
            return self.engine.predict(self.problem, self.tensors(), self.state, x)

    def to(self, *args: Any, **kwargs: Any) -> "Learner":
        """Move the model, the engine's own trainables (in place, so that optimizers keep them) and its state."""
        self.model.to(*args, **kwargs)
        for value in self.aux.values():
            value.data = value.data.to(*args, **kwargs)
        self.state = {name: moved(value, *args, **kwargs) for name, value in self.state.items()}
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's and optimizer's own state: aux trainables, engine state, draw counter, seed."""
        return {
            "engine": self.engine.name,
            "seed": self.key.seed,
            "draws": self.draws,
            "split_loss": self.problem.split_loss,
            "aux": {name: value.detach().clone() for name, value in self.aux.items()},
            "state": {name: value.clone() for name, value in self.state.items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take up where `state_dict` left off.

        Raises:
            CheckpointError: it belongs to another engine or other settings.
        """
        if saved.get("engine") != self.engine.name or set(saved["aux"]) != set(self.aux) or set(saved["state"]) != set(self.state):
            raise CheckpointError(f"this state belongs to engine {saved.get('engine')!r} or other settings; the learner runs {self.engine.name!r}.")
        self.key, self.draws = Key(saved["seed"]), saved["draws"]
        self.problem.split_loss = saved.get("split_loss")
        with torch.no_grad():
            for name, value in saved["aux"].items():
                self.aux[name].copy_(value)
        self.state = {name: value.clone() for name, value in saved["state"].items()}


def moved(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """value.to(...), whole numbers keeping their dtype as in nn.Module.to."""
    there = value.to(*args, **kwargs)
    return there if value.is_floating_point() else value.to(there.device)


def added(parameter: Tensor, grad: Tensor) -> None:
    """Add a gradient to what is in `parameter.grad`."""
    grad = grad.to(parameter.dtype)
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad


def check_optimizers(optimizers: Mapping[Any, torch.optim.Optimizer]) -> None:
    """Raise UsageError unless every optimizer holds the parameter that it stands for and steps by itself."""
    for parameter, optimizer in optimizers.items():
        if not isinstance(parameter, Tensor) or not isinstance(optimizer, torch.optim.Optimizer):
            raise UsageError(f"apply maps a {type(parameter).__name__} to a {type(optimizer).__name__}; {ONE_EACH}.")
        if not any(parameter is held for group in optimizer.param_groups for held in group["params"]):
            raise UsageError(f"apply gives a parameter of shape {tuple(parameter.shape)} to a {type(optimizer).__name__} that does not hold it.")
        if wants_closure(optimizer):
            raise UsageError(f"{type(optimizer).__name__} evaluates the loss itself, so it cannot step tensor by tensor; use backward without apply.")


def first_not_finite(grads: Mapping[str, Tensor]) -> str | None:
    """The name of the first gradient that holds NaN or infinity; one device sync where there is none."""
    if not grads:
        return None
    # ⟨g, g⟩ is one fast pass; it may overflow where g does not, so a suspicion is looked into.
    flat = [(torch.view_as_real(grad) if grad.is_complex() else grad).flatten() for grad in grads.values()]
    squares = torch.stack([torch.dot(one, one).float() for one in flat])
    if bool(torch.isfinite(squares).all()):
        return None
    return next((name for name, grad in grads.items() if not bool(torch.isfinite(grad).all())), None)


__all__ = ["Learner", "Report", "first_tensor"]
