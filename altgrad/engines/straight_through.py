r"""Straight-through: backprop through a model whose quantisers have a stand-in derivative, chosen from outside the model.

    q(x) forward,   x̄ = h(x) ȳ   backward,   h by `estimator`, sharpened along the run by its own schedule

In the first `real_weights` of the run weights pass through the primitive F of h in the place of q (BiPer: sin ωw), activations through q; then both
through q, from the weights that the first stage left.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from altgrad.engine import Bias, Estimate, Tree
from altgrad.engines.backprop import Backprop
from altgrad.errors import CapabilityError, SettingError, near_miss, require
from altgrad.problem import Batch, Problem
from altgrad.quantisation.diagnostics import layer_figures, levels, smoothed_cosines, weights_of
from altgrad.rng import Key
from altgrad.surrogates import names, pointwise_of
from altgrad.surrogates.replacing import Replacing, replacing
from altgrad.world import World

OWN, SCHEDULES = "own", ("own", "none")


@dataclass(frozen=True)
class StraightThrough(Backprop):
    """Backprop of a model with quantisers (altgrad.surrogates), whose derivative is that of a surrogate.

    The estimate is exact for the stand-in derivative; without a quantiser in the model it is backprop's. `quantisers` among the metrics counts
    the calls that were met, `share` is where the schedules stand.

    Raises:
        SettingError: no such schedule, a share outside [0, 1], steps < 1. UsageError: no such estimator, or one that is not pointwise.
        CapabilityError: `estimator` is given, and the model quantises by other operations only; real_weights where the run's length is not known;
            checkpointing as for backprop.

    Source: Bengio, Léonard, Courville 2013, arXiv 1308.3432; the two stages: Vargas et al. 2024, arXiv 2404.01278.
    """

    estimator: str = field(
        default=OWN, metadata={"help": 'surrogate for every quantiser of its operation, as in "reste" or "reste,o=2"; own: the model\'s own'}
    )
    schedule: str = field(default="own", metadata={"help": "own: surrogates that have a schedule follow it along the run; none: settings stay"})
    real_weights: float = field(
        default=0.0, metadata={"help": "share of the run, at its beginning, in which weights are not quantised, in [0, 1]; BiPer: 0.67"}
    )
    steps: int | None = field(default=None, metadata={"help": "updates of the run, where nobody else knows its length (Learner); >= 1"})

    diagnose: int = field(default=0, metadata={"help": "every so many steps the log says how well surrogates do, weight by weight; 0 for never"})
    diagnose_pairs: int = field(default=1024, metadata={"help": "antithetic pairs for cosine/<parameter> to the smoothed loss's gradient; 0 for no cosine"})
    diagnose_sigma: float = field(default=0.1, metadata={"help": "smoothing noise of these, a share of each tensor's root mean square, > 0"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.diagnose, int) and self.diagnose >= 0, "diagnose", self.diagnose, "a whole number >= 0")
        pairs = isinstance(self.diagnose_pairs, int) and self.diagnose_pairs >= 0 and self.diagnose_pairs != 1
        require(pairs, "diagnose_pairs", self.diagnose_pairs, "0, or a whole number >= 2")
        require(isinstance(self.diagnose_sigma, (int, float)) and 0 < self.diagnose_sigma < math.inf, "diagnose_sigma", self.diagnose_sigma, "a number > 0")
        if self.schedule not in SCHEDULES:
            raise SettingError(near_miss("schedule", str(self.schedule), SCHEDULES))
        real = isinstance(self.real_weights, (int, float)) and not isinstance(self.real_weights, bool)
        require(real and 0 <= self.real_weights <= 1, "real_weights", self.real_weights, "a share of the run, in [0, 1]")
        require(self.steps is None or (isinstance(self.steps, int) and self.steps >= 1), "steps", self.steps, "a whole number >= 1, or none")
        if self.estimator != OWN:
            pointwise_of(self.estimator)

    @property
    def name(self) -> str:
        return "straight-through"

    @property
    def bias(self) -> Bias:
        return Bias.SURROGATE

    @property
    def source(self) -> str:
        return "Bengio, Léonard, Courville 2013, arXiv 1308.3432"

    def share(self, problem: Problem, step: int | None) -> float | None:
        """The share of the run that is done; None where nobody knows."""
        if problem.progress is not None:
            return problem.progress
        return None if self.steps is None or step is None else min(1.0, step / self.steps)

    @contextmanager
    def surrogates(self, share: float | None) -> Iterator[Replacing]:
        """The model's quantisers act as the settings say while inside."""
        soft = ("weight",) if share is not None and share < self.real_weights else ()
        chosen = None if self.estimator == OWN else pointwise_of(self.estimator)
        with replacing(chosen, share=share if self.schedule == "own" else None, soft=soft) as active:
            yield active

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        share = self.share(problem, key.step)
        if self.real_weights and share is None:
            raise CapabilityError(
                f"real_weights={self.real_weights} is a share of the run, whose length is not known here; set steps to the updates of the run."
            )
        with self.surrogates(share) as active:
            found = super().estimate(problem, params, state, batch, key, world)
            met = sum(active.met.values())
            told = self.told(problem, params, state, batch, key, found.grads, active) if self.diagnose else {}
        self.hold_to_operations(active)
        device = found.loss.device
        counted = {"quantisers": torch.tensor(met, device=device), "share": torch.tensor(share or 0.0, device=device)}
        after = levels(weights_of(problem), params) if self.diagnose else {}
        return found._replace(metrics={**found.metrics, **counted, **told}, state={**found.state, **after})

    def init(self, problem: Problem, params: Tree, key: Key) -> Tree:
        return levels(weights_of(problem), params) if self.diagnose else {}

    def told(
        self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, grads: Mapping[str, torch.Tensor], active: Replacing
    ) -> dict[str, torch.Tensor]:
        """Figures of quantisation/diagnostics.py, in steps that have their turn; what they cost is not counted among the forwards."""
        if (key.step + 1) % self.diagnose:
            return {}
        found = layer_figures(weights_of(problem), params, grads, state, lambda own: active.chosen(own, "weight")[1])
        if self.diagnose_pairs:
            found |= smoothed_cosines(problem, params, grads, batch, key, sigma=self.diagnose_sigma, pairs=self.diagnose_pairs)
        return found

    def hold_to_operations(self, active: Replacing) -> None:
        """Refuse an estimator that took no quantiser's place where there were some."""
        if active.estimator is None or not active.met or active.met[active.estimator.operation]:
            return
        met = sorted(active.met)
        fitting = [name for operation in met for name in names("pointwise", operation=operation)]
        raise CapabilityError(
            f"estimator={self.estimator!r} is for the operation {active.estimator.operation!r}, but the model's quantisers are {', '.join(map(repr, met))}; "
            f"take estimator='own', or one of: {', '.join(fitting)}."
        )

    def predict(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> Any:
        """The model's outputs, with weights as real as they are at this share of the run."""
        with self.surrogates(self.share(problem, None)):
            return problem.forward(params, inputs, problem.buffers())
