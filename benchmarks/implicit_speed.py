"""Time of one hypergradient of ridge regression, altgrad beside TorchOpt and plain torch. One thread, one process, contenders taking turns.

    python benchmarks/implicit_speed.py --out benchmarks/records/implicit_speed.json

w = argmin ‖X w − y‖² / 2 + λ ‖w‖² / 2, X [4 p, p] in float64; the CPU time of d⟨c, w⟩ / dλ, forward solution included: the median of `repeats` turns, and its
ratio to TorchOpt's CG and to torch.linalg.solve under autograd. Every row solves forward by torch.linalg.solve on XᵀX + λ except "factor reused" (by its
Cholesky factor, which the solver hands over for the adjoint), "root" (Newton, whose factors the adjoint uses again), "ridge" (the ready problem) and "Cholesky
by hand", which is what the arithmetic alone costs. Iterative adjoints run matrix-free to
the relative tolerance `tol` in both packages. TorchOpt is in the extra `peers`; without it the record says so.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from implicit_peers import installed, missing
from recording import record
from torch import Tensor

from altgrad.implicit import Solved, custom_root, ridge, root

STRENGTH = 3.0


def contenders(size: int, tol: float, *, torchopt: bool) -> dict[str, Callable[[], Tensor]]:
    drawn = torch.Generator().manual_seed(0)  # a generator of this problem's own
    x, y, c = (torch.randn(*shape, generator=drawn, dtype=torch.float64) for shape in ((4 * size, size), (4 * size,), (size,)))
    eye, start = torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)

    def slope(w: Tensor, strength: Tensor) -> Tensor:
        return x.T @ (x @ w - y) + strength * w

    def exact(start: Tensor, strength: Tensor) -> Tensor:
        return torch.linalg.solve(x.T @ x + strength * eye, x.T @ y)

    def timed(solution: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def gradient() -> Tensor:
            strength = torch.full((), STRENGTH, dtype=torch.float64, requires_grad=True)
            (solution(strength) @ c).backward()
            assert strength.grad is not None
            return strength.grad

        return gradient

    def by_hand() -> Tensor:
        gram = x.T @ x
        factor = torch.linalg.cholesky(gram + STRENGTH * eye)
        w, u = torch.cholesky_solve(torch.stack([x.T @ y, c], 1), factor).unbind(1)
        return -(u @ w)

    def factored(slope: Callable[..., Tensor], start: Tensor, strength: Tensor) -> Solved:
        factor = torch.linalg.cholesky(x.T @ x + strength * eye)
        return Solved(torch.cholesky_solve((x.T @ y).unsqueeze(1), factor).squeeze(1), cholesky=factor)

    found = {
        "altgrad cg": timed(lambda strength: custom_root(slope, adjoint="cg", adjoint_tol=tol)(exact)(start, strength)),
        "altgrad lu": timed(lambda strength: custom_root(slope, adjoint="lu")(exact)(start, strength)),
        "altgrad factor reused": timed(lambda strength: root(slope, start, strength, solver=factored)),
        "altgrad root": timed(lambda strength: root(slope, start, strength)),
        "altgrad ridge": timed(lambda strength: ridge(x, y, strength)),
        "torch.linalg.solve": timed(lambda strength: exact(start, strength)),
        "Cholesky by hand": by_hand,
    }
    if torchopt:
        import torchopt as package

        for name in ("cg", "normal_cg"):
            solver = getattr(package.linear_solve, f"solve_{name}")(rtol=tol, atol=0.0)
            found[f"TorchOpt {name}"] = timed(
                lambda strength, solver=solver: package.diff.implicit.custom_root(slope, argnums=1, solve=solver)(exact)(start, strength)
            )
    return found


def measured(size: int, tol: float, repeats: int, *, torchopt: bool) -> dict[str, dict[str, Any]]:
    turns = contenders(size, tol, torchopt=torchopt)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    values = {name: float(turn()) for name, turn in turns.items()}
    for _ in range(repeats):
        for name, turn in turns.items():
            turn()  # finds the caches as the one before left them
            began = time.process_time()
            turn()
            seconds[name].append(time.process_time() - began)
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    rows = {}
    for name, value in values.items():
        ratios = {f"of {other}": middle[name] / middle[other] for other in ("TorchOpt cg", "torch.linalg.solve") if other in middle}
        error = abs(value / values["Cholesky by hand"] - 1)
        rows[name] = {"milliseconds": 1e3 * middle[name], "least": 1e3 * min(seconds[name]), **ratios, "error": error}
        shown = "  ".join(f"{ratio:6.2f} {key}" for key, ratio in ratios.items())
        print(f"p {size:4}  {name:20} {1e3 * middle[name]:8.3f} ms  {shown}  error {error:.0e}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--tol", type=float, default=1e-6)
    parser.add_argument("--short", action="store_true", help="p = 50 only, 20 turns")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peers = installed()
    sizes, repeats = ((50,), 20) if arguments.short else ((50, 500), arguments.repeats)
    rows = {str(size): measured(size, arguments.tol, max(repeats // (1 if size < 100 else 10), 5), torchopt=not missing(peers, "torchopt")) for size in sizes}
    asked = {
        "p = 50: altgrad cg of TorchOpt cg": 0.5,
        "p = 50: altgrad factor reused of TorchOpt cg": 0.125,
        "p = 500: altgrad ridge of torch.linalg.solve": 1.1,
    }
    record(arguments.out, {"tol": arguments.tol, "repeats": repeats, "peers": peers, "asked": asked, "sizes": rows})


if __name__ == "__main__":
    main()
