"""The examples run as they are and come to what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "examples"


def printed(name):
    done = subprocess.run([sys.executable, FOLDER / name], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readmes_loop_learns_digits_without_backprop():
    accuracy = re.search(r"test accuracy ([\d.]+) %", printed("learner.py"))
    assert float(accuracy[1]) > 90


def test_a_function_is_minimised_by_estimates():
    value = re.search(r"f = ([\d.]+)", printed("function.py"))
    assert float(value[1]) < 0.05
