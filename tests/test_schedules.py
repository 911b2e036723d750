"""Learning-rate schedules: their closed forms, and that they follow the share of the run or of the budget that is done."""

import json
import math
import os
import signal

import pytest
import torch
from console import elsewhere, invoke, rows, train  # noqa: F401

from altgrad import checkpoint, errors, trainer
from altgrad.compare import Choice, CompareSettings, compare, run
from altgrad.schedules import SHAPES, START, Schedule
from altgrad.trainer import TrainSettings

FORWARD = Choice("forward", "forward", {"tangents": 2})
STEPS = 8


def settings(**changes):
    base = {"problem": "toys:LeastSquaresFactory", "engine": "toys:Noisy", "optimizer": "SGD", "lr": 0.1, "schedule": "cosine", "steps": STEPS}
    return TrainSettings(**{**base, **changes})


def rates_of(training):
    """The learning rate of every step to the end."""
    found = []
    while training.step < training.total_steps:
        trainer.step(training)
        found.append(training.optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize(("name", "fraction", "factor"), [("cosine", 0.5, 0.5), ("cosine", 0.25, (2 + math.sqrt(2)) / 4), ("linear", 0.25, 0.75)])
def test_a_schedule_has_its_closed_form(name, fraction, factor):
    assert Schedule(name).factor(fraction) == pytest.approx(factor, abs=1e-15)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_falling_schedule_goes_from_one_to_nothing(name):
    assert Schedule(name).factor(0.0) == 1.0
    assert Schedule(name).factor(1.0) == pytest.approx(0.0, abs=1e-15)


def test_cosine_is_torchs_annealing_without_its_state():
    base, parameter = 0.3, torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=base)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        assert base * Schedule("cosine").factor(step / STEPS) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_warm_up_rises_in_a_line_and_ends_where_the_shape_begins(name):
    schedule = Schedule(name, warmup=0.2)
    assert [schedule.factor(share) for share in (0.0, 0.1, 0.2)] == pytest.approx([START, (1 + START) / 2, 1.0])


def test_what_follows_a_warm_up_is_the_whole_shape():
    assert Schedule("cosine", warmup=0.2).factor(0.6) == pytest.approx(Schedule("cosine").factor(0.5))


@pytest.mark.parametrize(("before", "inside"), [(-0.5, 0.0), (1.5, 1.0)])
def test_a_share_outside_the_run_counts_as_the_nearer_end(before, inside):
    assert Schedule("linear").factor(before) == Schedule("linear").factor(inside)


@pytest.mark.parametrize("warmup", [-0.1, 1.0, math.nan])
def test_a_warm_up_that_is_no_share_of_the_run_is_refused(warmup):
    with pytest.raises(errors.SettingError, match="warmup"):
        settings(warmup=warmup)


@pytest.mark.parametrize("make", [settings, lambda schedule: CompareSettings(schedule=schedule)])
def test_an_unknown_schedule_is_refused_with_the_nearest(make):
    with pytest.raises(errors.SettingError, match=r"unknown schedule 'cosin'\. Did you mean 'cosine'\?"):
        make(schedule="cosin")


def test_every_step_takes_the_rate_of_the_share_done_before_it():
    assert rates_of(trainer.build(settings())) == [0.1 * Schedule("cosine").factor(step / STEPS) for step in range(STEPS)]


def test_a_step_moves_by_the_scheduled_rate():
    training = trainer.build(settings(schedule="linear"))
    training.step = STEPS // 2
    before = training.params["weight"].detach().clone()
    trainer.step(training)
    assert torch.allclose(training.params["weight"].detach(), before - 0.05 * training.params["weight"].grad)


def test_every_group_of_parameters_keeps_its_own_base_rate():
    training = trainer.build(settings(schedule="linear", steps=2))
    parameters = list(training.params.values())
    training.optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 0.2}, {"params": parameters[1:], "lr": 0.6}], lr=0.1)
    training.rates = training.schedule.rates(training.optimizer.param_groups, optimizer="SGD")
    trainer.step(training)
    trainer.step(training)
    assert [group["lr"] for group in training.optimizer.param_groups] == [0.1, 0.3]


def test_all_evaluations_of_a_closure_share_one_rate(monkeypatch):
    training = trainer.build(settings(optimizer="LBFGS", engine_settings={"sigma": 0.0}))
    seen, fill = [], trainer.fill
    monkeypatch.setattr(trainer, "fill", lambda *given: (seen.append((training.step, training.optimizer.param_groups[0]["lr"])), fill(*given))[1])
    rates_of(training)
    assert len(seen) > STEPS
    assert set(seen) == {(step, 0.1 * Schedule("cosine").factor(step / STEPS)) for step in range(STEPS)}


