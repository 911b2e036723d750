"""ask and tell: pure functions of the state, partial tells in any order, and what is refused."""

import numpy as np
import pytest
from es_runs import NAMES, advance, begin, build

from altgrad.errors import SettingError, ShapeError
from altgrad.es import CMAES, SNES, XNES, OpenES, RandomSearch, functions, storage
from altgrad.rng import Key


@pytest.mark.parametrize("name", NAMES)
def test_ask_is_a_function_of_the_state(name):
    strategy = build(name)
    state = advance(strategy, begin(strategy), generations=2)
    np.testing.assert_array_equal(strategy.ask(state), strategy.ask(state))


@pytest.mark.parametrize("name", NAMES)
def test_tell_leaves_the_state_it_was_given(name):
    strategy = build(name)
    state = advance(strategy, begin(strategy), generations=2)
    before = {key: array.copy() for key, array in storage.flatten(state)[1].items()}
    population = strategy.ask(state)
    strategy.tell(state, population, functions.sphere(population))
    strategy.tell(state, population[:1], functions.sphere(population[:1]), index=[0])
    assert all(np.array_equal(before[key], array) for key, array in storage.flatten(state)[1].items())


@pytest.mark.parametrize("name", NAMES)
def test_partial_tells_in_any_order_are_one_whole_tell(name):
    strategy = build(name)
    state = advance(strategy, begin(strategy), generations=2)
    population = strategy.ask(state)
    fitness = functions.sphere(population)
    whole = strategy.tell(state, population, fitness)
    parts = state
    for index in np.array_split(np.random.default_rng(0).permutation(len(population)), 3):
        parts = strategy.tell(parts, population[index], fitness[index], index=index)
    assert parts.generation == whole.generation == 3
    np.testing.assert_array_equal(parts.mean, whole.mean)
    np.testing.assert_array_equal(strategy.ask(parts), strategy.ask(whole))
    assert (parts.evaluations, parts.best_fitness) == (whole.evaluations, whole.best_fitness)


def test_a_partial_tell_leaves_the_population_and_counts_what_was_told():
    strategy = build("cma-es")
    state = begin(strategy)
    population = strategy.ask(state)
    part = strategy.tell(state, population[[4, 1]], functions.sphere(population[[4, 1]]), index=[4, 1])
    np.testing.assert_array_equal(strategy.ask(part), population)
    assert part.generation == 0
    assert part.evaluations == 2
    assert part.best_fitness == functions.sphere(population[[4, 1]]).min()
    assert np.flatnonzero(part.told).tolist() == [1, 4]


def test_points_of_ones_own_may_be_told():
    strategy = build("cma-es")
    state = begin(strategy)
    population = strategy.ask(state)
    population[0] = 0.0
    after = strategy.tell(state, population, functions.sphere(population))
    assert after.best_fitness == 0
    assert functions.sphere(after.mean) < functions.sphere(state.mean)


def test_the_best_points_are_kept_in_order():
    strategy = build("random-search", keep=7, around="start")
    state, seen = begin(strategy), []
    for _ in range(20):
        population = strategy.ask(state)
        seen += functions.sphere(population).tolist()
        state = strategy.tell(state, population, functions.sphere(population))
    np.testing.assert_array_equal(state.top_fitness, np.sort(seen)[:7])
    np.testing.assert_array_equal(functions.sphere(state.top), state.top_fitness)
    np.testing.assert_array_equal(state.best, state.top[0])


def test_the_average_is_the_moving_average_of_the_mean():
    strategy = build("snes", averaging=0.5)
    state = begin(strategy)
    expected = state.mean
    for _ in range(4):
        state = advance(strategy, state)
        expected = 0.5 * expected + 0.5 * state.mean
    np.testing.assert_allclose(state.average, expected)


