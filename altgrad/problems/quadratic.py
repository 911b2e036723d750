r"""A quadratic with a known optimum and a known gradient: the oracle of tests.

    f(x) = ½ (x - x*)ᵀ H (x - x*),   ∇f(x) = H (x - x*),   H = R diag(λ) R,   R = I - 2uuᵀ,   λ_i = condition^(i / (d - 1))

R is a reflection, so H is dense while a product with it costs O(d). Example n adds the linear term ξ_n · x with ξ_n ~ N(0, noise_std² I), so that
the gradient of a batch is H (x - x*) + mean ξ_n.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from altgrad import rng
from altgrad.engine import Tree
from altgrad.errors import UsageError, require
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.world import World


class QuadraticProblem(Problem):
    """The quadratic that `settings` and `key` describe; its one parameter is x [dimension], which starts at 0."""

    name = "quadratic"
    steps_per_epoch = 100

    def __init__(self, settings: "Quadratic", key: Key):
        self.settings, self.key = settings, key
        d = settings.dimension
        self.x = nn.Parameter(torch.zeros(d))
        self.eigenvalues = torch.from_numpy(np.logspace(0, np.log10(settings.condition), d))  # [dimension], float64
        self.target = torch.from_numpy(rng.normal(key.fold("optimum"), 0, [0], d)[0]).double()
        axis = torch.from_numpy(rng.normal(key.fold("axis"), 0, [0], d)[0]).double()
        self.axis = axis / axis.norm()

    def params(self) -> Tree:
        return {"x": self.x}

    @property
    def optimum(self) -> Tree:
        """Where f is 0, and every gradient without noise."""
        return {"x": self.target.to(self.x)}

    def hessian_times(self, vector: Tensor) -> Tensor:
        """H · vector, in the vector's dtype."""
        axis, eigenvalues = self.axis.to(vector), self.eigenvalues.to(vector)
        inner = eigenvalues * (vector - 2 * axis * (axis * vector).sum())
        return inner - 2 * axis * (axis * inner).sum()

    def gradient(self, params: Tree, batch: Batch | None = None) -> Tree:
        """∇f, and with `batch` the mean gradient of its examples."""
        exact = self.hessian_times(params["x"] - self.target.to(params["x"]))
        return {"x": exact if batch is None else exact + batch.inputs.to(exact).mean(0)}

    def batch(self, step: int, world: World) -> Batch:
        """Inputs are the linear terms ξ [N, dimension], addressed by (key, step, example)."""
        share = world.share(self.settings.batch_size)
        terms = rng.normal(self.key.fold("terms").at(step), 0, share, self.settings.dimension) * np.float32(self.settings.noise_std)
        return Batch(torch.from_numpy(terms).to(self.x.device), torch.zeros(len(share), device=self.x.device), share.start)

    def forward(self, params: Tree, inputs: Any, buffers: Tree) -> Any:
        """f(x) + ξ_n · x of every example [N]."""
        x = params["x"]
        offset = x - self.target.to(x)
        return 0.5 * (offset * self.hessian_times(offset)).sum() + (inputs.to(x) * x).sum(-1)

    def losses(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        return self.forward(params, batch.inputs, buffers)

    def evaluate(self, predict: Any, *, split: str = "test") -> dict[str, float]:
        """f without noise."""
        return {"loss": float(predict(torch.zeros(1, self.settings.dimension, device=self.x.device)).mean())}


@dataclass(frozen=True)
class Quadratic:
    """½ (x - x*)ᵀ H (x - x*) with eigenvalues from 1 to `condition`: closed form, no data.

    Defaults of the command line: no model, Adam, lr 1e-2, batch 64, 10 epochs of 100 steps.
    """

    dimension: int = field(default=100, metadata={"help": "length of x"})
    condition: float = field(default=100.0, metadata={"help": "largest eigenvalue over smallest, at least 1; the smallest is 1"})
    noise_std: float = field(default=0.0, metadata={"help": "standard deviation of every component of an example's linear term"})
    batch_size: int = field(default=64, metadata={"help": "examples a step"})

    name: ClassVar[str] = "quadratic"
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 1e-2, "epochs": 10}

    def __post_init__(self) -> None:
        for label in ("dimension", "batch_size"):
            value = getattr(self, label)
            require(isinstance(value, int) and value >= 1, label, value, "an integer of at least 1")
        require(1 <= self.condition < float("inf"), "condition", self.condition, "a number of at least 1")
        require(0 <= self.noise_std < float("inf"), "noise_std", self.noise_std, "a number of at least 0")

    def build(
        self, key: Key, *, model: str | None = None, model_settings: Mapping[str, Any] | None = None, data_dir: str | Path | None = None
    ) -> QuadraticProblem:
        """The problem; `key` addresses x*, R and the noise. There is no model to choose (UsageError) and no data to find."""
        if model or model_settings:
            raise UsageError(f"quadratic has no model, but model={model or dict(model_settings or {})!r} was given; leave it out.")
        return QuadraticProblem(self, key)