def test_a_constant_schedule_leaves_an_optimizers_own_rate_alone():
    training = trainer.build(settings(schedule="constant"))
    training.optimizer.param_groups[0]["lr"] = 0.25  # as an optimizer that adapts its rate would
    trainer.step(training)
    assert training.optimizer.param_groups[0]["lr"] == 0.25


def test_an_optimizer_without_a_rate_cannot_be_scheduled():
    with pytest.raises(errors.SettingError, match="no learning rate"):
        Schedule("cosine").rates([{"params": []}], optimizer="Rateless")


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "LBFGS"])
@pytest.mark.parametrize("stop", [1, 5])
def test_a_scheduled_run_resumes_bit_for_bit(tmp_path, optimizer, stop):
    changes = {"optimizer": optimizer, "warmup": 0.3, "engine_settings": {"sigma": 0.01}}

    def interrupt(training, row):
        if training.step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    trainer.fit(trainer.build(settings(**changes)), run_folder=tmp_path / "whole")
    with pytest.raises(errors.Interrupted):
        trainer.fit(trainer.build(settings(**changes)), run_folder=tmp_path / "broken", on_step=interrupt)
    trainer.fit(trainer.resume(tmp_path / "broken"))
    whole, broken = (checkpoint.load_latest(tmp_path / name / "checkpoints") for name in ("whole", "broken"))
    assert {name: tensor.numpy().tobytes() for name, tensor in broken.tensors.items()} == {n: t.numpy().tobytes() for n, t in whole.tensors.items()}
    timeless = [[{name: value for name, value in row.items() if name != "seconds"} for row in rows(tmp_path / path)] for path in ("whole", "broken")]
    assert timeless[0] == timeless[1]


def test_a_run_from_before_there_were_schedules_resumes_as_constant(tmp_path):
    trainer.fit(trainer.build(settings(schedule="constant")), run_folder=tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["settings"]["schedule"], config["settings"]["warmup"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    assert trainer.resume(tmp_path / "a").settings.schedule == "constant"


def test_rows_tell_the_rate_that_a_schedule_gave(tmp_path):
    trainer.fit(trainer.build(settings(schedule="linear")), run_folder=tmp_path / "a")
    assert [row["lr"] for row in rows(tmp_path / "a") if "lr" in row] == [0.1 * (1 - step / STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("budget", ["forwards=60", "epochs=1.5", "seconds=4.5"])
def test_in_a_comparison_the_share_is_that_of_the_budget(monkeypatch, budget):
    ticks = iter(range(10**6))
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: 0.5 * next(ticks))  # every step takes half a second
    rates, apply = [], Schedule.apply

    def watched(self, groups, base, *, fraction):
        apply(self, groups, base, fraction=fraction)
        rates.append(groups[0]["lr"])

    monkeypatch.setattr(Schedule, "apply", watched)
    asked = CompareSettings(problem="blobs:Blobs", engines=(FORWARD,), seeds=(0,), budget=budget, optimizer="SGD", lr=0.01, schedule="linear", points=1)
    end = run(asked, FORWARD, seed=0, lr=0.01, tuning=False).curve[-1]
    assert len(rates) == end["step"] > 4
    assert rates == pytest.approx([0.01 * (1 - step / end["step"]) for step in range(end["step"])], rel=1e-6)


def test_a_comparison_says_which_schedule_all_engines_followed():
    asked = CompareSettings(
        problem="blobs:Blobs", engines=(FORWARD,), baselines=("backprop",), seeds=(0,), budget="epochs=1", lr=0.01, schedule="cosine", points=1
    )
    assert any("cosine" in sentence for sentence in compare(asked).method)


def test_a_schedule_of_the_command_line_is_kept_in_the_run_folder(tmp_path):
    done = train("--schedule", "cosine", "--warmup", "0.25", "--steps", "4", "--out", "a", "--quiet")
    assert done.exit_code == 0, done.stderr
    config = json.loads((tmp_path / "a" / "config.json").read_text())["settings"]
    assert (config["schedule"], config["warmup"]) == ("cosine", 0.25)
    assert trainer.resume(tmp_path / "a").schedule == Schedule("cosine", 0.25)


def test_compare_takes_a_schedule():
    done = invoke(
        "compare", "--problem", "blobs:Blobs", "--seeds", 1, "--budget", "epochs=1", "--lr", 0.01, "--schedule", "linear", "--out", "c", "--json", "-q"
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["schedule"] == "linear"


@pytest.mark.parametrize("command", ["train", "compare"])
def test_an_unknown_schedule_leaves_with_2_and_names_the_nearest(command):
    done = invoke(command, "--problem", "blobs:Blobs", "--schedule", "liner")
    assert done.exit_code == 2
    assert "Did you mean 'linear'?" in done.stderr
