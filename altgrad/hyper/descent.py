r"""One update of a training run as a pure, differentiable function of its state and of what the run was given.

    (w, s) ← update(w, s, ∇_w ℓ(w, t, φ))        s: the optimizer's own state

The update is that of a torch.optim class with `differentiable`, so no rule is written here. SGD takes its first momentum buffer out of the graph even so
(torch.clone(grad).detach()), which would lose a part of the derivative in silence; it is given one of zeros, which comes to the same buffer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from altgrad import optimizers
from altgrad.attention import unfused
from altgrad.engine import Tree
from altgrad.errors import CapabilityError, ShapeError, require

WEIGHTS, STATE = "weights", "state"
COUNTERS = ("step", "mu_product")  # functions of the update's number alone
FIRST = {"SGD": "momentum_buffer"}  # what a class would take out of the graph at its first step
TESTED = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam")


@dataclass(frozen=True)
class Descent:
    """step(state, t, meta) -> state: one update of weights on loss(weights, t, meta).

    Args:
        loss: (weights by name, update number t, meta) -> a scalar; meta is any pytree of tensors, what is not drawn from t must come from it.
        optimizer: SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax, NAdam or RAdam.
        lr: learning rate, above 0.
        settings: others of its constructor (momentum, betas, weight_decay, …).

    Raises:
        UsageError, SettingError: another optimizer, or settings it does not have.
    """

    loss: Callable[[Tree, int, Any], Tensor]
    optimizer: str = "SGD"
    lr: float = 0.1
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cls = optimizers.find(self.optimizer)
        if cls.__name__ not in TESTED:
            raise CapabilityError(f"optimizer {cls.__name__} has no differentiable form that is known to be right; use one of: {', '.join(TESTED)}.")
        require(self.lr > 0, "lr", self.lr, "above 0")
        require(not self.settings.get("dampening"), "dampening", self.settings.get("dampening"), "0: SGD's first step has another form otherwise")

    def start(self, weights: Tree) -> Tree:
        """The state before the first update."""
        return {f"{WEIGHTS}/{name}": value for name, value in weights.items()}

    def weights(self, state: Tree) -> Tree:
        """The weights in a state."""
        return {name.removeprefix(f"{WEIGHTS}/"): value for name, value in state.items() if name.startswith(f"{WEIGHTS}/")}

    def __call__(self, state: Tree, t: int, meta: Any) -> Tree:
        with torch.enable_grad(), unfused():
            weights = {name: value if value.requires_grad else value.detach().requires_grad_() for name, value in self.weights(state).items()}
            value = self.loss(weights, t, meta)
            if not isinstance(value, Tensor) or value.ndim:
                seen = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ShapeError(f"loss(weights, t, meta) returned {seen}; it must return a scalar.")
            slopes = torch.autograd.grad(value, list(weights.values()), create_graph=True, allow_unused=True)
            return self.updated(weights, dict(zip(weights, slopes, strict=True)), state)

    def updated(self, weights: Tree, slopes: Mapping[str, Tensor | None], state: Tree) -> Tree:
        """The state after an update with these gradients."""
        own = {name: value.clone() for name, value in weights.items()}  # written in place, in the graph
        settings = {**self.settings, "differentiable": True, "foreach": False}
        optimizer = optimizers.build(self.optimizer, own, lr=self.lr, settings=settings)
        for name, value in own.items():
            value.retain_grad()
            value.grad = slopes[name]
            held = {key: kept.detach().clone() if key in COUNTERS else kept.clone() for key, kept in of_parameter(state, name).items()}
            if not held and optimizer.defaults.get("momentum") and type(optimizer).__name__ in FIRST:
                held = {FIRST[type(optimizer).__name__]: torch.zeros_like(value)}
            if held:
                optimizer.state[value] = held
        optimizer.step()
        following = {f"{WEIGHTS}/{name}": value for name, value in own.items()}
        for name, value in own.items():
            value.grad = None  # which held the graph that holds it
            for key, kept in optimizer.state[value].items():
                if isinstance(kept, Tensor):
                    following[f"{STATE}/{name}/{key}"] = kept
                elif kept is not None:
                    raise CapabilityError(f"optimizer {self.optimizer} keeps {key}={kept!r}, which is no tensor; its steps cannot be replayed.")
        return following


def of_parameter(state: Tree, name: str) -> Tree:
    """What the optimizer keeps of one parameter."""
    own = f"{STATE}/{name}/"
    return {key.removeprefix(own): kept for key, kept in state.items() if key.startswith(own)}
