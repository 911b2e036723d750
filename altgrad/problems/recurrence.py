r"""Influence balancing: a linear recurrence in which a parameter's late influence has the opposite sign of its early one.

    s_{k+1} = A s_k + θ c,   A_ii = A_{i,i+1} = ½,   c = (1, …, 1, -1, …, -1) with `positive` ones;   ℓ_k = ½ (s_k^1 - 1)²

θ reaches s^1 at once with a plus and, through the other units, later with a minus that outweighs it (2 positive < size). A gradient cut after a
few steps therefore points uphill, and a learner that trusts it diverges. An episode is `horizon` truncations of `length` steps; truncation t has
the loss L_t = the mean of its ℓ_k, the episode the sum of its L_t. Each is quadratic in θ, so a symmetric smoothing leaves its gradient as it is.

Source: Tallec and Ollivier 2017 (UORO), arXiv 1702.05043; Vicol et al. 2021 (PES), arXiv 2112.13835.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from altgrad.engine import Tree
from altgrad.errors import UsageError, require
from altgrad.kernels import noise
from altgrad.problem import Batch, Problem
from altgrad.rng import Key, tensor_id
from altgrad.world import World

SPREAD = 0.1  # of the units' start about 1, so that episodes differ
FIRST = 0.5  # θ at the beginning of training
TEST_EPISODES = 64


class RecurrenceProblem(Problem):
    """The recurrence that `settings` and `key` describe; its one parameter is theta [1]."""

    name = "recurrence"

    def __init__(self, settings: "Recurrence", key: Key):
        self.settings, self.key = settings, key
        self.horizon = self.steps_per_epoch = settings.horizon
        self.theta = nn.Parameter(torch.full((1,), FIRST))
        units = torch.arange(settings.size)
        self.signs = torch.where(units < settings.positive, 1.0, -1.0)  # c
        self.transition = 0.5 * (torch.eye(settings.size) + torch.ones(settings.size - 1).diag(1))  # A

    def params(self) -> Tree:
        return {"theta": self.theta}

    def starts(self, key: Key, episodes: range) -> Tensor:
        """s_0 [episodes, size], each a function of (key, its number)."""
        return 1 + SPREAD * noise.draw("normal", key, tensor_id("start"), episodes, (self.settings.size,), dtype=self.theta.dtype, device=self.theta.device)

    def batch(self, step: int, world: World) -> Batch:
        """The start states [N, size] of the episode that the step belongs to, the same for all its truncations, and what s^1 is to be [N]."""
        share = world.share(self.settings.batch_size)
        require(self.settings.batch_size >= world.size, "batch_size", self.settings.batch_size, f"at least the number of processes, {world.size}")
        states = self.starts(self.key.fold("start").at(step // self.settings.horizon), share)
        return Batch(states, torch.ones_like(states[:, 0]), share.start)

    def run(self, params: Tree, states: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """s^1 after each of so many steps [N, steps], and the last states [N, size]."""
        theta, transition, seen = params["theta"], self.transition.to(states), []
        for _ in range(steps):
            states = states @ transition.T + theta * self.signs.to(states)
            seen.append(states[:, 0])
        return torch.stack(seen, 1), states

    def start(self, batch: Batch) -> Tree:
        return {"units": batch.inputs}

    def unroll(self, params: Tree, carry: Tree, batch: Batch, buffers: Tree) -> tuple[Tensor, Tree]:
        seen, states = self.run(params, carry["units"], self.settings.length)
        return 0.5 * (seen - batch.targets[:, None]).square().mean(), {"units": states}

    def forward(self, params: Tree, inputs: Any, buffers: Tree) -> Any:
        """s^1 along whole episodes [N, horizon · length] from their start states."""
        return self.run(params, inputs, self.settings.horizon * self.settings.length)[0]

    def losses(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        """Σ_t L_t of every whole episode [N]: what truncations divide, and what backprop differentiates."""
        return self.settings.horizon * 0.5 * (self.forward(params, batch.inputs, buffers) - batch.targets[:, None]).square().mean(1)

    def evaluate(self, predict: Any, *, split: str = "test") -> dict[str, float]:
        """{"loss"}: of episodes that training does not see, the same for every seed."""
        with torch.no_grad():
            seen = predict(self.starts(Key(0).fold("recurrence", split), range(TEST_EPISODES)))
        return {"loss": float(self.settings.horizon * 0.5 * (seen - 1).square().mean())}


@dataclass(frozen=True)
class Recurrence:
    """Influence balancing: where truncated gradients point uphill; no model, no data.

    Defaults of the command line: Adam, lr 1e-2, batch 8 episodes, 10 epochs of one episode each.
    """

    size: int = field(default=23, metadata={"help": "units of the recurrence"})
    positive: int = field(default=10, metadata={"help": "units that theta enters with a plus; fewer than half turn its late influence round"})
    length: int = field(default=1, metadata={"help": "steps of the recurrence in a truncation"})
    horizon: int = field(default=100, metadata={"help": "truncations of an episode"})
    batch_size: int = field(default=8, metadata={"help": "episodes side by side"})

    name: ClassVar[str] = "recurrence"
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 1e-2, "epochs": 10}

    def __post_init__(self) -> None:
        for label in ("size", "length", "horizon", "batch_size"):
            value = getattr(self, label)
            require(isinstance(value, int) and value >= 1, label, value, "an integer of at least 1")
        require(isinstance(self.positive, int) and 0 <= self.positive <= self.size, "positive", self.positive, f"an integer from 0 to size={self.size}")

    def build(
        self, key: Key, *, model: str | None = None, model_settings: Mapping[str, Any] | None = None, data_dir: str | Path | None = None
    ) -> RecurrenceProblem:
        """The problem; `key` addresses the start states. There is no model to choose (UsageError) and no data to find."""
        if model or model_settings:
            raise UsageError(f"recurrence has no model, but model={model or dict(model_settings or {})!r} was given; leave it out.")
        return RecurrenceProblem(self, key)
