"""Equilibrium propagation against exact gradients: the order of its error, what needs no symmetry, and the homeostatic estimate beside what it estimates.

    OMP_NUM_THREADS=1 python benchmarks/equilibrium_orders.py [--short] [--out benchmarks/records/equilibrium_orders.json]

orders     one-sided and symmetric: log2 of the factor by which the error falls as β halves, 0.02 → 0.01; holomorphic: the factor from N to N + 2 at |β| = 0.1
           until rounding (1e-11). On a layered Hopfield net (an energy), random recurrent nets of 40 units without symmetry, and a feed-forward tanh MLP.
correction four points at |β| = 0.1, in float32 and float64, with correction="asymmetric" and "none", at several gains of the recurrent weights; six beside them
sweeps     the most that an example's free relaxation takes to 1e-12: nets that settle slowly are near an edge, and a nudge of 0.1 may be beyond it
probes     the mean of the homeostatic estimate over 100,000 normal probes beside ½ ‖J - Jᵀ‖²_F / dim

Errors are ‖ĝ - g‖ / ‖g‖ over all parameters; g is the adjoint by a dense linear system (autograd's for the MLP), in float64, so that all of float32's rounding
is in the error. The nets have no hyperparameters to choose.
"""

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F
from recording import record
from torch import Tensor, nn

from altgrad import Batch, Key, World
from altgrad.alignment import exact_gradient
from altgrad.engine import Tree
from altgrad.engines.equilibrium import Equilibrium
from altgrad.equilibrium.adjoint import adjoint_gradient
from altgrad.equilibrium.feedback import LayeredFeedback
from altgrad.equilibrium.homeostasis import homeostasis, map_of
from altgrad.equilibrium.nets import GraphNet, LayeredHopfield
from altgrad.equilibrium.settling import Settling, squared_error
from altgrad.problem import Problem
from altgrad.problems.supervised import Supervised

FLOOR = 1e-11


def normal(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recurrent(gain: float, seed: int) -> Problem:
    return Settling(GraphNet(12, 40, 5, key=Key(seed), gain=gain).double(), squared_error)


def mlp(seed: int) -> Problem:
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 10)).double()
    for number, parameter in enumerate(model.parameters()):
        with torch.no_grad():
            parameter.copy_(normal(*parameter.shape, seed=100 * seed + number) * parameter.shape[-1] ** -0.5)
    return Supervised(model, F.cross_entropy)


def nets(gains: tuple[float, ...], seed: int) -> dict[str, tuple[Problem, Batch]]:
    labels = torch.arange(8) % 5
    found: dict[str, tuple[Problem, Batch]] = {}
    found["layered Hopfield"] = (Settling(LayeredHopfield([12, 16, 10, 5], key=Key(seed)).double(), squared_error), Batch(normal(8, 12), labels))
    found |= {f"recurrent, gain {gain}": (recurrent(gain, seed), Batch(normal(8, 12), 0.3 * normal(8, 5, seed=6))) for gain in gains}
    return found | {"feed-forward tanh MLP": (mlp(seed), Batch(normal(8, 20), torch.arange(8)))}


def exact_of(problem: Problem, batch: Batch) -> Tree:
    return adjoint_gradient(problem, problem.params(), batch) if isinstance(problem, Settling) else exact_gradient(problem, problem.params(), batch, Key(7))[1]


def error(problem: Problem, batch: Batch, exact: Tree, dtype: torch.dtype = torch.float64, **settings: Any) -> float:
    params = {name: value.detach().to(dtype) for name, value in problem.params().items()}
    own = Batch(batch.inputs.to(dtype), batch.targets.to(dtype) if batch.targets.is_floating_point() else batch.targets)
    problem.model.to(dtype)  # type: ignore[attr-defined]
    found = Equilibrium(steps=3000, **settings).estimate(problem, params, {}, own, Key(7), World()).grads
    problem.model.double()  # type: ignore[attr-defined]
    wrong = sum(float((found[name].double() - exact[name]).square().sum()) for name in exact)
    return math.sqrt(wrong / sum(float(gradient.square().sum()) for gradient in exact.values()))


