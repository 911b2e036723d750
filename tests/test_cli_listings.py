"""Commands that tell rather than train: listings, describe, completion, check, doctor, compare."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from console import elsewhere, environment, invoke  # noqa: F401  (elsewhere is a fixture)

from altgrad import errors

OPAQUE = """
import torch

class Opaque(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(4))

    def forward(self, x):
        return torch.from_numpy((x * self.w).detach().numpy() ** 2)
"""


# -- listings --------------------------------------------------------------------------------------------------------------------

LISTINGS = [["engines"], ["problems"], ["models"], ["optimizers"], ["data", "list"], ["describe", "forward"], ["describe", "digits"], ["describe", "mlp"]]


@pytest.mark.parametrize("arguments", LISTINGS, ids=" ".join)
def test_json_of_a_listing_is_one_line(arguments):
    done = invoke(*arguments, "--json")
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout)
    assert done.stderr == ""


@pytest.mark.parametrize(("kind", "name"), [("engines", "forward"), ("problems", "fashion-mnist"), ("models", "transformer"), ("optimizers", "Adam")])
def test_a_listing_names_what_there_is(kind, name):
    assert any(line.split()[0] == name for line in invoke(kind).stdout.splitlines())


def test_describe_states_what_train_does_by_default():
    text = invoke("describe", "digits").stdout
    for part in ("batch_size 64", "hidden=128-128", "optimizer Adam", "lr 0.001", "epochs 30"):
        assert part in text


def test_describe_an_engine_gives_needs_bias_source_and_the_meaning_of_settings():
    text = invoke("describe", "forward").stdout
    for part in ("TANGENT", "UNBIASED", "arXiv", "directions in memory at once", "lr 0.001"):
        assert part in text


def test_describe_takes_other_peoples_engines():
    assert json.loads(invoke("describe", "toys:Noisy", "--json").stdout)["settings"][0]["name"] == "sigma"


def test_data_that_come_embedded_need_no_fetching():
    done = invoke("data", "get", "digits")
    assert done.exit_code == 0
    assert "nothing to fetch" in done.stderr


def test_data_get_prints_the_folder(monkeypatch):
    monkeypatch.setattr("altgrad.fetch.get", lambda name, data_dir=None: Path("cache") / name)
    assert invoke("data", "get", "mnist").stdout == "cache/mnist\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_for(shell):
    done = invoke("completion", shell)
    assert done.exit_code == 0
    assert "_ALTGRAD_COMPLETE" in done.stdout


def test_the_shell_is_offered_engines_by_name():
    done = subprocess.run(
        [sys.executable, "-c", "from altgrad.cli import main; main()"],
        env={**environment(), "_ALTGRAD_COMPLETE": "bash_complete", "COMP_WORDS": "altgrad train --engine for", "COMP_CWORD": "3"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "plain,forward" in done.stdout


# -- check, doctor, compare ------------------------------------------------------------------------------------------------------


def hold():
    """A claim that holds."""


def break_down():
    raise errors.AltgradError("not so")


@pytest.mark.parametrize(("claims", "code"), [([hold], 0), ([hold, break_down], 1)])
def test_check_leaves_with_1_where_a_claim_fails(claims, code, monkeypatch):
    monkeypatch.setattr("altgrad.testing.checks", lambda engine, factory: [(claim.__name__, claim) for claim in claims])
    assert invoke("check", "backprop").exit_code == code


def test_check_names_the_claim_that_fails_and_why(monkeypatch):
    monkeypatch.setattr("altgrad.testing.checks", lambda engine, factory: [("sums_up", break_down)])
    found = json.loads(invoke("check", "backprop", "--json").stdout)
    assert not found["passed"]
    assert found["claims"][0]["name"] == "sums_up"
    assert "not so" in found["claims"][0]["detail"]


def test_check_takes_settings_and_a_problem(monkeypatch):
    seen = []
    monkeypatch.setattr("altgrad.testing.checks", lambda engine, factory: [("seen", lambda: seen.extend([engine.tangents, factory().name]))])
    invoke("check", "forward", "-s", "tangents=3", "--problem", "quadratic")
    assert seen == [3, "quadratic"]


def test_doctor_says_which_engines_can_drive_a_model():
    done = invoke("doctor", "mlp", "--json")
    assert done.exit_code == 0
    assert {"backprop", "forward"} <= {fit["engine"] for fit in json.loads(done.stdout)["engines"] if fit["fits"]}


def test_doctor_reads_in_words_too():
    text = invoke("doctor", "resnet", "--input-shape", "1,8,8").stdout
    assert "examples mix in" in text
    assert "batch_norm" in text


def test_doctor_leaves_with_1_where_forward_mode_does_not_get_through(monkeypatch):
    Path("opaque.py").write_text(OPAQUE)
    monkeypatch.syspath_prepend(".")
    done = invoke("doctor", "opaque:Opaque", "--input-shape", "4")
    assert done.exit_code == 1
    assert "in the way" in done.stdout


def test_doctor_asks_for_inputs_it_cannot_guess(monkeypatch):
    Path("plainmodel.py").write_text("from torch import nn\ndef model(): return nn.Linear(4, 2)\n")
    monkeypatch.syspath_prepend(".")
    done = invoke("doctor", "plainmodel:model")
    assert done.exit_code == 2
    assert "--input-shape" in done.stderr


def test_doctor_gives_a_callable_the_shape_and_the_classes_that_it_takes(monkeypatch):
    Path("shapedmodel.py").write_text("from torch import nn\ndef model(input_shape, classes, width): return nn.Linear(*input_shape, width * classes)\n")
    monkeypatch.syspath_prepend(".")
    done = invoke("doctor", "shapedmodel:model", "--input-shape", "4", "--classes", "3", "--model-setting", "width=2", "--json")
    assert done.exit_code == 0, done.stderr
    done = invoke("doctor", "shapedmodel:model")
    assert done.exit_code == 2
    assert "--input-shape" in done.stderr


def test_probes_are_counted(monkeypatch):
    row = {"name": "Linear", "driven": True, "agrees": False, "error": 1.0, "rung": "rule", "functions": []}
    monkeypatch.setattr("altgrad.doctor.examine_probes", lambda probes, precision: [row])
    done = invoke("doctor", "--probes")
    assert done.exit_code == 1
    assert "0 of " in done.stderr


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "c"
    engines = "forward[tangents=2],forward[space=weights,rank=1,tangents=2]"
    budget = ("--seeds", 1, "--budget", "forwards=12", "--lr", "1e-3", "--points", 1)
    return folder, invoke("compare", "--problem", "digits", "--model-setting", "hidden=8", "--engines", engines, *budget, "--out", folder)


def test_compare_puts_backprop_and_its_variants_beside_every_engine(compared):
    _, done = compared
    assert done.exit_code == 0, done.stderr
    labels = [line.split("  ")[0] for line in done.stdout.split("\n\n")[0].splitlines()[1:]]
    baselines = ["backprop", "backprop + checkpointing", "backprop + accumulation"]
    assert labels == [*baselines, "forward tangents=2", "forward space=weights rank=1 tangents=2"]


def test_compare_leaves_json_csv_plots_and_a_page(compared):
    folder, _ = compared
    wanted = {"comparison.json", "comparison.csv", "table.md", "accuracy-against-forwards.png", "accuracy-against-seconds.png", "report.html"}
    assert wanted <= {path.name for path in folder.iterdir()}


def test_compare_does_not_write_over_an_earlier_one(compared):
    folder, _ = compared
    done = invoke("compare", "--out", folder)
    assert done.exit_code == 2
    assert "--overwrite" in done.stderr


def test_compare_with_overwrite_leaves_a_foreign_folder_alone():
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    assert invoke("compare", "--out", "mine", "--overwrite").exit_code == 2
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]
