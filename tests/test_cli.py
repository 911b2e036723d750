"""The command line: what it prints where, and what a run leaves behind."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from console import TOY, elsewhere, environment, invoke, process, rows, train  # noqa: F401  (elsewhere is a fixture)

from altgrad import __version__

BEFORE_TORCH = "import sys; from altgrad.cli import cli\ntry: cli({arguments!r})\nexcept SystemExit as left: assert not left.code, left.code\n"


# -- before torch ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["compare", "--help"], ["data", "list"], ["completion", "zsh"]], ids=" ".join)
def test_torch_is_not_imported_for(arguments):
    code = BEFORE_TORCH.format(arguments=arguments) + "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_missing_torch_leaves_with_5_and_names_the_extra():
    code = "import sys; sys.modules['torch'] = None; from altgrad.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "train"], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 5
    assert "pip install 'altgrad[torch]'" in done.stderr


def test_python_m_altgrad_is_altgrad():
    assert process("--version").stdout == f"altgrad, version {__version__}\n"


# -- a run -----------------------------------------------------------------------------------------------------------------------


def test_training_leaves_settings_metrics_plot_result_and_checkpoints():
    assert train("--steps", 3, "--out", "a").exit_code == 0
    assert {path.name for path in Path("a").iterdir()} >= {"config.json", "metrics.jsonl", "plot.png", "result.json", "env.json", "checkpoints"}


def test_the_result_goes_to_stdout_and_the_rest_to_stderr():
    done = train("--steps", 3, "--out", "a")
    assert done.stdout.startswith("test accuracy ")
    assert done.stdout.count("\n") == 1
    assert "run folder: a" in done.stderr


def test_json_ends_with_one_object_that_has_every_figure():
    done = train("--steps", 3, "--out", "a", "--json")
    keys = {"test_accuracy", "test_loss", "steps", "forwards", "backwards", "seconds", "peak_memory_bytes", "seed", "settings"}
    assert done.stdout.count("\n") == 1
    assert keys <= set(json.loads(done.stdout))


def test_quiet_leaves_stderr_empty():
    assert train("--steps", 3, "--out", "a", "--quiet").stderr == ""


def test_without_out_every_run_gets_a_folder_of_its_own():
    assert [train("--steps", 1, "--quiet").exit_code for _ in range(2)] == [0, 0]
    assert sorted(path.name for path in Path("runs").iterdir()) == ["toys-LeastSquaresFactory-toys-Noisy-1", "toys-LeastSquaresFactory-toys-Noisy-2"]


def test_a_run_folder_that_exists_is_refused():
    train("--steps", 1, "--out", "a")
    before = Path("a/metrics.jsonl").read_bytes()
    done = train("--steps", 2, "--out", "a")
    assert done.exit_code == 2
    assert "--overwrite" in done.stderr
    assert Path("a/metrics.jsonl").read_bytes() == before


def test_overwrite_replaces_an_earlier_run():
    train("--steps", 1, "--out", "a")
    assert train("--steps", 2, "--out", "a", "--overwrite").exit_code == 0
    assert rows("a")[-1]["step"] == 2


def test_overwrite_leaves_a_foreign_folder_alone():
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    assert train("--steps", 1, "--out", "mine", "--overwrite").exit_code == 2
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]


def test_dry_run_prints_the_resolved_settings_and_makes_nothing():
    done = invoke("train", "--dry-run", "--json", "-s", "tangents=4", "--batch-size", 32)
    settings = json.loads(done.stdout)
    assert (settings["lr"], settings["epochs"], settings["problem_settings"]["batch_size"], settings["engine_settings"]["tangents"]) == (0.001, 30, 32, 4)
    assert list(Path().iterdir()) == []


def test_every_kind_of_setting_reaches_its_owner():
    options = {"--model-setting": "hidden=16", "--problem-setting": "batch_size=8", "--optimizer-setting": "betas=(0.5, 0.9)", "--set": "space=weights"}
    done = invoke("train", "--dry-run", "--json", "--model", "mlp", "--optimizer", "adam", *[part for pair in options.items() for part in pair])
    settings = json.loads(done.stdout)
    assert settings["model_settings"] == {"hidden": "16"}
    assert settings["problem_settings"]["batch_size"] == 8
    assert settings["optimizer_settings"] == {"betas": "(0.5, 0.9)"}
    assert settings["engine_settings"]["space"] == "weights"


def test_an_option_can_come_from_the_environment():
    done = invoke("train", "--dry-run", "--json", env={"ALTGRAD_TRAIN_ENGINE": "backprop"})
    assert json.loads(done.stdout)["engine"] == "backprop"


def test_a_models_module_is_found_in_the_folder_at_hand():
    Path("here.py").write_text("from torch import nn\ndef model(): return nn.Linear(64, 10)\n")
    done = process("train", "--model", "here:model", "--steps", "2", "--quiet", "--out", "a")
    assert done.returncode == 0, done.stderr


def test_beside_trains_the_other_engine_at_the_same_settings():
    done = train("--steps", 3, "--out", "a", "--beside", "toys:Noisy[sigma=0]", "--json")
    beside = json.loads(done.stdout)["beside"]["toys:Noisy sigma=0"]["settings"]
    assert beside["engine_settings"]["sigma"] == 0
    assert {name for name, value in json.loads(done.stdout)["settings"].items() if value != beside[name]} == {"engine_settings"}


def test_beside_prints_both_accuracies():
    done = train("--steps", 3, "--out", "a", "--beside", "toys:Noisy[sigma=0]")
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["engine", "toys:Noisy", "toys:Noisy sigma=0"]
    assert "%" in lines[1]
    assert "%" in lines[2]


@pytest.mark.parametrize("other", ["backprp", "forward[tangnts=3]", "toys:Noisy"])
def test_beside_is_checked_before_anything_is_trained(other):
    assert train("--steps", 3, "--out", "a", "--beside", other).exit_code == 2
    assert not Path("a").exists()


def test_without_matplotlib_the_run_is_kept_and_the_missing_plot_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = train("--steps", 2, "--out", "a")
    assert done.exit_code == 0
    assert "altgrad[plot]" in done.stderr


# -- progress --------------------------------------------------------------------------------------------------------------------


def on_a_terminal(*arguments, **changes):
    """What the command writes to a stderr that is a terminal."""
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "altgrad", *map(str, arguments)], env={**environment(), "TERM": "xterm", **changes}, stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    running.wait(timeout=60)
    return shown.decode()


def test_a_terminal_gets_a_bar():
    assert "3/3" in on_a_terminal("train", *TOY, "--steps", 3, "--out", "a")


def test_a_dumb_terminal_gets_plain_lines():
    shown = on_a_terminal("train", *TOY, "--steps", 3, "--out", "a", TERM="dumb")
    assert "run folder: a" in shown
    assert "\x1b" not in shown


def test_no_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setattr("altgrad.cli_progress.PAUSE", -1.0)
    done = train("--steps", 8, "--out", "a")
    assert "step: 4 of 8, test accuracy" in done.stderr
    assert "\x1b" not in done.stderr
