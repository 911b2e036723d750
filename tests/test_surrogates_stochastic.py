"""Random choices: bias by enumeration of every outcome, by quadrature and by samples; addressed noise; every transform."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance

from altgrad import surrogates
from altgrad.errors import SettingError, ShapeError, UsageError
from altgrad.kernels import noise
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers

EXACT = tolerance("closed_form64")
ERRORS = tolerance("standard_errors")
KEY = Key(5, 2)
LOGITS = torch.tensor([0.3, -0.8, 1.1, 0.0, -0.2, 0.7], dtype=torch.float64)
CATEGORICAL = ["straight-through", "gumbel-softmax", "reinmax"]
MATRIX = noise.draw("normal", KEY, 7, [0], (6, 6), dtype=torch.float64)[0]
VECTOR = MATRIX[0]
LOSSES = {
    "linear": lambda d: d @ VECTOR,
    "quadratic": lambda d: (d @ MATRIX * d).sum(-1) + d @ VECTOR,
    "separable quadratic": lambda d: ((d - VECTOR) ** 2).sum(-1),
    "cubic": lambda d: (d @ VECTOR) ** 3,
    "exponential": lambda d: torch.exp(d @ VECTOR),
}


def outcome(index, logits=LOGITS):
    """Noise under which a class is drawn."""
    u = torch.full_like(logits, 1e-3)
    u[..., index] = 1 - 1e-9
    return u


def bias(estimator, loss, logits=LOGITS):
    """‖E ĝ - ∇E f(D)‖, the mean over every outcome with its probability."""
    p, found = torch.softmax(logits, -1), torch.zeros_like(logits)
    theta = logits.clone().requires_grad_()
    value = sum(torch.softmax(theta, -1)[k] * loss(torch.eye(6, dtype=torch.float64)[k]) for k in range(6))
    wanted = torch.autograd.grad(value, theta)[0]
    for k in range(6):
        theta = logits.clone().requires_grad_()
        sample = estimator(theta, noise=outcome(k))
        assert int(sample.argmax()) == k
        found += p[k] * torch.autograd.grad(loss(sample), theta)[0]
    return float((found - wanted).norm())


# -- bias by enumeration -----------------------------------------------------------------------------------------------------------


def test_straight_through_is_unbiased_for_linear_losses_and_for_no_others():
    estimator = surrogates.get("straight-through")
    assert bias(estimator, LOSSES["linear"]) <= EXACT
    assert all(bias(estimator, LOSSES[name]) > 1e-2 for name in LOSSES if name != "linear")


def test_reinmax_is_unbiased_for_quadratic_losses_and_for_no_higher_ones():
    estimator = surrogates.get("reinmax")
    assert all(bias(estimator, LOSSES[name]) <= EXACT for name in ("linear", "quadratic", "separable quadratic"))
    assert all(bias(estimator, LOSSES[name]) > 1e-2 for name in ("cubic", "exponential"))


def test_reinmax_is_biased_at_a_higher_temperature_even_for_linear_losses():
    assert bias(surrogates.get("reinmax", tau=1.3), LOSSES["linear"]) > 1e-2


def test_gumbel_softmax_has_the_derivative_of_torchs_own():
    u = noise.draw("uniform", KEY, 3, [0], (4, 6), dtype=torch.float64)[0]
    theta = noise.draw("normal", KEY, 4, [0], (4, 6), dtype=torch.float64)[0].requires_grad_()
    sample = surrogates.get("gumbel-softmax", tau=0.7)(theta, noise=u)
    soft = torch.softmax((theta - torch.log(-torch.log(u))) / 0.7, -1)
    weights = MATRIX[:4]
    own, wanted = (torch.autograd.grad((y * weights).sum(), theta)[0] for y in (sample, soft))
    assert torch.equal(sample.detach(), F.one_hot(soft.argmax(-1), 6).double())
    assert (own - wanted).abs().max() <= EXACT


# -- REBAR and RELAX ---------------------------------------------------------------------------------------------------------------


def binary_gradient(estimator, loss, logits, residual=None, pieces=200):
    """E ĝ of a choice between two, by quadrature. Every term depends on its exponentials' ratio alone, r = e₀ / (e₀ + e₁), which is uniform."""
    x, w = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(pieces))
    p = torch.softmax(logits, -1)
    edge = float(p[0])  # class 0 is drawn where e₀ / p₀ < e₁ / p₁, which is r < p₀
    total = torch.zeros_like(logits)
    half = 0.5 * (x + 1), 0.5 * w
    for low, high in ((0.0, edge), (edge, 1.0)):  # z, and with it the class
        r, weight = low + (high - low) * half[0], (high - low) * half[1]
        u = torch.exp(-torch.stack([r, 1 - r], -1))  # [pieces, 2]
        v = torch.exp(-torch.stack([half[0], 1 - half[0]], -1))
        first, second = (part.reshape(-1, 2) for part in (u[:, None].expand(-1, pieces, -1), v[None].expand(pieces, -1, -1)))
        theta = logits.expand(len(first), 2).clone().requires_grad_()
        value = estimator(theta, loss=loss, noise=(first, second), residual=residual)
        each = torch.autograd.grad(value.sum(), theta)[0]
        total += ((weight[:, None] * half[1][None]).reshape(-1, 1) * each).sum(0)
    return total


