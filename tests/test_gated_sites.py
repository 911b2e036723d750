"""Where relu lets nothing through the gradient is known to be 0, and activation noise leaves it so; where anything else looks on, it does not."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance
from torch import nn

import altgrad
from altgrad import rng
from altgrad.forward_mode.activities import ActivityTrace
from altgrad.rng import Key


def normals(name, *shape):
    size = torch.Size(shape).numel()
    return torch.from_numpy(rng.normal(Key(7), rng.tensor_id(name), [0], size)[0].copy()).reshape(shape)


X, Y = normals("inputs", 8, 5), torch.arange(8) % 3


class Net(nn.Module):
    """Two hidden layers; `skip`: the first one's output before relu is used again; `inplace`, `shape`: how relu is called, what is read first."""

    def __init__(self, *, skip=False, inplace=False, shape=False):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.skip, self.inplace, self.shape = skip, inplace, shape
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(normals(name, *parameter.shape) * 0.5)
            self.first.bias[:2] = -6.0  # two units that no example wakes

    def forward(self, x):
        y = self.first(x)
        if self.shape:
            assert y.shape[1] == 6
        before = y * 1 if self.skip else 0
        return self.last(F.relu(self.second(F.relu(y, inplace=self.inplace)), inplace=self.inplace) + before)


def estimate(net, *, seed=0, **settings):
    learner = altgrad.Learner(net, F.cross_entropy, engine="forward", tangents=4, seed=seed, **settings)
    net.zero_grad()
    learner.backward(X, Y)
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("memory", ["store", "replay"])
@pytest.mark.parametrize("form", [{}, {"inplace": True}, {"shape": True}])
def test_a_dead_unit_gets_no_noise(memory, form):
    grads = estimate(Net(**form), memory=memory)
    assert not grads["first.bias"][:2].any()
    assert not grads["first.weight"][:2].any()
    assert grads["first.bias"][2:].all()


@pytest.mark.parametrize("memory", ["store", "replay"])
def test_a_unit_whose_output_goes_past_relu_too_is_still_estimated(memory):
    assert estimate(Net(skip=True), memory=memory)["first.bias"][:2].all()


@pytest.mark.parametrize("form", [{}, {"inplace": True}, {"skip": True}])
def test_a_replay_leaves_out_what_the_stored_pass_does(form):
    stored, replayed = (estimate(Net(**form), memory=memory) for memory in ("store", "replay"))
    assert all(torch.equal(stored[name], replayed[name]) for name in stored)


@pytest.mark.parametrize("form", [{}, {"inplace": True}, {"skip": True}])
def test_leaving_dead_units_out_keeps_the_mean(form):
    net = Net(**form)
    exact = torch.autograd.grad(F.cross_entropy(net(X), Y), list(net.parameters()))
    draws = [torch.cat([grad.flatten() for grad in estimate(net, seed=seed, noise="sign").values()]) for seed in range(400)]  # lighter tails than normals
    drawn = torch.stack(draws).double()
    error = drawn.mean(0) - torch.cat([grad.flatten() for grad in exact])
    assert (error.abs() <= tolerance("standard_errors") * drawn.std(0) / len(draws) ** 0.5 + 1e-6).all()


def test_without_the_gates_dead_units_would_get_noise(monkeypatch):
    monkeypatch.setattr(ActivityTrace, "met", lambda *told: None)
    assert estimate(Net())["first.bias"][:2].all()
