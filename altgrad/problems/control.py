r"""Classic control by policy search: the loss of an episode is minus its return. No derivative exists, or none is offered: the simulator is a black box.

    cart-pole   τ = 0.02, Euler; f = ±10 N by the sign of the policy's output
                t = (f + m l ω² sin θ) / (M + m),   α = (g sin θ - t cos θ) / (l (4/3 - m cos² θ / (M + m))),   a = t - m l α cos θ / (M + m)
                reward 1 a step, until |x| > 2.4 m or |θ| > 12° or 500 steps are done
    pendulum    τ = 0.05; torque u = 2 tanh(output);   ω ← clip(ω + (3g/2l · sin θ + 3u / m l²) τ, ±8),   θ ← θ + ω τ
                reward -(wrap(θ)² + ω²/10 + u²/1000) a step, 200 steps; θ = 0 is upright

All episodes advance together, one tensor operation at a time, for a fixed number of steps with a mask of those still running: nothing depends on
the data, so torch.func.vmap over the parameters of a population works, and all members of it see the same start states.

Source: Barto, Sutton, Anderson, "Neuronlike adaptive elements that can solve difficult learning control problems", 1983, with the constants and
limits of CartPole-v1 and Pendulum-v1.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from altgrad import models
from altgrad.engine import Tree
from altgrad.errors import ShapeError, UsageError, near_miss, require
from altgrad.kernels import noise
from altgrad.problem import Batch, Problem
from altgrad.problems.supervised import fitting, shapes_of
from altgrad.rng import Key, tensor_id
from altgrad.world import World

TEST_EPISODES = 100
UPDATES = 20  # an epoch, after which the policy is tested


class Task(Protocol):
    """A simulator of many episodes at once; pure."""

    steps: int  # the longest episode
    start_width: tuple[float, ...]  # every state variable starts uniform on ± this
    observations: int

    def observe(self, states: Tensor) -> Tensor:
        """States [N, variables] as the policy sees them [N, observations]."""
        ...

    def advance(self, states: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step under the policy's output [N]: (states, reward [N], whether the episode goes on [N])."""
        ...


