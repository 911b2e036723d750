"""Bounds: every kind keeps evaluations inside, leaves the inside alone, and lets an optimum on a face be found."""

import warnings

import numpy as np
import pytest
from es_runs import NAMES

from altgrad.errors import SettingError, ShapeError
from altgrad.es import Bounds, functions, minimize
from altgrad.es.bounds import KINDS

DIRECTIONAL = ("cma-es", "xnes", "lm-ma-es")
pytestmark = pytest.mark.filterwarnings("ignore:.*with clipped bounds:UserWarning")
INSIDE = [kind for kind in KINDS if kind != "none"]
MIXED = (np.array([-2.0, -np.inf, 0.0, -np.inf]), np.array([np.inf, 3.0, 1.0, np.inf]))  # one face, the other, both, none
FAR = np.random.default_rng(0).normal(size=(500, 4)) * 20


@pytest.mark.parametrize("how", INSIDE)
def test_every_point_is_brought_inside(how):
    points = Bounds(*MIXED, how).inside(FAR)
    assert ((points >= MIXED[0]) & (points <= MIXED[1])).all()


@pytest.mark.parametrize("how", ["clip", "reflect", "penalty"])
def test_points_inside_stay_where_they_are(how):
    points = np.random.default_rng(0).uniform([-2, -5, 0, -5], [5, 3, 1, 5], size=(500, 4))
    np.testing.assert_array_equal(Bounds(*MIXED, how).inside(points), points)


@pytest.mark.parametrize("how", INSIDE)
def test_the_start_stands_for_x0(how):
    bounds = Bounds(*MIXED, how)
    for x0 in (np.array([0.0, 1.0, 0.3, 5.0]), np.array([-2.0, 3.0, 1.0, 0.0])):
        np.testing.assert_allclose(bounds.inside(bounds.start(x0)), x0, atol=1e-12)


def test_reflection_is_that_of_mirrors():
    found = Bounds(0.0, 1.0, "reflect").inside(np.array([[-0.25, 1.25, 2.25, -1.25, 7.5]]))
    np.testing.assert_allclose(found, [[0.25, 0.75, 0.25, 0.75, 0.5]])


def test_the_transform_is_smooth_and_of_slope_one_in_the_middle():
    bounds, u = Bounds(-1.0, 3.0, "transform"), np.linspace(-9, 9, 20001)[:, None]
    slope = np.diff(bounds.inside(u)[:, 0]) / np.diff(u[:, 0])
    assert np.abs(np.diff(slope)).max() < 1e-3
    assert slope[np.abs(u[:-1, 0] - 1).argmin()] == pytest.approx(1, abs=1e-3)


def test_no_bounds_change_nothing():
    np.testing.assert_array_equal(Bounds(*MIXED, "none").inside(FAR), FAR)


@pytest.mark.parametrize("how", INSIDE)
@pytest.mark.parametrize("name", NAMES)
def test_no_strategy_evaluates_outside(name, how):
    seen = []

    def f(x):
        seen.append(x)
        return -x.sum()

    minimize(f, [1.0, 0.0, 0.5, -3.0], strategy=name, sigma=2.0, max_evaluations=400, bounds=Bounds(*MIXED, how))
    assert ((np.array(seen) >= MIXED[0]) & (np.array(seen) <= MIXED[1])).all()


FACES = [(name, how) for name in ("cma-es", "xnes", "sep-cma-es", "snes", "cem") for how in INSIDE if how != "clip" or name not in DIRECTIONAL]


@pytest.mark.parametrize(("name", "how"), FACES, ids=lambda value: value)
def test_an_optimum_on_a_face_is_found(name, how):
    shift = np.array([0.5, 4.0, -3.0])
    found = minimize(lambda x: functions.sphere(x - shift), np.zeros(3), strategy=name, sigma=0.5, max_evaluations=6_000, bounds=Bounds(-1, 2, how))
    np.testing.assert_allclose(found.x, [0.5, 2.0, -1.0], atol=1e-4)
    assert found.fun == functions.sphere(found.x - shift)


@pytest.mark.parametrize("name", NAMES)
def test_clipping_warns_where_directions_are_learned(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        minimize(functions.sphere, np.ones(3), strategy=name, sigma=0.5, max_evaluations=100, bounds=Bounds(-2, 2, "clip"))
    assert [("with clipped bounds can end early" in str(warning.message)) for warning in caught] == [True] * (name in DIRECTIONAL)


@pytest.mark.parametrize("how", INSIDE)
def test_an_optimum_inside_is_found_as_without_bounds(how):
    found = minimize(functions.ellipsoid, np.ones(5), sigma=0.5, max_evaluations=6_000, target=1e-9, bounds=Bounds(-3, 2, how))
    assert found.reached


def test_a_clipped_mean_stays_inside():
    found = minimize(lambda x: -x.sum(), np.ones(3), strategy="openes", sigma=1.0, max_evaluations=2_000, bounds=Bounds(-1, 2, "clip"))
    assert (found.state.mean <= 2).all()


def test_a_penalty_grows_with_the_distance_and_is_zero_inside():
    bounds = Bounds(0.0, 1.0, "penalty")
    points = np.array([[0.5], [1.0], [1.5], [2.0], [-1.0]])
    fitness = np.array([0.0, 1.0, 2.0, 3.0, 4.0])  # their interquartile range is 2
    expected = 2 * np.array([0, 0, 0.5, 1, 1]) ** 2 / points.var()
    np.testing.assert_allclose(bounds.charged(points, fitness) - fitness, expected)


def test_a_pair_of_bounds_reflects():
    seen = minimize(lambda x: -x.sum(), np.zeros(2), sigma=1.0, max_evaluations=200, bounds=(-1.0, [2.0, 3.0]))
    assert (seen.top <= [2.0, 3.0]).all()


# -- what is refused -------------------------------------------------------------------------------------------------------------


def test_a_start_outside_is_refused_with_its_coordinate():
    with pytest.raises(SettingError, match=r"x0\[1\]=5 is not allowed; it must be within the bounds \[-1, 2\], as must 1 other"):
        minimize(functions.sphere, [0.0, 5.0, -7.0], sigma=1, max_evaluations=100, bounds=(-1, 2))


def test_bounds_the_wrong_way_round_are_refused():
    with pytest.raises(SettingError, match=r"bounds \[2, 1\] of coordinate 1"):
        Bounds([0, 2], 1)


def test_bounds_of_another_length_are_refused():
    with pytest.raises(ShapeError, match="bounds of 2 entries do not fit x0 of 3"):
        minimize(functions.sphere, np.zeros(3), sigma=1, max_evaluations=100, bounds=([-1, -1], 1))


def test_an_unknown_kind_suggests_the_nearest():
    with pytest.raises(SettingError, match="Did you mean 'reflect'"):
        Bounds(0, 1, "reflex")


@pytest.mark.parametrize("bounds", [5, (1, 2, 3), "ab"])
def test_bounds_that_are_no_pair_are_refused(bounds):
    with pytest.raises((SettingError, ShapeError), match="bound"):
        minimize(functions.sphere, np.zeros(3), sigma=1, max_evaluations=100, bounds=bounds)
