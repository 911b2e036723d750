"""Any Gymnasium environment by policy search: the loss of an episode is minus its return, the environment a black box in Python.

Members of a population act one after the other (environments cannot be batched over members), the episodes of one member together; every member
meets the same episodes, since a reset is seeded by (key, step, episode).

    actions    Discrete(n): the greatest of n outputs;   Box: outputs o as middle + half · tanh o where it is bounded, o itself where it is not

Source: Towers et al. 2024 (Gymnasium), arXiv 2407.17032.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from altgrad import models, rng
from altgrad.engine import Tree
from altgrad.errors import MissingExtraError, ShapeError, UsageError, require
from altgrad.problem import Batch, Problem
from altgrad.problems.supervised import fitting, shapes_of
from altgrad.rng import Key, tensor_id
from altgrad.world import World

TEST_EPISODES = 20
UPDATES = 20  # an epoch, after which the policy is tested


def outputs_for(space: Any) -> int:
    """How many outputs a policy needs to act in a Discrete or Box space.

    Raises:
        UsageError: another kind of space.
    """
    if getattr(space, "n", None) is not None:
        return int(space.n)
    if hasattr(space, "low") and hasattr(space, "high"):
        return int(np.prod(space.shape))
    raise UsageError(f"actions of {space} are not understood; they must be Discrete or Box.")


def actions_of(space: Any, outputs: Tensor) -> list[Any]:
    """Outputs [N, k] as N actions in `space`."""
    if getattr(space, "n", None) is not None:
        return [int(place) + int(getattr(space, "start", 0)) for place in outputs.argmax(1).tolist()]
    rows = outputs.double().cpu().numpy().reshape(len(outputs), *space.shape)
    bounded = np.isfinite(space.low) & np.isfinite(space.high)
    low, high = np.where(bounded, space.low, -1.0), np.where(bounded, space.high, 1.0)
    return list(np.where(bounded, (low + high) / 2 + (high - low) / 2 * np.tanh(rows), rows).astype(space.dtype))


class GymnasiumProblem(Problem):
    """Episodes in what `make` makes, under the policy `model`: observations [N, n] to outputs [N, k]."""

    name = "gymnasium"
    differentiable = False
    steps_per_epoch = UPDATES

    def __init__(self, make: Callable[[], Any], model: nn.Module, *, episodes: int, steps: int, key: Key):
        self.make, self.model, self.episodes, self.steps, self.key = make, model, episodes, steps, key
        self.environments = [make()]
        self.actions = self.environments[0].action_space

    def params(self) -> Tree:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def buffers(self) -> Tree:
        return dict(self.model.named_buffers())

    def seeds(self, key: Key, episodes: range) -> Tensor:
        """What the episodes are reset with, [episodes] in [0, 2^31), each a function of (key, its number)."""
        words = rng.integers(key, tensor_id("episode"), list(episodes), 1)[:, 0]
        return torch.from_numpy((words >> 1).astype(np.int64))

    def batch(self, step: int, world: World) -> Batch:
        """The seeds of a step's episodes; there are no targets (zeros)."""
        share = world.share(self.episodes)
        require(self.episodes >= world.size, "batch_size", self.episodes, f"at least the number of processes, {world.size}")
        return Batch(self.seeds(self.key.fold("episode").at(step), share), torch.zeros(len(share)), share.start)

    def check_batch(self, batch: Batch) -> None:
        """The policy must give as many outputs as the actions need."""
        seen, needed = torch.zeros(2, int(np.prod(self.environments[0].observation_space.shape))), outputs_for(self.actions)
        with torch.no_grad(), fitting(f"the model does not take observations of shape {tuple(seen.shape)}"):
            outputs = self.forward(self.params(), seen, self.fresh_buffers())
        if not isinstance(outputs, Tensor) or tuple(outputs.shape) != (2, needed):
            raise ShapeError(f"the model returned {shapes_of(outputs)} for 2 observations; actions of {self.actions} need {[2, needed]}.")

    def forward(self, params: Tree, inputs: Any, buffers: Tree) -> Any:
        """The policy's outputs [N, k] for observations [N, n]."""
        own = self.params()
        values = {**{name: value for name, value in params.items() if name in own}, **buffers}
        like = next((value for value in own.values() if value.is_floating_point()), inputs)
        return torch.func.functional_call(self.model, values, (inputs.to(device=like.device, dtype=like.dtype),))

    def losses(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        """Minus the return of every episode [N]."""
        return -self.returns(lambda seen: self.forward(params, seen, buffers), batch.inputs)

    def returns(self, policy: Callable[[Tensor], Tensor], seeds: Tensor) -> Tensor:
        """The sum of rewards [N] of the episodes reset with `seeds` [N]; the policy is asked for all that still run at once."""
        while len(self.environments) < len(seeds):
            self.environments.append(self.make())
        running = {place: self.environments[place].reset(seed=seed)[0] for place, seed in enumerate(seeds.tolist())}
        totals = [0.0] * len(seeds)
        for _ in range(self.steps):
            if not running:
                break
            places = list(running)
            seen = torch.from_numpy(np.stack([np.asarray(running[place], dtype=np.float32).reshape(-1) for place in places]))
            for place, action in zip(places, actions_of(self.actions, policy(seen)), strict=True):
                running[place], reward, terminated, truncated, _ = self.environments[place].step(action)
                totals[place] += float(reward)
                if terminated or truncated:
                    del running[place]
        return torch.tensor(totals)

    def evaluate(self, predict: Any, *, split: str = "test") -> dict[str, float]:
        """{"return", "loss"}: the mean return of TEST_EPISODES episodes, the same for every seed and engine, and minus it."""
        with torch.no_grad():
            mean = float(self.returns(predict, self.seeds(Key(0).fold("gymnasium", split), range(TEST_EPISODES))).double().mean())
        return {"return": mean, "loss": -mean}


@dataclass(frozen=True)
class Gymnasium:
    """An environment of Gymnasium (extra: gymnasium) by its id: minus the return, no gradient.

    Defaults of the command line: an n-16-k mlp (tanh), Adam, lr 3e-2, batch 8 episodes, 5 epochs of 20 updates. An evolution strategy wants a sigma of
    about 0.1 here: actions are all or nothing, and members that differ by less all act alike.
    """

    environment: str = field(default="CartPole-v1", metadata={"help": "an id that gymnasium.make takes; observations in a Box, actions Discrete or in a Box"})
    batch_size: int = field(default=8, metadata={"help": "episodes a step, the same for every member of a population"})
    steps: int = field(default=1000, metadata={"help": "an episode that goes on is ended after so many"})
    model: str = field(default="mlp", metadata={"help": "a name of `altgrad models`, or package.module:callable: observations [N, n] to outputs [N, k]"})

    name: ClassVar[str] = "gymnasium"
    model_settings: ClassVar[Mapping[str, Any]] = {"hidden": "16", "activation": "tanh"}  # of the default model
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 3e-2, "epochs": 5}

    def __post_init__(self) -> None:
        for label in ("batch_size", "steps"):
            value = getattr(self, label)
            require(isinstance(value, int) and value >= 1, label, value, "an integer of at least 1")

    def build(
        self, key: Key, *, model: str | None = None, model_settings: Mapping[str, Any] | None = None, data_dir: str | Path | None = None
    ) -> GymnasiumProblem:
        """The problem; `key` addresses the policy's first weights and the episodes. There are no data to find.

        Raises:
            MissingExtraError: gymnasium is not installed.
            UsageError, SettingError: no such environment, model or setting, or spaces that are not understood.
        """
        try:
            import gymnasium
        except ModuleNotFoundError as error:
            raise MissingExtraError("gymnasium", "gymnasium", "problem gymnasium") from error

        def make() -> Any:
            try:
                return gymnasium.make(self.environment)
            except Exception as error:  # its own errors, and those of whatever simulator it loads
                raise UsageError(f"gymnasium cannot make environment={self.environment!r}: {error}") from error

        first = make()
        shape = getattr(first.observation_space, "shape", None)
        if not shape or not hasattr(first.observation_space, "low"):
            raise UsageError(f"observations of {first.observation_space} are not understood; they must be in a Box with one axis or more.")
        chosen = model or self.model
        own = self.model_settings if chosen == type(self).model else {}
        size, outputs = int(np.prod(shape)), outputs_for(first.action_space)
        policy = models.build(chosen, {**own, **(model_settings or {})}, input_shape=(size,), classes=outputs, key=key)
        return GymnasiumProblem(make, policy, episodes=self.batch_size, steps=self.steps, key=key)
