"""Pointwise surrogates: closed forms, primitives, limits, every transform, every dtype; the numbers are those of the papers' formulas, by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from tolerances import tolerance

import altgrad
from altgrad import surrogates
from altgrad.errors import SettingError, UsageError
from altgrad.metrics import saved_bytes

POINTS = torch.tensor([-2, -1.5, -1, -0.5, -0.1, -0.05, 0, 0.05, 0.1, 0.5, 1, 1.5, 2], dtype=torch.float64)
NAMES = surrogates.names("pointwise")
SIGNS = surrogates.names("pointwise", operation="sign")
EXACT = tolerance("closed_form64")
OTHERS = {
    "clipped,width=0.75": lambda x: float(abs(x) <= 0.75),
    "swish-sign,beta=2": lambda x: 2 * (2 - 2 * x * math.tanh(x)) / (1 + math.cosh(2 * x)),
    "ede,t=0.01": lambda x: 1 - math.tanh(0.01 * x) ** 2,
    "ede,t=10": lambda x: 10 * (1 - math.tanh(10 * x) ** 2),
    "reste,o=1": lambda x: float(abs(x) <= 1.5),
    "reste,o=2,t=1,m=0.2": lambda x: 0.2**-0.5 if abs(x) <= 0.2 else 0.5 * abs(x) ** -0.5 if abs(x) <= 1 else 0.0,
    "biper,omega=3": lambda x: 3 * math.cos(3 * x),
    "triangle,alpha=2": lambda x: max(0.0, 2 - 4 * abs(x)),
    "dsq,alpha=0.5": lambda x: math.log(3) * (1 - math.tanh(math.log(3) / 2 * x) ** 2) if abs(x) <= 1 else 0.0,
    "round,low=-1,high=1": lambda x: float(abs(x) <= 1),
}
CLOSED = {
    "identity": lambda x: 1.0,
    "clipped": lambda x: float(abs(x) <= 1),
    "bireal": lambda x: 2 - 2 * abs(x) if abs(x) <= 1 else 0.0,
    "swish-sign": lambda x: 5 * (2 - 5 * x * math.tanh(5 * x / 2)) / (1 + math.cosh(5 * x)),
    "ede": lambda x: 1 - math.tanh(x) ** 2,
    "reste": lambda x: 0.1 ** (-2 / 3) if abs(x) <= 0.1 else abs(x) ** (-2 / 3) / 3 if abs(x) <= 1.5 else 0.0,
    "biper": lambda x: 20 * math.cos(20 * x),
    "atan": lambda x: 1 / (1 + (math.pi * x) ** 2),
    "sigmoid": lambda x: 4 * math.exp(-4 * x) / (1 + math.exp(-4 * x)) ** 2,
    "triangle": lambda x: max(0.0, 1 - abs(x)),
    "fast-sigmoid": lambda x: 1 / (1 + 25 * abs(x)) ** 2,
    "erf": lambda x: 2 / math.sqrt(math.pi) * math.exp(-4 * x * x),
    "exponential": lambda x: math.exp(-2 * abs(x)),
    "rectangle": lambda x: float(abs(x) <= 0.5),
    "dsq": lambda x: math.log(9) / 2 / 0.8 * (1 - math.tanh(math.log(9) / 2 * x) ** 2) if abs(x) <= 1 else 0.0,
    "round": lambda x: 1.0,
    "ternary": lambda x: float(abs(x) <= 1),
}
KNOWN = {  # (estimator, x) -> h(x), printed in or worked out from the papers
    ("bireal", 0.0): 2.0,
    ("bireal", 0.25): 1.5,
    ("bireal", 0.5): 1.0,
    ("bireal", 1.0): 0.0,
    ("swish-sign", 0.0): 5.0,
    ("swish-sign", 0.25): 2.262047,
    ("swish-sign", 0.5): -0.084622,
    ("ede", 0.0): 1.0,
    ("ede", 0.5): 0.786448,
    ("ede", 1.0): 0.419974,
    ("ede,t=10", 0.0): 10.0,
    ("ede,t=10", 0.25): 0.265922,
    ("atan", 0.0): 1.0,
    ("atan", 0.25): 0.618486,
    ("atan", 0.5): 0.288400,
    ("sigmoid", 0.0): 1.0,
    ("reste,o=2", 0.0): 3.162278,
    ("reste,o=2", 0.5): 0.707107,
    ("reste,o=2", 1.0): 0.5,
    ("reste,o=2", 1.5): 0.408248,
    ("reste,o=2", 1.5001): 0.0,
    ("reste,o=3", 0.0): 4.641589,
    ("reste,o=3", 0.5): 0.529134,
    ("reste,o=3", 1.0): 0.333333,
    ("reste,o=3", 1.5): 0.254381,
    ("reste,o=3", 1.5001): 0.0,
    ("biper", 0.0): 20.0,
    ("biper", math.pi / 80): 14.142136,
    ("biper", math.pi / 40): 0.0,
    ("biper", math.pi / 20): -20.0,
}


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def slope(estimator, x):
    """h by autograd."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(estimator(x).sum(), x)[0]


