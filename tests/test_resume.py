"""Resuming is bit-exact: weights, optimizer, engine state, noise, buffers and metrics, from any step and after any way of dying."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys

from altgrad import checkpoint, durable, errors, trainer
from altgrad.trainer import TrainSettings

STEPS = 11  # ends in mid-epoch


def settings(optimizer="Adam", **changes):
    base = {"problem": "toys:LeastSquaresFactory", "engine": "toys:Noisy", "optimizer": optimizer, "lr": 0.05, "steps": STEPS, "clip": 1.0}
    return TrainSettings(**{**base, **changes})


def rows(folder):
    """metrics.jsonl without wall-clock time."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def contents(folder):
    """The newest checkpoint without wall-clock time, its tensors as bytes."""
    saved = checkpoint.load_latest(folder / "checkpoints")
    tensors = {name: (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes()) for name, tensor in saved.tensors.items()}
    return saved.step, tensors, {key: value for key, value in saved.meta.items() if key != "seconds"}


def interrupt_after(step):
    def on_step(training, row):
        if training.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Runs that nothing disturbed, by optimizer."""
    made = {}

    def get(optimizer="Adam", **changes):
        key = (optimizer, repr(sorted(changes.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("unbroken") / "run"
            trainer.fit(trainer.build(settings(optimizer, **changes)), run_folder=made[key])
        return made[key]

    return get


@pytest.mark.parametrize("stop", range(1, STEPS + 1))
def test_resume_from_any_step_is_bit_exact(tmp_path, unbroken, stop):
    run = tmp_path / "run"
    with pytest.raises(errors.Interrupted):
        trainer.fit(trainer.build(settings()), run_folder=run, on_step=interrupt_after(stop))
    trainer.fit(trainer.resume(run))
    assert contents(run) == contents(unbroken())
    assert rows(run) == rows(unbroken())


@pytest.mark.parametrize("optimizer", ["SGD", "LBFGS", "RMSprop", "Rprop", "NAdam", "ASGD", "Adafactor"])
def test_resume_is_bit_exact_with_every_kind_of_optimizer(tmp_path, unbroken, optimizer):
    run = tmp_path / "run"
    changes = {"clip": None, "engine_settings": {"sigma": 0.01}}  # LBFGS diverges where clipping contradicts the loss
    with pytest.raises(errors.Interrupted):
        trainer.fit(trainer.build(settings(optimizer, **changes)), run_folder=run, on_step=interrupt_after(6))
    trainer.fit(trainer.resume(run))
    assert contents(run) == contents(unbroken(optimizer, **changes))
    assert rows(run) == rows(unbroken(optimizer, **changes))


def test_resuming_many_times_is_bit_exact(tmp_path, unbroken):
    run = tmp_path / "run"
    with pytest.raises(errors.Interrupted):
        trainer.fit(trainer.build(settings()), run_folder=run, on_step=interrupt_after(1))
    for stop in (2, 5, 9):
        with pytest.raises(errors.Interrupted):
            trainer.fit(trainer.resume(run), on_step=interrupt_after(stop))
    result = trainer.fit(trainer.resume(run))
    assert rows(run) == rows(unbroken())
    assert result.forwards == json.loads((unbroken() / "result.json").read_text())["forwards"]


def test_a_crash_between_checkpoints_repeats_the_lost_steps_and_no_rows(tmp_path, unbroken):
    run = tmp_path / "run"

    def crash(training, row):
        if training.step == 7:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        trainer.fit(trainer.build(settings()), run_folder=run, on_step=crash)
    assert rows(run)[-1]["step"] == 7
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # a torn row
    training = trainer.resume(run)
    assert training.step == 4
    assert rows(run)[-1]["step"] == 4
    trainer.fit(training)
    assert rows(run) == rows(unbroken())


def test_a_crash_before_the_first_checkpoint_starts_again(tmp_path, unbroken):
    run = tmp_path / "run"

    def crash(training, row):
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        trainer.fit(trainer.build(settings()), run_folder=run, on_step=crash)
    trainer.fit(trainer.resume(run))
    assert contents(run) == contents(unbroken())
    assert rows(run) == rows(unbroken())


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run = tmp_path / "run"
    first = trainer.fit(trainer.build(settings()), run_folder=run)
    before = rows(run)
    second = trainer.fit(trainer.resume(run))
    assert rows(run) == before
    assert (first.test_loss, first.steps, first.forwards) == (second.test_loss, second.steps, second.forwards)


def test_config_json_gives_back_the_settings(tmp_path):
    training = trainer.build(settings(engine_settings={"sigma": 0.3}))
    trainer.fit(training, run_folder=tmp_path / "run")
    again = trainer.resume(tmp_path / "run")
    assert again.settings == training.settings
    assert again.engine == training.engine


def test_the_time_spent_goes_on_from_where_it_was(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(errors.Interrupted):
        trainer.fit(trainer.build(settings()), run_folder=run, on_step=interrupt_after(5))
    spent = trainer.resume(run).seconds
    assert spent > 0
    assert trainer.fit(trainer.resume(run)).seconds > spent


def test_a_full_disk_keeps_the_last_good_checkpoint_and_the_run_can_go_on(tmp_path, unbroken, monkeypatch):
    run, honest, writes = tmp_path / "run", durable.write, []

    def write(path, data):
        writes.append(path.name)
        if writes.count("tensors.safetensors") == 2:
            path.write_bytes(data[:10])
            raise OSError(28, "No space left on device")
        honest(path, data)

    monkeypatch.setattr(durable, "write", write)
    with pytest.raises(errors.AltgradError, match="the disk is full") as caught:
        trainer.fit(trainer.build(settings()), run_folder=run)
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000004"]
    trainer.fit(trainer.resume(run))
    assert contents(run) == contents(unbroken())
    assert rows(run) == rows(unbroken())


def test_a_full_disk_under_the_metrics_is_explained(tmp_path):
    training = trainer.build(settings())
    trainer.fit(trainer.build(settings(steps=1)), run_folder=tmp_path / "run")
    training.run = trainer.resume(tmp_path / "run").run
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(errors.AltgradError, match=r"the disk is full: .*metrics\.jsonl"):
        trainer.fit(training)


KILLED_IN_THE_WRITE = """
import os, signal, sys
from altgrad import durable, trainer
from altgrad.trainer import TrainSettings
import test_resume

