"""The problem vq-autoencoder: its loss and figures, every engine that trains it, buffers, pictures, resuming, bad input."""

import json
import math

import numpy as np
import pytest
import torch
from console import invoke
from PIL import Image

from altgrad import registry, trainer
from altgrad.engine import Needs
from altgrad.errors import CapabilityError, NumericsError, SettingError, ShapeError
from altgrad.problems.vq_autoencoder import VQAutoencoder, errors_of_each
from altgrad.rng import Key
from altgrad.training import TrainSettings
from altgrad.world import World

SMALL = {"codes": 16, "dim": 4, "hidden": 8}


@pytest.fixture(scope="module")
def problem():
    return VQAutoencoder(**SMALL).build(Key(0))


def run(engine="backprop", *, steps=4, engine_settings=None, **settings):
    return TrainSettings(problem="vq-autoencoder", problem_settings={**SMALL, **settings}, engine=engine, engine_settings=engine_settings or {}, steps=steps)


def estimate(engine, problem, **settings):
    params = {name: value.detach() for name, value in problem.params().items()}
    rule = registry.engine(engine, settings)
    return rule.estimate(problem, params, rule.init(problem, params, Key(1)), problem.batch(0, World()), Key(2), World())


# -- the loss and the figures ------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_pixels_error_and_the_quantisers(problem):
    batch = problem.batch(0, World())
    outputs = problem.forward(problem.params(), batch.inputs, problem.fresh_buffers())
    expected = ((outputs.images - batch.inputs) ** 2).mean(1) + outputs.losses
    assert batch.targets is batch.inputs
    assert torch.allclose(problem.losses(problem.params(), batch, problem.fresh_buffers()), expected)


def test_the_figures_are_those_of_the_whole_test_set_whatever_the_chunk(problem):
    inputs = problem.dataset.test_inputs
    with torch.no_grad():
        outputs = problem.predict(inputs)
    found = problem.evaluate(problem.predict, chunk=100)
    share = np.bincount(outputs.indices.flatten().numpy(), minlength=16) / outputs.indices.numel()
    assert found["mse"] == pytest.approx(float((outputs.images - inputs).square().mean()), rel=1e-5)
    assert found["loss"] == pytest.approx(float(errors_of_each(outputs, inputs).mean()), rel=1e-5)
    assert found["usage"] == (share > 0).mean()
    assert found["perplexity"] == pytest.approx(math.exp(-(share[share > 0] * np.log(share[share > 0])).sum()), rel=1e-9)


def test_an_untrained_net_does_no_better_than_the_mean_image(problem):
    assert problem.evaluate(problem.predict)["mse"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    "settings", [{}, {"gradient": "rotation"}, {"affine": "running"}, {"sync": 0.2}, {"alternating": 1}, {"ema": True, "revive": 5}], ids=str
)
def test_every_variant_learns(settings):
    training = trainer.build(run(steps=40, batch_size=128, **settings))
    trainer.fit(training)
    assert training.figures["test_mse"] < 0.75


def test_first_codes_of_kmeans_are_all_chosen():
    built = VQAutoencoder(**SMALL, init="kmeans").build(Key(0))
    assert built.evaluate(built.predict, split="train")["usage"] == 1.0


# -- engines -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "settings"), [("straight-through", {}), ("forward", {"tangents": 1}), ("eggroll", {"population": 4}), ("likelihood-ratio", {"copies": 2})]
)
def test_an_engine_trains_it_from_the_command_line(tmp_path, engine, settings):
    words = [part for name, value in settings.items() for part in ("-s", f"{name}={value}")]
    words += [part for name, value in SMALL.items() for part in ("--problem-setting", f"{name}={value}")]
    done = invoke("train", "--problem", "vq-autoencoder", "--engine", engine, *words, "--steps", "2", "--out", str(tmp_path / "run"), "--json")
    figures = json.loads(done.stdout)["figures"]
    assert set(figures) == {"test_mse", "test_loss", "test_usage", "test_perplexity"}
    assert 0 < figures["test_usage"] <= 1


def test_the_command_line_trains_it_by_straight_through_unless_told_otherwise():
    found = json.loads(invoke("train", "--problem", "vq-autoencoder", "--dry-run", "--json").stdout)
    assert [found[name] for name in ("engine", "optimizer", "lr", "epochs")] == ["straight-through", "Adam", 3e-3, 30]


def test_forward_gradients_over_many_directions_point_along_backprop(problem):
    exact = estimate("backprop", problem).grads
    size = sum(grad.numel() for grad in exact.values())
    found = estimate("forward", problem, space="weights", tangents=256, noise="sign")
    mine, theirs = (torch.cat([tree[name].flatten() for name in exact]) for tree in (found.grads, exact))
    assert float(torch.cosine_similarity(mine, theirs, 0)) == pytest.approx(math.sqrt(256 / (256 + size + 1)), abs=0.1)