def grid(estimator, *, low=-3.0, high=3.0, count=601):
    """Points away from the kinks."""
    x = torch.linspace(low, high, count, dtype=torch.float64) + 1.3e-4
    near = torch.tensor([*estimator.kinks, 1e9], dtype=torch.float64)
    return x[(x[:, None] - near).abs().amin(1) > 1e-3]


def area(estimator, low, high, pieces=400):
    """∫ h by Gauss-Legendre between kinks."""
    edges = sorted({low, high, *(kink for kink in estimator.kinks if low < kink < high)})
    x, w = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(pieces))
    total = 0.0
    for a, b in itertools.pairwise(edges):
        inner = 0.5 * (b - a) * x + 0.5 * (a + b)
        total += float((estimator.derivative(inner) * w).sum()) * 0.5 * (b - a)
    return total


# -- what they are -----------------------------------------------------------------------------------------------------------------


def test_there_are_at_least_twelve_and_every_one_has_a_closed_form_here():
    assert len(NAMES) >= 12
    assert set(NAMES) == set(CLOSED)


@pytest.mark.parametrize("name", [*CLOSED, *OTHERS])
def test_the_derivative_is_the_closed_form_at_thirteen_points(name):
    wanted = double([{**CLOSED, **OTHERS}[name](x) for x in POINTS.tolist()])
    assert (slope(surrogates.get(name), POINTS) - wanted).abs().max() <= EXACT * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize(("name", "x"), KNOWN, ids=[f"{name}-{x:.4g}" for name, x in KNOWN])
def test_known_values(name, x):
    assert float(slope(surrogates.get(name), double([x]))) == pytest.approx(KNOWN[name, x], abs=5e-7)


def test_swish_changes_its_sign_where_the_paper_says():
    h = surrogates.get("swish-sign").derivative
    assert h(double(0.47986)) > 0 > h(double(0.47988))


@pytest.mark.parametrize("name", [*CLOSED, *OTHERS])
def test_the_derivative_is_that_of_the_primitive_by_finite_differences(name):
    estimator = surrogates.get(name)
    x, step = grid(estimator), 1e-5
    difference = (estimator.primitive(x + step) - estimator.primitive(x - step)) / (2 * step)
    assert (difference - estimator.derivative(x)).abs().max() <= 1e-4 * max(1.0, float(difference.abs().max()))


@pytest.mark.parametrize("name", [*CLOSED, *OTHERS])
def test_the_primitive_is_continuous_at_kinks(name):
    estimator = surrogates.get(name)
    kinks = double(estimator.kinks or [0.0])
    assert (estimator.primitive(kinks + 1e-9) - estimator.primitive(kinks - 1e-9)).abs().max() <= 1e-7


@pytest.mark.parametrize(
    ("name", "high", "wanted"),
    [
        ("clipped", 1, 1.0),
        ("bireal", 1, 1.0),
        ("triangle", 1, 0.5),
        ("rectangle", 1, 0.5),
        *((f"reste,o={o}", 1, 1.0) for o in (1, 2, 3, 7)),
        ("dsq", 1, 1.0),
        ("sigmoid", 20, 0.5),
        ("erf", 20, 0.5),
        ("exponential", 20, 0.5),
        ("swish-sign", 20, 1.0),
        ("ede,t=10", 20, 1.0),
    ],
)
def test_area_over_the_positive_axis(name, high, wanted):
    assert area(surrogates.get(name), 0, high) == pytest.approx(wanted, abs=1e-9)


def test_the_arctangents_area_over_the_positive_axis_is_a_half():
    assert area(surrogates.get("atan"), 0, 20, 300) == pytest.approx(0.5 - math.atan(1 / (20 * math.pi)) / math.pi, abs=1e-9)  # what lies beyond 20


# -- limits and schedules ----------------------------------------------------------------------------------------------------------


def test_reste_with_power_one_is_the_identity_up_to_t():
    assert torch.equal(slope(surrogates.get("reste", o=1), POINTS), (POINTS.abs() <= 1.5).double())


def test_ede_that_is_not_sharp_is_the_identity():
    assert (slope(surrogates.get("ede", t=1e-6), POINTS) - 1).abs().max() < 1e-10


def test_primitives_of_sharp_estimators_are_the_sign():
    x = double([-2.0, -0.5, 0.5, 2.0])
    assert (surrogates.get("ede", t=100).primitive(x) - x.sign()).abs().max() < 1e-12
    assert (surrogates.get("dsq", alpha=1e-9).primitive(x) - x.sign()).abs().max() < 1e-3
    assert (surrogates.get("reste", o=1e6).soft_sign(x) - x.sign()).abs().max() < 1e-5


