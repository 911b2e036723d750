"""The facade for other people's training loops: `learner.backward(x, y)` in place of `loss.backward()`."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from altgrad import registry
from altgrad.engine import Engine, Tree, data_ranks, fit_check, over_ranks
from altgrad.errors import CheckpointError, NumericsError
from altgrad.problem import Batch, first_tensor, not_finite
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key
from altgrad.world import World


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
        settings: the engine's settings (`altgrad describe ENGINE`).

    Raises:
        UsageError: an unknown engine. SettingError: an unknown setting, or one out of range. CapabilityError: the engine needs more
        than a model and a loss provide.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        *,
        engine: str | Engine = "forward",
        seed: int = 0,
        world: World | None = None,
        **settings: Any,
    ):
        self.engine: Engine = registry.engine(engine, settings) if isinstance(engine, str) else engine
        self.problem = Supervised(model, loss, key=Key(seed))
        fit_check(self.engine, self.problem, alternatives=registry.needs)
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

    def backward(self, x: Any, y: Any) -> Report:
        """Estimate the gradient of the mean loss on (x, y) and add it to `p.grad`.

        Args:
            x: a tensor, a tuple (positional arguments of the model) or a dict (keyword arguments); the first axis counts examples.
            y: the targets, handed to the loss as they are.

        Raises:
            NumericsError: the loss or an estimate is NaN or infinite; `p.grad` is left as it was.
            ShapeError, DataError: outputs that fit no loss, labels out of range.
        """
        if self.aux and not (self.warned or self.asked_for_all):
            self.warned = True
            warnings.warn(f"the optimizer was not built from learner.parameters(), so {', '.join(sorted(self.aux))} will not be trained.", stacklevel=2)
        batch = Batch(x, y)
        examples = self.problem.batch_size_of(batch)
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
        grads = dict(estimate.grads)
        bad = first_not_finite(grads)
        if bad is not None:
            raise NumericsError(f"the gradient of {bad} is not finite in {self.engine.name}, step {self.draws}; lower the learning rate or clip.")
        for name, grad in grads.items():
            leaf = tensors[name]
            grad = grad.to(leaf.dtype)
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad
        self.state = estimate.state
        self.problem.load({}, estimate.buffers)
        if not self.frozen:
            self.draws += 1
        return Report(estimate.loss, estimate.metrics)

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
        self.state = {name: value.to(*args, **kwargs) for name, value in self.state.items()}
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


def first_not_finite(grads: Mapping[str, Tensor]) -> str | None:
    """The name of the first gradient that holds NaN or infinity; one device sync where there is none."""
    if not grads:
        return None
    # ⟨g, g⟩ is one fast pass; it may overflow where g does not, so a suspicion is looked into.
    squares = torch.stack([torch.dot(flat, flat).float() for flat in (grad.flatten() for grad in grads.values())])
    if bool(torch.isfinite(squares).all()):
        return None
    return next((name for name, grad in grads.items() if not bool(torch.isfinite(grad).all())), None)


__all__ = ["Learner", "Report", "first_tensor"]