def orders(problem: Problem, batch: Batch, exact: Tree) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for nudge in ("one-sided", "symmetric"):
        wide, narrow = (error(problem, batch, exact, nudge=nudge, beta=beta) for beta in (0.02, 0.01))
        found[nudge] = {"error at 0.02": wide, "error at 0.01": narrow, "order": math.log2(wide / narrow)}
    errors = {points: error(problem, batch, exact, nudge="holomorphic", points=points, beta=0.1) for points in (2, 4, 6, 8)}
    factors = [errors[points] / errors[points + 2] for points in (2, 4, 6) if errors[points + 2] > FLOOR]
    return {**found, "holomorphic": {"errors": {str(points): value for points, value in errors.items()}, "least factor": min(factors, default=None)}}


def corrected(problem: Problem, batch: Batch, exact: Tree) -> dict[str, float]:
    four = {"nudge": "holomorphic", "points": 4, "beta": 0.1, "form": "field"}
    return {
        "asymmetric, float64": error(problem, batch, exact, **four),
        "asymmetric, float32": error(problem, batch, exact, torch.float32, **four),
        "asymmetric, six points, float64": error(problem, batch, exact, **{**four, "points": 6}),
        "none, float64": error(problem, batch, exact, **four, correction="none"),
    }


def slowness(problem: Problem, batch: Batch) -> int:
    """The most sweeps of a free relaxation; none for a chain, which is at rest after its forward pass."""
    params = {name: value.detach() for name, value in problem.params().items()}
    return int(Equilibrium(steps=3000, tolerance=1e-12).system(problem, params, batch, Key(7), {}).settled.sweeps.max())


def probed(probes: int) -> dict[str, float]:
    """The homeostatic estimate on a layered net with random feedback, at a random state."""
    problem = Settling(LayeredFeedback([6, 12, 8, 4], key=Key(3), gain=1.0).double(), squared_error)
    state, x = tuple(normal(1, size, seed=size) for size in (12, 8, 4)), normal(1, 6)
    sizes = [leaf.shape[1] for leaf in state]
    params = {name: value.detach() for name, value in problem.params().items()}

    def told(flat: Tensor) -> Tensor:
        return torch.cat([part[0] for part in map_of(problem)(params, tuple(part[None] for part in flat.split(sizes)), x)])

    jacobian: Tensor = torch.autograd.functional.jacobian(told, torch.cat([leaf[0] for leaf in state]))  # type: ignore[assignment]
    wanted = float((jacobian - jacobian.T).square().sum()) / (2 * sum(sizes))
    many = tuple(leaf.expand(probes, -1) for leaf in state)
    values = homeostasis(lambda s: map_of(problem)(params, s, x.expand(probes, -1)), many, tuple(normal(probes, sum(sizes), seed=9).split(sizes, 1)))
    return {"probes": probes, "mean": float(values.mean()), "half squared asymmetry": wanted, "ratio": float(values.mean()) / wanted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--short", action="store_true", help="one seed and one gain, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in (3,) if options.short else (3, 4, 5):
        for name, (problem, batch) in nets((0.4,) if options.short else (0.3, 0.6, 0.9), seed).items():
            exact = exact_of(problem, batch)
            row: dict[str, Any] = {"net": name, "seed": seed, "sweeps": slowness(problem, batch)}
            row |= {"orders": orders(problem, batch, exact), "correction": corrected(problem, batch, exact)}
            rows.append(row)
            seen = row["orders"]
            print(
                f"{name:24} seed {seed}  {row['sweeps']:3} sweeps  "
                f"order one-sided {seen['one-sided']['order']:.2f}, symmetric {seen['symmetric']['order']:.2f};  "
                f"N to N + 2: at least {seen['holomorphic']['least factor'] or math.inf:.0f} x;  "
                + ", ".join(f"{key} {value:.1e}" for key, value in row["correction"].items()),
                flush=True,
            )
    estimate = probed(1000 if options.short else 100_000)
    print(f"homeostatic estimate over {estimate['probes']} probes: {estimate['ratio']:.4f} of half the squared asymmetry per unit")
    asked = {"one-sided": "1 ± 0.1", "symmetric": "2 ± 0.1", "holomorphic": ">= 10 x", "float32": 1e-4, "float64": 1e-5, "estimate": "1 ± 0.02"}
    record(options.out, {"asked": asked, "rows": rows, "homeostatic estimate": estimate})


if __name__ == "__main__":
    main()
