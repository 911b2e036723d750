"""The 0/1 objective: what it counts, that nobody is offered a gradient of it, and that it works member by member under vmap."""

import numpy as np
import pytest
import torch

from altgrad.engine import Needs
from altgrad.errors import SettingError, UsageError
from altgrad.problems.accuracy import Accuracy, error_of_each
from altgrad.problems.images import Digits
from altgrad.rng import Key
from altgrad.world import World


@pytest.fixture(scope="module")
def problem():
    return Accuracy(batch_size=64).build(Key(0))


def moved(problem, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for name, p in problem.params().items()}


def test_the_loss_is_one_where_the_answer_is_wrong_and_zero_where_it_is_right():
    outputs = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]])
    assert error_of_each(outputs, torch.tensor([1, 1, 0])).tolist() == [0.0, 1.0, 1.0]


def test_the_batch_loss_is_one_minus_its_accuracy(problem):
    batch = problem.batch(0, World())
    right = (problem.model(batch.inputs).argmax(1) == batch.targets).float().mean()
    assert torch.isclose(problem.losses(problem.params(), batch, {}).mean(), 1 - right)


def test_losses_under_vmap_are_those_of_a_loop(problem):
    batch, members = problem.batch(0, World()), [moved(problem, seed) for seed in range(3)]
    stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}
    together = torch.func.vmap(lambda params: problem.losses(params, batch, {}))(stacked)
    apart = torch.stack([problem.losses(member, batch, {}) for member in members])
    assert together.shape == (3, 64)
    assert torch.equal(together, apart)
    assert len(apart.mean(1).unique()) == 3


def test_losses_under_vmap_agree_before_a_first_check_of_a_batch():
    fresh = Accuracy(batch_size=8).build(Key(0))
    batch, params = fresh.batch(0, World()), moved(fresh, 0)
    together = torch.func.vmap(lambda params: fresh.losses(params, batch, {}))({name: p[None] for name, p in params.items()})
    assert torch.equal(together[0], fresh.losses(params, batch, {}))


def test_the_problem_provides_values_and_no_gradient(problem):
    assert Needs.VALUE in problem.provides
    assert not problem.provides & (Needs.TANGENT | Needs.REVERSE)


def test_evaluation_is_that_of_the_digits_problem_with_the_error_as_its_loss(problem):
    found = problem.evaluate(problem.predict)
    plain = Digits(batch_size=64).build(Key(0))
    assert found["accuracy"] == plain.evaluate(plain.predict)["accuracy"]
    assert found["loss"] == pytest.approx(1 - found["accuracy"])


def test_weights_and_order_are_those_of_the_digits_problem(problem):
    plain = Digits(batch_size=64).build(Key(0))
    assert all(torch.equal(problem.params()[name], p) for name, p in plain.params().items())
    assert torch.equal(problem.batch(3, World()).inputs, plain.batch(3, World()).inputs)


def test_the_check_of_a_first_batch_passes(problem):
    problem.check_batch(problem.batch(0, World()))


def test_the_data_set_is_a_setting_and_brings_its_own_model(tmp_path):
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8) for count in (20, 8)]
    np.savez(tmp_path / "cifar10.npz", x_train=images[0], y_train=np.arange(20) % 10, x_test=images[1], y_test=np.arange(8))
    problem = Accuracy(dataset="cifar10", batch_size=4).build(Key(0), data_dir=tmp_path)
    assert isinstance(problem.model[0], torch.nn.Conv2d)
    assert problem.losses(problem.params(), problem.batch(0, World()), {}).shape == (4,)


def test_the_model_can_be_chosen():
    problem = Accuracy(model="mlp").build(Key(0), model_settings={"hidden": "16"})
    assert [tuple(p.shape) for p in problem.params().values() if p.ndim == 2] == [(16, 64), (10, 16)]


def test_an_unknown_data_set_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'digits'"):
        Accuracy(dataset="digts")


def test_an_empty_batch_is_refused():
    with pytest.raises(SettingError, match="batch_size=0"):
        Accuracy(batch_size=0)
