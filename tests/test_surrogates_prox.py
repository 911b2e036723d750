"""Proximal steps: against the argmin by brute force, closed forms, and how their strength grows."""

import pytest
import torch
from tolerances import tolerance

from altgrad import surrogates
from altgrad.errors import SettingError

EXACT = tolerance("closed_form64")
NAMES = surrogates.names("prox")
W = torch.tensor([-2.3, -1.0, -0.7, -0.2, -0.05, 0.05, 0.3, 0.8, 1.0, 1.4, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.6, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_step_is_the_argmin_by_brute_force(name, strength):
    estimator = surrogates.get(name)
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    objective = 0.5 * (grid - W[:, None]).square() + strength * estimator.distance(grid)
    found = estimator(W, strength=strength)
    own = 0.5 * (found - W).square() + strength * estimator.distance(found)
    assert (own - objective.amin(1)).max() <= EXACT  # no point of the grid is lower
    assert (found - grid[objective.argmin(1)]).abs().max() <= 2e-4


def test_proxquant_at_points_by_hand():
    assert surrogates.get("proxquant")(torch.tensor([-2.0, -0.95, -0.5, 0.0, 0.5, 1.05, 2.0]), strength=0.1).tolist() == pytest.approx(
        [-1.9, -1.0, -0.6, 0.1, 0.6, 1.0, 1.9]
    )


def test_the_ternary_step_at_points_by_hand():
    assert surrogates.get("proxquant-ternary")(torch.tensor([-2.0, -0.4, 0.0, 0.6]), strength=1.0).tolist() == pytest.approx([-1.5, -0.2, 0.0, 0.8])


@pytest.mark.parametrize("name", NAMES)
def test_no_strength_changes_nothing_and_a_great_one_projects(name):
    estimator = surrogates.get(name)
    assert (estimator(W, strength=0.0) - W).abs().max() <= EXACT
    assert (estimator(W, strength=1e15) - estimator.hard(W)).abs().max() <= EXACT


@pytest.mark.parametrize("name", NAMES)
def test_the_strength_grows_evenly_along_the_run(name):
    estimator = surrogates.get(name, end=4.0)
    assert [estimator.at(share).strength for share in (0, 0.25, 1, 3)] == [0.0, 1.0, 4.0, 4.0]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_keeps_the_dtype_and_has_no_graph(name):
    w = torch.randn(5, dtype=torch.float32, requires_grad=True)
    found = surrogates.get(name)(w)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert not torch.equal(found, w)


def test_steps_behind_an_optimizer_make_weights_binary():
    estimator, w = surrogates.get("proxquant"), torch.tensor([0.3, -0.2, 1.7], requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.05)
    for step in range(40):
        optimizer.zero_grad()
        (w - torch.tensor([0.4, -0.3, 1.5])).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            w.copy_(estimator.at(step / 40)(w))
    assert w.tolist() == [1.0, -1.0, 1.0]


@pytest.mark.parametrize("spelled", ["proxquant,strength=-1", "binary-relax,end=inf", "proxquant-ternary,threshold=0"])
def test_settings_out_of_range_are_refused(spelled):
    with pytest.raises(SettingError, match=spelled.split(",")[1].split("=")[0]):
        surrogates.get(spelled)


def test_a_negative_strength_is_refused_at_the_call():
    with pytest.raises(SettingError, match="strength"):
        surrogates.get("proxquant")(W, strength=-0.1)