def test_the_quadrature_of_a_constant_is_one():
    w = np.polynomial.legendre.leggauss(200)[1]
    assert abs(w.sum() / 2 - 1) < 1e-13


@pytest.mark.parametrize("name", ["linear", "quadratic", "cubic", "exponential"])
def test_rebar_and_relax_are_unbiased_for_every_loss_by_quadrature(name):
    a = torch.tensor([0.9, -0.4], dtype=torch.float64)
    loss = {
        "linear": lambda d: d @ a,
        "quadratic": lambda d: (d @ a) ** 2 + d[..., 0] * d[..., 1],
        "cubic": lambda d: (d @ a) ** 3,
        "exponential": lambda d: torch.exp(2 * d @ a),
    }[name]
    logits = torch.tensor([0.4, -0.3], dtype=torch.float64)
    theta = logits.clone().requires_grad_()
    p = torch.softmax(theta, -1)
    wanted = torch.autograd.grad(p[0] * loss(torch.tensor([1.0, 0.0]).double()) + p[1] * loss(torch.tensor([0.0, 1.0]).double()), theta)[0]
    for estimator, residual in (
        (surrogates.get("rebar", temperature=1.0), None),
        (surrogates.get("rebar", temperature=0.5, eta=0.6), None),
        (surrogates.get("relax", temperature=1.0, eta=-0.3), lambda z: torch.tanh(torch.softmax(z, -1) @ a)),
    ):
        assert (binary_gradient(estimator, loss, logits, residual) - wanted).abs().max() <= EXACT


@pytest.mark.parametrize("name", ["rebar", "relax"])
def test_with_six_classes_the_mean_of_samples_is_the_gradient(name):
    residual = (lambda z: torch.tanh(z @ VECTOR)) if name == "relax" else None
    count, loss = 40000, LOSSES["cubic"]
    theta = LOGITS.expand(count, 6).clone().requires_grad_()
    each = torch.autograd.grad(surrogates.get(name)(theta, loss=loss, key=KEY, residual=residual).sum(), theta)[0]
    one = LOGITS.clone().requires_grad_()
    wanted = torch.autograd.grad((torch.softmax(one, -1) * loss(torch.eye(6, dtype=torch.float64))).sum(), one)[0]
    assert ((each.mean(0) - wanted).abs() <= ERRORS * each.std(0) / math.sqrt(count)).all()


def test_the_control_variate_takes_noise_away():
    theta = LOGITS.expand(20000, 6).clone().requires_grad_()
    noise_of = [
        float(torch.autograd.grad(surrogates.get("rebar", eta=eta)(theta, loss=LOSSES["separable quadratic"], key=KEY).sum(), theta)[0].var(0).sum())
        for eta in (0.0, 1.0)
    ]
    assert noise_of[1] < 0.1 * noise_of[0]


def test_rebars_value_is_the_loss_of_the_sample():
    u, v = outcome(3), outcome(1)
    assert float(surrogates.get("rebar")(LOGITS, loss=LOSSES["cubic"], noise=(u, v))) == float(LOSSES["cubic"](torch.eye(6, dtype=torch.float64)[3]))


# -- rounding ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "x", "mean"), [("stochastic-rounding", 1.3, 1.3), ("stochastic-rounding", -0.75, -0.75), ("stochastic-sign", 0.4, 0.4)])
def test_the_mean_over_all_noise_is_the_number_itself(name, x, mean):
    u = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    assert float(surrogates.get(name)(torch.full_like(u, x), noise=u).mean()) == pytest.approx(mean, abs=EXACT)


def test_rounding_gives_one_of_the_two_levels_around_a_number():
    values = surrogates.get("stochastic-rounding", step=0.25)(torch.full((1000,), 0.35, dtype=torch.float64), key=KEY)
    assert values.unique().tolist() == [0.25, 0.5]


def test_a_random_sign_is_binary_and_certain_beyond_one():
    values = surrogates.get("stochastic-sign")(torch.tensor([-3.0, 0.0, 3.0]).expand(500, 3), key=KEY)
    assert set(values.unique().tolist()) == {-1.0, 1.0}
    assert values[:, 0].unique().tolist() == [-1.0]
    assert values[:, 2].unique().tolist() == [1.0]


