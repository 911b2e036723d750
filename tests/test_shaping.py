"""Shaping: closed-form small examples, invariances where they hold, and fitness that is not finite, all equal, or badly arranged."""

import math

import pytest
import torch

from altgrad import shaping
from altgrad.errors import SettingError, ShapeError
from altgrad.kernels import noise
from altgrad.rng import Key
from altgrad.shaping import SHAPINGS, clean_fitness, group_index, shape, silent

NAN, INF = math.nan, math.inf
FITNESS = torch.tensor([3.0, -1.0, 4.0, 1.5, -5.0, 9.0, 2.0, 6.0], dtype=torch.float64)
FROM_ORDER = ["centred-rank", "nes", "sign"]
FROM_VALUES = sorted(set(SHAPINGS) - set(FROM_ORDER))
EXACT = {"rtol": 0, "atol": 1e-15}


def weights(name, fitness=FITNESS, **settings):
    """With pairs, and with two groups where the rule looks at groups."""
    fitness = torch.as_tensor(fitness, dtype=torch.float64)
    if name in shaping.TAKES_GROUPS and len(fitness) % 4 == 0:
        settings.setdefault("groups", group_index(len(fitness), 2, pairs=True))
    return shape(name, fitness, **{"pairs": True, **settings})


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)


# -- closed forms -----------------------------------------------------------------------------------------------------------------


def test_raw_without_pairs_subtracts_the_clean_loss_and_divides_by_the_members():
    close(shape("raw", torch.tensor([3.0, 5.0, 10.0, 2.0]), pairs=False, clean=4.0), [-0.25, 0.25, 1.5, -0.5])


@pytest.mark.parametrize("pairs", [True, False])
def test_raw_estimates_the_slope_of_a_line_in_its_own_units(pairs):
    slope, sigma = 7.0, 0.5
    half = noise.draw("normal", Key(3), 1, range(4), ()).double()
    moves = torch.cat([half, -half])
    fitness = 2.0 + slope * sigma * moves
    estimate = (shape("raw", fitness, pairs=pairs, clean=2.0) * moves).sum() / sigma
    assert float(estimate) == pytest.approx(slope * float(moves.square().mean()), rel=1e-12)


def test_raw_with_pairs_keeps_the_difference_of_a_pair():
    found = shape("raw", torch.tensor([3.0, 5.0, 10.0, 1.0]), pairs=True)
    close(found[:2] - found[2:], [-7 / 4, 4 / 4])


def test_raw_with_pairs_ignores_the_clean_loss():
    assert torch.equal(shape("raw", FITNESS, pairs=True, clean=100.0), shape("raw", FITNESS, pairs=True))


def test_z_score_divides_by_the_root_of_the_variance_and_the_floor():
    deviation = math.sqrt(5.0 + 1e-5)  # 1, 3, 5, 7: mean 4, variance 5
    close(shape("z-score", torch.tensor([1.0, 3.0, 5.0, 7.0]), pairs=True), [u / deviation / 4 for u in (-3, -1, 1, 3)])


def test_group_z_score_takes_the_groups_mean_and_the_deviation_of_all():
    # Pairs (1, 3), (2, 2) are group 0 with mean 2; (9, 5), (8, 10) are group 1 with mean 8; all: mean 5, variance 88/8 = 11.
    fitness, groups = torch.tensor([1.0, 2.0, 9.0, 8.0, 3.0, 2.0, 5.0, 10.0]), group_index(8, 2, pairs=True)
    deviation = math.sqrt(11 + 1e-5)
    close(shape("group-z-score", fitness, pairs=True, groups=groups), [u / deviation / 8 for u in (-1, 0, 1, 0, 1, 0, -3, 2)])


def test_centred_ranks_run_from_minus_a_half_to_a_half():
    close(8 * shape("centred-rank", FITNESS, pairs=True), [1 / 14, -5 / 14, 3 / 14, -3 / 14, -7 / 14, 7 / 14, -1 / 14, 5 / 14])


