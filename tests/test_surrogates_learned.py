"""Learned steps: LSQ at eight points by hand, scale invariance, every transform, and what is refused."""

import math

import pytest
import torch
from tolerances import tolerance

from altgrad import surrogates
from altgrad.errors import SettingError, ShapeError
from altgrad.metrics import saved_bytes

EXACT = tolerance("closed_form64")
V = torch.tensor([-2.0, -1.1, -0.6, -0.2, 0.1, 0.3, 0.6, 2.0], dtype=torch.float64)
STEP = torch.tensor(0.5, dtype=torch.float64)
TABLE = {  # two bits, signed, s = 1/2: levels -2, -1, 0, 1; V / s = -4, -2.2, -1.2, -0.4, 0.2, 0.6, 1.2, 4; N Q_p = 8
    "value": [-1.0, -1.0, -0.5, 0.0, 0.0, 0.5, 0.5, 0.5],
    "to_v": [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0],
    "to_step": [-2.0, -2.0, 0.2, 0.4, -0.2, 0.4, 1.0, 1.0],
}


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def columns(estimator, v, step):
    """∂q/∂v and ∂q/∂s, element by element, by forward mode."""
    to_v = torch.func.jvp(lambda v: estimator(v, step), (v,), (torch.ones_like(v),))[1]
    to_step = torch.func.jvp(lambda s: estimator(v, s), (step,), (torch.ones_like(step),))[1]
    return to_v, to_step


def test_lsq_at_eight_points():
    estimator = surrogates.get("lsq", bits=2)
    to_v, to_step = columns(estimator, V, STEP)
    assert (estimator(V, STEP) - double(TABLE["value"])).abs().max() <= EXACT
    assert torch.equal(to_v, double(TABLE["to_v"]))
    assert (to_step - double(TABLE["to_step"]) / math.sqrt(8)).abs().max() <= EXACT


def test_reverse_mode_adds_up_what_forward_mode_gives_element_by_element():
    estimator, weights = surrogates.get("lsq", bits=2), torch.linspace(-1, 1, 8, dtype=torch.float64)
    v, step = V.clone().requires_grad_(), STEP.clone().requires_grad_()
    to_v, to_step = torch.autograd.grad((estimator(v, step) * weights).sum(), (v, step))
    wanted = columns(estimator, V, STEP)
    assert torch.equal(to_v, weights * wanted[0])
    assert float((to_step - (weights * wanted[1]).sum()).abs()) <= EXACT


@pytest.mark.parametrize(("bits", "greatest"), [(2, 1), (4, 7), (8, 127)])
def test_the_gradient_of_the_step_carries_one_over_the_root_of_count_times_greatest_level(bits, greatest):
    step = STEP.clone().requires_grad_()
    far = torch.full((9,), 1e6, dtype=torch.float64)  # all at the greatest level, where the slope is that level
    found = torch.autograd.grad(surrogates.get("lsq", bits=bits)(far, step).sum(), step)[0]
    assert float(found) == pytest.approx(9 * greatest / (9 * greatest) ** 0.5, rel=EXACT)


def test_at_an_end_of_the_range_a_number_counts_as_outside():
    to_v, to_step = columns(surrogates.get("lsq", bits=2), double([-1.0, 0.5]), STEP)
    assert to_v.tolist() == [0.0, 0.0]
    assert (to_step * math.sqrt(2)).tolist() == pytest.approx([-2.0, 1.0])


def test_lsq_scales_with_its_input():
    estimator = surrogates.get("lsq", bits=3)
    assert (estimator(7 * V, 7 * STEP) - 7 * estimator(V, STEP)).abs().max() <= EXACT
    one, seven = columns(estimator, V, STEP), columns(estimator, 7 * V, 7 * STEP)
    assert all((a - b).abs().max() <= EXACT for a, b in zip(one, seven, strict=True))


def test_the_first_step_is_twice_the_mean_size_over_the_root_of_the_greatest_level():
    assert float(surrogates.get("lsq", bits=3).initial(V)) == pytest.approx(2 * (6.9 / 8) / math.sqrt(3))
    channels = surrogates.get("lsq", bits=3).initial(torch.stack([V, 3 * V]), axis=0)
    assert channels.shape == (2, 1)
    assert channels.flatten().tolist() == pytest.approx([2 * (6.9 / 8) / math.sqrt(3), 6 * (6.9 / 8) / math.sqrt(3)])


