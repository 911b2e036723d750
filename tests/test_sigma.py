"""σ over a run: schedules at their known points, and the adaptation against hand examples, its own derivation, and a sphere."""

import math

import pytest
import torch

from altgrad import perturb, sigma
from altgrad.errors import SettingError
from altgrad.perturb import LowRank
from altgrad.rng import Key
from altgrad.shaping import shape
from altgrad.sigma import Schedule, adapt, check_adaptation, default_rate, low_rank_squares

KEY = Key(31)
LAWS = sorted(perturb.KURTOSIS)


# -- schedules --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "values"), [
    ({}, {0: 0.2, 5: 0.2, 10**6: 0.2}),
    ({"name": "linear", "steps": 10}, {0: 0.2, 5: 0.11, 10: 0.02, 99: 0.02}),
    ({"name": "cosine", "steps": 9}, {0: 0.2, 3: 0.02 + 0.18 * 0.75, 6: 0.02 + 0.18 * 0.25, 9: 0.02, 99: 0.02}),
    ({"name": "exponential", "decay": 0.5}, {0: 0.2, 1: 0.1, 3: 0.025, 4: 0.02, 10**6: 0.02}),
    ({"name": "exponential", "decay": 0.999, "floor": 1e-9}, {1000: 0.2 * 0.999**1000}),
], ids=["constant", "linear", "cosine", "exponential", "low floor"])  # fmt: skip
def test_schedules_pass_through_their_known_values(settings, values):
    schedule = Schedule(sigma=0.2, **settings)
    assert {step: schedule.at(step) for step in values} == pytest.approx(values, rel=1e-12)


@pytest.mark.parametrize("name", sigma.SCHEDULES)
def test_no_schedule_rises_or_falls_below_its_floor(name):
    values = [Schedule(name=name, sigma=3.0, steps=50, decay=0.9).at(step) for step in range(100)]
    assert values == sorted(values, reverse=True)
    assert min(values) >= 0.3 * (1 - 1e-12)


