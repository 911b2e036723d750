"""The problems of the table: what they are built from, and the quadratic's closed form."""

import numpy as np
import pytest
import torch
from torch import nn

from altgrad import registry
from altgrad.engine import Needs
from altgrad.errors import DataError, SettingError, UsageError
from altgrad.problems import TABLE
from altgrad.problems.images import CIFAR10, MNIST, Digits, FashionMNIST
from altgrad.problems.quadratic import Quadratic
from altgrad.rng import Key
from altgrad.world import World


@pytest.fixture(scope="module")
def digits():
    return Digits().build(Key(0))


def double(quadratic, seed=0):
    """Parameters in float64 at a random place."""
    return {"x": torch.from_numpy(np.random.default_rng(seed).normal(size=quadratic.settings.dimension))}


def write_npz(path, shape):
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (count, *shape), dtype=np.uint8) for count in (20, 8)]
    np.savez(path, x_train=images[0], y_train=np.arange(20) % 10, x_test=images[1], y_test=np.arange(8))


@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_name_of_the_table_is_a_dataclass_of_settings_with_defaults_in_its_text(name):
    factory = registry.find("problem", name)
    assert factory.name == name
    assert {"optimizer", "lr", "epochs"} <= set(factory.defaults) <= {"optimizer", "lr", "epochs", "engine", "engine_settings", "schedule"}
    text = " ".join(factory.__doc__.split())
    assert f"{factory.defaults['epochs']} epochs" in text
    assert factory.defaults["optimizer"] in text
    assert f"batch {factory().batch_size}" in text
    assert all(setting["help"] for setting in registry.describe_settings(factory))


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_learning_rate_in_the_text_is_the_default(name):
    factory = registry.find("problem", name)
    stated = factory.__doc__.split("lr ")[1].split(",")[0]
    assert float(stated) == factory.defaults["lr"]


def test_digits_trains_the_64_128_128_10_net_by_default(digits):
    assert [tuple(p.shape) for p in digits.params().values() if p.ndim == 2] == [(128, 64), (128, 128), (10, 128)]


def test_digits_gives_one_loss_per_example(digits):
    batch = digits.batch(0, World())
    losses = digits.losses(digits.params(), batch, digits.buffers())
    reference = nn.functional.cross_entropy(digits.model(batch.inputs), batch.targets, reduction="none")
    assert torch.allclose(losses, reference, atol=1e-6)


def test_an_untrained_net_is_near_chance_and_near_ln_10(digits):
    figures = digits.evaluate(digits.predict)
    assert figures["accuracy"] < 0.35
    assert abs(figures["loss"] - np.log(10)) < 0.3


def test_the_key_decides_weights_and_order():
    one, same, other = (Digits().build(Key(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.params()["0.weight"], same.params()["0.weight"])
    assert torch.equal(one.batch(5, World()).targets, same.batch(5, World()).targets)
    assert not torch.equal(one.params()["0.weight"], other.params()["0.weight"])
    assert not torch.equal(one.batch(5, World()).targets, other.batch(5, World()).targets)


def test_every_key_meets_the_same_split():
    assert torch.equal(Digits().build(Key(1)).dataset.test_inputs, Digits().build(Key(2)).dataset.test_inputs)


def test_batch_size_is_a_setting():
    assert len(Digits(batch_size=17).build(Key(0)).batch(0, World()).targets) == 17


def test_model_settings_go_over_the_problems_own():
    assert Digits().build(Key(0), model_settings={"hidden": "32"}).params()["0.weight"].shape == (32, 64)


def test_another_model_does_not_get_the_default_models_settings():
    assert Digits().build(Key(0), model="gru").params()["1.cell.weight_hh_l0"].shape == (3 * 128, 128)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5])
def test_a_wrong_batch_size_is_refused(batch_size):
    with pytest.raises(SettingError, match="batch_size"):
        Digits(batch_size=batch_size).build(Key(0))


def test_an_unknown_model_is_refused():
    with pytest.raises(UsageError, match="Did you mean 'mlp'"):
        Digits().build(Key(0), model="mpl")


@pytest.mark.parametrize(
    ("factory", "shape", "first"), [(MNIST, (28, 28), (256, 784)), (FashionMNIST, (28, 28), (256, 784)), (CIFAR10, (32, 32, 3), (32, 3, 3, 3))]
)
def test_image_problems_read_data_dir_and_build_their_default_net(tmp_path, factory, shape, first):
    write_npz(tmp_path / f"{factory.name}.npz", shape)
    problem = factory(batch_size=4).build(Key(0), data_dir=tmp_path)
    assert next(iter(problem.params().values())).shape == first
    assert problem.losses(problem.params(), problem.batch(0, World()), problem.buffers()).shape == (4,)


def test_missing_data_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match="altgrad data get fashion-mnist"):
        FashionMNIST().build(Key(0))


