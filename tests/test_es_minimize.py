"""minimize: results, reasons, restarts, and an f that fails."""

import itertools
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from es_runs import NAMES

from altgrad.errors import SettingError, ShapeError, UsageError
from altgrad.es import CMAES, SNES, Stopping, functions, minimize
from altgrad.es.evaluation import FailedEvaluations
from altgrad.es.restarts import KINDS


def search(f=functions.sphere, **options):
    return minimize(f, options.pop("x0", np.ones(4)), **{"sigma": 0.5, "max_evaluations": 2_000, **options})


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_gets_better_within_its_evaluations(name):
    found = search(strategy=name, max_evaluations=1_000)
    assert found.fun < 0.5
    assert found.fun == functions.sphere(found.x)
    assert found.evaluations <= 1_000


@pytest.mark.parametrize("name", NAMES)
def test_one_by_one_and_vectorized_are_the_same_search(name):
    np.testing.assert_array_equal(search(strategy=name, max_evaluations=200).x, search(strategy=name, max_evaluations=200, vectorized=True).x)


def test_f_is_called_as_often_as_is_said():
    calls = []
    found = search(lambda x: calls.append(1) or functions.sphere(x), max_evaluations=333)
    assert found.evaluations == len(calls) <= 333


def test_f_may_write_into_its_argument():
    def writes(x):
        value = functions.sphere(x)
        x[:] = 100
        return value

    np.testing.assert_array_equal(search(writes, max_evaluations=400).x, search(max_evaluations=400).x)


def test_the_largest_value_is_found_on_request():
    found = search(lambda x: 3 - functions.sphere(x), maximize=True, target=3 - 1e-9)
    assert found.reached
    assert 3 - 1e-9 <= found.fun <= 3
    assert "target 3 " in found.reason
    assert (np.diff(found.top_fun) <= 0).all()


def test_a_strategy_may_be_given_with_its_settings():
    by_name = search(strategy="cma-es", population=12, settings={"active": False})
    by_value = minimize(functions.sphere, np.ones(4), strategy=CMAES(sigma=0.5, population=12, active=False), max_evaluations=2_000)
    np.testing.assert_array_equal(by_name.x, by_value.x)


def test_the_average_of_the_mean_is_nearer_than_the_mean_where_f_is_noisy():
    noise = np.random.default_rng(0)
    found = search(lambda x: functions.sphere(x) + noise.normal(), strategy="openes", settings={"averaging": 0.95, "decay": 1.0, "keep": 3})
    assert functions.sphere(found.average) < functions.sphere(found.mean)
    assert found.top.shape == (3, 4)


def test_another_seed_is_another_search():
    assert search(seed=1).fun != search(seed=2).fun


# -- reasons ---------------------------------------------------------------------------------------------------------------------


def test_a_target_is_named():
    found = search(target=1e-5)
    assert found.reached
    assert found.reason.startswith("The target 1e-05 was reached: f = ")


def test_spent_evaluations_are_named():
    found = search(max_evaluations=100)
    assert not found.reached
    assert found.reason == "The evaluations are spent: 96 of 100, and 4 are too few for a generation of 8."


def test_a_flat_function_is_named():
    assert "f has become flat" in search(lambda x: 1.0).reason


def test_a_converged_search_is_named():
    found = search(stopping=Stopping(flat=0.0), max_evaluations=20_000)
    assert found.reason.startswith("The step has become too small")


def test_a_function_without_a_minimum_is_named():
    assert "has run away" in search(lambda x: x.sum(), max_evaluations=50_000).reason


def test_an_uneven_covariance_is_named():
    found = search(lambda x: functions.ellipsoid(x, condition=1e8), stopping=Stopping(condition=1e4, flat=0.0), max_evaluations=20_000)
    assert "covariance matrix has become too uneven" in found.reason