def test_bipers_sine_is_as_far_from_its_sign_at_every_frequency():
    for omega in (3.0, 20.0):
        estimator = surrogates.get("biper", omega=omega)
        x = (torch.arange(100000, dtype=torch.float64) + 0.5) / 100000 * 2 * math.pi / omega
        gap = (estimator.primitive(x) - estimator.value(x)).square().mean()
        assert float(gap) == pytest.approx(0.226760, abs=1e-6)
        assert abs(estimator.QUANTISATION_ERROR - 0.226760) < 1e-6


def test_bipers_penalty_is_the_mean_square_of_the_sine():
    assert float(surrogates.get("biper", omega=2).penalty(double([math.pi / 4, 0.0]))) == pytest.approx(0.5)


@pytest.mark.parametrize(("share", "o"), [(0, 1.0), (0.25, 1.15224), (0.5, 1.58579), (0.75, 2.23463), (1, 3.0)])
def test_restes_power_along_the_run(share, o):
    assert surrogates.get("reste").at(share).o == pytest.approx(o, abs=5e-6)


@pytest.mark.parametrize(("share", "t"), [(0, 0.1), (0.5, 1.0), (1, 10.0), (2, 10.0)])
def test_edes_sharpness_along_the_run(share, t):
    assert surrogates.get("ede").at(share).t == pytest.approx(t)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"ede", "reste"}))
def test_other_estimators_have_no_schedule(name):
    estimator = surrogates.get(name)
    assert estimator.at(0.3) == estimator


def test_a_schedule_gives_a_new_estimator_and_leaves_the_old_one():
    old = surrogates.get("reste", end=5)
    assert old.at(1.0).o == 5
    assert old.o == 3


