"""How fast a population is evaluated in chunks, beside all members at once, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/population_chunks.py [--short] [--out benchmarks/records/population_chunks.json]

A chunk bounds the memory and leaves the estimate as it is, up to rounding (the record has the largest difference, relative to the largest entry). It also
decides whether the activations of a layer stay in the processor's cache until the next layer reads them. One estimate of 64 members, for each of four
models and two engines; float32, one thread, seconds of the processor's, medians of the quotients of rounds in which all chunks take turns. A speed above 1
is faster than all at once.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from recording import interleaved, ratio, record
from torch import nn

import altgrad
from altgrad import Key, models

ENGINES, MEMBERS, CHUNKS = ("eggroll", "es"), 64, (None, 2, 4, 8, 16, 32)
IMAGE = (1, 28, 28)
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "mlp 784-256-10": ("mlp", {"hidden": "256"}, (784,)),
    "mlp 784-1024-1024-10": ("mlp", {"hidden": "1024-1024"}, (784,)),
    "cnn 16-32": ("cnn", {"channels": "16-32"}, IMAGE),
    "transformer": ("transformer", {}, IMAGE),
}


def learners(name: str, engine: str, members: int, rows: int) -> tuple[dict[int | None, Callable[[], Any]], dict[int | None, torch.Tensor]]:
    """What takes one estimate in each chunk size, and the estimates that it gave first."""
    kind, settings, shape = MODELS[name]
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(rows) % 10
    calls: dict[int | None, Callable[[], Any]] = {}
    found = {}
    for chunk in CHUNKS:
        model = models.build(kind, settings, input_shape=shape, classes=10, key=Key(0))
        learner = altgrad.Learner(model, nn.CrossEntropyLoss(), engine=engine, population=members, **({} if chunk is None else {"chunk": chunk}))
        learner.backward(x, y)
        found[chunk] = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
        calls[chunk] = functools.partial(learner.backward, x, y)
    return calls, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="small sizes, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    members, rows = (8, 4) if arguments.short else (MEMBERS, 64)
    table = []
    print(f"{'model':<22}{'engine':<9}{'difference':>11}" + "".join(f"{chunk or 'all':>7}" for chunk in CHUNKS))
    for name in MODELS:
        for engine in ENGINES:
            calls, estimates = learners(name, engine, members, rows)
            seconds = interleaved({str(chunk): call for chunk, call in calls.items()}, 1 if arguments.short else arguments.repeats)
            speeds = {str(chunk): 1 / ratio(seconds[str(chunk)], seconds["None"]) for chunk in CHUNKS}
            whole = estimates[None]
            difference = max(float((estimates[chunk] - whole).abs().max() / whole.abs().max()) for chunk in CHUNKS)
            print(f"{name:<22}{engine:<9}{difference:>11.1e}" + "".join(f"{speed:>7.2f}" for speed in speeds.values()), flush=True)
            table.append(
                {"model": name, "engine": engine, "largest_difference": difference, "speed": {"all" if k == "None" else k: v for k, v in speeds.items()}}
            )
    record(arguments.out, {"members": members, "examples": rows, "rows": table})


if __name__ == "__main__":
    main()
