"""Bytes saved for backward sweeps, bytes alive at the peak, and the time of a step: local rules beside backprop.

    python benchmarks/local_memory.py [--out benchmarks/records/local_memory.json]

An MLP of `depth` hidden layers of 1,000 units (ReLU) and a head, batch 4,096, one thread. Saved bytes count a storage once while it is alive, those of
parameters, inputs and labels left out; live bytes count every storage an operation makes until it is freed, gradients left out. Times are the
least of several steps without an optimizer, engines taking turns.
"""

import argparse
import time
from typing import Any

import torch
import torch.nn.functional as F
from recording import record
from torch import nn

from altgrad import registry
from altgrad.metrics import live_bytes, saved_bytes
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key
from altgrad.world import World

WIDTH, BATCH, CLASSES = 1000, 4096, 10
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "backprop": ("backprop", {}),
    "backprop + checkpointing": ("backprop", {"checkpointing": True}),
    "deep supervision": ("deep-supervision", {}),
    "mono-forward": ("mono-forward", {}),
    "mono-forward, whole batch at once": ("mono-forward", {"rows": BATCH}),
    "greedy": ("local", {"loss": "greedy"}),
}


def build(depth: int) -> nn.Sequential:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


class Subject:
    """An engine on a fixed batch."""

    def __init__(self, model: nn.Module, name: str, settings: dict[str, Any], x: torch.Tensor, y: torch.Tensor):
        self.engine, self.problem, self.batch = registry.engine(name, settings), Supervised(model, F.cross_entropy), Batch(x, y)
        self.params = {**self.problem.params(), **self.engine.aux(self.problem, Key(0))}
        self.state = self.engine.init(self.problem, self.params, Key(0))
        self.problem.check_batch(self.batch)

    def run(self) -> dict[str, torch.Tensor]:
        return dict(self.engine.estimate(self.problem, self.params, self.state, self.batch, Key(0), World()).grads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    drawn = torch.Generator().manual_seed(0)
    x, y = torch.randn(BATCH, WIDTH, generator=drawn), torch.randint(CLASSES, (BATCH,), generator=drawn)
    rows: list[dict[str, Any]] = []
    for depth in (4, 16):
        model = build(depth)
        subjects = {label: Subject(model, name, settings, x, y) for label, (name, settings) in CASES.items()}
        found: dict[str, dict[str, Any]] = {}
        for label, subject in subjects.items():
            subject.run()
            with saved_bytes([x, y, *subject.params.values()]) as saved:
                subject.run()
            with live_bytes([x, y, *subject.params.values()]) as live:
                grads = subject.run()
            found[label] = {"depth": depth, "case": label, "saved_bytes": saved.peak, "live_bytes": live.peak_without(grads.values()), "seconds": float("inf")}
        for _ in range(arguments.repeats):
            for label, subject in subjects.items():
                started = time.perf_counter()
                subject.run()
                found[label]["seconds"] = min(found[label]["seconds"], time.perf_counter() - started)
        whole = found["backprop"]
        for label, row in found.items():
            ratios = {f"{name}_ratio": row[name] / whole[name] for name in ("saved_bytes", "live_bytes", "seconds")}
            rows.append({**row, **ratios})
            figures = f"{row['saved_bytes'] / 2**20:7.1f} MiB ({ratios['saved_bytes_ratio']:.3f})  alive {row['live_bytes'] / 2**20:7.1f} MiB"
            print(
                f"depth {depth:3}  {label:36} saved {figures} ({ratios['live_bytes_ratio']:.3f})  {row['seconds']:.2f} s ({ratios['seconds_ratio']:.2f})",
                flush=True,
            )
    record(arguments.out, {"width": WIDTH, "batch": BATCH, "asked": {"saved at depth 4": 0.40, "saved at depth 16": 0.10, "seconds": 1.25}, "rows": rows})


if __name__ == "__main__":
    main()
