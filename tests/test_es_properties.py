"""What holds for every strategy: invariances, and that failures never break one."""

import numpy as np
import pytest
from es_runs import BY_RANK, BY_VALUE, NAMES, advance, begin, build, is_finite, same

from altgrad.es import STRATEGIES, functions
from altgrad.rng import Key

TURNED = [("cma-es", {}), ("xnes", {}), ("lm-ma-es", {}), ("random-search", {})] + [
    (name, {"rule": rule}) for name in ("openes", "ars", "guided-es") for rule in ("sgd", "clipup")
]


@pytest.mark.parametrize("name", NAMES)
def test_a_shifted_problem_is_searched_in_the_same_way(name):
    strategy, shift = build(name), np.array([3.0, -7.0, 0.5, 20.0, -1.25])
    here = advance(strategy, strategy.init(Key(1), np.ones(5)), functions.ellipsoid, 15)
    there = advance(strategy, strategy.init(Key(1), np.ones(5) + shift), lambda x: functions.ellipsoid(x - shift), 15)
    assert np.abs(here.mean - np.ones(5)).max() > 0.1
    np.testing.assert_allclose(there.mean - shift, here.mean, atol=1e-9)
    np.testing.assert_allclose(there.sigma, here.sigma, rtol=1e-9)


@pytest.mark.parametrize(("name", "settings"), TURNED, ids=lambda value: value if isinstance(value, str) else "-".join(value.values()))
def test_turned_populations_lead_to_a_turned_mean(name, settings):
    strategy, turn = build(name, **settings), functions.rotation(5, 11)
    here, there = strategy.init(Key(1), np.ones(5)), strategy.init(Key(1), turn @ np.ones(5))
    for _ in range(15):
        population = strategy.ask(here)
        fitness = functions.ellipsoid(population)
        here, there = strategy.tell(here, population, fitness), strategy.tell(there, population @ turn.T, fitness)
    assert np.abs(here.mean - np.ones(5)).max() > 0.1
    np.testing.assert_allclose(there.mean, turn @ here.mean, atol=1e-9)
    np.testing.assert_allclose(there.sigma, here.sigma, rtol=1e-9)


@pytest.mark.parametrize("name", ["snes", "sep-cma-es", "cem", "pgpe"])
def test_turned_populations_do_not_turn_a_separable_strategy(name):
    strategy, turn = build(name), functions.rotation(5, 11)
    here, there = strategy.init(Key(1), np.ones(5)), strategy.init(Key(1), turn @ np.ones(5))
    for _ in range(15):
        population = strategy.ask(here)
        fitness = functions.ellipsoid(population)
        here, there = strategy.tell(here, population, fitness), strategy.tell(there, population @ turn.T, fitness)
    assert not np.allclose(np.sort(strategy.deviations(there)), np.sort(strategy.deviations(here)), rtol=1e-3)


@pytest.mark.parametrize("name", BY_RANK)
def test_a_monotone_map_of_the_fitness_changes_no_bit(name):
    strategy = build(name)
    plain = advance(strategy, begin(strategy), functions.ellipsoid, 20)
    mapped = advance(strategy, begin(strategy), lambda x: 7 * np.sqrt(functions.ellipsoid(x)) - 3, 20)
    np.testing.assert_array_equal(plain.mean, mapped.mean)
    assert plain.sigma == mapped.sigma


@pytest.mark.parametrize("name", BY_VALUE)
def test_scale_and_offset_of_the_fitness_do_not_matter_to_strategies_by_value(name):
    strategy = build(name)
    plain = advance(strategy, begin(strategy), functions.sphere, 20)
    mapped = advance(strategy, begin(strategy), lambda x: 1000 * functions.sphere(x) + 5, 20)
    np.testing.assert_allclose(plain.mean, mapped.mean, rtol=1e-6)


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**1000])
@pytest.mark.parametrize("name", BY_VALUE)
def test_values_whose_squares_are_no_numbers_are_searched_to_the_same_bits(name, scale):
    strategy = build(name)
    plain = advance(strategy, begin(strategy), functions.sphere, 20)
    np.testing.assert_array_equal(plain.mean, advance(strategy, begin(strategy), lambda x: scale * functions.sphere(x), 20).mean)