@pytest.mark.parametrize(("settings", "message"), [
    ({"name": "cosinus"}, "Did you mean 'cosine'"),
    ({"sigma": 0.0}, "sigma=0.0 is not allowed"),
    ({"sigma": math.nan}, "sigma=nan is not allowed"),
    ({"decay": 1.5}, "decay=1.5 is not allowed"),
    ({"floor": 0.0}, "floor=0.0 is not allowed"),
    ({"name": "linear"}, "steps=0 is not allowed"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        Schedule(**settings)


# -- adaptation: hand examples ----------------------------------------------------------------------------------------------------


def test_adaptation_is_half_the_rate_times_the_weighted_excess():
    # u = -w = (½, -½), s = (1.5, 0.8): ½ · 0.4 · (½ · 0.5 + ½ · 0.2) = 0.07
    found = adapt(torch.tensor(-1.0), torch.tensor([-0.5, 0.5]), torch.tensor([1.5, 0.8]), dimension=10, rate=0.4)
    assert float(found) == pytest.approx(-0.93, abs=1e-7)


def test_the_default_rate_is_that_of_snes():
    assert default_rate(100) == pytest.approx((3 + math.log(100)) / 50, rel=1e-15)
    one, other = (adapt(torch.zeros(()), torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 1.0]), dimension=100, rate=rate) for rate in (None, default_rate(100)))
    assert torch.equal(one, other)


def test_each_tensor_moves_by_its_own_squares():
    weights, squares = torch.tensor([-0.5, 0.2, 0.3]), torch.tensor([[1.5, 0.5], [1.0, 1.0], [0.5, 1.5]])
    both = adapt(torch.tensor([0.0, 1.0]), weights, squares, dimension=20)
    alone = [adapt(torch.tensor(float(t)), weights, squares[:, t], dimension=20) for t in range(2)]
    assert torch.equal(both, torch.stack(alone))
    assert both[0] > 0 > both[1] - 1


def test_one_sigma_for_each_coordinate_is_snes():
    z, utilities = perturb.draw("normal", KEY, 1, range(6), (4,)).double(), torch.tensor([0.5, 0.3, 0.1, -0.2, -0.3, -0.4], dtype=torch.float64)
    log_sigma = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    expected = log_sigma + default_rate(4) / 2 * (utilities @ (z.square() - 1))
    torch.testing.assert_close(adapt(log_sigma, -utilities, z.square(), dimension=4), expected, rtol=0, atol=1e-14)


def test_a_constant_on_all_weights_changes_nothing():
    weights, squares = torch.tensor([-0.5, 0.2, 0.3], dtype=torch.float64), torch.tensor([1.5, 1.2, 0.5], dtype=torch.float64)
    one, other = (adapt(torch.zeros((), dtype=torch.float64), w, squares, dimension=9) for w in (weights, weights + 8))
    assert float(one) == pytest.approx(float(other), rel=1e-12)


def test_equal_members_leave_sigma_bit_identical():
    log_sigma, squares = torch.tensor(-4.123), torch.tensor([1.5, 0.1, 2.0, 1.1])
    assert torch.equal(adapt(log_sigma, shape("nes", torch.full((4,), 0.1), pairs=True), squares, dimension=9), log_sigma)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_rate_that_is_not_positive_is_refused(rate):
    with pytest.raises(SettingError, match="rate="):
        adapt(torch.zeros(()), torch.zeros(2), torch.ones(2), dimension=2, rate=rate)


def test_the_step_is_the_natural_gradient_of_the_mean_fitness():
    """On f = ‖x‖² at 0 the mean is n σ²: its derivative in log σ is 2 n σ², its natural gradient that over 2n, σ² (with w = f / P)."""
    n, count, scale = 5, 200_000, 0.7
    squares = perturb.draw("normal", KEY, 2, range(count), (n,)).double().square().mean(1)
    fitness = scale**2 * n * squares
    moved = adapt(torch.zeros((), dtype=torch.float64), shape("raw", fitness, pairs=True), squares, dimension=n, rate=1.0)
    assert float(moved) == pytest.approx(-(scale**2), rel=0.02)  # 200,000 draws: a standard error below 1 %


# -- adaptation: low-rank noise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("law", LAWS)
def test_squares_of_factors_are_those_of_the_matrix(law, rank):
    directions = LowRank(KEY, "w", torch.empty(7, 5, dtype=torch.float64), range(20), law, rank)
    torch.testing.assert_close(low_rank_squares(*directions.factors()), directions.dense().square().mean((1, 2)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("law", LAWS)
def test_squares_of_low_rank_noise_have_mean_one(law, rank):
    squares = low_rank_squares(*LowRank(KEY, "w", torch.empty(12, 9), range(20_000), law, rank).factors())
    assert abs(float(squares.mean()) - 1) <= 4 * float(squares.std()) / 20_000**0.5 + 1e-6


@pytest.mark.parametrize("law", ["normal", "uniform"])
def test_the_variance_of_rank_one_squares_is_that_of_two_independent_lengths(law):
    m, n, excess = 12, 9, perturb.kurtosis(law) - 1
    squares = low_rank_squares(*LowRank(KEY, "w", torch.empty(m, n), range(100_000), law, 1).factors())
    assert float(squares.var()) == pytest.approx((1 + excess / m) * (1 + excess / n) - 1, rel=0.03)


# -- adaptation: a sphere ---------------------------------------------------------------------------------------------------------


def sphere_step(distance, *, shaping, n=10, pairs=500):
    """The change of log σ, from 0, after one step on f(x) = ‖x‖² at `distance`."""
    half = perturb.draw("normal", KEY, 3, range(pairs), (n,)).double()
    z = torch.cat([half, -half])
    start = torch.zeros(n, dtype=torch.float64)
    start[0] = distance
    weights = shape(shaping, (start + z).square().sum(1), pairs=True)
    return float(adapt(torch.zeros((), dtype=torch.float64), weights, z.square().mean(1), dimension=n))


def test_nes_utilities_make_sigma_grow_far_from_the_optimum():
    assert sphere_step(1e3, shaping="nes") > 0.01


@pytest.mark.parametrize("shaping", ["nes", "centred-rank", "z-score", "raw"])
def test_sigma_shrinks_at_the_optimum(shaping):
    assert sphere_step(0.0, shaping=shaping) < -0.01


@pytest.mark.parametrize("shaping", ["centred-rank", "z-score", "raw"])
def test_weights_odd_in_the_fitness_see_no_sigma_on_a_slope(shaping):
    half = perturb.draw("normal", KEY, 3, range(500), (10,)).double()
    z = torch.cat([half, -half])
    weights = shape(shaping, z[:, 0], pairs=True)
    assert float(adapt(torch.zeros((), dtype=torch.float64), weights, z.square().mean(1), dimension=10)) == pytest.approx(0, abs=1e-12)


def distance_left(rank, log_sigma, *, adaptive, steps):
    """NES with rank-r noise on ‖X‖², X [4, 5], from ‖X‖ = √20: the distance and σ after `steps`."""
    mean, log_sigma = torch.ones(4, 5, dtype=torch.float64), torch.tensor(log_sigma, dtype=torch.float64)
    for step in range(steps):
        half = perturb.directions(KEY.at(step), "x", mean, range(16), law="normal", rank=rank).dense()
        noise = torch.cat([half, -half])
        weights = shape("nes", (mean + log_sigma.exp() * noise).square().sum((1, 2)), pairs=True)
        mean = mean - log_sigma.exp() * torch.tensordot(weights, noise, 1)
        if adaptive:
            log_sigma = adapt(log_sigma, weights, noise.square().mean((1, 2)), dimension=20)
    return float(mean.norm()), float(log_sigma.exp())


@pytest.mark.parametrize("rank", [None, 2])
def test_an_adapted_sigma_gets_closer_than_a_constant_one(rank):
    constant, adapted = (distance_left(rank, 0.0, adaptive=adaptive, steps=150)[0] for adaptive in (False, True))
    assert adapted < 0.05 * constant


@pytest.mark.parametrize("rank", [None, 2])
def test_a_sigma_far_too_small_grows_step_by_step(rank):
    assert distance_left(rank, -9.0, adaptive=True, steps=200)[1] > 2 * math.exp(-9)


# -- adaptation: where it cannot work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"law": "normal", "rank": 1, "shaping": "sign"}, "weights of a pair cancel"),
    ({"law": "sign", "rank": None, "shaping": "nes"}, "dense noise='sign'"),
    ({"law": "sign", "rank": 1, "shaping": "nes"}, "rank 1 noise='sign'"),
])  # fmt: skip
def test_adaptation_without_information_is_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        check_adaptation(**settings)


@pytest.mark.parametrize("settings", [{"law": "sign", "rank": 2, "shaping": "nes"}, {"law": "uniform", "rank": 1, "shaping": "raw"}])
def test_adaptation_with_information_is_let_through(settings):
    check_adaptation(**settings)


def test_signs_of_rank_one_have_one_length():
    squares = low_rank_squares(*LowRank(KEY, "w", torch.empty(7, 5), range(50), "sign", 1).factors())
    assert torch.equal(squares, torch.ones(50, dtype=torch.float64))
