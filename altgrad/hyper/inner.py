r"""The inner problem, w* = argmin_w g(w), by any optimizer by name; how stationary its answer is decides what an implicit gradient is worth.

    residual = ‖∇g(w)‖ / (L ‖w‖)        one gradient step of length 1/L, relative to w

With g μ-strongly convex, ‖w − w*‖ / ‖w‖ ≤ residual · L/μ.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad import optimizers, registry
from altgrad.engine import Tree
from altgrad.errors import SettingError, require


class Found(NamedTuple):
    """The weights that were reached, their residual [], updates made, and whether residual <= tol."""

    weights: Tree
    residual: Tensor
    steps: int
    converged: bool


@dataclass(frozen=True)
class Inner:
    """How the inner problem is solved.

    Args:
        optimizer: a name in torch.optim or pytorch_optimizer; a class that evaluates the loss itself (LBFGS) is given its closure.
        lr: its learning rate; None: its own default.
        settings: of its constructor, as "momentum=0.9,nesterov=true" or a dict; LBFGS has a strong_wolfe line search, and no tolerances of
            its own, unless told otherwise.
        steps: updates at most, 1 or more; one of LBFGS is up to 20 iterations.
        tol: the residual at which to stop, above 0; below the 1e-6 at which engine implicit warns in float32.

    Raises:
        UsageError: no such optimizer. SettingError: out of range.
    """

    optimizer: str = "LBFGS"
    lr: float | None = None
    settings: str | Mapping[str, Any] = field(default="")
    steps: int = 50
    tol: float = 5e-7

    def __post_init__(self) -> None:
        optimizers.find(self.optimizer)
        require(isinstance(self.steps, int) and self.steps >= 1, "inner_steps", self.steps, "an integer of at least 1")
        require(0 < self.tol < float("inf"), "inner_tol", self.tol, "above 0 and finite")
        require(self.lr is None or self.lr > 0, "inner_lr", self.lr, "above 0, or none for the optimizer's own default")
        require(isinstance(self.settings, str | Mapping), "inner_settings", self.settings, "text as momentum=0.9,nesterov=true, or a dict")
        if isinstance(self.settings, str):
            registry.split_pairs(pairs(self.settings))

    def build(self, weights: Tree) -> torch.optim.Optimizer:
        """The optimizer over leaf tensors.

        Raises:
            SettingError: a setting that it does not have, or refuses.
        """
        given: dict[str, Any] = dict(registry.split_pairs(pairs(self.settings)) if isinstance(self.settings, str) else self.settings)
        if optimizers.find(self.optimizer) is torch.optim.LBFGS:
            given = {"line_search_fn": "strong_wolfe", "tolerance_grad": 0.0, "tolerance_change": 0.0, **given}  # the residual decides, not it
        return optimizers.build(self.optimizer, weights, lr=self.lr, settings=given)


def pairs(text: str) -> list[str]:
    return [part for part in re.split(r"[,;\s]+(?=[\w-]+=)", text.strip()) if part]


def minimise(objective: Callable[[Tree], Tensor], start: Tree, *, curvature: Tensor | float, inner: Inner | None = None) -> Found:
    """Run the optimizer from `start` until the residual is at most tol, or its steps are spent; nothing is left in anybody's graph.

    Args:
        objective: weights -> g, a scalar; what else it depends on must carry no derivative.
        start: where to begin, by name; not touched.
        curvature: L, an upper bound of the Hessian's largest eigenvalue, above 0.
        inner: how; LBFGS by default.

    Raises:
        SettingError: the optimizer refuses its settings.
    """
    inner = inner or Inner()
    weights = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
    optimizer = inner.build(weights)
    bound = float(curvature)
    if not 0 < bound < float("inf"):
        raise SettingError(f"curvature={bound!r} is not allowed; it must be above 0 and finite, an upper bound of the inner Hessian's largest eigenvalue.")

    def closure() -> Tensor:
        with torch.enable_grad(), torch._C.DisableTorchFunction():  # plain tensors: no mode of a caller has business here, and each costs
            value = objective(weights)
            slopes = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        for weight, slope in zip(weights.values(), slopes, strict=True):
            weight.grad = torch.zeros_like(weight) if slope is None else slope.detach()
        return value.detach()

    steps, alone = 0, optimizers.wants_closure(optimizer)
    while True:
        closure()
        residual = length([weight.grad for weight in weights.values() if weight.grad is not None]) / (bound * length(list(weights.values())).clamp_min(1e-30))
        if bool(residual <= inner.tol) or steps >= inner.steps or not bool(torch.isfinite(residual)):
            break
        with torch._C.DisableTorchFunction():
            optimizer.step(closure) if alone else optimizer.step()  # type: ignore[arg-type]
        steps += 1
    return Found({name: weight.detach() for name, weight in weights.items()}, residual.detach(), steps, bool(residual <= inner.tol))


def length(tensors: list[Tensor]) -> Tensor:
    """√Σ x² over all of them."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor.detach()) for tensor in tensors]))
