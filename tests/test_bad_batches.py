"""Data, models and losses that do not fit together are named before anything is trained; what the first look settles holds for good."""

from dataclasses import dataclass, field

import blobs
import pytest
import torch
from torch import nn

import altgrad
from altgrad import checkpoint, errors, trainer
from altgrad.data import Dataset
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key
from altgrad.trainer import TrainSettings

NAN, INF = float("nan"), float("inf")


def spoilt(data, spoil):
    parts = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in data._asdict().items()}
    if spoil in {"train", "test"}:
        parts[f"{spoil}_inputs"][40, 2] = NAN
    if spoil == "infinite":
        parts["train_inputs"][41, 0] = INF
    if spoil == "last label":  # of the last example: not in the first batch
        parts["train_targets"][-1] = 3
    if spoil == "negative label":
        parts["train_targets"][7] = -1
    if spoil == "test label":
        parts["test_targets"][5] = 9
    return Dataset(**parts)


@dataclass(frozen=True)
class Spoilt:
    """The blobs with something wrong in them."""

    spoil: str = ""
    loss: str = "mean"
    outputs: int = field(default=3)

    def build(self, key, *, data_dir=None):
        problem = blobs.Blobs().build(key)
        losses = {"mean": nn.CrossEntropyLoss(), "odd": lambda o, t: nn.functional.cross_entropy(o, t) * torch.ones(5), "int": lambda o, t: t.sum()}
        model = problem.model if self.outputs == 3 else nn.Linear(4, self.outputs)
        return Supervised(model, losses[self.loss], dataset=spoilt(problem.dataset, self.spoil), batch_size=16, key=key, name="spoilt")


def build(**settings):
    return trainer.build(TrainSettings(problem="test_bad_batches:Spoilt", problem_settings=settings, engine="backprop", steps=3))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"spoil": "train"}, errors.NumericsError, r"spoilt, training set: the inputs hold NaN, first in example 40; clean the data\."),
        ({"spoil": "infinite"}, errors.NumericsError, r"spoilt, training set: the inputs hold infinite values, first in example 41"),
        ({"spoil": "last label"}, errors.DataError, r"labels run from 0 to 3, but the model has 3 outputs; labels must be in \[0, 2\]"),
        ({"spoil": "negative label"}, errors.DataError, "labels run from -1 to 2, but the model has 3 outputs"),
        ({"outputs": 2}, errors.DataError, "labels run from 0 to 2, but the model has 2 outputs"),
        ({"loss": "odd"}, errors.ShapeError, r"the loss returned shape \(5,\) for a batch of 16"),
        ({"loss": "int"}, errors.ShapeError, "it must return a float tensor"),
    ],
)
def test_what_does_not_fit_is_refused_when_a_training_is_built(settings, error, message):
    with pytest.raises(error, match=message):
        build(**settings)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [("test", errors.NumericsError, "spoilt, test set: the inputs hold NaN, first in example 40"), ("test label", errors.DataError, "labels run from 0 to 9")],
)
def test_what_is_wrong_with_the_test_set_is_named_when_it_is_looked_at(spoil, error, message):
    with pytest.raises(error, match=message):
        trainer.evaluate(build(spoil=spoil))


def test_the_first_look_changes_nothing_and_draws_nothing():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    problem = Supervised(model, nn.CrossEntropyLoss())
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    problem.check_batch(Batch(*blobs.clouds(12, Key(0))))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def learner(model=None, loss=None, **settings):
    return altgrad.Learner(model or nn.Linear(4, 3), loss or nn.CrossEntropyLoss(), engine="backprop", **settings)