@pytest.mark.parametrize("name", BY_VALUE)
def test_a_bent_fitness_matters_to_strategies_by_value(name):
    strategy = build(name)
    plain = advance(strategy, begin(strategy), functions.sphere, 20)
    assert not np.allclose(plain.mean, advance(strategy, begin(strategy), lambda x: functions.sphere(x) ** 3, 20).mean, rtol=1e-6)


def sometimes(bad):
    """The sphere, with `bad` for every member whose first coordinate has an odd third digit."""
    return lambda x: np.where(np.floor(np.abs(x[:, 0]) * 1000) % 2 == 1, bad, functions.sphere(x))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_fitness_that_is_not_finite_breaks_no_strategy(name, bad):
    strategy = build(name)
    state = advance(strategy, begin(strategy), sometimes(bad), 60)
    assert is_finite(state)
    assert functions.sphere(state.mean) < 0.6 * functions.sphere(begin(strategy).mean)
    assert np.isfinite(state.best_fitness)


@pytest.mark.parametrize("name", BY_RANK)
def test_nan_and_both_infinities_are_the_worst_rank(name):
    strategy = build(name)
    state = begin(strategy)
    population = strategy.ask(state)
    fitness = functions.sphere(population)
    told = []
    for bad in (1e300, np.nan, np.inf, -np.inf):
        fitness[1] = bad
        told.append(strategy.tell(state, population, fitness).mean)
    for mean in told[1:]:
        np.testing.assert_array_equal(mean, told[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_generation_of_failures_moves_nothing_and_is_followed_by_other_points(name):
    strategy = build(name)
    state = advance(strategy, begin(strategy), generations=3)
    population = strategy.ask(state)
    after = strategy.tell(state, population, np.full(len(population), np.nan))
    np.testing.assert_array_equal(after.mean, state.mean)
    assert after.sigma == state.sigma
    assert not np.array_equal(strategy.ask(after), population)


@pytest.mark.parametrize("name", NAMES)
def test_one_dimension_is_enough(name):
    strategy = build(name)
    state = advance(strategy, strategy.init(Key(0), np.array([1.0])), generations=80)
    assert is_finite(state)
    assert state.best_fitness < 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_a_flat_fitness_breaks_no_strategy(name):
    strategy = build(name)
    assert is_finite(advance(strategy, begin(strategy), lambda x: np.zeros(len(x)), 50))


ENDLESS = [("xnes", "flat", 1_000), ("sep-cma-es", "face", 200), ("xnes", "face", 40), ("snes", "sphere", 1_500), ("sep-cma-es", "slope", 700)]


@pytest.mark.parametrize(("name", "kind", "generations"), ENDLESS, ids=lambda value: str(value))
def test_a_search_that_nobody_stops_breaks_no_strategy(name, kind, generations):
    size = {"sphere": 1e-100, "slope": 1e100}.get(kind, 1.0)  # so that few generations lead to the end of float64
    strategy = build(name, sigma=size)
    state = strategy.init(Key(1), np.full(4, size))
    f = {"sphere": lambda x: functions.sphere(x / size), "flat": lambda x: np.zeros(len(x))}.get(kind, lambda x: -x.sum(1))
    for _ in range(generations):
        population = strategy.ask(state)
        population = np.clip(population, 0.9, 1.1) if kind == "face" else population
        state = strategy.tell(state, population, f(population))
    assert is_finite(state)
    assert np.min(strategy.deviations(state)) > 0


@pytest.mark.parametrize("name", NAMES)
def test_two_keys_give_two_searches_and_one_key_gives_one(name):
    strategy = build(name)
    first, again, other = (advance(strategy, begin(strategy, seed=seed), generations=3) for seed in (3, 3, 4))
    assert same(first, again)
    assert not np.array_equal(first.best, other.best)


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_names_its_source_and_explains_its_settings(name):
    from altgrad.registry import describe_settings

    assert len(STRATEGIES[name].source) > 10
    assert all(entry["help"] for entry in describe_settings(STRATEGIES[name]))