def test_pairs_are_mirrored_about_the_mean():
    strategy = build("openes")
    state = begin(strategy)
    population = strategy.ask(state)
    np.testing.assert_allclose((population[0::2] + population[1::2]) / 2, np.broadcast_to(state.mean, (len(population) // 2, 5)))


def test_a_population_has_the_law_it_states():
    strategy = build("snes", population=20_000)
    state = begin(strategy)
    z = (strategy.ask(state) - state.mean) / 0.5
    assert np.abs(z.mean(0)).max() < 4 / np.sqrt(20_000)
    assert np.abs(z.var(0) - 1).max() < 4 * np.sqrt(2 / 20_000)


def test_guided_noise_has_the_stated_covariance():
    strategy = build("guided-es", population=40_000, whole=0.25)
    state = strategy.guide(strategy.init(Key(0), np.zeros(4)), np.array([0.0, 2.0, 0.0, 0.0]))
    covariance = np.cov(strategy.ask(state).T) / 0.25
    np.testing.assert_allclose(np.diag(covariance), [0.25, 0.25 + 0.75 * 4, 0.25, 0.25], rtol=0.05)


def test_a_surrogate_that_points_along_the_gradient_speeds_guided_search_up():
    strategy = build("guided-es", population=8)
    plain = guided = strategy.init(Key(0), np.ones(100))
    for _ in range(30):
        plain = advance(strategy, plain)
        guided = advance(strategy, strategy.guide(guided, guided.mean))
    assert functions.sphere(guided.mean) < 0.5 * functions.sphere(plain.mean)


def test_another_step_of_the_key_is_another_stream():
    strategy = build("snes")
    assert not np.array_equal(strategy.ask(strategy.init(Key(0), np.ones(3))), strategy.ask(strategy.init(Key(0, 1), np.ones(3))))


# -- what is refused -------------------------------------------------------------------------------------------------------------


def refused(error, words, *arguments, **options):
    strategy = build("cma-es")
    with pytest.raises(error, match=words):
        strategy.tell(begin(strategy), *arguments, **options)


def test_a_population_of_another_shape_is_refused():
    refused(ShapeError, r"population of shape \(8, 4\); it must be \(8, 5\)", np.zeros((8, 4)), np.zeros(8))


def test_fitness_of_another_length_is_refused():
    refused(ShapeError, r"fitness of shape \(7,\); it must be \(8,\)", np.zeros((8, 5)), np.zeros(7))


def test_fitness_of_text_is_refused():
    refused(ShapeError, "fitness must be an array of real numbers", np.zeros((8, 5)), ["a"] * 8)


def test_points_that_are_not_finite_are_refused():
    refused(ShapeError, "NaN or infinite coordinates", np.full((8, 5), np.nan), np.zeros(8))


def test_an_index_out_of_range_is_refused():
    refused(SettingError, "between 0 and 7", np.zeros((1, 5)), np.zeros(1), index=[8])


def test_an_index_with_repeats_is_refused():
    refused(SettingError, "without repeats", np.zeros((2, 5)), np.zeros(2), index=[1, 1])


def test_a_member_is_told_once():
    strategy = build("cma-es")
    state = strategy.tell(begin(strategy), np.zeros((1, 5)), np.zeros(1), index=[2])
    with pytest.raises(SettingError, match=r"\[2\] were"):
        strategy.tell(state, np.zeros((1, 5)), np.zeros(1), index=[2])


def test_a_whole_population_after_a_part_is_refused():
    strategy = build("cma-es")
    state = strategy.tell(begin(strategy), np.zeros((6, 5)), np.zeros(6), index=[0, 1, 2, 3, 4, 5])
    with pytest.raises(SettingError, match=r"index=\[6, 7\]"):
        strategy.tell(state, np.zeros((8, 5)), np.zeros(8))


@pytest.mark.parametrize("sigma", [0, -1, 1e-200, np.nan, np.inf, "a", True])
def test_sigma_must_be_above_zero(sigma):
    with pytest.raises(SettingError, match=r"sigma=.* must be a number above 0"):
        SNES(sigma=sigma)


def test_an_odd_population_of_pairs_is_refused():
    with pytest.raises(SettingError, match=r"population=7 .* even"):
        OpenES(sigma=1, population=7)


@pytest.mark.parametrize("strategy", [CMAES(sigma=1), XNES(sigma=1)], ids=["cma-es", "xnes"])
def test_too_many_dimensions_for_a_matrix_offer_strategies_without_one(strategy):
    with pytest.raises(SettingError, match=r"n=3001 is above the limit .* 3000.*sep-cma-es.*lm-ma-es"):
        strategy.init(Key(0), np.zeros(3001))


def test_the_limit_of_dimensions_can_be_moved():
    assert len(CMAES(sigma=1, max_dimension=4).init(Key(0), np.zeros(4)).mean) == 4


@pytest.mark.parametrize("mean", [[], [[1.0]], [np.nan], ["a"], 3.0])
def test_a_start_that_is_no_vector_of_finite_numbers_is_refused(mean):
    with pytest.raises(ShapeError, match="mean must be"):
        RandomSearch(sigma=1).init(Key(0), mean)


def test_an_unknown_rule_suggests_the_nearest():
    with pytest.raises(SettingError, match="Did you mean 'adam'"):
        OpenES(sigma=1, rule="adm")
