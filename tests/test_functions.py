"""altgrad.grad and altgrad.value_and_grad on functions that are no networks."""

import pytest
import torch
from tolerances import tolerance

import altgrad
from altgrad import Key
from altgrad.errors import CapabilityError, NumericsError, SettingError, ShapeError, UsageError

POINT = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)
ALL = {"backprop": {"engine": "backprop"}, "weights": {"space": "weights", "tangents": 3, "combine": "orthogonal"}}  # 3 tangents span all of R³


def bowl(x):
    return (x.square() * torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)).sum() + x.prod()


def slope(x):
    return torch.func.grad(bowl)(x)


@pytest.mark.parametrize("settings", ALL.values(), ids=ALL)
def test_the_gradient_has_the_shape_of_torch_func_grad(settings):
    found = altgrad.grad(bowl, **settings)(POINT)
    assert found.shape == POINT.shape
    assert found.dtype == POINT.dtype
    assert torch.allclose(found, slope(POINT), rtol=tolerance("oracle64"))


@pytest.mark.parametrize("settings", [{}, {"space": "weights"}], ids=str)
def test_the_mean_over_keys_is_the_gradient(settings):
    estimate = altgrad.grad(bowl, tangents=16, **settings)
    drawn = torch.stack([estimate(POINT, key=Key(3, step)) for step in range(60)])
    error = drawn.std(0) / 60**0.5
    assert ((drawn.mean(0) - slope(POINT)).abs() <= tolerance("standard_errors") * error).all()


def test_the_key_addresses_the_noise():
    estimate = altgrad.grad(bowl)
    assert torch.equal(estimate(POINT, key=Key(1)), estimate(POINT, key=Key(1)))
    assert not torch.equal(estimate(POINT, key=Key(1)), estimate(POINT, key=Key(2)))
    assert not torch.equal(estimate(POINT, key=Key(1)), estimate(POINT, key=Key(1, 1)))


def test_value_and_grad_gives_the_value_too():
    value, found = altgrad.value_and_grad(bowl, engine="backprop")(POINT)
    assert float(value) == pytest.approx(float(bowl(POINT)))
    assert torch.allclose(found, slope(POINT))


def test_pytrees_come_back_in_their_own_form():
    tree = {"a": (POINT, [POINT * 2]), "b": POINT.sum()}

    def function(tree):
        return bowl(tree["a"][0]) + 3 * tree["a"][1][0].sum() + tree["b"] ** 2

    found, expected = altgrad.grad(function, engine="backprop")(tree), torch.func.grad(function)(tree)
    assert torch.allclose(found["a"][0], expected["a"][0])
    assert isinstance(found["a"][1], list)
    assert torch.allclose(found["a"][1][0], expected["a"][1][0])
    assert torch.allclose(found["b"], expected["b"])


def test_a_leaf_that_the_function_does_not_touch_gets_zeros():
    found = altgrad.grad(lambda tree: bowl(tree["used"]))({"used": POINT, "unused": POINT})
    assert torch.equal(found["unused"], torch.zeros_like(POINT))
    assert found["used"].abs().sum() > 0


@pytest.mark.parametrize("settings", ALL.values(), ids=ALL)
def test_argnums_says_which_argument_varies(settings):
    found = altgrad.grad(lambda scale, x: scale * bowl(x), argnums=1, **settings)(2.0, POINT)
    assert torch.allclose(found, 2 * slope(POINT), rtol=tolerance("oracle64"))


def test_keyword_arguments_are_passed_on():
    found = altgrad.grad(lambda x, *, scale: scale * bowl(x), engine="backprop")(POINT, scale=3.0)
    assert torch.allclose(found, 3 * slope(POINT))


@pytest.mark.parametrize("engine", ["backprop", "forward"])
def test_aux_is_handed_back_beside_the_gradient(engine):
    def function(x):
        return bowl(x), {"label": "kept", "count": 2}

    found, aux = altgrad.grad(function, engine=engine, has_aux=True)(POINT)
    (value, also), again = altgrad.value_and_grad(function, engine=engine, has_aux=True)(POINT)
    assert aux == also == {"label": "kept", "count": 2}
    assert float(value) == pytest.approx(float(bowl(POINT)))
    assert torch.equal(found, again)


@pytest.mark.parametrize("engine", ["backprop", "forward", "es", "eggroll", "spsa", "ask-tell"])
def test_aux_of_tensors_carries_neither_graph_nor_tangents(engine):
    _, aux = altgrad.grad(lambda x: (bowl(x), x * 2), engine=engine, has_aux=True)(POINT)
    assert type(aux) is torch.Tensor
    assert not aux.requires_grad
    assert torch.equal(aux, POINT * 2)


def test_the_argument_is_left_as_it_was():
    x = POINT.clone().requires_grad_()
    found = altgrad.grad(bowl)(x)
    assert x.grad is None
    assert not found.requires_grad
    assert torch.equal(x.detach(), POINT)


def test_a_function_of_integers_is_refused():
    with pytest.raises(ShapeError, match=r"leaf 1 of argument 0 is torch\.int64"):
        altgrad.grad(lambda tree: tree[0].sum())((POINT, torch.arange(3)))


def test_a_function_that_gives_no_scalar_is_refused():
    with pytest.raises(ShapeError, match=r"returned \(3,\)"):
        altgrad.grad(lambda x: x * 2, engine="backprop")(POINT)


def test_a_function_that_gives_no_tensor_is_refused():
    with pytest.raises(ShapeError, match="returned float"):
        altgrad.grad(lambda x: 1.0)(POINT)


@pytest.mark.parametrize("engine", ["backprop", "forward"])
def test_a_value_that_is_not_finite_is_refused(engine):
    with pytest.raises(NumericsError, match=f"inf in {engine}"):
        altgrad.grad(lambda x: (1 / (x - x)).abs().sum(), engine=engine)(POINT)


def test_an_unknown_engine_is_refused_when_it_is_named():
    with pytest.raises(UsageError, match="Did you mean 'forward'"):
        altgrad.grad(bowl, engine="forwards")


def test_an_unknown_setting_is_refused_when_it_is_named():
    with pytest.raises(SettingError, match="Did you mean 'tangents'"):
        altgrad.grad(bowl, tangent=2)


def test_an_engine_that_needs_labels_is_refused():
    class Labelled(altgrad.Engine):
        needs = altgrad.Needs.LABELS

    with pytest.raises(CapabilityError, match="needs LABELS"):
        altgrad.grad(bowl, engine=Labelled())(POINT)


def test_local_guesses_have_no_layers_to_guide_in_a_function():
    with pytest.raises(CapabilityError, match="guess='random'"):
        altgrad.grad(bowl, guess="local")(POINT)


def test_minimising_with_estimates_finds_the_minimum():
    x = torch.zeros(3)
    estimate = altgrad.grad(lambda x: (x - 1).square().sum(), tangents=4)
    for step in range(150):
        x = x - 0.1 * estimate(x, key=Key(0, step))
    assert torch.allclose(x, torch.ones(3), atol=1e-3)  # the noise shrinks with the gradient


def test_an_engine_that_trains_something_else_is_refused_by_grad():
    with pytest.raises(CapabilityError, match=r"subspace\.z"):
        altgrad.grad(lambda p: (p * p).sum(), engine="random-subspace", dimension=2)(torch.ones(5))
