"""`altgrad export`: the file gives what the run's engine predicts, and nothing is lost on the way."""

import json

import pytest
import torch
from console import elsewhere, invoke

from altgrad import training

__all__ = ["elsewhere"]


def ran(folder, engine, *settings):
    done = invoke("train", "--engine", engine, *settings, "--steps", "2", "--out", folder, "-q")
    assert done.exit_code == 0, done.output


def predicted(folder, inputs, readout=None):
    from altgrad import export

    opened = training.opened(folder)
    return export.reading(opened.engine, readout).predict(opened.problem, opened.params, opened.state, inputs)


def digits(rows):
    return torch.rand(rows, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("engine", "readout"), [("backprop", None), ("mono-forward", None), ("mono-forward", "vote")])
def test_the_file_gives_what_the_engine_reads_out_for_any_number_of_examples(engine, readout):
    ran("run", engine)
    done = invoke("export", "run", "--out", "model.pt2", *(("--readout", readout) if readout else ()), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["step"] == 2
    module = torch.export.load("model.pt2").module()
    for rows in (1, 7):
        torch.testing.assert_close(module(digits(rows)), predicted("run", digits(rows), readout))


def test_a_read_out_of_several_passes_is_written_for_one_number_of_examples():
    ran("run", "forward-forward")
    refused = invoke("export", "run")
    assert refused.exit_code == 2
    assert "--batch" in refused.output
    assert invoke("export", "run", "--batch", 3).exit_code == 0
    torch.testing.assert_close(torch.export.load("run/model.pt2").module()(digits(3)), predicted("run", digits(3)))


def test_exporting_leaves_the_run_as_it_was(tmp_path):
    ran("run", "backprop")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert invoke("export", "run", "--out", "model.pt2").exit_code == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing-here",), "nothing-here"),
        (("run", "--out", "there.pt2"), "--overwrite"),
        (("run", "--out", "no/where.pt2"), "does not exist"),
        (("run", "--readout", "vote"), "one read-out"),
    ],
)
def test_what_cannot_be_written_is_said(arguments, said, tmp_path):
    ran("run", "backprop")
    (tmp_path / "there.pt2").write_bytes(b"mine")
    done = invoke("export", *arguments)
    assert done.exit_code == 2
    assert said in done.output
    assert (tmp_path / "there.pt2").read_bytes() == b"mine"
