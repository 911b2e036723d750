r"""What the gradient of a deep equilibrium layer costs: error, products of the adjoint, saved bytes and time, beside unrolling and torchdeq.

    python benchmarks/deq_cost.py [--out benchmarks/records/deq_cost.json] [--short]

z = tanh(z Wᵀ + x Uᵀ), 64 × 128, float32, one thread; loss ⟨z, G⟩ with a fixed normal G. Errors are ‖ĝ - g‖ / ‖g‖ of the gradient of W, g by a float64 dense
adjoint at a float64 solution. Saved bytes count a storage once, inputs and weights left out; beside them, those of solves of exactly 10 and exactly 1,000
iterations. CPU times are the least and the median of forward and backward, contenders taking turns. torchdeq (extra `peers`) is left out, and the record says
so, where it is not installed.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from recording import interleaved, record
from torch import Tensor, nn

from altgrad.errors import NotConvergedWarning
from altgrad.implicit.layers import DEQ
from altgrad.metrics import saved_bytes

BATCH, WIDTH = 64, 128
NORMS = (0.5, 0.9, 1.5)
PRECISE = {"tol": 3e-7, "adjoint_tol": 3e-7, "adjoint": "gmres", "max_steps": 300}
OURS: dict[str, dict[str, Any]] = {
    "altgrad, anderson + gmres, 3e-7": {"solver": "anderson", **PRECISE},
    "altgrad, broyden + gmres, 3e-7": {"solver": "broyden", **PRECISE},
    "altgrad, iteration + gmres, 3e-7": {"solver": "iteration", **PRECISE},
    "altgrad, iteration + bicgstab, 3e-7": {"solver": "iteration", **PRECISE, "adjoint": "bicgstab"},
    "altgrad, iteration + bicgstab, 3e-6": {"solver": "iteration", **PRECISE, "adjoint": "bicgstab", "tol": 3e-6, "adjoint_tol": 3e-6},
    "altgrad, broyden + gmres, 3e-6": {"solver": "broyden", **PRECISE, "tol": 3e-6, "adjoint_tol": 3e-6},
    "altgrad, iteration + gmres, 3e-6": {"solver": "iteration", **PRECISE, "tol": 3e-6, "adjoint_tol": 3e-6},
    "altgrad, anderson + lu": {"solver": "anderson", **PRECISE, "adjoint": "lu"},
}
THEIRS: dict[str, dict[str, Any]] = {
    "torchdeq, its defaults (one step)": {},
    "torchdeq, ift, fixed point": {"ift": True, "f_solver": "fixed_point_iter", "b_solver": "fixed_point_iter"},
    "torchdeq, ift, anderson": {"ift": True, "f_solver": "anderson", "b_solver": "anderson"},
    "torchdeq, ift, broyden": {"ift": True, "f_solver": "broyden", "b_solver": "broyden"},
    "torchdeq, ift, fixed point, 1e-7, 300": {
        "ift": True, "f_solver": "fixed_point_iter", "b_solver": "fixed_point_iter", "f_tol": 1e-7, "b_tol": 1e-7, "f_max_iter": 300, "b_max_iter": 300,
    },
}  # fmt: skip
UNROLLED = (10, 30, 100, 300)


class Weighted(nn.Module):
    """tanh(z Wᵀ + u), ‖W‖ = `norm`."""

    def __init__(self, norm: float):
        super().__init__()
        drawn = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
        self.weight = nn.Parameter(drawn * (norm / torch.linalg.matrix_norm(drawn, 2)))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.T + u)


def drawn(seed: int) -> Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(seed))


def exact(cell: Weighted, u: Tensor, bar: Tensor) -> Tensor:
    """The gradient of W in float64: Newton for z, a dense solve for its adjoint."""
    w, u, bar = cell.weight.detach().double(), u.double(), bar.double()
    z = torch.zeros_like(u)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    for _ in range(2000):
        z = torch.tanh(z @ w.T + u)
    for _ in range(20):
        jacobian = (1 - torch.tanh(z @ w.T + u) ** 2).unsqueeze(-1) * w
        z = z + torch.linalg.solve(eye - jacobian, (torch.tanh(z @ w.T + u) - z).unsqueeze(-1)).squeeze(-1)
    slope = 1 - z**2
    adjoint = torch.linalg.solve((eye - slope.unsqueeze(-1) * w).transpose(-1, -2), bar.unsqueeze(-1)).squeeze(-1)
    return (adjoint * slope).T @ z


Layer = Callable[[Tensor], Tensor]


def unrolled(cell: Weighted, steps: int) -> Layer:
    def layer(u: Tensor) -> Tensor:
        z = torch.zeros_like(u)
        for _ in range(steps):
            z = cell(z, u)
        return z

    return layer


def torchdeq_layer(cell: Weighted, settings: dict[str, Any]) -> Layer:
    deq = import_module("torchdeq").get_deq(**settings)
    return lambda u: deq(lambda z: cell(z, u), torch.zeros_like(u))[0][-1]


def gradient(layer: Layer, cell: Weighted, u: Tensor, bar: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        return torch.autograd.grad((layer(u) * bar).sum(), cell.weight)[0]


def saved(layer: Layer, u: Tensor, cell: Weighted) -> int:
    with warnings.catch_warnings(), saved_bytes([u, cell.weight]) as meter:
        warnings.simplefilter("ignore", NotConvergedWarning)
        layer(u)
    return meter.peak


def peer() -> str | None:
    """torchdeq's version, or None where it is not installed."""
    try:
        import_module("torchdeq")
        return version("torchdeq")
    except Exception as error:  # a peer may fail to import in any way
        print(f"torchdeq skipped: {error}", flush=True)
        return None