def test_a_step_a_channel_is_as_many_quantisers():
    estimator, v = surrogates.get("lsq", bits=2), torch.stack([V, 3 * V])
    steps = double([[0.5], [0.7]]).requires_grad_()
    together = torch.autograd.grad(estimator(v, steps).square().sum(), steps)[0]
    for row in range(2):
        own = steps[row, 0].detach().requires_grad_()
        assert float((torch.autograd.grad(estimator(v[row], own).square().sum(), own)[0] - together[row, 0]).abs()) <= EXACT


@pytest.mark.parametrize(("name", "settings"), [("lsq", {"bits": 2}), ("lsq", {"bits": 1, "signed": False}), ("lsq-plus", {"bits": 2})])
def test_transforms_agree(name, settings):
    estimator = surrogates.get(name, **settings)
    wanted = columns(estimator, V, STEP)

    def total(v, step):
        return estimator(v, step).sum()

    by_grad = torch.func.grad(total, argnums=(0, 1))(V, STEP)
    assert torch.equal(by_grad[0], wanted[0])
    assert float((by_grad[1] - wanted[1].sum()).abs()) <= EXACT
    each = torch.func.vmap(torch.func.grad(total, argnums=(0, 1)), in_dims=(0, None))(torch.stack([V, V]), STEP)
    assert torch.equal(each[0][1], wanted[0])
    assert float((each[1][1] - wanted[1].sum()).abs()) <= EXACT
    mapped = torch.func.vmap(estimator, in_dims=(0, 0))(torch.stack([V, V]), torch.stack([STEP, 2 * STEP]))
    assert torch.equal(mapped[1], estimator(V, 2 * STEP))
    v, step = V.clone().requires_grad_(), STEP.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(total(v, step), v)[0], wanted[0])


def test_compiled_functions_give_the_same_gradients():
    estimators = [surrogates.get("lsq", bits=2), surrogates.get("lsq-plus", bits=2)]
    torch._dynamo.reset()
    compiled = torch.compile(lambda v, step: [estimator(v, step).sum() for estimator in estimators], fullgraph=True, backend="eager")
    v, step = V.clone().requires_grad_(), STEP.clone().requires_grad_()
    for estimator, total in zip(estimators, compiled(v, step), strict=True):
        own = torch.autograd.grad(estimator(v, step).sum(), (v, step))
        assert all(float((a - b).abs().max()) <= EXACT for a, b in zip(torch.autograd.grad(total, (v, step)), own, strict=True))


def test_lsq_plus_moves_its_levels_by_the_offset():
    estimator, offset = surrogates.get("lsq-plus", bits=2), double(-1.0)
    assert estimator(double([-3.0, -0.8, 0.1, 9.0]), STEP, offset).tolist() == [-1.0, -1.0, 0.0, 0.5]  # levels -1, -0.5, 0, 0.5
    slope = torch.func.jvp(lambda b: estimator(double([-3.0, -0.8, 0.1, 9.0]), STEP, b), (offset,), (double(1.0),))[1]
    assert slope.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_lsq_plus_begins_with_the_range_of_its_input():
    estimator = surrogates.get("lsq-plus", bits=2)
    step, offset = estimator.initial(V), estimator.initial_offset(V)
    levels = estimator(V, step, offset)
    assert float(levels.min()) == pytest.approx(-2.0)
    assert float(levels.max()) == pytest.approx(2.0)


def test_nothing_is_saved_but_the_inputs():
    v, step = torch.randn(1000, requires_grad=True) * 1.0, (torch.ones(1000, requires_grad=True) * 0.5)
    with saved_bytes(exclude=(v, step)) as meter:
        surrogates.get("lsq")(v, step)
    assert meter.total <= 4000  # the offset that LSQ has none of


@pytest.mark.parametrize("bits", [0, 9, 2.5, True])
def test_bits_outside_one_to_eight_are_refused(bits):
    with pytest.raises(SettingError, match="bits"):
        surrogates.get("lsq", bits=bits)


def test_one_signed_bit_is_refused():
    with pytest.raises(SettingError, match="signed=False"):
        surrogates.get("lsq", bits=1)


def test_a_step_that_does_not_broadcast_is_refused():
    with pytest.raises(ShapeError, match="step of shape \\(3,\\)"):
        surrogates.get("lsq")(V, torch.ones(3, dtype=torch.float64))
