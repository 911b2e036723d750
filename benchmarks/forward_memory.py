"""Figures 1 and 3: bytes saved for a backward sweep, and bytes alive at the peak beyond parameters and gradients.

    python benchmarks/forward_memory.py [--out benchmarks/records/forward_memory.json]

An MLP of `depth` layers of 256 units, batch 512. Plain inference of the same batch (under no_grad) is the unit. Live bytes count every
storage an operation makes, from its making until it is freed, the gradients' own storages left out.
"""

import argparse

import torch
import torch.nn.functional as F
from recording import record
from torch import nn

import altgrad
from altgrad.metrics import live_bytes, saved_bytes

WIDTH, BATCH, CLASSES = 256, 512, 10
CASES = {
    "weights K=1": ("forward", {"space": "weights", "tangents": 1}, 2.5),
    "weights K=1, rank 1": ("forward", {"space": "weights", "tangents": 1, "rank": 1}, None),
    "activations K=1, replay": ("forward", {"tangents": 1, "memory": "replay"}, 2.5),
    "activations K=1, store": ("forward", {"tangents": 1}, None),
    "weights K=16, chunk 1": ("forward", {"space": "weights", "tangents": 16, "chunk": 1}, None),
    "activations K=16, replay": ("forward", {"tangents": 16, "memory": "replay"}, None),
    "activations K=16, replay, chunk 1": ("forward", {"tangents": 16, "memory": "replay", "chunk": 1}, None),
    "local guess alone, replay": ("forward", {"guess": "local", "tangents": 0, "memory": "replay"}, None),
    "backprop": ("backprop", {}, None),
    "backprop + checkpointing": ("backprop", {"checkpointing": True}, None),
    "backprop + accumulation 4": ("backprop", {"accumulation": 4}, None),
}


def build(depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for place in range(depth):
        layers += [nn.Linear(WIDTH, WIDTH if place < depth - 1 else CLASSES), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    x, y = torch.randn(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,))
    rows = []
    for depth in (8, 32):
        model = build(depth)
        with torch.no_grad(), live_bytes() as plain:
            model(x)
        for label, (engine, settings, limit) in CASES.items():
            if depth > 8 and settings.get("chunk"):
                continue  # every small operation is watched: minutes, for what depth 8 shows
            learner = altgrad.Learner(build(depth), F.cross_entropy, engine=engine, **settings)
            leaves = list(learner.parameters())
            learner.backward(x, y)
            for leaf in leaves:
                leaf.grad = None
            with live_bytes() as live:
                learner.backward(x, y)
            peak = live.peak_without(leaf.grad for leaf in leaves if leaf.grad is not None)
            with saved_bytes([x, y, *leaves]) as saved:
                learner.backward(x, y)
            rows.append({"depth": depth, "case": label, "peak_bytes": peak, "ratio_to_inference": peak / plain.peak, "limit": limit, "saved_bytes": saved.peak})
            asked = f"  asked <= {limit}" if limit else ""
            print(f"depth {depth:3}  {label:36} {peak / 2**20:7.2f} MiB  {peak / plain.peak:6.2f} × inference  saved for backward {saved.peak:>10}{asked}")
    record(arguments.out, {"width": WIDTH, "batch": BATCH, "rows": rows})


if __name__ == "__main__":
    main()
