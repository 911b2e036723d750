"""What settling costs: sweeps of every second layer beside sweeps of all at once, and a step of equilibrium propagation beside backprop and its kin.

    OMP_NUM_THREADS=1 python benchmarks/equilibrium_cost.py [--short] [--out benchmarks/records/equilibrium_cost.json]

sweeps   relaxations of layered Hopfield nets from zeros to the same residual, each example stopped when it is at rest: the sweeps of all layers at once over
         those of every second layer, then the others (one of which updates every layer once too), with the spread over examples
steps    one estimate on a batch of 64 digits, without an optimizer, engines taking turns, medians and the medians of their ratios to backprop on a plain MLP of
         the same sizes (relu): equilibrium propagation by four nudges, backprop unrolled through the 30 sweeps of the same net, and recurrent backprop at its
         fixed point
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from recording import record

from altgrad import Key, World, registry
from altgrad.engines.equilibrium import Equilibrium
from altgrad.equilibrium.nets import LayeredHopfield
from altgrad.equilibrium.relaxation import relax
from altgrad.problem import Problem

SIZES = ("64-256-10", "64-128-128-10", "64-64-64-64-10")
TOLERANCE = 1e-5


def sweeps(sizes: str, gain: float, x: torch.Tensor) -> dict[str, Any]:
    net = LayeredHopfield([int(size) for size in sizes.split("-")], key=Key(0))
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.ndim > 1 and name != "weights.0":
                weight.mul_(gain)
        params = dict(net.named_parameters())
        ran = {
            label: relax(lambda s, way=way: way(params, s, x), net.rest(params, x), steps=3000, tolerance=TOLERANCE).sweeps.float()
            for label, way in (("together", net.step), ("alternating", net.sweep))
        }
    found = {label: {"mean": float(own.mean()), "least": float(own.min()), "most": float(own.max())} for label, own in ran.items()}
    return {"sizes": sizes, "gain": gain, **found, "ratio": found["together"]["mean"] / found["alternating"]["mean"]}


def estimator(problem: Problem, name: str, settings: dict[str, Any]) -> Callable[[], Any]:
    engine = registry.engine(name, settings)
    params = {key: value.detach() for key, value in problem.params().items()}
    batch, state = problem.batch(0, World()), engine.init(problem, params, Key(0))
    problem.check_batch(batch)
    return lambda: engine.estimate(problem, params, state, batch, Key(0), World())


def adjoint(problem: Problem) -> Callable[[], Any]:
    rule = Equilibrium(tolerance=TOLERANCE)
    params = {key: value.detach() for key, value in problem.params().items()}
    batch = problem.batch(0, World())
    return lambda: rule.exact(problem, params, batch, Key(0))


def steps(hidden: str, repeats: int) -> dict[str, Any]:
    settles = registry.find("problem", "hopfield-digits")(hidden=hidden).build(Key(0))
    plain = registry.find("problem", "digits")().build(Key(0), model_settings={"hidden": hidden})
    four = {"nudge": "holomorphic", "points": 4, "beta": 0.1, "tolerance": TOLERANCE}
    cases = {
        "backprop, plain MLP": estimator(plain, "backprop", {}),
        "backprop through 30 sweeps": estimator(settles, "backprop", {}),
        "recurrent backprop": adjoint(settles),
        "equilibrium, symmetric": estimator(settles, "equilibrium", {"tolerance": TOLERANCE}),
        "equilibrium, 4 points": estimator(settles, "equilibrium", four),
        "equilibrium, field, corrected": estimator(settles, "equilibrium", {"form": "field", "tolerance": TOLERANCE}),
        "equilibrium, plain MLP (tanh)": estimator(
            registry.find("problem", "digits")().build(Key(0), model_settings={"hidden": hidden, "activation": "tanh"}), "equilibrium", {"tolerance": TOLERANCE}
        ),
    }
    seconds: dict[str, list[float]] = {label: [] for label in cases}
    for turn in range(repeats + 1):
        for label, run in cases.items():
            started = time.perf_counter()
            run()
            if turn:  # the first turn warms up
                seconds[label].append(time.perf_counter() - started)
    base = seconds["backprop, plain MLP"]
    rows = {
        label: {"milliseconds": 1000 * statistics.median(own), "ratio": statistics.median(one / other for one, other in zip(own, base, strict=True))}
        for label, own in seconds.items()
    }
    return {"hidden": hidden, "batch": 64, "repeats": repeats, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--short", action="store_true", help="few sizes and repeats, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = registry.find("problem", "digits")().build(Key(0)).batch(0, World()).inputs.flatten(1)
    relaxed = [sweeps(sizes, gain, x) for sizes in SIZES[: 1 if options.short else 3] for gain in ((1.0,) if options.short else (1.0, 1.5, 2.0))]
    for row in relaxed:
        print(
            f"{row['sizes']:16} gain {row['gain']}: together {row['together']['mean']:.1f}, alternating {row['alternating']['mean']:.1f}, {row['ratio']:.2f} x"
        )
    timed = [steps(hidden, 2 if options.short else 15) for hidden in (("32",) if options.short else ("256", "128-128"))]
    for found in timed:
        for label, row in found["rows"].items():
            print(f"{found['hidden']:8} {label:32} {row['milliseconds']:8.2f} ms  {row['ratio']:7.1f} x")
    record(options.out, {"tolerance": TOLERANCE, "asked": {"sweeps": ">= 2 x"}, "sweeps": relaxed, "steps": timed})


if __name__ == "__main__":
    main()
