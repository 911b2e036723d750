"""The command line in trouble: mistakes, damage, divergence, signals; what it says and what it exits with."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from console import TOY, elsewhere, environment, invoke, process, rows, train  # noqa: F401  (elsewhere is a fixture)

SLOW = """
import time
from dataclasses import dataclass
import toys

@dataclass(frozen=True)
class Slow(toys.Noisy):
    def estimate(self, *args):
        time.sleep(0.005)
        return super().estimate(*args)
"""


# -- bad input -------------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "engine": (["train", "--engine", "forwrd"], "unknown engine 'forwrd'. Did you mean 'forward'?"),
    "problem": (["train", "--problem", "digts"], "unknown problem 'digts'. Did you mean 'digits'?"),
    "model": (["train", "--model", "mlpp"], "unknown model 'mlpp'. Did you mean 'mlp'?"),
    "optimizer": (["train", "--optimizer", "adm"], "unknown optimizer 'adm'. Did you mean 'Adam'?"),
    "engine setting": (["train", "-s", "tangnts=3"], "unknown setting 'tangnts'. Did you mean 'tangents'?"),
    "problem setting": (["train", "--problem-setting", "batchsize=3"], "unknown setting 'batchsize'. Did you mean 'batch_size'?"),
    "model setting": (["train", "--model-setting", "hiden=3"], "unknown setting 'hiden'. Did you mean 'hidden'?"),
    "optimizer setting": (["train", "--optimizer-setting", "beta=3"], "unknown setting 'beta'. Did you mean 'betas'?"),
    "no equals sign": (["train", "-s", "tangents"], "not of the form name=value"),
    "setting out of range": (["train", "-s", "tangents=0"], "tangents=0 is not allowed; it must be a whole number >= 1"),
    "setting of the wrong type": (["train", "-s", "tangents=many"], "tangents='many' is not allowed; it must be int"),
    "learning rate": (["train", "--lr", "-1"], "lr=-1.0 is not allowed"),
    "clip": (["train", "--clip", "0"], "clip=0.0 is not allowed"),
    "batch size": (["train", "--batch-size", "0"], "batch_size=0 is not allowed"),
    "steps": (["train", "--steps", "0"], "steps=0 is not allowed"),
    "seed": (["train", "--seed", "-1"], "seed=-1 is not allowed"),
    "epochs and steps": (["train", "--epochs", "1", "--steps", "1"], "steps=1 is not allowed"),
    "a model where there is none": (["train", "--problem", "quadratic", "--model", "mlp"], "quadratic has no model"),
    "module": (["train", "--model", "nowhere:net"], "there is no module 'nowhere'"),
    "attribute": (["train", "--engine", "toys:Nosy"], "unknown attribute 'Nosy'. Did you mean 'Noisy'?"),
    "command": (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
    "command of a group": (["data", "gte"], "unknown command 'gte'. Did you mean 'get'?"),
    "data set": (["data", "get", "mnst"], "unknown data set 'mnst'. Did you mean 'mnist'?"),
    "what to describe": (["describe", "forwrd"], "Did you mean 'forward'?"),
    "what to check": (["check", "json:loads"], "must be a subclass of altgrad.Engine"),
    "run folder": (["resume", "nothere"], "no run folder"),
    "budget": (["compare", "--budget", "epoch=3"], "unknown budget 'epoch'. Did you mean 'epochs'?"),
    "engine to compare": (["compare", "--engines", "forwrd", "--out", "c"], "unknown engine 'forwrd'. Did you mean 'forward'?"),
    "bracket": (["compare", "--engines", "forward[rank=1"], "no closing bracket"),
    "rates": (["compare", "--lrs", "1e-3;3e-3"], "not a list of numbers"),
    "doctor's input": (["doctor", "mlp", "--input-shape", "1,y"], "--input-shape '1,y' is not allowed"),
    "doctor's patient": (["doctor"], "give a MODEL"),
    "shell": (["completion"], "unknown shell"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_leaves_with_2_and_says_what_to_do(mistake):
    arguments, message = MISTAKES[mistake]
    done = invoke(*arguments, env={"SHELL": "/bin/tcsh"})
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stdout == ""
    assert list(Path().iterdir()) == []


def test_an_error_is_one_line():
    assert invoke("train", "--engine", "forwrd").stderr.count("\n") == 1


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(place):
    done = invoke("--debug", "train", "--engine", "forwrd") if place == "before" else invoke("train", "--engine", "forwrd", "--debug")
    assert "Traceback" in done.stderr
    assert done.exit_code == 2


def test_an_error_in_somebodys_own_code_is_one_line_and_leaves_with_1():
    Path("broken.py").write_text("def model():\n    raise RuntimeError('boom\\nand more')\n")
    done = process("train", "--model", "broken:model", "--out", "a")
    assert done.returncode == 1
    assert done.stderr == "Error: RuntimeError: boom and more (--debug shows where)\n"


MISFITS = {
    "nn.Linear(64, 3)": "labels run from 0 to 9, but the model has 3 outputs; labels must be in [0, 2].",
    "nn.Sequential(nn.Linear(64, 10), nn.Flatten(0))": "the model returned shape (640,) for 64 inputs; a classifier must return [64, 10].",
    "nn.Sequential(nn.Linear(64, 10), nn.Unflatten(0, (32, 2)))": "the model returned shape (32, 2, 10) for 64 inputs; a classifier must return [64, 10].",
    "nn.Linear(63, 10)": "the model does not take inputs of shape (64, 64): mat1 and mat2 shapes cannot be multiplied",
    "nn.LSTM(64, 10)": "the model returned shapes (64, 10), (1, 10), (1, 10) for 64 inputs; a classifier must return [64, 10].",
}


@pytest.mark.parametrize("model", MISFITS)
def test_a_model_that_does_not_fit_the_data_leaves_with_1_before_there_is_a_run_folder(model, monkeypatch):
    Path("misfit.py").write_text(f"from torch import nn\ndef model(): return {model}\n")
    monkeypatch.syspath_prepend(".")
    monkeypatch.delitem(sys.modules, "misfit", raising=False)
    done = invoke("train", "--model", "misfit:model", "--steps", 2, "--quiet", "--out", "a")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: {MISFITS[model]}")
    assert done.stderr.count("\n") == 1
    assert not Path("a").exists()


def test_a_data_set_that_is_missing_says_how_to_get_it():
    done = invoke("train", "--problem", "mnist", "--quiet", env={"XDG_CACHE_HOME": str(Path("cache").absolute())})
    assert done.exit_code == 1
    assert "altgrad data get mnist" in done.stderr


# -- trouble ---------------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_nan_leaves_with_3_and_names_engine_and_step():
    done = train("--steps", 20, "--save-every", 5, "--problem-setting", "poison=inputs@7", "--out", "a", "--quiet")
    assert done.exit_code == 3
    assert "the loss is NaN" in done.stderr
    assert "step 7 (engine toys:Noisy" in done.stderr
    assert "In this batch the inputs hold NaN, first in example 0; clean the data." in done.stderr


def test_the_last_good_checkpoint_stays_after_divergence():
    train("--steps", 20, "--save-every", 5, "--problem-setting", "poison=inputs@7", "--out", "a", "--quiet")
    assert Path("a/checkpoints/latest").read_text().strip() == "step-00000005"


def test_divergence_at_step_0_is_not_said_to_leave_a_checkpoint_and_the_name_is_free_again():
    done = train("--steps", 2, "--problem-setting", "poison=inputs@0", "--out", "a", "--quiet")
    assert done.exit_code == 3
    assert done.stderr.rstrip().endswith("No checkpoint had been written.")
    assert train("--steps", 2, "--out", "a", "--quiet").exit_code == 0


def damage(folder):
    newest = Path(folder) / "checkpoints" / Path(folder, "checkpoints/latest").read_text().strip() / "tensors.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)


def test_a_damaged_checkpoint_leaves_with_4_and_changes_nothing():
    train("--steps", 6, "--save-every", 2, "--out", "a", "--quiet")
    damage("a")
    before = {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()}
    done = invoke("resume", "a")
    assert done.exit_code == 4
    assert "sha256" in done.stderr
    assert {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()} == before


def test_fallback_goes_on_from_the_checkpoint_before():
    train("--steps", 6, "--save-every", 2, "--out", "a", "--quiet")
    damage("a")
    done = invoke("resume", "a", "--fallback", "--json")
    assert json.loads(done.stdout)["steps"] == 6
    assert "Warning: " in done.stderr


def truncate(checkpoint):
    (checkpoint / "tensors.safetensors").write_bytes((checkpoint / "tensors.safetensors").read_bytes()[:-10])


def put_a_pickle(checkpoint):
    (checkpoint / "tensors.safetensors").write_bytes(b"\x80\x04.")


def make_foreign(checkpoint):
    (checkpoint / "manifest.json").write_text('{"format": "somebody else\'s"}')


def make_newer(checkpoint):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))


@pytest.mark.parametrize("spoil", [truncate, put_a_pickle, make_foreign, make_newer])
def test_a_checkpoint_that_cannot_be_used_leaves_with_4(spoil):
    train("--steps", 2, "--out", "a", "--quiet")
    spoil(Path("a/checkpoints") / Path("a/checkpoints/latest").read_text().strip())
    done = invoke("resume", "a")
    assert done.exit_code == 4
    assert done.stderr.count("\n") == 1


def test_a_finished_run_is_resumed_to_the_same_result():
    first = json.loads(train("--steps", 4, "--out", "a", "--json").stdout)
    again = json.loads(invoke("resume", "a", "--json").stdout)
    assert {**again, "peak_memory_bytes": 0} == {**first, "peak_memory_bytes": 0}


@pytest.fixture(scope="module", params=[signal.SIGINT, signal.SIGTERM])
def interrupted(request, tmp_path_factory):
    """A run of 150 steps that got a signal in its first half: its folder, and how it left."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "slow.py").write_text(SLOW)
    arguments = ["train", *TOY[:2], "--engine", "slow:Slow", *TOY[4:], "--steps", "150", "--save-every", "1000", "--out", "a"]
    running = subprocess.Popen([sys.executable, "-m", "altgrad", *arguments], cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)
    metrics, end = folder / "a" / "metrics.jsonl", time.monotonic() + 60
    while running.poll() is None and time.monotonic() < end and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 5):
        time.sleep(0.01)
    running.send_signal(request.param)
    _, said = running.communicate(timeout=60)
    return folder, request.param, running.returncode, said


