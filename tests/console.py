"""The command line as tests call it: in this process, or in one of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from altgrad.cli import cli

TESTS = Path(__file__).parent
TOY = ("--problem", "toys:LeastSquaresFactory", "--engine", "toys:Noisy", "--optimizer", "SGD", "--lr", "0.1")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test in a folder of its own, without options from the environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("ALTGRAD_")]:
        monkeypatch.delenv(name)


def invoke(*arguments, env=None):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], env=env)


def train(*arguments, env=None):
    return invoke("train", *TOY, *arguments, env=env)


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def environment():
    return {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}


def process(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "altgrad", *map(str, arguments)], capture_output=True, text=True, env=environment(), timeout=120, **options)
