"""`torchrun … -m altgrad train`: the ranks share every batch, one of them writes and speaks."""

import json
import os
import subprocess
import sys

import pytest

COMMAND = ["-m", "altgrad", "train", "--steps", "4", "--engine", "forward", "-s", "tangents=2", "--json", "--quiet"]


def launched(command, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command, "--out", str(folder)], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The JSON lines of a run on one process, and of the same run on two."""
    root = tmp_path_factory.mktemp("ranks")
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *COMMAND]
    return launched(COMMAND, root / "one"), launched(two, root / "two")


def test_only_one_rank_speaks(outcomes):
    assert [len(lines) for lines in outcomes] == [1, 1]


def test_two_ranks_reach_what_one_process_reaches(outcomes):
    (one,), (two,) = outcomes
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-4)  # sums over examples are grouped differently
