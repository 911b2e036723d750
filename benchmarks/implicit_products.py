"""Products with Aᵀ that a gradient through a fixed point takes, beside scipy's Krylov solvers and the fixed-point solvers in their place.

    python benchmarks/implicit_products.py --out benchmarks/records/implicit_products.json

z = W z + b with W symmetric or random of spectral radius 0.9, 0.99, 0.999; the adjoint system (1 − Wᵀ) u = z̄ to a relative residual of `tol`, float64.
altgrad's figures are `info.adjoint.products` of fixed_point; one product more than the iterations is the check of the residual. scipy's are the calls of its
operator. "Broyden" and "Anderson" solve u = Wᵀ u + z̄ as a fixed point, as equilibrium layers commonly do, and count its evaluations.
"""

import argparse
from typing import Any

import torch
from recording import record
from torch import Tensor

from altgrad.fixed_point import Anderson, Broyden, Goal, Method
from altgrad.implicit import fixed_point

RADII = (0.9, 0.99, 0.999)


def weights(size: int, radius: float, *, symmetric: bool) -> Tensor:
    whole = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # a generator of this system's own
    if symmetric:
        basis = torch.linalg.qr(whole)[0]
        return basis @ torch.diag(torch.linspace(-radius, radius, size, dtype=torch.float64)) @ basis.T
    return whole * radius / torch.linalg.eigvals(whole).abs().max()


def ours(w: Tensor, bar: Tensor, adjoint: str, tol: float) -> dict[str, Any]:
    b = torch.ones_like(bar).requires_grad_()
    z, info = fixed_point(lambda z, b: w @ z + b, torch.zeros_like(bar), b, solver="newton", adjoint=adjoint, adjoint_tol=tol, info=True)
    (u,) = torch.autograd.grad(z, b, bar)
    return {"products": info.adjoint.products, "residual": float((bar - u + w.T @ u).norm() / bar.norm()), "converged": bool(info.adjoint.converged)}


def scipys(w: Tensor, bar: Tensor, solver: str, tol: float) -> dict[str, Any]:
    from scipy.sparse import linalg

    used: list[int] = []
    matrix = (torch.eye(len(bar), dtype=bar.dtype) - w.T).numpy()
    operator = linalg.LinearOperator(matrix.shape, matvec=lambda v: used.append(1) or matrix @ v, dtype=float)
    u, failed = getattr(linalg, solver)(operator, bar.numpy(), rtol=tol, **({"restart": 200} if solver == "gmres" else {}))
    return {"products": len(used), "residual": float((bar - torch.from_numpy(matrix @ u)).norm() / bar.norm()), "converged": not failed}


def as_fixed_point(w: Tensor, bar: Tensor, method: Method, tol: float, limit: int) -> dict[str, Any]:
    used: list[int] = []
    u, outcome = method.solve(lambda u: used.append(1) or w.T @ u + bar - u, torch.zeros_like(bar), Goal(tol, limit, False))
    return {"products": len(used), "residual": float((bar - u + w.T @ u).norm() / bar.norm()), "converged": bool(outcome.converged)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--tol", type=float, default=1e-6)
    parser.add_argument("--limit", type=int, default=400, help="evaluations that Broyden and Anderson may use")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size, tol, rows, worst, most = arguments.size, arguments.tol, [], 0.0, 0
    for symmetric in (True, False):
        for radius in RADII:
            w = weights(size, radius, symmetric=symmetric)
            bar = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            found: dict[str, dict[str, Any]] = {}
            for solver in ("gmres", "cg", "bicgstab") if symmetric else ("gmres", "bicgstab"):
                found[f"altgrad {solver}"], found[f"scipy {solver}"] = ours(w, bar, solver, tol), scipys(w, bar, solver, tol)
                if solver != "bicgstab":
                    worst = max(worst, found[f"altgrad {solver}"]["products"] / found[f"scipy {solver}"]["products"])
            most = max(most, found["altgrad gmres"]["products"] if radius == 0.999 else 0)
            for name, method in (("Broyden", Broyden(memory=arguments.limit)), ("Anderson", Anderson())):
                found[name] = as_fixed_point(w, bar, method, tol, arguments.limit)
            kind = "symmetric" if symmetric else "random"
            rows.append({"weights": kind, "radius": radius, "solvers": found})
            shown = "  ".join(f"{name} {row['products']}{'' if row['converged'] else ' (not converged)'}" for name, row in found.items())
            print(f"{kind:9} {radius:5}  {shown}", flush=True)
    figures = {"largest ratio to scipy's GMRES and CG": worst, "most products of GMRES at radius 0.999": most}
    print(figures)
    asked = {"largest ratio to scipy's GMRES and CG": 1.1, "most products of GMRES at radius 0.999": 160}
    record(arguments.out, {"size": size, "tol": tol, "asked": asked, "figures": figures, "rows": rows})


if __name__ == "__main__":
    main()
