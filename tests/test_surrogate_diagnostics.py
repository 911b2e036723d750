"""What the log says of surrogates: each figure against its own formula, and the cosine against gradients that are known."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from console import rows
from torch import nn

import altgrad
from altgrad import registry, surrogates, trainer
from altgrad.errors import SettingError
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.quantisation import diagnostics
from altgrad.rng import Key
from altgrad.world import World

KEY = Key(3)


def bench(model):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem, batch = Supervised(model.double(), F.cross_entropy), Batch(x, torch.arange(16) % 3)
    problem.check_batch(batch)
    return problem, batch


def network(weights=None):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return altgrad.quantize(model, weights=weights) if weights else model


def look(problem, batch, state=None, key=KEY, **settings):
    engine = registry.engine("straight-through", {"diagnose": 1, "diagnose_pairs": 0, **settings})
    params = problem.params()
    return engine.estimate(problem, params, engine.init(problem, params, key) if state is None else state, batch, key, World())


def test_the_estimating_error_is_the_distance_of_restes_soft_sign():
    problem, batch = bench(network("sign:reste,o=2"))
    w = problem.params()["2.parametrizations.weight.original"].detach()
    found = look(problem, batch, schedule="none").metrics
    assert float(found["estimating-error/2.weight"]) == pytest.approx(float((w.sign() * w.abs().sqrt() - w.sign()).norm()))
    assert float(found["estimating-error"]) == float(found["estimating-error/2.weight"])


def test_a_surrogate_from_outside_is_the_one_that_is_judged():
    problem, batch = bench(network("sign:clipped"))
    w = problem.params()["2.parametrizations.weight.original"].detach()
    found = look(problem, batch, estimator="erf", schedule="none").metrics
    assert float(found["estimating-error"]) == pytest.approx(float((surrogates.get("erf").primitive(w) - w.sign()).norm()))


def test_the_gradient_variance_is_that_of_its_sizes():
    problem, batch = bench(network("sign:reste"))
    found = look(problem, batch)
    g = found.grads["2.parametrizations.weight.original"].abs()
    assert float(found.metrics["gradient-variance/2.weight"]) == pytest.approx(float((g - g.mean()).square().mean()))


@pytest.mark.parametrize("weights", ["sign:clipped,width=0.2", "ternary:ternary,threshold=0.5"])
def test_flips_are_the_levels_that_changed_since_the_step_before(weights):
    problem, batch = bench(network(weights))
    name = "2.parametrizations.weight.original"
    first = look(problem, batch)
    assert float(first.metrics["flips"]) == 0
    with torch.no_grad():
        problem.params()[name][:2] *= -1
    level = problem.model[2].weight.detach()[:2]
    second = look(problem, batch, first.state)
    assert float(second.metrics["flips"]) == pytest.approx(int((level != 0).sum()) / 30)
    assert float(look(problem, batch, second.state).metrics["flips/2.weight"]) == 0


def test_dead_weights_are_those_beyond_the_surrogates_reach():
    problem, batch = bench(network("sign:reste,t=0.2"))
    w = problem.params()["2.parametrizations.weight.original"].detach()
    share = float((w.abs() > 0.2).double().mean())
    assert 0 < share < 1
    assert float(look(problem, batch, schedule="none").metrics["dead"]) == pytest.approx(share)


def test_the_cosine_of_a_network_without_quantisers_is_one():
    found = look(*bench(network()), diagnose_pairs=300, diagnose_sigma=0.02).metrics
    assert abs(float(found["cosine"]) - 1) < 0.08


def test_the_cosine_is_to_the_smoothed_gradient_of_a_sign_which_is_known():
    """L = Σ_i c_i sign(w_i): the smoothed loss has the slope 2 c_i φ(w_i / σs) / σs, and the clipped surrogate gives c_i here."""
    w = torch.tensor([0.005, -0.02, 0.05, -0.09, 0.14, 0.001], dtype=torch.float64)
    c = torch.tensor([1.0, -2.0, 0.5, 1.0, 3.0, 0.7], dtype=torch.float64)

    class Signs(altgrad.Problem):
        def params(self):
            return {"w": w}

        def losses(self, params, batch, buffers):
            return (c * surrogates.get("clipped")(params["w"])).sum().reshape(1)

        def batch_size_of(self, batch):
            return 1

    spread = 0.3 * w.square().mean().sqrt()
    smooth = 2 * c * torch.exp(-0.5 * (w / spread).square()) / spread
    clipped = c * (w.abs() <= 1)
    found = diagnostics.smoothed_cosines(Signs(), {"w": w}, {"w": clipped}, Batch(w, w), Key(1), sigma=0.3, pairs=1500)
    assert abs(float(found["cosine"]) - float(F.cosine_similarity(smooth, clipped, dim=0))) < 0.08


def test_the_noise_has_an_address():
    problem, batch = bench(network("sign:reste"))
    one, same, other = (look(problem, batch, key=key, diagnose_pairs=20).metrics["cosine/0.bias"] for key in (Key(3), Key(3), Key(4)))
    assert torch.equal(one, same) or bool(one.isnan() & same.isnan())
    assert not torch.equal(one, other)


def test_figures_come_every_so_many_steps_and_leave_the_estimate_alone():
    problem, batch = bench(network("sign:reste"))
    told = ["flips" in look(problem, batch, key=Key(3, step), diagnose=3).metrics for step in range(6)]
    assert told == [False, False, True, False, False, True]
    plain = look(problem, batch, diagnose=0)
    assert plain.state == {}
    assert all(torch.equal(plain.grads[name], grad) for name, grad in look(problem, batch, diagnose_pairs=3).grads.items())


@pytest.mark.parametrize(("name", "value"), [("diagnose", -1), ("diagnose_pairs", 1), ("diagnose_sigma", 0.0)])
def test_a_wrong_setting_is_refused(name, value):
    with pytest.raises(SettingError, match=f"{name}={value} is not allowed"):
        registry.engine("straight-through", {name: value})


def test_they_are_in_the_log_and_flips_go_on_after_resuming(tmp_path):
    run = tmp_path / "run"
    engine = {"diagnose": 1, "diagnose_pairs": 2}
    given = {"engine": "straight-through", "engine_settings": engine, "model_settings": {"hidden": "8-8"}, "quantize": {"weights": "sign:reste"}}
    trainer.fit(trainer.build(trainer.TrainSettings(**given, lr=0.05, steps=4, save_every=3)), run_folder=run)
    first = rows(run)[:4]
    assert all("flips/2.weight" in row for row in first)
    assert first[-1]["flips"] > 0
    assert {"cosine", "cosine/0.weight", "dead", "estimating-error/2.weight", "gradient-variance"} <= set(first[0])
    third, _ = sorted((run / "checkpoints").glob("step-*"))
    (run / "checkpoints" / "latest").write_text(f"{third.name}\n")  # as if it had ended behind step 3
    trainer.fit(trainer.resume(run))
    assert [row["flips"] for row in rows(run)[:4]] == [row["flips"] for row in first]


# -- teeth -------------------------------------------------------------------------------------------------------------------------


def biased(grads, sums, squares, pairs):
    return REAL(grads, sums, {name: torch.zeros_like(value) for name, value in squares.items()}, pairs)


def reversed_sign(grads, sums, squares, pairs):
    return REAL(grads, {name: -value for name, value in sums.items()}, squares, pairs)


REAL = diagnostics.cosines_of
PLANTED = [
    ("noise counted into the norm", (diagnostics, "cosines_of", biased), test_the_cosine_of_a_network_without_quantisers_is_one),
    ("the smoothed gradient reversed", (diagnostics, "cosines_of", reversed_sign), test_the_cosine_is_to_the_smoothed_gradient_of_a_sign_which_is_known),
    (
        "flips of the raw weights",
        (diagnostics.Weight, "seen", lambda self, w: w),
        lambda: test_flips_are_the_levels_that_changed_since_the_step_before("ternary:ternary,threshold=0.5"),
    ),
    ("one scale for all tensors", (diagnostics, "rms", lambda value: torch.ones(())), test_the_cosine_is_to_the_smoothed_gradient_of_a_sign_which_is_known),
]


@pytest.mark.parametrize(("planted", "check"), [entry[1:] for entry in PLANTED], ids=[entry[0] for entry in PLANTED])
def test_a_planted_bug_is_caught(planted, check):
    with mock.patch.object(*planted), pytest.raises(AssertionError):
        check()
