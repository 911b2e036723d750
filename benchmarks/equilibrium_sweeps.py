"""Sweeps that relaxations take to one and the same residual: all layers at once, every second layer, over-relaxed, and with Anderson's combinations.

    OMP_NUM_THREADS=1 python benchmarks/equilibrium_sweeps.py --out benchmarks/records/equilibrium_sweeps.json

A sweep updates every unit once, however it is ordered: evens and odds together are one, and cost what a sweep of all at once does. "as set" is the
relaxation that the engine takes where nothing is said: 1.1, and 1 for a graph that is swept by halves. The residual is max |step(s) - s| / (1 + max |s|) of one
step of all layers at once, whichever way the state came about, of every example by itself; the figures are means over 32 examples, weights `scale` times those
that the nets begin with. Looking at the residual costs a step more, which is not counted.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from recording import record

from altgrad.equilibrium.conv_nets import ConvHopfield
from altgrad.equilibrium.nets import GraphHopfield, LayeredHopfield
from altgrad.equilibrium.relaxation import Leap, greatest
from altgrad.kernels import noise
from altgrad.rng import Key, tensor_id

HALVES = torch.arange(64)[:, None] // 32 != torch.arange(64) // 32
NETS: dict[str, tuple[Any, float, tuple[int, ...]]] = {
    "784-512-10": (lambda: LayeredHopfield([784, 512, 10], key=Key(3)), 2.0, (784,)),
    "64-256-10, as it begins": (lambda: LayeredHopfield([64, 256, 10], key=Key(3)), 1.0, (64,)),
    "64-32-32-32-10": (lambda: LayeredHopfield([64, 32, 32, 32, 10], key=Key(3)), 1.5, (64,)),
    "64-32-32-32-10, tanh": (lambda: LayeredHopfield([64, 32, 32, 32, 10], key=Key(3), hidden="tanh"), 1.2, (64,)),
    "convolutions 8-16, softmax": (lambda: ConvHopfield((1, 12, 12), [8, 16], 10, key=Key(3)), 1.5, (1, 12, 12)),
    "convolutions 8-16, max": (lambda: ConvHopfield((1, 12, 12), [8, 16], 10, key=Key(3), pooling="max"), 1.2, (1, 12, 12)),
    "graph of two colours, 64 units": (lambda: GraphHopfield(16, 64, 10, key=Key(3), edges=HALVES), 2.0, (16,)),
    "graph, 64 units, all joined": (lambda: GraphHopfield(16, 64, 10, key=Key(3)), 1.2, (16,)),
}
HALVED = ("graph, 64 units, all joined",)  # no order leaves its units without neighbours in their own group
RESIDUALS = (1e-3, 1e-6, 1e-10)
MOST = 5000


WAYS: dict[str, Callable[[Any], Any]] = {
    "together": lambda net: net.step,
    "alternating, relaxation 1": lambda net: net.sweep,
    "alternating, as set": lambda net: partial(net.sweep, relaxation=net.relaxation),
    "alternating, relaxation 1.2": lambda net: partial(net.sweep, relaxation=1.2),
}


def sweeps_to(residual: float, net: Any, x: torch.Tensor, way: Any, acceleration: str) -> float:
    """The mean number of sweeps an example takes."""
    params = dict(net.named_parameters())
    taken, moving, leap = torch.zeros(len(x)), torch.ones(len(x), dtype=torch.bool), Leap(0.0)
    with torch.no_grad():
        state, given = net.rest(params, x), net.prepared(params, x)
        for _ in range(MOST):
            moving &= greatest([a - b for a, b in zip(net.step(params, state, given), state, strict=True)]) / (1 + greatest(state)) > residual
            if not bool(moving.any()):
                return float(taken.mean())
            swept = way(params, state, given)
            change = greatest([a - b for a, b in zip(swept, state, strict=True)]) / (1 + greatest(state))
            taken, state = taken + moving, leap(state, swept, swept, change, moving, 0.0) if acceleration == "anderson" else swept
    return float("inf")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two nets, four examples")
    parser.add_argument("--out", help="the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (build, scale, shape) in list(NETS.items())[1:3] if options.short else NETS.items():
        net = build().double()
        with torch.no_grad():
            for weight in getattr(net, "weights", None) or [net.recurrent]:
                weight.mul_(scale)
        count = 4 if options.short else 32
        x = noise.draw("normal", Key(5), tensor_id("inputs"), [0], (count, *shape))[0].double()
        for residual in RESIDUALS:
            found = {name: sweeps_to(residual, net, x, way(net), "none") for name, way in WAYS.items()}
            quick = {f"{name}, anderson": sweeps_to(residual, net, x, WAYS[name](net), "anderson") for name in ("together", "alternating, as set")}
            fewer = {name: found["together"] / count for name, count in found.items() if name != "together"}
            row = {"net": name, "scale": scale, "residual": residual, "sweeps": {**found, **quick}, "times fewer": fewer}
            print(f"{name}, {residual:g}: together {found['together']:.1f};", ", ".join(f"{name} {times:.2f} x" for name, times in fewer.items()), flush=True)
            rows.append(row)
    least = min(row["times fewer"]["alternating, as set"] for row in rows if row["net"] not in HALVED)
    record(options.out, {"asked": ">= 2 x", "least, layers and two colours": least, "rows": rows})


if __name__ == "__main__":
    main()
