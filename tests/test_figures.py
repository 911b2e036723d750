"""The short form of the benchmarks: the figures that counting decides, and that every script runs."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import altgrad
from altgrad.metrics import flops, live_bytes

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
IMPORTED = {"recording.py", "peers.py", "implicit_peers.py", "tuned.py"}  # by the scripts
WIDTH, BATCH = 256, 512


def stack(depth):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers[:-2], nn.Linear(WIDTH, 10))


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, WIDTH, generator=generator), torch.randint(10, (BATCH,), generator=generator)


def peak_over_inference(depth, **settings):
    """Peak live bytes of a step beyond parameters and gradients, in units of plain inference's peak."""
    x, y = batch()
    model = stack(depth)
    with torch.no_grad(), live_bytes() as plain:
        model(x)
    learner = altgrad.Learner(model, F.cross_entropy, **settings)
    learner.backward(x, y)  # what is found out once is found out here
    model.zero_grad(set_to_none=True)
    with live_bytes() as live:
        learner.backward(x, y)
    return live.peak_without(p.grad for p in model.parameters()) / plain.peak


LEAN = [{"engine": "forward", "space": "weights", "tangents": 1}, {"engine": "forward", "tangents": 1, "memory": "replay"}]


@pytest.mark.parametrize("settings", LEAN, ids=["weights", "activations"])
@pytest.mark.parametrize("depth", [8, 32])
def test_one_tangent_needs_at_most_two_and_a_half_times_inference(settings, depth):
    assert peak_over_inference(depth, **settings) <= 2.5


def test_backprop_needs_more_the_deeper_the_network():
    assert peak_over_inference(32, engine="backprop") > 2 * peak_over_inference(8, engine="backprop") > 2 * 2.5


def test_dense_tangents_cost_the_operations_of_their_formula():
    sizes, rows, tangents = (784, 256, 256, 10), 64, 16
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    x, y = torch.zeros(rows, 784), torch.zeros(rows, dtype=torch.int64)
    learner = altgrad.Learner(model, F.cross_entropy, engine="forward", space="weights", tangents=tangents)
    learner.backward(x, y)
    forward = flops(lambda: model(x))
    first = 2 * rows * sizes[0] * sizes[1] / forward
    assert flops(lambda: learner.backward(x, y)) <= 1.15 * forward * (1 + tangents * (2 - first))


@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name not in IMPORTED))
def test_every_benchmark_explains_itself(script):
    shown = subprocess.run([sys.executable, str(BENCHMARKS / script), "--help"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0
    assert "--out" in shown.stdout


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "records").glob("*.json")), ids=lambda path: path.name)
def test_every_record_names_its_command_and_versions(path):
    content = json.loads(path.read_text(encoding="utf8"))
    script = content["command"].split()[1]
    assert (BENCHMARKS.parent / script).is_file()
    assert {"python", "torch", "numpy", "altgrad"} <= set(content["versions"])


def test_a_short_accuracy_run_puts_every_rule_beside_backprop():
    command = [sys.executable, str(BENCHMARKS / "forward_accuracy.py"), "digits", "--epochs", "1", "--seeds", "1"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "ALTGRAD_COMPILE": "off", "OMP_NUM_THREADS": "1"})
    assert shown.returncode == 0, shown.stderr
    assert all(rule in shown.stdout for rule in ("backprop", "activations K=16", "weights K=16"))
