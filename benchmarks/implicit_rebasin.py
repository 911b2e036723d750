"""Re-basin: the loss barrier between two digits networks trained apart, before and after hidden units are permuted through implicit Sinkhorn layers.

    python benchmarks/implicit_rebasin.py [--out benchmarks/records/implicit_rebasin.json] [--seeds 3] [--first 3] [--short]

Two 64-64-64-10 mlps on scikit-learn's digits, from other first weights and in another order of the data; the problem's default settings, five passes over the
training set. The barrier is the largest rise of the loss over the straight line between the ends' losses, at 25 points of the path, with the nearest
permutations, on the test set; on the training set beside it.
"""

import argparse
import time
from typing import Any

import torch
from recording import record

from altgrad import registry
from altgrad.problems.rebasin import Rebasin
from altgrad.rng import Key
from altgrad.world import World


def aligned(seed: int, objective: str, epochs: int, hidden: str) -> dict[str, Any]:
    """The figures of one pair of networks."""
    problem = Rebasin(objective=objective, hidden=hidden).build(Key(seed))
    engine, params = registry.engine("implicit"), problem.params()
    optimizer = torch.optim.Adam(params.values(), lr=Rebasin.defaults["lr"])
    assert problem.steps_per_epoch is not None
    started = time.perf_counter()
    for step in range(epochs * problem.steps_per_epoch):
        for name, grad in engine.estimate(problem, params, {}, problem.batch(step, World()), Key(seed, step), World()).grads.items():
            params[name].grad = grad
        optimizer.step()
    held = {name: value.detach() for name, value in params.items()}
    test, train = problem.figures(held), problem.figures(held, split="train")
    seconds = time.perf_counter() - started
    return {"seed": seed, "objective": objective, "seconds": seconds, "test": test, "train": train, "path": problem.path(problem.second)[0].tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first", type=int, default=3, help="the first of them; 0 to 2 were looked at while the settings were chosen")
    parser.add_argument("--short", action="store_true", help="one seed, 16-16, one pass")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    epochs = 1 if arguments.short else Rebasin.defaults["epochs"]
    rows = []
    for objective in ("both", "weights", "midpoint"):
        for seed in range(arguments.first, arguments.first + (1 if arguments.short else arguments.seeds)):
            row = aligned(seed, objective, epochs, "16-16" if arguments.short else "64-64")
            rows.append(row)
            found = row["test"]
            change = f"barrier {found['barrier_before']:.3f} -> {found['barrier']:.3f} ({100 * found['reduction']:.1f} % less)"
            print(f"{objective:9} seed {seed}  {change}  accuracy of the middle {100 * found['accuracy']:.1f} %  {row['seconds']:.1f} s", flush=True)
    own = [row["test"]["reduction"] for row in rows if row["objective"] == "both"]
    record(arguments.out, {"asked": {"reduction": 0.8}, "least reduction, both": min(own), "mean reduction, both": sum(own) / len(own), "rows": rows})


if __name__ == "__main__":
    main()
