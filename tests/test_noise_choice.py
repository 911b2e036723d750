"""Whether a run draws compiled noise is decided once, from what it is, and kept: the two forms differ in the last bits."""

import json
import warnings
from contextlib import contextmanager

import pytest
import test_resume
import torch
from test_noise import HAS_COMPILER

from altgrad import checkpoint, trainer
from altgrad.kernels import noise
from altgrad.rng import Key
from altgrad.trainer import TrainSettings

NORMALS = 16 * (8 + 3) * 16  # a step: 16 tangents of the outputs of two layers, 16 examples


@pytest.fixture(autouse=True)
def _automatic(monkeypatch):
    monkeypatch.setenv("ALTGRAD_COMPILE", "auto")


@pytest.fixture
def forms(monkeypatch):
    """The compiled block replaced by the eager one, and a list of the forms that were asked for, step by step."""
    asked, honest = [], noise.compiled

    @contextmanager
    def compiled(wanted):
        asked.append(wanted)
        with honest(False):
            yield

    monkeypatch.setattr(noise, "compiled", compiled)
    return asked


def settings(**changes):
    return TrainSettings(**{"problem": "blobs:Blobs", "engine": "forward", "steps": 6, "save_every": 3, **changes})


def form_of(folder):
    return checkpoint.load_latest(folder / "checkpoints").meta["noise"]


def test_normals_on_the_cpu_are_counted():
    before = noise.drawn()
    noise.draw("normal", Key(0), 1, range(3), (5, 2))
    noise.draw("sign", Key(0), 1, range(3), (5, 2))
    assert noise.drawn() - before == 30


def test_a_run_decides_by_the_normals_of_its_first_step_and_its_length(monkeypatch, forms):
    seen = []
    monkeypatch.setattr(noise, "worth_compiling", lambda normals, steps: seen.append((normals, steps)))
    trainer.fit(trainer.build(settings()))
    assert seen == [(NORMALS, 6)]


def test_the_first_step_is_eager_and_the_others_follow_the_decision(monkeypatch, forms):
    monkeypatch.setattr(noise, "worth_compiling", lambda normals, steps: True)
    trainer.fit(trainer.build(settings()))
    assert forms == [False, True, True, True, True, True, True]  # step 0, the decision, five steps


def test_a_resumed_run_keeps_its_form_though_it_has_become_longer(tmp_path, monkeypatch, forms):
    run = tmp_path / "run"
    trainer.fit(trainer.build(settings()), run_folder=run)
    assert form_of(run) == "eager"
    config = json.loads((run / "config.json").read_text())
    config["settings"]["steps"] = 9
    (run / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(noise, "worth_compiling", lambda normals, steps: True)
    forms.clear()
    trainer.fit(trainer.resume(run))
    assert forms == [False] * 3
    assert form_of(run) == "eager"


def test_a_resumed_run_keeps_compiled_noise_though_it_is_short(tmp_path, monkeypatch, forms):
    run = tmp_path / "run"
    monkeypatch.setattr(noise, "worth_compiling", lambda normals, steps: True)
    trainer.fit(trainer.build(settings()), run_folder=run, on_step=lambda training, row: training.step == 3)
    monkeypatch.setattr(noise, "worth_compiling", lambda normals, steps: False)
    forms.clear()
    result = trainer.fit(trainer.resume(run))
    assert forms == [True] * 3
    assert result.noise["form"] == form_of(run) == "compiled"


def test_an_engine_that_draws_no_normals_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ALTGRAD_COMPILE", "on")
    monkeypatch.setattr(noise, "_compiler", noise._Compiler())
    assert trainer.fit(trainer.build(settings(engine="backprop"))).noise == {"form": "none", "compile_seconds": 0.0, "compile_failures": 0}


def test_a_failed_compilation_is_recorded_and_the_run_goes_on_eagerly(tmp_path, monkeypatch):
    def broken(function, size):
        raise RuntimeError("no C++ compiler here")

    trainer.fit(trainer.build(settings()), run_folder=tmp_path / "eager")
    monkeypatch.setattr(noise, "build", broken)
    monkeypatch.setattr(noise, "_compiler", noise._Compiler())
    monkeypatch.setattr(noise, "worth_compiling", lambda normals, steps: True)
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler here"):
        result = trainer.fit(trainer.build(settings()), run_folder=tmp_path / "failed")
    assert (result.noise["form"], result.noise["compile_failures"]) == ("eager", 1)
    assert json.loads((tmp_path / "failed" / "result.json").read_text())["noise"]["compile_failures"] == 1
    assert test_resume.contents(tmp_path / "failed") == test_resume.contents(tmp_path / "eager")


@pytest.mark.parametrize(("form", "mode"), [("eager", "on"), ("compiled", "off")])
def test_resuming_in_the_other_form_warns(tmp_path, monkeypatch, forms, form, mode):
    monkeypatch.setattr(noise, "worth_compiling", lambda normals, steps: form == "compiled")
    trainer.fit(trainer.build(settings()), run_folder=tmp_path / "run")
    monkeypatch.setenv("ALTGRAD_COMPILE", mode)
    with pytest.warns(UserWarning, match=f"the run drew {form} noise, which ALTGRAD_COMPILE now forbids"):
        trainer.resume(tmp_path / "run")


def test_resuming_in_the_same_form_does_not_warn(tmp_path):
    trainer.fit(trainer.build(settings()), run_folder=tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.resume(tmp_path / "run")


def test_training_with_compiled_noise_equals_eager_training_to_rounding(monkeypatch):
    """Normals differ by 1e-6 at most (test_noise.py); over six steps of SGD that grows no faster than the steps do."""
    eager, compiled = trainer.build(settings(optimizer="SGD", lr=0.1)), trainer.build(settings(optimizer="SGD", lr=0.1))
    trainer.fit(eager)
    monkeypatch.setenv("ALTGRAD_COMPILE", "on")
    result = trainer.fit(compiled)
    assert (eager.noise, result.noise["form"]) == ("eager", "compiled" if HAS_COMPILER else "eager")
    for name, tensor in eager.params.items():
        assert torch.allclose(tensor, compiled.params[name], rtol=1e-4, atol=1e-5), name
    assert not HAS_COMPILER or any(not torch.equal(tensor, compiled.params[name]) for name, tensor in eager.params.items())


def test_compiled_training_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(noise, "worth_compiling", lambda normals, steps: True)
    trainer.fit(trainer.build(settings()), run_folder=tmp_path / "whole")
    trainer.fit(trainer.build(settings()), run_folder=tmp_path / "broken", on_step=lambda training, row: training.step == 3)
    monkeypatch.setattr(noise, "worth_compiling", lambda normals, steps: False)
    trainer.fit(trainer.resume(tmp_path / "broken"))
    assert test_resume.contents(tmp_path / "broken") == test_resume.contents(tmp_path / "whole")