def test_a_signal_leaves_with_its_number_and_says_how_to_go_on(interrupted):
    _, number, code, said = interrupted
    assert code == 128 + number
    assert "Go on with: altgrad resume a" in said
    assert "Traceback" not in said


def test_an_interrupted_run_is_resumed_as_if_it_had_never_stopped(interrupted, monkeypatch):
    folder, *_ = interrupted
    stopped = len(rows(folder / "a"))
    done = process("resume", "a", "--json", cwd=folder)
    train("--steps", 150, "--save-every", 1000, "--out", "whole", "--quiet")
    timeless = [[{name: value for name, value in row.items() if name != "seconds"} for row in rows(path)] for path in (folder / "a", "whole")]
    assert 5 < stopped < 150
    assert done.returncode == 0, done.stderr
    assert timeless[0] == timeless[1]


def test_ctrl_c_before_the_first_step_leaves_with_130(monkeypatch):
    def interrupt(settings, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr("altgrad.trainer.build", interrupt)
    done = train("--steps", 1)
    assert done.exit_code == 130
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_traceback():
    running = subprocess.Popen([sys.executable, "-m", "altgrad", "data", "list"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running.stdout.close()
    assert running.stderr.read() == ""
    running.stderr.close()
    running.wait(timeout=60)


def test_a_full_disk_is_said_so(monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("altgrad.durable.write", full)
    done = train("--steps", 1, "--out", "a")
    assert done.exit_code == 1
    assert "the disk is full" in done.stderr
