"""The examples run as they are and come to what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "examples"


def printed(name, *arguments):
    done = subprocess.run([sys.executable, FOLDER / name, *arguments], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readmes_loop_learns_digits_without_backprop():
    accuracy = re.search(r"test accuracy ([\d.]+) %", printed("learner.py"))
    assert float(accuracy[1]) > 90


def test_a_function_is_minimised_by_estimates():
    value = re.search(r"f = ([\d.]+)", printed("function.py"))
    assert float(value[1]) < 0.05


def test_on_a_noisy_device_a_small_nudge_is_lost_and_large_ones_on_a_circle_are_not():
    both = ("one-sided, small", "holomorphic, large")
    shown = printed("noisy_hardware.py", "--epochs", "1", "--hidden", "32", "--lr", "1e-2", "--nudges", *both)
    accuracy = {name: (float(ideal), float(noisy)) for name, ideal, noisy in re.findall(r"^([a-z-]+, \w+) +([\d.]+) % +([\d.]+) %", shown, re.M)}
    small, large = (accuracy[name] for name in both)
    assert small[0] - small[1] > 30
    assert large[1] > small[1] + 30
