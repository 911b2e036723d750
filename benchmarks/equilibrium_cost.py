"""What settling costs: a step of equilibrium propagation beside backprop's and recurrent backprop's. Sweeps are counted by equilibrium_sweeps.py.

    OMP_NUM_THREADS=1 python benchmarks/equilibrium_cost.py [--short] [--out benchmarks/records/equilibrium_cost.json]

One estimate on a batch of 128 random examples, without an optimizer, engines taking turns; medians, and the medians of their ratios to backprop on a plain
network of the same sizes. The settling nets are as they begin; every relaxation, recurrent backprop's adjoint among them, goes to one tolerance: 1e-3, with
which nets are trained, or 1e-5. Backprop through the sweeps takes ten of them, about as many as the loose tolerance does.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from recording import interleaved, ratio, record

from altgrad import Batch, Key, World, models, registry
from altgrad.engines.equilibrium import Equilibrium
from altgrad.equilibrium.adjoint import recurrent_backprop
from altgrad.equilibrium.nets import LayeredHopfield
from altgrad.equilibrium.settling import Settling, direct_gradient, squared_error
from altgrad.kernels import noise
from altgrad.problem import Problem
from altgrad.problems.images import cross_entropy_of_each
from altgrad.problems.supervised import Supervised
from altgrad.rng import tensor_id

SIZES = ("784-512-10", "64-256-10", "64-128-128-10")
TOLERANCES = (1e-3, 1e-5)
EXAMPLES = 128
BACKPROP = "backprop, plain network (relu)"


def estimator(problem: Problem, batch: Batch, name: str, **settings: Any) -> Callable[[], Any]:
    engine = registry.engine(name, settings)
    params = {key: value.detach() for key, value in problem.params().items()}
    state = engine.init(problem, params, Key(0))
    problem.check_batch(batch)
    return lambda: engine.estimate(problem, params, state, batch, Key(0), World())


def adjoint(problem: Problem, batch: Batch, tolerance: float) -> Callable[[], Any]:
    """Recurrent backprop from the free state that alternating sweeps come to."""
    rule = Equilibrium(form="field", tolerance=tolerance)
    params = {key: value.detach() for key, value in problem.params().items()}

    def run() -> Any:
        free = rule.system(problem, params, batch, Key(0), {})
        _, force = rule.pushes(problem, free, batch)
        own = recurrent_backprop(free, tuple(-part for part in force), steps=rule.steps, tolerance=tolerance)  # type: ignore[arg-type]
        return {**direct_gradient(problem, params, free.rest, batch), **own}

    return run


def plain(sizes: list[int], activation: str) -> Problem:
    settings = {"hidden": "-".join(map(str, sizes[1:-1])), "activation": activation}
    return Supervised(models.build("mlp", settings, input_shape=sizes[:1], classes=sizes[-1], key=Key(0)), cross_entropy_of_each)


def steps(spelt: str, tolerance: float, repeats: int) -> dict[str, Any]:
    sizes = [int(size) for size in spelt.split("-")]
    batch = Batch(noise.draw("normal", Key(5), tensor_id("inputs"), [0], (EXAMPLES, sizes[0]))[0], torch.arange(EXAMPLES) % sizes[-1])
    settles = Settling(LayeredHopfield(sizes, key=Key(0), sweeps=10), squared_error)
    four = {"nudge": "holomorphic", "points": 4, "tolerance": tolerance}
    cases = {
        BACKPROP: estimator(plain(sizes, "relu"), batch, "backprop"),
        "backprop through 10 sweeps": estimator(settles, batch, "backprop"),
        "recurrent backprop": adjoint(settles, batch, tolerance),
        "equilibrium, symmetric": estimator(settles, batch, "equilibrium", tolerance=tolerance),
        "equilibrium, 4 points": estimator(settles, batch, "equilibrium", **four),
        "equilibrium, field, corrected": estimator(settles, batch, "equilibrium", form="field", tolerance=tolerance),
        "equilibrium, plain network (tanh)": estimator(plain(sizes, "tanh"), batch, "equilibrium", tolerance=tolerance),
        "equilibrium, plain network (tanh), 4 points": estimator(plain(sizes, "tanh"), batch, "equilibrium", **four),
    }
    seconds = interleaved(cases, repeats, time.perf_counter)
    base = seconds[BACKPROP]
    rows = {label: {"milliseconds": 1000 * statistics.median(own), "ratio": ratio(own, base)} for label, own in seconds.items()}
    return {"sizes": spelt, "tolerance": tolerance, "batch": EXAMPLES, "repeats": repeats, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--short", action="store_true", help="one net and few repeats, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    timed = []
    for sizes in SIZES[1:2] if options.short else SIZES:
        for tolerance in TOLERANCES:
            timed.append(steps(sizes, tolerance, 2 if options.short else 20))
            for label, row in timed[-1]["rows"].items():
                print(f"{sizes:14} {tolerance:g} {label:44} {row['milliseconds']:8.2f} ms  {row['ratio']:7.1f} x", flush=True)
    record(options.out, {"asked": "stated plainly", "steps": timed})


if __name__ == "__main__":
    main()