# -- values ------------------------------------------------------------------------------------------------------------------------

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIGNS)
def test_signs_are_plus_or_minus_one_exactly_and_plus_at_zero(name, dtype):
    y = surrogates.get(name)(torch.cat([POINTS, double([-0.0, 1e-30, -30.0])]).to(dtype))
    assert y.dtype == dtype
    assert y.tolist() == [-1.0] * 6 + [1.0] * 8 + [1.0, -1.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_finite_at_a_thousand_in_every_dtype(name, dtype):
    x = torch.tensor([-1e3, -30.0, 0.0, 30.0, 1e3]).to(dtype)
    h = surrogates.get(name).derivative(x)
    assert h.dtype == dtype
    assert torch.isfinite(h).all()


def test_a_square_wave_is_plus_one_at_zero_and_flips_every_half_period():
    y = surrogates.get("biper", omega=20)(double([0.0, 0.1, math.pi / 20 + 0.01, -0.1]))
    assert y.tolist() == [1.0, 1.0, -1.0, -1.0]


def test_nan_stays_nan():
    assert all(torch.isnan(surrogates.get(name)(double(math.nan))) for name in SIGNS)


def test_rounding_and_three_levels():
    assert surrogates.get("round", low=-2, high=1)(double([-9.0, -1.4, 0.4, 0.6, 9.0])).tolist() == [-2.0, -1.0, 0.0, 1.0, 1.0]
    assert surrogates.get("ternary")(POINTS).tolist() == [-1.0] * 5 + [0.0] * 3 + [1.0] * 5


def test_dsq_has_as_many_levels_as_its_bits_say_and_its_soft_form_meets_every_one():
    estimator = surrogates.get("dsq", bits=2, low=-1, high=2)
    assert estimator(torch.linspace(-2, 3, 500, dtype=torch.float64)).unique().tolist() == pytest.approx([-1.0, 0.0, 1.0, 2.0])
    assert estimator.primitive(double([-1.0, 0.0, 1.0, 2.0])).tolist() == pytest.approx([-1.0, 0.0, 1.0, 2.0])


# -- transforms --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_five_transforms_give_one_derivative(name):
    estimator = surrogates.get(name)
    wanted, ones = estimator.derivative(POINTS), torch.ones_like(POINTS)
    found = {
        "grad": slope(estimator, POINTS),
        "func.grad": torch.func.grad(lambda x: estimator(x).sum())(POINTS),
        "vmap": slope(torch.func.vmap(estimator), POINTS),
        "vmap(grad)": torch.func.vmap(torch.func.grad(estimator))(POINTS),
        "jvp": torch.func.jvp(estimator, (POINTS,), (ones,))[1],
        "vmap(jvp)": torch.func.vmap(lambda x, t: torch.func.jvp(estimator, (x,), (t,))[1])(POINTS, ones),
        "jacrev": torch.func.jacrev(estimator)(POINTS).diagonal(),
        "jacfwd": torch.func.jacfwd(estimator)(POINTS).diagonal(),
    }
    assert [transform for transform, h in found.items() if not torch.equal(h, wanted)] == []


def test_compiled_functions_give_the_same_values_and_derivatives():
    estimators = [surrogates.get(name) for name in NAMES]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: [estimator(x) for estimator in estimators], fullgraph=True, backend="eager")  # all at once: tracing takes its time
    x = POINTS.clone().requires_grad_()
    for estimator, y in zip(estimators, compiled(x), strict=True):
        assert torch.equal(y.detach(), estimator(POINTS)), estimator
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], estimator.derivative(POINTS)), estimator


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_that_of_the_surrogate(name):
    estimator, step = surrogates.get(name), 1e-5
    x = grid(estimator, count=61)
    second = torch.func.vmap(torch.func.grad(torch.func.grad(estimator)))(x)
    difference = (estimator.derivative(x + step) - estimator.derivative(x - step)) / (2 * step)
    assert (second - difference).abs().max() <= 1e-5 * max(1.0, float(difference.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_saved_but_the_input(name):
    x = torch.randn(1000, requires_grad=True)
    mine = x * 1.0  # a tensor of the graph's, not a leaf
    with saved_bytes() as meter:
        surrogates.get(name)(mine)
    assert meter.total == 4000


def test_gradients_keep_the_inputs_dtype_under_autocast():
    x = torch.randn(4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = surrogates.get("reste")(x @ x)
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.float32


# -- another surrogate from outside ------------------------------------------------------------------------------------------------


def test_replacing_changes_the_derivative_and_no_value():
    estimator = surrogates.get("clipped")
    with surrogates.replacing("bireal") as active:
        y, h = estimator(POINTS), slope(estimator, POINTS)
    assert torch.equal(y, estimator(POINTS))
    assert torch.equal(h, surrogates.get("bireal").derivative(POINTS))
    assert active.met == {"sign": 2}
    assert torch.equal(slope(estimator, POINTS), estimator.derivative(POINTS))


def test_replacing_leaves_other_operations_alone():
    wave = surrogates.get("biper")
    with surrogates.replacing("bireal"):
        assert torch.equal(slope(wave, POINTS), wave.derivative(POINTS))


def test_the_derivative_is_that_of_the_forward_pass_where_the_backward_pass_comes_later():
    estimator, x = surrogates.get("clipped"), POINTS.clone().requires_grad_()
    with surrogates.replacing("bireal"):
        y = estimator(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], surrogates.get("bireal").derivative(POINTS))


# -- names and mistakes ------------------------------------------------------------------------------------------------------------


def test_the_public_name_is_there():
    assert altgrad.surrogates is surrogates
    assert {"pointwise", "learned", "stochastic", "prox"} == set(surrogates.KINDS)
    assert len(surrogates.names()) >= 16
    assert sorted(surrogates.names()) == sorted(name for kind in surrogates.KINDS for name in surrogates.names(kind))


def test_settings_may_stand_behind_the_name():
    assert surrogates.get("reste,o=2,t=1") == surrogates.get("reste", o=2, t=1)
    assert str(surrogates.get("reste", o=2)) == "reste,o=2"


@pytest.mark.parametrize("name", surrogates.names())
def test_every_estimator_has_a_source_and_plain_settings(name):
    estimator = surrogates.get(name)
    assert estimator.source
    assert surrogates.get(name, **estimator.settings()) == estimator


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: surrogates.get("restee"), "unknown surrogate 'restee'. Did you mean 'reste'"),
        (lambda: surrogates.names("pointwize"), "Did you mean 'pointwise'"),
        (lambda: surrogates.pointwise_of("lsq"), "surrogate 'lsq' is learned"),
        (lambda: surrogates.get("identity")(torch.arange(3)), "must be a floating-point tensor"),
    ],
)
def test_wrong_names_and_kinds_are_told(call, says):
    with pytest.raises(UsageError, match=says.replace(".", r"\.")):
        call()


@pytest.mark.parametrize(
    "spelled",
    [
        *["reste,o=0.5", "reste,m=0", "reste,t=0.05", "reste,end=0", "reste,q=1", "clipped,width=-1", "ede,t=0", "biper,omega=inf", "dsq,bits=9", "dsq,bits=0"],
        *["dsq,alpha=1", "dsq,low=2", "ternary,threshold=1", "round,low=0.5", "round,low=3,high=1", "swish-sign,beta=0", "atan,alpha=-2", "sigmoid,slope=nan"],
    ],
)
def test_settings_out_of_range_are_refused(spelled):
    with pytest.raises(SettingError, match=spelled.split(",")[-1 if "high" in spelled else 1].split("=")[0]):
        surrogates.get(spelled)