def compared(norm: float, repeats: int, installed: bool) -> list[dict[str, Any]]:
    """A row for every contender at ‖W‖ = `norm`."""
    cell, u, bar = Weighted(norm), drawn(2), drawn(3)
    wanted = exact(cell, u, bar)
    layers: dict[str, Layer] = {name: DEQ(cell, **settings) for name, settings in OURS.items()}
    layers |= {f"unrolled {steps}": unrolled(cell, steps) for steps in UNROLLED}
    layers |= {name: torchdeq_layer(cell, settings) for name, settings in THEIRS.items()} if installed else {}
    rows = {}
    for name, layer in layers.items():
        found = gradient(layer, cell, u, bar)
        rows[name] = {"norm": norm, "case": name, "error": float((found.double() - wanted).norm() / wanted.norm()), "saved_bytes": saved(layer, u, cell)}
        if isinstance(layer, DEQ) and layer.info is not None:
            gradient(layer, cell, u, bar)
            assert layer.info.iterations is not None
            assert layer.info.adjoint is not None
            rows[name] |= {"iterations": int(layer.info.iterations.max()), "products": layer.info.adjoint.products}
    times = interleaved({name: partial(gradient, layer, cell, u, bar) for name, layer in layers.items()}, repeats)
    for name, row in rows.items():
        row |= {"least_ms": 1e3 * min(times[name]), "median_ms": 1e3 * statistics.median(times[name])}
        products = f"{row.get('products', '-'):>4} products" if "products" in row else " " * 13
        figures = f"error {row['error']:.1e}  {products}  {row['saved_bytes'] / 1e6:6.2f} MB  {row['least_ms']:6.2f} ms ({row['median_ms']:.2f})"
        print(f"‖W‖ = {norm}  {name:42} {figures}", flush=True)
    return list(rows.values())


def flatness() -> dict[str, int]:
    """Saved bytes of a solve of exactly 10 and exactly 1,000 iterations."""
    found = {}
    for steps in (10, 1000):
        cell = Weighted(0.9)
        found[str(steps)] = saved(DEQ(cell, solver="iteration", tol=1e-30, max_steps=steps), drawn(2), cell)
    print(f"saved bytes at 10 iterations {found['10']}, at 1,000 {found['1000']}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--short", action="store_true", help="one norm, three repeats")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    installed = peer()
    rows = []
    for norm in NORMS[1:2] if arguments.short else NORMS:
        rows += compared(norm, 3 if arguments.short else arguments.repeats, installed is not None)
    asked = {"error": 1e-6, "products": 40, "saved bytes, 1,000 over 10 iterations": 1.01, "time over torchdeq's, at a tenth of its error": 1.0}
    record(
        arguments.out,
        {"batch": BATCH, "width": WIDTH, "torchdeq": installed or "not installed", "asked": asked, "saved_bytes_by_iterations": flatness(), "rows": rows},
    )


if __name__ == "__main__":
    main()