@pytest.mark.filterwarnings("ignore:Using a target size")  # of PyTorch, before its error
@pytest.mark.parametrize(
    ("model", "loss", "targets", "error", "message"),
    [
        (nn.Linear(4, 3), nn.CrossEntropyLoss(), torch.tensor([0, 1, 5]), errors.DataError, "labels run from 0 to 5, but the model has 3 outputs"),
        (nn.Linear(5, 3), nn.CrossEntropyLoss(), torch.tensor([0, 1, 2]), errors.ShapeError, r"the model does not take inputs of shape \(3, 4\): mat1"),
        (
            nn.Linear(4, 3),
            nn.MSELoss(),
            torch.zeros(3, 5),
            errors.ShapeError,
            r"the loss does not take outputs of shape \(3, 3\) with targets of shape \(3, 5\)",
        ),
        (nn.Linear(4, 3), lambda o, t: o, torch.zeros(3), None, ""),
    ],
)
def test_the_learner_looks_before_its_first_step(model, loss, targets, error, message):
    if error is None:
        learner(model, loss).backward(torch.ones(3, 4), targets)
        return
    with pytest.raises(error, match=message):
        learner(model, loss).backward(torch.ones(3, 4), targets)


def test_labels_that_the_loss_leaves_out_are_no_mistake():
    learner().backward(torch.ones(3, 4), torch.tensor([0, -100, 2]))


def test_a_regression_on_whole_numbers_has_no_labels():
    learner(nn.Linear(4, 1), lambda o, t: (o[:, 0] - t).square()).backward(torch.ones(3, 4), torch.tensor([7, 8, 9]))


def test_an_error_of_the_models_own_is_not_dressed_up():
    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("the sensor is offline")

    with pytest.raises(RuntimeError, match="the sensor is offline"):
        learner(Broken(4, 3)).backward(torch.ones(3, 4), torch.tensor([0, 1, 2]))


def test_nan_in_the_learners_inputs_is_named():
    x = torch.ones(3, 4)
    x[1, 1] = NAN
    with pytest.raises(errors.NumericsError, match="the loss is nan in backprop, step 0; the inputs hold NaN, first in example 1; clean the data"):
        learner().backward(x, torch.tensor([0, 1, 2]))


# What the first look settles.


def borderline(outputs, targets):
    """The mean over the examples while outputs are small; once they are large, something that is no mean over examples."""
    excess = torch.relu(outputs.square().mean() - 1)
    return nn.functional.cross_entropy(outputs, targets) * (1 + (outputs.shape[0] - 1) * excess)


@dataclass(frozen=True)
class Borderline:
    """Blobs under the borderline loss."""

    def build(self, key, *, data_dir=None):
        problem = blobs.Blobs().build(key)
        return Supervised(problem.model, borderline, dataset=problem.dataset, batch_size=16, key=key, name="borderline")


def test_how_a_loss_splits_into_examples_is_the_same_after_resuming(tmp_path):
    settings = TrainSettings(problem="test_bad_batches:Borderline", engine="forward", lr=0.5, optimizer="SGD", steps=12, save_every=6)
    whole = trainer.build(settings)
    trainer.fit(whole, run_folder=tmp_path / "whole")
    broken = trainer.build(settings)
    trainer.fit(broken, run_folder=tmp_path / "broken", on_step=lambda training, row: training.step == 6)
    resumed = trainer.resume(tmp_path / "broken")
    late = Supervised(resumed.problem.model, borderline, dataset=resumed.problem.dataset, batch_size=16)
    late.check_batch(resumed.problem.batch(6, resumed.world))
    assert whole.problem.split_loss == "mean"
    assert late.split_loss != "mean"  # the batch after resuming would have said something else
    trainer.fit(resumed)
    pair = [checkpoint.load_latest(tmp_path / name / "checkpoints").tensors for name in ("whole", "broken")]
    assert all(torch.equal(tensor, pair[1][name]) for name, tensor in pair[0].items())


def test_a_learner_takes_up_how_its_loss_splits():
    first = learner(loss=borderline)
    first.backward(torch.ones(3, 4) * 1e-3, torch.tensor([0, 1, 2]))
    second = learner(loss=borderline)
    second.load_state_dict(first.state_dict())
    second.backward(torch.ones(3, 4) * 1e3, torch.tensor([0, 1, 2]))
    assert second.problem.split_loss == first.problem.split_loss == "mean"
