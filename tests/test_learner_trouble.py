"""The facade in trouble: what it refuses, what it says, and what it leaves untouched."""

import pytest
import torch
import torch.nn.functional as F
from test_learner import KINDS, X, Y, grads_of, learner_of, net, same
from torch import nn

import altgrad
from altgrad import Learner
from altgrad.errors import CapabilityError, DataError, NumericsError, SettingError, ShapeError, UsageError


@pytest.mark.parametrize("label", [3, -1])
@pytest.mark.parametrize("kind", ["backprop", "forward"])
def test_labels_out_of_range_are_refused_before_the_first_step(kind, label):
    wrong = Y.clone()
    wrong[2] = label
    with pytest.raises(DataError, match=r"labels must be in \[0, 2\]"):
        learner_of(kind).backward(X, wrong)


def test_a_model_with_fewer_rows_than_examples_is_refused():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return self.body(x)[:5]

    with pytest.raises(ShapeError, match=r"\(5, 3\) for 12 labels"):
        learner_of(model=First()).backward(X, Y)


def test_a_loss_that_is_no_tensor_is_refused():
    with pytest.raises(ShapeError, match="float tensor"):
        learner_of(loss=lambda outputs, y: 1.0).backward(X, Y)


def test_a_loss_of_the_wrong_length_is_refused():
    with pytest.raises(ShapeError, match=r"shape \(5,\) for a batch of 12"):
        learner_of(loss=lambda outputs, y: F.cross_entropy(outputs[:5], y[:5], reduction="none")).backward(X, Y)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_a_batch_names_engine_and_step_and_leaves_gradients_and_buffers(kind):
    learner = learner_of(kind, model=nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)))
    list(learner.parameters())
    learner.backward(X, Y)
    before = grads_of(learner)
    buffers = {name: value.clone() for name, value in learner.model.named_buffers()}
    poisoned = X.clone()
    poisoned[3, 1] = float("nan")
    with pytest.raises(NumericsError, match=rf"{learner.engine.name}, step 1"):
        learner.backward(poisoned, Y)
    assert same(before, grads_of(learner))
    assert same(buffers, dict(learner.model.named_buffers()))


def test_a_gradient_that_is_not_finite_is_named_and_nothing_is_written():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.scale = nn.Linear(4, 3), nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.first(x) + self.scale.sqrt()  # slope ∞ at 0

    learner = learner_of(model=Root())
    with pytest.raises(NumericsError, match="gradient of scale"):
        learner.backward(X, Y)
    assert grads_of(learner) == {}


def test_an_unknown_engine_is_met_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'forward'"):
        Learner(net(), F.cross_entropy, engine="foward")


def test_an_unknown_setting_is_met_with_the_nearest():
    with pytest.raises(SettingError, match="Did you mean 'tangents'"):
        Learner(net(), F.cross_entropy, tangent=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"tangents": 0},
        {"space": "outputs"},
        {"noise": "uniform"},
        {"space": "weights", "rank": 0},
        {"rank": 1},
        {"combine": "orthogonal"},
        {"guess": "momentum"},
        {"space": "weights", "memory": "replay"},
        {"space": "weights", "guess": "local"},
        {"space": "weights", "rescale": True},
        {"chunk": 0},
        {"decay": 1.0},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused(settings):
    with pytest.raises(SettingError, match="not allowed"):
        learner_of("forward", **settings)


def test_an_engine_that_needs_more_than_a_model_and_a_loss_is_refused_with_what_fits():
    class Energetic(altgrad.Engine):
        needs = altgrad.Needs.ENERGY

    with pytest.raises(CapabilityError, match=r"use one of: .*backprop, .*forward"):
        Learner(net(), F.cross_entropy, engine=Energetic())


def test_a_model_with_nothing_to_train_is_refused():
    frozen = net().requires_grad_(False)
    with pytest.raises(UsageError, match="nothing to train"):
        Learner(frozen, F.cross_entropy)


def test_an_empty_batch_is_refused():
    learner = Learner(net(), F.cross_entropy)
    x, y = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(DataError, match="no examples"):
        learner.backward(x, y)
