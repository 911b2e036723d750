"""Are implicit gradients of ill-conditioned problems right, or said not to be? Default settings, beside jaxopt and TorchOpt.

    python benchmarks/implicit_conditioning.py --out benchmarks/records/implicit_conditioning.json

A x = b, A symmetric with `size` eigenvalues from 1 down to 1 / κ in even ratios, κ = 1e2, 1e4, 1e6, in float32 and float64; the gradient of a random linear
function of x in b, relative to float64 elimination. A run is silently wrong where its error is above 10 % and no warning was given, by any means that
Python has. Beside the defaults, every exact adjoint of altgrad. A peer that cannot be imported is named in the record and skipped.
"""

import argparse
import math
import warnings
from typing import Any

import torch
from implicit_peers import Gradient, installed, jaxopts, missing, ours, torchopts
from recording import record
from torch import Tensor

KAPPAS, WRONG = (1e2, 1e4, 1e6), 0.1


def system(size: int, kappa: float) -> tuple[Tensor, Tensor, Tensor]:
    """(A, b, x̄) in float64."""
    drawn = torch.Generator().manual_seed(0)  # a generator of this system's own
    whole, b, bar = (torch.randn(*shape, generator=drawn, dtype=torch.float64) for shape in ((size, size), (size,), (size,)))
    basis = torch.linalg.qr(whole)[0]
    matrix = basis @ torch.diag(torch.logspace(0, -math.log10(kappa), size, dtype=torch.float64)) @ basis.T
    return (matrix + matrix.T) / 2, b, bar


def run(gradient: Gradient, size: int, kappa: float, kind: torch.dtype) -> dict[str, Any]:
    matrix, b, bar = system(size, kappa)
    exact = torch.linalg.solve(matrix, bar)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = gradient(matrix.to(kind), b.to(kind), bar.to(kind)).double()
    told = [str(warning.message)[:120] for warning in said if not issubclass(warning.category, DeprecationWarning | FutureWarning)]
    error = float((found - exact).norm() / exact.norm())
    return {"kappa": kappa, "dtype": str(kind), "error": error, "warned": told[:1], "silently_wrong": not told and not error <= WRONG}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--size", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peers = installed()
    contenders = {"altgrad (default)": ours(), **{f"altgrad {name}": ours(name) for name in ("cholesky", "cg", "gmres", "bicgstab", "normal-cg")}}
    if not missing(peers, "torchopt"):
        contenders |= {"TorchOpt (default)": torchopts(), "TorchOpt cg": torchopts("cg")}
    if not missing(peers, "jaxopt"):
        contenders |= {"jaxopt (default)": jaxopts(), **{f"jaxopt {name}": jaxopts(name) for name in ("cg", "gmres", "bicgstab")}}
    rows, wrong = [], {}
    for name, gradient in contenders.items():
        runs = [{"contender": name, **run(gradient, arguments.size, kappa, kind)} for kind in (torch.float32, torch.float64) for kappa in KAPPAS]
        wrong[name] = sum(row["silently_wrong"] for row in runs)
        rows += runs
        shown = "  ".join(f"{row['error']:.1e}{'!' if row['warned'] else ' '}" for row in runs)
        print(f"{name:22} silently wrong {wrong[name]} of {len(runs)}   {shown}", flush=True)
    record(arguments.out, {"size": arguments.size, "peers": peers, "asked": {"altgrad (default)": 0}, "silently_wrong": wrong, "rows": rows})


if __name__ == "__main__":
    main()
