"""Searches as tests drive them: by hand, a generation at a time."""

import numpy as np

from altgrad.es import STRATEGIES, functions, storage
from altgrad.rng import Key

NAMES = sorted(STRATEGIES)
BY_VALUE = ("ars", "guided-es")  # use differences of fitness, where all others use ranks
BY_RANK = [name for name in NAMES if name not in BY_VALUE]


def build(name, **settings):
    return STRATEGIES[name](**{"sigma": 0.5, **settings})


def begin(strategy, dimension=5, seed=3):
    return strategy.init(Key(seed), np.linspace(1.0, 2.0, dimension))


def advance(strategy, state, f=functions.sphere, generations=1):
    for _ in range(generations):
        population = strategy.ask(state)
        state = strategy.tell(state, population, f(population))
    return state


def same(one, other):
    """Whether two states agree in every bit."""
    (scalars, arrays), (more, others) = storage.flatten(one), storage.flatten(other)
    return scalars == more and arrays.keys() == others.keys() and all(np.array_equal(arrays[name], others[name], equal_nan=True) for name in arrays)


def is_finite(state):
    """Whether all arrays are finite but the fitness of a best point there may not be yet."""
    return all(np.isfinite(array).all() for name, array in storage.flatten(state)[1].items() if name != "best_fitness")


__all__ = ["BY_RANK", "BY_VALUE", "NAMES", "advance", "begin", "build", "is_finite", "same"]