def test_the_quadratic_is_zero_at_its_optimum_and_so_is_its_gradient():
    quadratic = Quadratic(dimension=7).build(Key(0))
    at = {"x": quadratic.target.clone()}
    assert quadratic.losses(at, quadratic.batch(0, World()), {}).abs().max() < 1e-12
    assert quadratic.gradient(at)["x"].abs().max() < 1e-12


@pytest.mark.parametrize("noise_std", [0.0, 0.5])
def test_the_analytic_gradient_is_autograds(noise_std):
    quadratic = Quadratic(dimension=9, noise_std=noise_std, batch_size=5).build(Key(1))
    params, batch = double(quadratic), quadratic.batch(3, World())
    params["x"].requires_grad_()
    exact = torch.autograd.grad(quadratic.losses(params, batch, {}).mean(), params["x"])[0]
    assert torch.allclose(quadratic.gradient(params, batch)["x"], exact, rtol=1e-12, atol=1e-12)


def test_the_loss_is_half_the_quadratic_form():
    quadratic = Quadratic(dimension=9).build(Key(1))
    params = double(quadratic)
    offset = params["x"] - quadratic.target
    value = quadratic.losses(params, quadratic.batch(0, World()), {})[0]
    assert torch.allclose(value, 0.5 * offset @ quadratic.gradient(params)["x"], rtol=1e-12)


def test_the_eigenvalues_run_from_one_to_the_condition():
    quadratic = Quadratic(dimension=6, condition=50.0).build(Key(2))
    hessian = torch.stack([quadratic.hessian_times(row) for row in torch.eye(6, dtype=torch.float64)])
    expected = torch.logspace(0, np.log10(50.0), 6, dtype=torch.float64)
    assert torch.allclose(torch.linalg.eigvalsh(hessian), expected, rtol=1e-10)


def test_the_hessian_is_not_diagonal():
    quadratic = Quadratic(dimension=6, condition=50.0).build(Key(2))
    hessian = torch.stack([quadratic.hessian_times(row) for row in torch.eye(6, dtype=torch.float64)])
    assert (hessian - hessian.diag().diag()).abs().max() > 1


def test_noise_has_the_stated_deviation():
    terms = Quadratic(dimension=100, noise_std=0.3, batch_size=200).build(Key(0)).batch(0, World()).inputs
    assert abs(terms.std() - 0.3) < 4 * 0.3 / np.sqrt(2 * terms.numel())  # 4 standard errors


def test_noise_is_a_function_of_key_and_step():
    quadratic = Quadratic(noise_std=1.0).build(Key(4))
    assert torch.equal(quadratic.batch(2, World()).inputs, Quadratic(noise_std=1.0).build(Key(4)).batch(2, World()).inputs)
    assert not torch.equal(quadratic.batch(2, World()).inputs, quadratic.batch(3, World()).inputs)


def test_ranks_share_the_batch_of_one_process():
    quadratic = Quadratic(noise_std=1.0, batch_size=7).build(Key(4))
    parts = [quadratic.batch(2, World(rank=rank, size=3)) for rank in range(3)]
    assert torch.equal(torch.cat([part.inputs for part in parts]), quadratic.batch(2, World()).inputs)
    assert [part.first for part in parts] == [0, 2, 4]


def test_gradient_descent_reaches_the_optimum():
    quadratic = Quadratic(dimension=5, condition=4.0).build(Key(0))
    params = quadratic.params()
    for _ in range(200):
        params = {"x": params["x"].detach() - 0.25 * quadratic.gradient(params)["x"].detach()}
    assert torch.allclose(params["x"], quadratic.optimum["x"], atol=1e-5)


def test_the_quadratic_evaluates_without_noise():
    quadratic = Quadratic(noise_std=3.0).build(Key(0))
    at = quadratic.optimum
    assert abs(quadratic.evaluate(lambda inputs: quadratic.forward(at, inputs, {}))["loss"]) < 1e-9


def test_the_quadratic_provides_value_tangent_and_reverse():
    assert Quadratic().build(Key(0)).provides == Needs.VALUE | Needs.TANGENT | Needs.REVERSE


def test_a_condition_of_one_and_one_dimension_work():
    quadratic = Quadratic(dimension=1, condition=1.0).build(Key(0))
    assert torch.allclose(quadratic.gradient(double(quadratic))["x"], double(quadratic)["x"] - quadratic.target)


@pytest.mark.parametrize("wrong", [{"dimension": 0}, {"condition": 0.5}, {"condition": float("inf")}, {"noise_std": -1.0}, {"batch_size": 0}])
def test_a_quadratic_out_of_range_is_refused(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        Quadratic(**wrong)


def test_the_quadratic_has_no_model_to_choose():
    with pytest.raises(UsageError, match="quadratic has no model"):
        Quadratic().build(Key(0), model="mlp")