def test_a_precision_that_is_exhausted_is_named():
    found = search(lambda x: functions.sphere(x - 1e9), x0=np.full(4, 1e9), stopping=Stopping(flat=0.0, step=0.0), max_evaluations=50_000)
    assert "below the precision of float64" in found.reason


def test_on_generation_sees_figures_and_may_stop():
    rows = []
    found = search(on_generation=lambda row: rows.append(row) or len(rows) == 5)
    assert found.generations == len(rows) == 5
    assert found.reason == "on_generation asked to stop."
    assert [row["evaluations"] for row in rows] == [8, 16, 24, 32, 40]
    assert all(row["best"] <= row["generation_best"] <= row["generation_median"] for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_restarts_find_what_one_run_misses(kind):
    found = search(functions.rastrigin, x0=np.full(4, 3.0), sigma=2.0, bounds=(-5, 5), restarts=kind, target=1e-8, max_evaluations=40_000)
    assert found.reached == (kind != "none")
    assert (found.restarts > 0) == (kind != "none")


def test_ipop_doubles_the_population():
    sizes = []
    search(functions.rastrigin, sigma=2.0, restarts="ipop", max_evaluations=9_000, on_generation=lambda row: sizes.append((row["run"], row["population"])))
    assert sorted(set(sizes))[:3] == [(0, 8), (1, 16), (2, 32)]


def test_bipop_has_small_runs_between_the_large_ones():
    sizes = []
    search(functions.rastrigin, sigma=2.0, restarts="bipop", max_evaluations=20_000, on_generation=lambda row: sizes.append((row["run"], row["population"])))
    members = [population for _, population in sorted(set(sizes))]
    assert members[0] == 8
    assert max(members) >= 32
    assert any(later < earlier for earlier, later in itertools.pairwise(members))


# -- an f that fails -------------------------------------------------------------------------------------------------------------


def fails_right_of_one(x):
    if x[0] > 1:
        raise RuntimeError("the simulator crashed")
    return functions.sphere(x)


@pytest.mark.parametrize("name", NAMES)
def test_an_f_that_raises_now_and_then_breaks_no_strategy(name):
    with pytest.warns(FailedEvaluations):
        found = search(fails_right_of_one, strategy=name, max_evaluations=1_500)
    assert found.failures > 0
    assert found.fun < 0.5


def test_an_exception_is_reported_once_with_its_index():
    with pytest.warns(FailedEvaluations) as caught:
        found = search(fails_right_of_one, max_evaluations=400)
    assert len(caught) == 1
    assert found.failures > 1
    assert "f raised at member" in str(caught[0].message)
    assert found.first_failure.endswith("of generation 0: RuntimeError: the simulator crashed")


def test_an_exception_of_many_lines_is_told_on_one():
    def f(x):
        raise ValueError("no licence\nask the office")

    with pytest.warns(FailedEvaluations):
        assert search(f).first_failure == "member 0 of generation 0: ValueError: no licence ask the office"


def test_three_generations_of_nothing_but_failures_stop_the_run():
    with pytest.warns(FailedEvaluations):
        found = search(lambda x: 1 / 0)
    assert found.evaluations == found.failures == 24
    assert found.generations == 3
    assert found.reason.startswith("3 generations in a row gave not one finite fitness; the first failure was at member 0 of generation 0: ZeroDivisionError")
    np.testing.assert_array_equal(found.x, np.ones(4))
    assert found.fun == np.inf


def test_nan_everywhere_stops_the_run_too():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert search(lambda x: np.nan).reason == "3 generations in a row gave not one finite fitness."


def test_one_good_generation_starts_the_count_again():
    calls = []

    def f(x):
        calls.append(1)
        return functions.sphere(x) if len(calls) // 8 % 3 == 2 else np.nan

    assert search(f, max_evaluations=160).generations == 20


def test_a_vectorized_f_that_raises_fails_every_member():
    def f(population):
        raise OSError("no licence")

    with pytest.warns(FailedEvaluations, match="all members of generation 0: OSError: no licence"):
        assert search(f, vectorized=True).failures == 24


@pytest.mark.parametrize("value", ["1.0", None, [1.0], np.ones(2), 1j, True, {"loss": 1}], ids=repr)
def test_what_is_no_real_number_is_refused(value):
    with pytest.raises(UsageError, match=r"f returned .* at member 0; it must return one real number"):
        search(lambda x: value)


@pytest.mark.parametrize("wrap", [float, np.float32, np.asarray, int], ids=["float", "float32", "array", "int"])
def test_numbers_of_every_kind_are_taken(wrap):
    assert np.isfinite(search(lambda x: wrap(10 * functions.sphere(x)), max_evaluations=100).fun)


def test_a_tensor_of_no_dimension_is_taken():
    import torch

    assert search(lambda x: torch.as_tensor(x).square().sum(), max_evaluations=800).fun < 1e-3


def test_a_vectorized_f_of_another_shape_is_refused():
    with pytest.raises(ShapeError, match=r"shape \(8, 1\) for a population of shape \(8, 4\)"):
        search(lambda x: np.zeros((len(x), 1)), vectorized=True)


# -- what is refused -------------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"strategy": "cmaes"}, UsageError, "unknown strategy 'cmaes'. Did you mean 'cma-es'"),
    ({"strategy": 5}, SettingError, "strategy=5"),
    ({"sigma": 0.0}, SettingError, "sigma=0.0 is not allowed"),
    ({"sigma": None}, SettingError, "needs the setting sigma"),
    ({"settings": {"actve": True}}, SettingError, "Did you mean 'active'"),
    ({"max_evaluations": 5}, SettingError, "less than one generation of 8"),
    ({"max_evaluations": 0}, SettingError, "max_evaluations=0"),
    ({"max_evaluations": 10.5}, SettingError, "max_evaluations=10.5"),
    ({"population": 3}, SettingError, "population=3"),
    ({"seed": "a"}, SettingError, "seed='a'"),
    ({"target": "low"}, SettingError, "target='low'"),
    ({"restarts": "ipo"}, SettingError, "restarts='ipo'.*none, ipop, bipop"),
    ({"surrogate": lambda x: x}, SettingError, "surrogate was given to cma-es.*guided-es"),
    ({"x0": [np.nan, 1.0]}, ShapeError, "x0 must be finite; entry 0 is nan"),
    ({"x0": [[1.0]]}, ShapeError, "x0 must be a vector"),
    ({"strategy": SNES(sigma=1.0)}, SettingError, "sigma was given beside a SNES"),
    ({"strategy": SNES(sigma=1.0), "sigma": 0.0}, SettingError, "sigma was given beside a SNES"),
    ({"f": 5}, SettingError, "f=5"),
]


@pytest.mark.parametrize(("wrong", "error", "words"), REFUSED, ids=[next(iter(wrong)) + str(place) for place, (wrong, _, _) in enumerate(REFUSED)])
def test_a_wrong_argument_is_refused(wrong, error, words):
    with pytest.raises(error, match=words):
        search(**wrong)


# -- cost ------------------------------------------------------------------------------------------------------------------------


def fresh(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True
    ).stdout


def test_es_imports_neither_torch_nor_what_the_command_line_needs():
    shown = fresh("import sys, altgrad.es; print([name for name in ('torch', 'rich', 'click', 'matplotlib', 'scipy') if name in sys.modules])")
    assert shown.strip() == "[]"


def test_a_search_imports_no_torch():
    code = "import sys; from altgrad.es import minimize; minimize(lambda x: (x * x).sum(), [1.0], sigma=1, max_evaluations=50); print('torch' in sys.modules)"
    assert fresh(code).strip() == "False"


def test_es_is_imported_in_less_than_three_tenths_of_a_second_of_processor_time():
    code = "import time; begin = time.process_time(); import altgrad.es; print(time.process_time() - begin)"
    assert min(float(fresh(code)) for _ in range(5)) < 0.3