@pytest.mark.parametrize(
    "settings", [{}, {"gradient": "rotation"}, {"affine": "running"}, {"sync": 0.2}, {"alternating": 1}, {"ema": True}, {"revive": 1}], ids=str
)
def test_a_population_is_evaluated_at_once(settings):
    metrics = estimate("eggroll", VQAutoencoder(**SMALL, **settings).build(Key(0)), population=4).metrics
    assert {"fallback_member_loop", "fallback_objective_loop"}.isdisjoint(metrics)


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        ("forward", {"tangents": 3, "chunk": 1}),
        ("forward", {"space": "weights", "tangents": 2}),
        ("eggroll", {"population": 4}),
        ("likelihood-ratio", {"copies": 4}),
    ],
)
@pytest.mark.parametrize("variant", [{"ema": True, "revive": 1, "dead": 1.0}, {"affine": "running", "alternating": 1}], ids=str)
def test_buffers_follow_the_unperturbed_pass_alone(engine, settings, variant):
    built = VQAutoencoder(**SMALL, **variant).build(Key(0))
    expected = estimate("backprop", built).buffers
    found = estimate(engine, built, **settings).buffers
    assert set(found) == set(expected) != set()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-6) for name in expected)


def test_rules_that_need_blocks_or_labels_are_refused():
    assert VQAutoencoder(**SMALL).build(Key(0)).provides == Needs.VALUE | Needs.TANGENT | Needs.REVERSE
    for engine in ("mono-forward", "forward-forward"):
        with pytest.raises(CapabilityError, match="does not provide"):
            trainer.build(run(engine))


# -- runs --------------------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_with_revival_ends_bit_for_bit_as_one_that_never_stopped(tmp_path):
    settings = run(steps=8, ema=True, revive=2, dead=1.0)
    whole = trainer.build(settings)
    trainer.fit(whole, run_folder=tmp_path / "whole")
    trainer.fit(trainer.build(settings), run_folder=tmp_path / "parts", on_step=lambda training, row: row["step"] == 3)
    parts = trainer.resume(tmp_path / "parts")
    trainer.fit(parts)
    assert int(whole.problem.buffers()["quantizer.updates"]) == 8
    for mine, theirs in ((whole.values(), parts.values()), (whole.problem.buffers(), parts.problem.buffers())):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_revival_brings_codes_into_use():
    figures = []
    for revive in (0, 5):
        training = trainer.build(run(steps=40, codes=128, revive=revive, dead=0.5, decay=0.5))
        trainer.fit(training)
        figures.append(training.figures["test_usage"])
    assert figures[1] > figures[0] + 0.2


def test_a_run_leaves_the_reconstructions(tmp_path):
    trainer.fit(trainer.build(run()), run_folder=tmp_path / "run")
    found = sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir())
    assert found == ["reconstructions-000000.png", "reconstructions-000004.png"]
    first, last = (np.asarray(Image.open(tmp_path / "run" / "pictures" / name)) for name in found)
    assert first.shape == (2 * 8 * 4, 10 * 8 * 4, 3)
    assert np.array_equal(first[:32], last[:32])  # what was to be reconstructed
    assert not np.array_equal(first[32:], last[32:])


def test_the_upper_row_of_the_picture_is_the_test_images(problem):
    picture = problem.pictures(problem.params())["reconstructions"]
    images = problem.dataset.test_inputs[:10].view(10, 8, 8)
    scaled = (images - images.min()) / (images.max() - images.min())
    assert torch.allclose(picture[:32:4, 32:64:4, 0], scaled[1], atol=1e-6)


def test_the_key_decides_codes_weights_and_order():
    one, same, other = (VQAutoencoder(**SMALL).build(Key(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(value, same.params()[name]) for name, value in one.params().items())
    assert not any(torch.equal(value, other.params()[name]) for name, value in one.params().items())
    assert not torch.equal(one.batch(0, World()).inputs, other.batch(0, World()).inputs)


# -- bad input ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"data": "digit"}, "Did you mean 'digits'"),
        ({"init": "k-means"}, "Did you mean 'kmeans'"),
        ({"gradient": "reinmax"}, "unknown gradient 'reinmax'"),
        ({"codes": 0}, "codes=0"),
        ({"codes": 23000}, "at most 22992, the vectors of digits's training set"),
        ({"codes": 2000, "init": "kmeans"}, "there are 1024 vectors to start from"),
        ({"halvings": 4}, "leaves whole sides of 8 x 8 pixels"),
        ({"hidden": 0}, "hidden=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"ema": True, "sync": 0.1}, "with ema=true"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused(settings, told):
    with pytest.raises(SettingError, match=told):
        VQAutoencoder(**settings).build(Key(0))


def test_images_of_another_size_are_refused(problem):
    with pytest.raises(ShapeError, match=r"inputs of shape \(2, 65\); it reads \[examples, 1, 8, 8\]"):
        problem.predict(torch.zeros(2, 65))


def test_images_with_nan_are_refused():
    built = VQAutoencoder(**SMALL).build(Key(0))
    built.dataset.train_inputs[3, 0] = float("nan")
    with pytest.raises(NumericsError, match="training set"):
        built.check_batch(built.batch(0, World()))
