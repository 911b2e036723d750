"""Figure 2: what a forward-gradient step costs beside one backprop step, on one thread, noise included.

    OMP_NUM_THREADS=1 python benchmarks/forward_cost.py [--repeats 15] [--out benchmarks/records/forward_cost.json]

Dense tangents are held to their operation count, F(1 + K(2 - f₁)) with f₁ the first layer's share of the forward pass F; rank-1 tangents
and activations to process time, as the median over rounds of the ratio to a backprop step timed in the same round. The noise block
is compiled before; its compile time is reported and left out.
"""

import argparse
import itertools
import json
import statistics
import time

import torch
import torch.nn.functional as F
from recording import record
from torch import nn

import altgrad
from altgrad.kernels import noise
from altgrad.metrics import flops

NETS = {"784-256-256-10": (784, 256, 256, 10), "784-1024-1024-10": (784, 1024, 1024, 10)}
BATCH, TANGENTS = 256, 16
CASES = {
    "rank 1, K=16": {"space": "weights", "rank": 1, "tangents": TANGENTS},
    "activations, K=16": {"space": "activations", "tangents": TANGENTS},
    "activations, K=16, signs": {"space": "activations", "tangents": TANGENTS, "noise": "sign"},
    "activations, K=16, replay": {"space": "activations", "tangents": TANGENTS, "memory": "replay"},
    "dense, K=16": {"space": "weights", "tangents": TANGENTS},
    "dense, K=1": {"space": "weights", "tangents": 1},
    "activations, K=1": {"space": "activations", "tangents": 1},
}
LIMITS = {("rank 1, K=16", 0): 3.0, ("rank 1, K=16", 1): 4.7, ("activations, K=16", 0): 5.5, ("activations, K=16", 1): 6.3}


def build(sizes: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(sizes):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def plain_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()


def seconds(function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for place, (name, sizes) in enumerate(NETS.items()):
        x, y = torch.randn(BATCH, sizes[0]), torch.randint(sizes[-1], (BATCH,))
        model = build(sizes)
        learners = {label: altgrad.Learner(build(sizes), F.cross_entropy, engine="forward", **case) for label, case in CASES.items()}

        def step(learner: altgrad.Learner) -> None:
            learner.model.zero_grad(set_to_none=True)
            learner.backward(x, y)

        forward = flops(lambda: model(x))
        first = 2 * BATCH * sizes[0] * sizes[1] / forward
        bound = forward * (1 + TANGENTS * (2 - first))
        counted = flops(lambda: step(learners["dense, K=16"]))
        rows.append({"net": name, "case": "dense, K=16: operations", "ratio": counted / bound, "limit": 1.15, "unit": "× F(1+K(2-f1))"})
        with noise.compiled(True):
            for learner in learners.values():
                step(learner)
            for label, learner in learners.items():
                ratios = []
                for _ in range(arguments.repeats if "dense, K=16" not in label else 3):
                    base = statistics.median(seconds(lambda: plain_step(model, x, y)) for _ in range(5))
                    ratios.append(seconds(lambda: step(learner)) / base)
                rows.append(
                    {
                        "net": name,
                        "case": label,
                        "ratio": statistics.median(ratios),
                        "spread": [min(ratios), max(ratios)],
                        "limit": LIMITS.get((label, place)),
                        "unit": "× backprop step",
                    }
                )
    for row in rows:
        limit = "" if row["limit"] is None else f"   asked <= {row['limit']}"
        print(f"{row['net']:18} {row['case']:28} {row['ratio']:6.2f} {row['unit']}{limit}", flush=True)
    record(
        arguments.out, {"batch": BATCH, "threads": 1, "compile_seconds": noise.compile_seconds(), "compile_failures": noise.compile_failures(), "rows": rows}
    )
    print(json.dumps({"compile_seconds": round(noise.compile_seconds(), 1)}))


if __name__ == "__main__":
    main()