def test_ties_share_their_mean_rank():
    close(4 * shape("centred-rank", torch.tensor([1.0, 5.0, 5.0, 9.0]), pairs=True), [-1 / 2, 0, 0, 1 / 2])


def test_centred_ranks_are_taken_within_groups():
    fitness, groups = torch.tensor([1.0, 2.0, 9.0, 8.0]), group_index(4, 2, pairs=False)
    close(4 * shape("centred-rank", fitness, pairs=False, groups=groups), [-0.5, 0.5, 0.5, -0.5])


def test_a_group_of_one_gets_rank_zero():
    close(shape("centred-rank", torch.tensor([1.0, 2.0]), pairs=False, groups=torch.tensor([0, 1])), [0.0, 0.0])


def test_nes_utilities_are_wierstras():
    places = [max(0.0, math.log(3) - math.log(k)) for k in (1, 2, 3, 4)]
    first, second, third, fourth = (u / sum(places) - 1 / 4 for u in places)
    close(shape("nes", torch.tensor([7.0, 1.0, 5.0, 3.0]), pairs=True), [-fourth, -first, -third, -second])


def test_tied_nes_utilities_are_averaged():
    apart, tied = shape("nes", torch.tensor([1.0, 2.0, 3.0, 4.0]), pairs=True), shape("nes", torch.tensor([1.0, 1.0, 3.0, 4.0]), pairs=True)
    mean = float(apart[:2].mean())
    close(tied, [mean, mean, float(apart[2]), float(apart[3])])


def test_sign_compares_the_two_members_of_a_pair():
    close(6 * shape("sign", torch.tensor([1.0, 5.0, 4.0, 2.0, 3.0, 4.0]), pairs=True), [-1, 1, 0, 1, -1, 0])


def test_baseline_pair_subtracts_the_mean_of_the_groups_first_pair():
    # Groups of two pairs: (1, 3) is the baseline 2 of pair (7, 4); (10, 20) is the baseline 15 of pair (14, 15). Four members move.
    fitness = torch.tensor([1.0, 7.0, 10.0, 14.0, 3.0, 4.0, 20.0, 15.0])
    close(shape("baseline-pair", fitness, pairs=True, groups=group_index(8, 2, pairs=True)), [0, 5 / 4, 0, -1 / 4, 0, 2 / 4, 0, 0])


def test_baseline_pair_without_groups_has_one_baseline():
    close(shape("baseline-pair", torch.tensor([1.0, 7.0, 3.0, 4.0]), pairs=True), [0, 5 / 2, 0, 2 / 2])


def test_the_first_pair_of_each_group_is_silent():
    assert silent("baseline-pair", 12, group_index(12, 3, pairs=True)).nonzero().flatten().tolist() == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("name", sorted(set(SHAPINGS) - {"baseline-pair"}))
def test_no_member_is_silent_without_a_baseline(name):
    assert not silent(name, 8).any()


def test_groups_are_equal_contiguous_and_hold_whole_pairs():
    assert group_index(8, 2, pairs=True).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert group_index(6, 3, pairs=False).tolist() == [0, 0, 1, 1, 2, 2]


# -- invariances ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SHAPINGS))
def test_adding_a_constant_to_the_fitness_changes_nothing(name):
    torch.testing.assert_close(weights(name, FITNESS + 64), weights(name), **EXACT)


@pytest.mark.parametrize("name", FROM_ORDER)
def test_order_only_rules_ignore_a_monotone_map(name):
    assert torch.equal(weights(name, FITNESS.exp()), weights(name))


@pytest.mark.parametrize("name", FROM_VALUES)
def test_rules_of_values_do_see_a_monotone_map(name):
    assert not torch.allclose(weights(name, FITNESS.exp()), weights(name), rtol=1e-3)


@pytest.mark.parametrize("name", sorted(set(SHAPINGS) - {"nes"}))
def test_negated_fitness_negates_the_weights(name):
    torch.testing.assert_close(weights(name, -FITNESS), -weights(name), **EXACT)