@pytest.mark.parametrize(("name", "wanted"), [("stochastic-rounding", [1.0, 1.0, 1.0, 1.0, 1.0]), ("stochastic-sign", [0.0, 1.0, 1.0, 1.0, 0.0])])
def test_the_derivative_is_that_of_the_mean(name, wanted):
    x = torch.tensor([-2.0, -1.0, 0.1, 1.0, 2.0], dtype=torch.float64)
    estimator = surrogates.get(name)
    for found in (
        torch.func.grad(lambda x: estimator(x, key=KEY).sum())(x),
        torch.func.jvp(lambda x: estimator(x, key=KEY), (x,), (torch.ones_like(x),))[1],
        torch.func.vmap(torch.func.grad(lambda x: estimator(x, key=KEY)))(x),
    ):
        assert found.tolist() == wanted


# -- noise and transforms ----------------------------------------------------------------------------------------------------------

DRAWING = [*CATEGORICAL, "stochastic-rounding", "stochastic-sign"]


@pytest.mark.parametrize("name", DRAWING)
def test_noise_is_addressed_and_the_global_generator_left_alone(name):
    estimator, x = surrogates.get(name), torch.full((200, 3), 0.3)
    before = torch.get_rng_state()
    first, again, other = (estimator(x, key=key) for key in (KEY, KEY, KEY.at(9)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", DRAWING)
def test_within_an_engines_pass_no_key_is_needed(name):
    estimator, x = surrogates.get(name), torch.full((200, 3), 0.3)
    with AddressedSamplers(KEY, examples=200):
        first, second = estimator(x), estimator(x)
    with AddressedSamplers(KEY, examples=200):
        again = estimator(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", [*DRAWING, "rebar"])
def test_without_an_address_nothing_is_drawn(name):
    given = {"loss": LOSSES["linear"]} if name == "rebar" else {}
    with pytest.raises(UsageError, match=r"key=altgrad\.Key"):
        surrogates.get(name)(LOGITS, **given)


def test_classes_are_drawn_as_often_as_their_probability_says():
    count = 40000
    drawn = surrogates.get("reinmax")(LOGITS.expand(count, 6), key=KEY).mean(0)
    p = torch.softmax(LOGITS, -1)
    assert ((drawn - p).abs() <= ERRORS * (p * (1 - p) / count).sqrt()).all()


@pytest.mark.parametrize("name", CATEGORICAL)
def test_forward_mode_is_the_transpose_of_reverse_mode(name):
    estimator, u = surrogates.get(name), noise.draw("uniform", KEY, 8, [0], (6,), dtype=torch.float64)[0]
    forward = torch.func.jacfwd(lambda t: estimator(t, noise=u))(LOGITS)
    backward = torch.func.jacrev(lambda t: estimator(t, noise=u))(LOGITS)
    assert (forward - backward).abs().max() <= EXACT
    assert forward.abs().max() > 0.05


@pytest.mark.parametrize("name", CATEGORICAL)
def test_rows_are_drawn_and_differentiated_each_for_itself(name):
    estimator = surrogates.get(name)
    theta, u = torch.stack([LOGITS, -LOGITS]), torch.stack([outcome(1), outcome(4)])
    together = torch.func.grad(lambda t: LOSSES["cubic"](estimator(t, noise=u)).sum())(theta)
    each = torch.func.vmap(torch.func.grad(lambda t, u: LOSSES["cubic"](estimator(t, noise=u))))(theta, u)
    assert (together - each).abs().max() <= EXACT


def test_compiled_functions_give_the_same_samples_and_gradients():
    estimators, u = [surrogates.get(name) for name in DRAWING], torch.stack([outcome(1), outcome(4)])
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: [estimator(x, noise=u) for estimator in estimators], fullgraph=True, backend="eager")
    x = torch.stack([LOGITS, -LOGITS]).requires_grad_()
    for estimator, y in zip(estimators, compiled(x), strict=True):
        plain = estimator(x, noise=u)
        assert torch.equal(y, plain), estimator
        assert torch.equal(*(torch.autograd.grad(found.square().sum() + found[..., 0].sum(), x)[0] for found in (y, plain))), estimator


# -- mistakes ----------------------------------------------------------------------------------------------------------------------


def test_settings_and_shapes_are_refused():
    with pytest.raises(SettingError, match="tau"):
        surrogates.get("reinmax", tau=0.5)
    with pytest.raises(SettingError, match="temperature"):
        surrogates.get("rebar", temperature=0)
    with pytest.raises(SettingError, match="two classes or more"):
        surrogates.get("reinmax")(LOGITS[:1], key=KEY)
    with pytest.raises(ShapeError, match="noise given to reinmax"):
        surrogates.get("reinmax")(LOGITS, noise=torch.rand(3))
    with pytest.raises(ShapeError, match="the loss gave shape"):
        surrogates.get("relax")(LOGITS, loss=lambda d: d, key=KEY)