honest, written = durable.write, []

def write(path, data):
    written.append(path.name)
    if written.count("tensors.safetensors") == 3:
        path.write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    honest(path, data)

durable.write = write
trainer.fit(trainer.build(test_resume.settings(save_every=2)), run_folder=sys.argv[1])
"""


def test_resume_after_sigkill_in_the_middle_of_a_write_is_bit_exact(tmp_path, unbroken):
    run = tmp_path / "run"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", KILLED_IN_THE_WRITE, str(run)], env=environment, timeout=60, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(entry.name.startswith(".tmp-step-00000006") for entry in (run / "checkpoints").iterdir())
    training = trainer.resume(run)
    assert training.step == 4
    trainer.fit(training)
    assert contents(run) == contents(unbroken(save_every=2))
    assert rows(run) == rows(unbroken(save_every=2))


REAL = {
    "backprop, dropout": {"engine": "backprop", "model": "transformer", "model_settings": {"dropout": 0.2, "width": 8, "heads": 2, "layers": 1}},
    "backprop, batch norm": {"engine": "backprop", "model": "resnet", "model_settings": {"width": 4}},
    "implicit": {"engine": "implicit", "engine_settings": {"jacobian": 0.1, "adjoint": "gmres"}, "model": "deq", "model_settings": {"width": 8}},
    "forward": {"engine": "forward", "engine_settings": {"tangents": 2}},
    "forward, with a state": {"engine": "forward", "engine_settings": {"space": "weights", "tangents": 2, "guess": "momentum"}},
    "forward, with trainables of its own": {"engine": "forward", "engine_settings": {"tangents": 2, "guess": "local"}},
}


@pytest.mark.parametrize("kind", REAL)
def test_resume_on_real_data_in_mid_epoch_is_bit_exact(tmp_path, kind):
    changes = {"lr": 1e-3, "steps": 26, "save_every": 10, **REAL[kind]}  # an epoch of digits has 22 steps
    trainer.fit(trainer.build(TrainSettings(**changes)), run_folder=tmp_path / "whole")
    with pytest.raises(errors.Interrupted):
        trainer.fit(trainer.build(TrainSettings(**changes)), run_folder=tmp_path / "broken", on_step=interrupt_after(13))
    trainer.fit(trainer.resume(tmp_path / "broken"))
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


# What must be refused, with nothing changed.


def damaged_run(tmp_path):
    run = tmp_path / "run"
    trainer.fit(trainer.build(settings()), run_folder=run)
    file = checkpoint.latest(run / "checkpoints") / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return run


def test_a_damaged_checkpoint_is_refused_and_nothing_changes(tmp_path):
    run = damaged_run(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(errors.CheckpointError) as caught:
        trainer.resume(run)
    assert caught.value.exit_code == 4
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_fallback_resumes_from_the_one_before_bit_exactly(tmp_path, unbroken):
    run = damaged_run(tmp_path)
    with pytest.warns(UserWarning, match="Falling back to .*step-00000008"):
        training = trainer.resume(run, fallback=True)
    assert training.step == 8
    trainer.fit(training)
    assert contents(run) == contents(unbroken())
    assert rows(run) == rows(unbroken())


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(errors.UsageError, match=r"is no run folder: it has no config\.json"):
        trainer.resume(tmp_path)
    with pytest.raises(errors.UsageError, match="is no folder"):
        trainer.resume(tmp_path / "nowhere")


def changed_config(tmp_path, **changes):
    trainer.fit(trainer.build(settings()), run_folder=tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    config["settings"].update(changes)
    file.write_text(json.dumps(config))
    return tmp_path / "run"


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    with pytest.raises(errors.CheckpointError, match=r"made with optimizer Adam, not SGD\. Was config\.json changed"):
        trainer.resume(changed_config(tmp_path, optimizer="SGD"))


def test_a_checkpoint_of_another_model_is_refused(tmp_path, monkeypatch):
    run = changed_config(tmp_path)
    monkeypatch.setattr(toys.Noisy, "aux", lambda self, problem, key: {"aux.scale": torch.ones(3)})
    with pytest.raises(errors.CheckpointError, match=r"params 'aux.scale' is \(\) torch.float32 in it and \(3,\) torch.float32 here"):
        trainer.resume(run)


def test_an_unknown_setting_in_config_json_gets_the_nearest(tmp_path):
    with pytest.raises(errors.SettingError, match=r"config\.json: unknown setting 'epoch'\. Did you mean 'epochs'"):
        trainer.resume(changed_config(tmp_path, epoch=3))


def test_more_steps_in_config_json_go_on_where_a_longer_run_would_be(tmp_path, unbroken):
    run = changed_config(tmp_path, steps=STEPS + 4)
    trainer.fit(trainer.resume(run))
    step, tensors, _ = contents(run)
    assert (step, tensors) == contents(unbroken(steps=STEPS + 4))[:2]


def test_resuming_under_other_versions_warns(tmp_path):
    run = changed_config(tmp_path)
    file = run / "env.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "torch": "1.0"}))
    with pytest.warns(UserWarning, match=r"torch 1\.0 -> .*bit-exact only where these agree"):
        trainer.resume(run)


def test_a_restored_run_shares_no_memory_with_a_problem_of_the_same_settings(tmp_path):
    trainer.fit(trainer.build(settings()), run_folder=tmp_path / "run")
    first, second = trainer.resume(tmp_path / "run"), trainer.resume(tmp_path / "run")
    with torch.no_grad():
        first.params["weight"].add_(1)
    assert torch.equal(second.params["weight"] + 1, first.params["weight"])