class CartPole:
    """A pole on a cart that is pushed left or right; state (x, v, θ, ω), angles in radians from upright."""

    steps, observations = 500, 4
    start_width: tuple[float, ...] = (0.05, 0.05, 0.05, 0.05)
    gravity, force, step_seconds = 9.8, 10.0, 0.02
    pole_mass, half_length = 0.1, 0.5
    total_mass = 1.1
    far, tilted = 2.4, 12 * 2 * math.pi / 360

    def observe(self, states: Tensor) -> Tensor:
        return states

    def advance(self, states: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, speed, angle, spin = states.unbind(-1)
        sine, cosine = torch.sin(angle), torch.cos(angle)
        push = torch.where(output > 0, self.force, -self.force).to(states.dtype)
        pole = self.pole_mass * self.half_length
        shared = (push + pole * spin * spin * sine) / self.total_mass
        turn = (self.gravity * sine - cosine * shared) / (self.half_length * (4 / 3 - self.pole_mass / self.total_mass * cosine * cosine))
        slide = shared - pole / self.total_mass * turn * cosine
        moved = states + self.step_seconds * torch.stack([speed, slide, spin, turn], dim=-1)
        inside = (moved[..., 0].abs() <= self.far) & (moved[..., 2].abs() <= self.tilted)  # NaN is outside
        return moved, torch.ones_like(speed), inside


class Pendulum:
    """A pendulum to be swung up by a torque too weak to lift it; state (θ, ω), seen as (cos θ, sin θ, ω)."""

    steps, observations = 200, 3
    start_width: tuple[float, ...] = (math.pi, 1.0)
    gravity, torque, step_seconds, fastest = 10.0, 2.0, 0.05, 8.0  # mass and length are 1

    def observe(self, states: Tensor) -> Tensor:
        angle, spin = states.unbind(-1)
        return torch.stack([torch.cos(angle), torch.sin(angle), spin], dim=-1)

    def advance(self, states: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle, spin = states.unbind(-1)
        torque = self.torque * torch.tanh(output)
        away = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        cost = away * away + 0.1 * spin * spin + 0.001 * torque * torque
        spin = (spin + (1.5 * self.gravity * torch.sin(angle) + 3 * torque) * self.step_seconds).clamp(-self.fastest, self.fastest)
        return torch.stack([angle + spin * self.step_seconds, spin], dim=-1), -cost, torch.ones_like(angle, dtype=torch.bool)


TASKS: dict[str, Task] = {"cart-pole": CartPole(), "pendulum": Pendulum()}


def returns(task: Task, policy: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """The sum of rewards [N] of the episodes that start in `states` [N, variables], the policy's outputs [N] being functions of the states."""
    running = torch.ones_like(states[:, 0], dtype=torch.bool)
    total = torch.zeros_like(states[:, 0])
    for _ in range(task.steps):
        moved, reward, goes_on = task.advance(states, policy(states))
        total = total + running * reward
        states = torch.where(running.unsqueeze(-1), moved, states)  # an episode that is over stands still, and cannot run off to infinity
        running = running & goes_on
    return total


class Episodes(nn.Module):
    """Start states -> returns under `policy`, as one module: functional_call swaps the parameters once an episode, not once a step."""

    def __init__(self, task: Task, policy: nn.Module):
        super().__init__()
        self.task, self.policy = task, policy

    def forward(self, states: Tensor) -> Tensor:
        return returns(self.task, lambda now: self.output(now).squeeze(-1).to(states.dtype), states)

    def output(self, states: Tensor) -> Tensor:
        """The policy's outputs [N, 1], in the dtype of its parameters."""
        own = next(self.policy.parameters(), states)
        return self.policy(self.task.observe(states).to(own.dtype))


class ControlProblem(Problem):
    """Episodes of `task` under the policy `model`, which maps observations [N, observations] to outputs [N, 1]."""

    name = "control"
    differentiable = False
    steps_per_epoch = UPDATES

    def __init__(self, task: Task, model: nn.Module, *, episodes: int, key: Key):
        self.task, self.model, self.episodes, self.key = task, model, episodes, key
        self.simulation = Episodes(task, model)

    def params(self) -> Tree:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def buffers(self) -> Tree:
        return dict(self.model.named_buffers())

    def starts(self, key: Key, episodes: range) -> Tensor:
        """Start states [episodes, variables], each a function of (key, its number)."""
        width = torch.tensor(self.task.start_width)
        unit = noise.draw("uniform", key, tensor_id("start"), episodes, width.shape)  # in (0, 1)
        return ((2 * unit - 1) * width).to(next(self.model.parameters()).device)

    def batch(self, step: int, world: World) -> Batch:
        """The start states of a step, addressed by (key, step, episode); there are no targets (zeros)."""
        share = world.share(self.episodes)
        require(self.episodes >= world.size, "batch_size", self.episodes, f"at least the number of processes, {world.size}")
        states = self.starts(self.key.fold("start").at(step), share)
        return Batch(states, states.new_zeros(len(share)), share.start)

    def check_batch(self, batch: Batch) -> None:
        """The policy must give one output an episode."""
        with torch.no_grad(), fitting(f"the model does not take observations of shape {tuple(self.task.observe(batch.inputs).shape)}"):
            outputs = self.forward(self.params(), batch.inputs, self.fresh_buffers())
        expected = (len(batch.inputs), 1)
        if not isinstance(outputs, Tensor) or tuple(outputs.shape) != expected:
            raise ShapeError(f"the model returned {shapes_of(outputs)} for {expected[0]} episodes; a policy must return {list(expected)}.")

    def forward(self, params: Tree, inputs: Any, buffers: Tree) -> Any:
        """The policy's outputs [N, 1] in the states `inputs`."""
        return torch.func.functional_call(self.model, self.values(params, buffers), (self.task.observe(inputs).to(self.dtype(params)),))

    def losses(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        """Minus the return of every episode [N]."""
        values = {f"policy.{name}": value for name, value in self.values(params, buffers).items()}
        return -torch.func.functional_call(self.simulation, values, (batch.inputs,))

    def values(self, params: Tree, buffers: Tree) -> Tree:
        """What the model is to run with."""
        own = self.params()
        return {**{name: value for name, value in params.items() if name in own}, **buffers}

    def dtype(self, params: Tree) -> torch.dtype:
        """The policy's."""
        return next((value.dtype for name, value in params.items() if value.is_floating_point()), torch.float32)

    def evaluate(self, predict: Any, *, split: str = "test") -> dict[str, float]:
        """{"return", "loss"}: the mean return of TEST_EPISODES episodes, the same for every seed and engine, and minus it."""
        with torch.no_grad():
            states = self.starts(Key(0).fold("control", split), range(TEST_EPISODES))
            mean = float(returns(self.task, lambda now: predict(now).reshape(len(now)).to(now.dtype), states).double().mean())
        return {"return": mean, "loss": -mean}


@dataclass(frozen=True)
class Control:
    """Cart-pole (500 is perfect, 475 counts as solved) or a pendulum to swing up (about -1200 untrained, 0 is perfect): minus the return, no gradient.

    Defaults of the command line: a 4-16-1 mlp (tanh), Adam, lr 3e-2, batch 8 episodes, 5 epochs of 20 updates. An evolution strategy wants a sigma of
    about 0.1 here: actions are all or nothing, and members that differ by less all act alike.
    """

    task: str = field(default="cart-pole", metadata={"help": "cart-pole or pendulum"})
    batch_size: int = field(default=8, metadata={"help": "episodes a step, the same for every member of a population"})
    model: str = field(default="mlp", metadata={"help": "a name of `altgrad models`, or package.module:callable: observations [N, n] to outputs [N, 1]"})

    name: ClassVar[str] = "control"
    model_settings: ClassVar[Mapping[str, Any]] = {"hidden": "16", "activation": "tanh"}  # of the default model
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 3e-2, "epochs": 5}

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UsageError(near_miss("task", self.task, TASKS))
        require(isinstance(self.batch_size, int) and self.batch_size >= 1, "batch_size", self.batch_size, "an integer of at least 1")

    def build(
        self, key: Key, *, model: str | None = None, model_settings: Mapping[str, Any] | None = None, data_dir: str | Path | None = None
    ) -> ControlProblem:
        """The problem; `key` addresses the policy's first weights and the start states. There are no data to find.

        Raises:
            UsageError, SettingError: no such model or setting.
        """
        chosen, task = model or self.model, TASKS[self.task]
        own = self.model_settings if chosen == type(self).model else {}
        policy = models.build(chosen, {**own, **(model_settings or {})}, input_shape=(task.observations,), classes=1, key=key)
        return ControlProblem(task, policy, episodes=self.batch_size, key=key)
