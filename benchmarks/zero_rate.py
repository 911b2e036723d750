"""Figure 6: 10,000 steps of rate zero leave every parameter bit-identical, in float32, bfloat16 and float16: weights are never moved to be perturbed.

OMP_NUM_THREADS=1 python benchmarks/zero_rate.py [--out benchmarks/records/zero_rate.json]
"""

import argparse
import sys
import time

import torch
import torch.nn.functional as F
from recording import record
from torch import nn

import altgrad
from altgrad.probes import ready

ENGINES = {"es": 4, "eggroll": 4, "spsa": 2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def changed_after(engine: str, population: int, dtype: torch.dtype, steps: int) -> int:
    """How many numbers of a small network have other bits after `steps` steps of SGD at rate zero."""
    generator = torch.Generator().manual_seed(0)
    model = ready(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), generator).to(dtype)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    learner = altgrad.Learner(model, F.cross_entropy, engine=engine, population=population)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.0)
    x, y = torch.randn(4, 4, generator=generator).to(dtype), torch.tensor([0, 1, 1, 0])
    for _ in range(steps):
        optimizer.zero_grad()
        learner.backward(x, y)
        optimizer.step()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    return sum(int((value.detach().view(bits) != before[name].view(bits)).sum()) for name, value in model.named_parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--steps", type=int, default=10_000)
    arguments = parser.parse_args()
    rows = []
    for engine, population in ENGINES.items():
        for dtype in DTYPES:
            start = time.perf_counter()
            changed = changed_after(engine, population, dtype, arguments.steps)
            rows.append({"engine": engine, "population": population, "dtype": str(dtype).removeprefix("torch."), "changed_numbers": changed})
            print(
                f"{engine:8} {rows[-1]['dtype']:9} {arguments.steps} steps: {changed} of 23 numbers changed  ({time.perf_counter() - start:.0f} s)", flush=True
            )
    record(arguments.out, {"steps": arguments.steps, "numbers": 23, "rows": rows})
    if any(row["changed_numbers"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