@pytest.mark.parametrize("name", sorted(SHAPINGS))
def test_maximizing_is_minimizing_the_negative(name):
    assert torch.equal(weights(name, maximize=True), weights(name, -FITNESS))


def test_maximizing_negates_the_clean_loss_too():
    assert torch.equal(shape("raw", FITNESS, pairs=False, clean=3.0, maximize=True), shape("raw", -FITNESS, pairs=False, clean=-3.0))


@pytest.mark.parametrize("name", sorted(set(SHAPINGS) - {"baseline-pair"}))
def test_weights_sum_to_zero(name):
    assert float(weights(name).sum()) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("name", sorted(SHAPINGS))
def test_of_a_pair_the_worse_member_weighs_more(name):
    plus, minus = weights(name).chunk(2)
    moved = ~silent(name, 8, group_index(8, 2, pairs=True)).chunk(2)[0]
    worse = FITNESS.chunk(2)[0] > FITNESS.chunk(2)[1]
    if name == "nes":  # the lower half shares one utility: only the pairs with a member in the better half are told apart
        assert bool(((plus >= minus) == worse)[plus != minus].all())
        assert bool((plus != minus).any())
    else:
        assert torch.equal((plus > minus)[moved], worse[moved])


@pytest.mark.parametrize("name", sorted(SHAPINGS))
def test_the_weights_follow_the_members_when_pairs_change_places(name):
    order = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])  # within groups of two pairs
    if name == "baseline-pair":
        order = torch.tensor([2, 3, 0, 1, 6, 7, 4, 5])  # whole groups: the first pair is not like the others
    torch.testing.assert_close(weights(name, FITNESS[order]), weights(name)[order], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_any_real_dtype_gives_float64_weights(dtype):
    whole = FITNESS.round()
    assert torch.equal(shape("z-score", whole.to(dtype), pairs=True), shape("z-score", whole, pairs=True))


# -- not finite, all equal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_gets_the_worst_finite_value_and_is_counted(bad):
    cleaned, count = clean_fitness(torch.tensor([1.0, bad, 5.0, NAN]))
    assert (cleaned.tolist(), int(count)) == ([1.0, 5.0, 5.0, 5.0], 2)


def test_the_worst_reward_is_the_smallest():
    assert clean_fitness(torch.tensor([1.0, INF, 5.0]), maximize=True)[0].tolist() == [1.0, 1.0, 5.0]


def test_finite_fitness_is_left_alone():
    cleaned, count = clean_fitness(FITNESS)
    assert torch.equal(cleaned, FITNESS)
    assert int(count) == 0


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_ranks_behind_the_worst_finite_member(bad, maximize):
    fitness = torch.tensor([1.0, 2.0, bad, 3.0])
    found = 4 * shape("centred-rank", -fitness if maximize else fitness, pairs=True, maximize=maximize)
    close(found, [-1 / 2, -1 / 6, 1 / 2, 1 / 6])


def test_all_that_is_not_finite_is_tied():
    close(4 * shape("centred-rank", torch.tensor([1.0, NAN, -INF, INF]), pairs=True), [-1 / 2, 1 / 6, 1 / 6, 1 / 6])


def test_the_worst_finite_member_still_beats_its_partner_that_is_not():
    close(4 * shape("sign", torch.tensor([9.0, NAN, INF, NAN]), pairs=True), [-1, 0, 1, 0])


@pytest.mark.parametrize("name", FROM_VALUES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_rules_of_values_see_the_worst_finite_value_instead(name, bad):
    broken, mended = FITNESS.clone(), FITNESS.clone()
    broken[3], mended[3] = bad, 9.0
    assert torch.equal(weights(name, broken), weights(name, mended))


@pytest.mark.parametrize("name", sorted(SHAPINGS))
@pytest.mark.parametrize("value", [0.1, 1e30, -1e-30, NAN, INF])
def test_equal_members_get_exactly_zero(name, value):
    assert not weights(name, torch.full((12,), value, dtype=torch.float64)).any()


@pytest.mark.parametrize("name", ["z-score", "centred-rank", "nes"])
@pytest.mark.parametrize("count", [1, 6, 12, 44])
def test_equal_members_get_exactly_zero_without_pairs(name, count):
    assert not shape(name, torch.full((count,), 0.1, dtype=torch.float64), pairs=False).any()


def test_a_group_of_equal_members_gets_zero_beside_one_that_differs():
    fitness = torch.tensor([0.1, 0.1, 0.1, 7.0, 8.0, 9.0])
    found = shape("group-z-score", fitness, pairs=False, groups=group_index(6, 2, pairs=False))
    assert not found[:3].any()
    assert found[3:].any()


def test_one_member_without_pairs_is_compared_with_the_clean_loss():
    close(shape("raw", torch.tensor([3.0]), pairs=False, clean=1.0), [2.0])


def test_nothing_finite_gives_no_weight_even_beside_a_clean_loss():
    assert not shape("raw", torch.tensor([NAN, INF]), pairs=False, clean=1.0).any()


def test_a_clean_loss_that_is_not_finite_is_not_hidden():
    assert shape("raw", FITNESS, pairs=False, clean=NAN).isnan().all()


def test_differences_far_below_the_fitness_survive():
    found = shape("centred-rank", 1e9 + 1e-6 * FITNESS, pairs=True)
    assert torch.equal(found, shape("centred-rank", FITNESS, pairs=True))


# -- mistakes ---------------------------------------------------------------------------------------------------------------------


def test_an_unknown_shaping_is_answered_with_the_nearest():
    with pytest.raises(SettingError, match="Did you mean 'centred-rank'"):
        shape("centered-rank", FITNESS, pairs=True)


def test_pairs_in_an_odd_population_are_refused():
    with pytest.raises(SettingError, match="population=7 is not allowed; it must be even"):
        shape("raw", FITNESS[:7], pairs=True)


@pytest.mark.parametrize("name", sorted(shaping.NEEDS_PAIRS))
def test_rules_of_pairs_are_refused_without_pairs(name):
    with pytest.raises(SettingError, match="needs antithetic=True"):
        shape(name, FITNESS, pairs=False)


def test_raw_without_pairs_asks_for_the_clean_loss():
    with pytest.raises(SettingError, match="clean="):
        shape("raw", FITNESS, pairs=False)


def test_group_z_score_asks_for_groups():
    with pytest.raises(SettingError, match="use shaping='z-score'"):
        shape("group-z-score", FITNESS, pairs=True)


@pytest.mark.parametrize("name", sorted(set(SHAPINGS) - shaping.TAKES_GROUPS))
def test_groups_are_not_silently_ignored(name):
    with pytest.raises(SettingError, match="does not look at groups"):
        shape(name, FITNESS, pairs=True, groups=group_index(8, 2, pairs=True))


def test_groups_that_do_not_divide_the_population_are_refused():
    with pytest.raises(SettingError, match="groups=3 is not allowed; it must be a divisor of the 4 pairs"):
        group_index(8, 3, pairs=True)


def test_a_baseline_needs_a_second_pair_in_each_group():
    with pytest.raises(SettingError, match="at least 16"):
        shaping.check("baseline-pair", 8, pairs=True, groups=4)


@pytest.mark.parametrize("fitness", [torch.zeros(0), torch.zeros(2, 2), torch.zeros(())], ids=["none", "matrix", "scalar"])
def test_fitness_must_be_one_number_a_member(fitness):
    with pytest.raises(ShapeError, match="one number for each member"):
        shape("z-score", fitness, pairs=False)


def test_groups_must_be_one_a_member():
    with pytest.raises(ShapeError, match="the group of every member"):
        shape("centred-rank", FITNESS, pairs=True, groups=torch.zeros(3))
