"""Modules called with other tensors than their own: buffers that a forward writes, cuts that leave a model alone, activations that it checkpoints itself."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance
from torch import nn
from torch.utils.checkpoint import checkpoint

from altgrad import Learner
from altgrad.alignment import exact_gradient
from altgrad.blocks import cut_model
from altgrad.learner import first_not_finite
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key

ENGINES = {
    **{name: {} for name in ("backprop", "forward", "spsa", "likelihood-ratio", "straight-through", "equilibrium", "feedback-alignment")},
    **{name: {"population": 8} for name in ("es", "eggroll")},
    **{name: {} for name in ("mono-forward", "predsim", "forward-forward", "direct-feedback-alignment", "deep-supervision", "local")},
}
X, Y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(12) % 3


class Centred(nn.Module):
    """relu(h - m), m a running mean, and a count; `assigned` puts new tensors in the buffers' places."""

    def __init__(self, assigned):
        super().__init__()
        self.assigned = assigned
        self.register_buffer("mean", torch.ones(6, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, h):
        if not self.training:
            return torch.relu(h - self.mean)
        if self.assigned:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            self.count = self.count + 1
        else:
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
            self.count += 1
        return torch.relu(h - self.mean)


class Whole(nn.Module):
    """The same within a forward of its own, which is traced."""

    def __init__(self, assigned):
        super().__init__()
        self.first, self.centred, self.second, self.head = nn.Linear(5, 6), Centred(assigned), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(self.centred(self.first(x)))))


def sequential(assigned):
    return nn.Sequential(nn.Linear(5, 6), Centred(assigned), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def trained(make, name, *, assigned):
    """The buffers after two steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(assigned).double()
    learner = Learner(model, F.cross_entropy, engine=name, example=X, **ENGINES[name])
    optimizer = torch.optim.SGD(learner.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        learner.backward(X, Y)
        optimizer.step()
    found = model.centred if make is Whole else model[1]
    assert isinstance(found.mean, torch.Tensor)
    return found.mean, int(found.count)


@pytest.mark.parametrize("make", [sequential, Whole])
@pytest.mark.parametrize("name", ENGINES)
def test_a_buffer_that_is_assigned_is_kept_as_one_that_is_written_in_place(name, make):
    (mean, count), (expected, steps) = trained(make, name, assigned=True), trained(make, name, assigned=False)
    assert torch.allclose(mean, expected, atol=tolerance("rounding64"))
    assert not torch.allclose(mean, torch.full_like(mean, 0.81))  # the batch's own mean has come in
    assert count == steps == 2


@pytest.mark.parametrize("assigned", [True, False])
def test_cutting_a_model_leaves_its_buffers_and_attributes_alone(assigned):
    model = Whole(assigned)
    mean, before = model.centred.mean, {name: set(vars(module)) for name, module in model.named_modules()}
    cut_model(model)
    assert model.centred.mean is mean
    assert mean.tolist() == [1.0] * 6
    assert int(model.centred.count) == 0
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_what_a_forward_keeps_on_itself_is_no_stand_in_after_a_cut():
    class Keeping(Whole):
        def forward(self, x):
            self.seen = self.first(x)
            return self.head(self.second(torch.relu(self.seen)))

    model = Keeping(False)
    model.seen = 3
    cut_model(model)
    assert model.seen == 3


# -- activations that a forward checkpoints itself -----------------------------------------------------------------------------------


class Checkpointing(nn.Module):
    """Two parts with dropout and batch norm between them, of which the backward pass runs the second again where `on`."""

    def __init__(self, on):
        super().__init__()
        self.on = on
        self.first = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5))
        self.second = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.5))
        self.third, self.head = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        return self.head(self.third(checkpoint(self.second, h, use_reentrant=False) if self.on else self.second(h)))


def checkpointing(on):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Checkpointing(on).double()


@pytest.mark.parametrize("name", ["backprop", "straight-through", "feedback-alignment", "implicit", "deep-supervision", "mono-forward"])
def test_a_model_that_checkpoints_its_activations_has_the_gradient_of_one_that_does_not(name):
    found = {}
    for on in (True, False):
        model = checkpointing(on)
        learner = Learner(model, F.cross_entropy, engine=name, example=X)
        torch.optim.SGD(learner.parameters(), lr=1e-2).zero_grad()
        learner.backward(X, Y)
        found[on] = [parameter.grad for parameter in model.parameters()], dict(model.named_buffers())
    assert all(torch.allclose(one, other, atol=tolerance("rounding64")) for one, other in zip(found[True][0], found[False][0], strict=True))
    assert all(torch.allclose(found[True][1][key], value) for key, value in found[False][1].items())
    assert int(found[True][1]["second.1.num_batches_tracked"]) == 1


def test_what_is_run_again_has_the_parameters_that_the_pass_was_given():
    grads = []
    for on in (True, False):
        problem = Supervised(checkpointing(on), F.cross_entropy)
        grads.append(exact_gradient(problem, {name: 3 * value.detach() for name, value in problem.params().items()}, Batch(X, Y), Key(0))[1])
    assert all(torch.allclose(grads[0][name], value, atol=tolerance("rounding64")) for name, value in grads[1].items())


def test_checkpointing_of_the_engine_and_of_the_model_go_together():
    found = []
    for on, settings in ((True, {"checkpointing": True}), (False, {"checkpointing": True})):
        model = nn.Sequential(checkpointing(on), nn.Tanh(), nn.Linear(3, 3).double())
        with torch.no_grad():
            model[2].weight.copy_(torch.eye(3))
            model[2].bias.zero_()
        Learner(model, F.cross_entropy, engine="backprop", **settings).backward(X, Y)
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(one, other, atol=tolerance("rounding64")) for one, other in zip(*found, strict=True))


# -- gradients of other layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["backprop", "straight-through", "deep-supervision", "direct-feedback-alignment"])
def test_a_sparse_embedding_has_the_gradient_of_a_dense_one(name):
    tokens, found = torch.arange(24).view(12, 2) % 7, {}
    for sparse in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3))
        learner = Learner(model, F.cross_entropy, engine=name, example=tokens)
        optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
        learner.backward(tokens, Y)
        optimizer.step()
        found[sparse] = [parameter.detach() for parameter in model.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(found[True], found[False], strict=True))


def test_an_imaginary_part_that_is_not_finite_is_met():
    grad = torch.ones(3, 5, dtype=torch.complex128)
    assert first_not_finite({"w": grad}) is None
    grad[0, 0] = complex(1.0, math.inf)
    assert first_not_finite({"w": grad}) == "w"
