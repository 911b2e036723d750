"""A problem that trains in a blink: three clouds of points in four dimensions; and engines that misbehave."""

from dataclasses import dataclass, field

import torch
from torch import nn

from altgrad import rng
from altgrad.data import Dataset
from altgrad.engine import Bias, Engine, Estimate, Needs
from altgrad.engines.backprop import Backprop
from altgrad.problems.quadratic import Quadratic
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key


def clouds(count, key):
    """Inputs [count, 4] around one of three centres, and which."""
    targets = torch.arange(count) % 3
    centres = torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]])
    noise = torch.from_numpy(rng.normal(key, 0, [0], 4 * count)[0].copy()).reshape(count, 4)
    return centres[targets] + noise, targets


class HiddenTest(Dataset):
    """A data set whose test part may not be looked at."""

    @property
    def test_inputs(self):
        raise AssertionError("the test inputs were read")

    @property
    def test_targets(self):
        raise AssertionError("the test targets were read")


@dataclass(frozen=True)
class Blobs:
    """96 examples to train on, 48 to test on, a 4-8-3 network."""

    batch_size: int = field(default=16, metadata={"help": "examples a step"})
    hidden_test: bool = False
    one_layer: bool = False

    def build(self, key, *, data_dir=None):
        data = Dataset("blobs", *clouds(96, Key(1)), *clouds(48, Key(2)), 3)
        model = nn.Linear(4, 3) if self.one_layer else nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                unit = rng.normal(key.fold("model"), rng.tensor_id(name), [0], parameter.numel())[0].copy()
                parameter.copy_(torch.from_numpy(unit).reshape(parameter.shape) * 0.3)
        data = HiddenTest(*data) if self.hidden_test else data
        return Supervised(model, nn.CrossEntropyLoss(reduction="none"), dataset=data, batch_size=self.batch_size, key=key, name="blobs")


@dataclass(frozen=True)
class Endless:
    """A problem without epochs."""

    def build(self, key, *, data_dir=None):
        problem = Quadratic(dimension=3).build(key)
        problem.steps_per_epoch = None
        return problem


@dataclass(frozen=True)
class Silent(Engine):
    """Backprop that does not say what it spent."""

    needs = Needs.REVERSE
    bias = Bias.EXACT
    source = "tests"

    def estimate(self, problem, params, state, batch, key, world):
        found = Backprop().estimate(problem, params, state, batch, key, world)
        return found._replace(metrics={"forwards": torch.tensor(0), "backwards": torch.tensor(0)})


@dataclass(frozen=True)
class Exploding(Engine):
    """Backprop whose third step of every run is infinite."""

    needs = Needs.REVERSE
    bias = Bias.EXACT
    source = "tests"

    def estimate(self, problem, params, state, batch, key, world):
        found = Backprop().estimate(problem, params, state, batch, key, world)
        return found if key.step < 3 else Estimate(found.loss * float("inf"), *found[1:])


@dataclass(frozen=True)
class Greedy(Engine):
    """Needs what no classifier provides."""

    needs = Needs.ENERGY
    bias = Bias.LIMIT
    source = "tests"
