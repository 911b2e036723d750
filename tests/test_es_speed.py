"""Time of ask and tell: the record of benchmarks/es_speed.py, and a small form of it in processor time, of which other programs take none."""

import json
import pathlib
import time

import numpy as np
import pytest
from es_runs import build

from altgrad.es import draws, functions
from altgrad.rng import Key

RECORD = pathlib.Path(__file__).parent.parent / "benchmarks" / "records" / "es_speed.json"
SEPARABLE = ("snes", "sep-cma-es", "openes", "pgpe", "ars", "cem", "random-search")


def seconds(work):
    """The least of five."""
    found = []
    for _ in range(5):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return min(found)


@pytest.mark.parametrize("name", SEPARABLE)
def test_ask_and_tell_of_a_separable_strategy_take_at_most_three_times_the_draw(name):
    strategy = build(name, population=64)
    state = strategy.init(Key(0), np.ones(20_000))
    fitness = functions.sphere(strategy.ask(state))
    draw = seconds(lambda: draws.normals(Key(0), 64, 20_000))
    assert seconds(lambda: strategy.tell(state, strategy.ask(state), fitness)) <= 3 * draw


def test_the_record_holds_separable_strategies_within_three_times_the_draw():
    content = json.loads(RECORD.read_text(encoding="utf8"))
    assert (content["normals"]["n"], content["normals"]["members"]) == (100_000, 64)
    assert [row["strategy"] for row in content["separable"]] == list(SEPARABLE)
    assert all(row["of_addressed"] <= 3 for row in content["separable"])


def test_the_record_holds_cma_es_within_one_and_a_half_times_pycma():
    row = json.loads(RECORD.read_text(encoding="utf8"))["beside_pycma"][0]
    assert (row["n"], row["members"]) == (100, 50)
    assert row["ratio_of_means"] <= 1.5
