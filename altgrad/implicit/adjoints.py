"""Adjoints: how the linear system of the implicit function theorem is solved, or what stands in for its solution."""

import re
import warnings
from collections.abc import Container
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from altgrad.errors import NotConvergedError, NotConvergedWarning, SettingError, SingularError, near_miss, require
from altgrad.fixed_point import factored, rounding
from altgrad.linear_solvers import Apply, LinearOutcome, bicgstab, cg, gmres, normal_cg
from altgrad.linearised import Linearised, condition

EXACT = ("auto", "lu", "cholesky", "cg", "gmres", "bicgstab", "normal-cg")
SERIES = ("neumann", "phantom", "jfb")
TRACED = ("unroll", "truncated", "checkpoint")
NAMES = ("auto", "lu", "cholesky", "cg", "gmres", "bicgstab", "normal-cg", "neumann(k)", "phantom(k,tau)", "jfb", "unroll", "truncated(k)", "checkpoint")
DENSE_SIZE = 512  # unknowns an example up to which `auto` factors
DENSE_ELEMENTS = 1 << 26  # and elements of all the matrices together: half a GiB in float64
REFINEMENTS = 5


@dataclass
class AdjointInfo:
    """The last linear solve of a derivative: relative residual, iterations, convergence of each system, products with A or Aᵀ, the solver used."""

    solver: str
    residual: Tensor
    iterations: Tensor
    converged: Tensor
    products: int


@dataclass(frozen=True)
class Adjoint:
    """A parsed `adjoint=`: its name, k (terms or steps) and tau (the damping of phantom)."""

    name: str
    k: int = 0
    tau: float = 1.0

    @property
    def exact(self) -> bool:
        return self.name in EXACT


def parse(spelling: str) -> Adjoint:
    """'gmres', 'neumann(5)', 'phantom(5, 0.5)', … as settings; SettingError says what is allowed."""
    return read(spelling if isinstance(spelling, str) else repr(spelling))


@lru_cache
def read(spelling: str) -> Adjoint:
    match = re.fullmatch(r"\s*([a-z-]+)\s*(?:\(([^()]*)\))?\s*", spelling)
    plain = [name.split("(")[0] for name in NAMES]
    if match is None or match[1] not in plain:
        raise SettingError(near_miss("adjoint", spelling, NAMES))
    name = match[1]
    words = [word.strip() for word in match[2].split(",")] if match[2] is not None else []
    wanted = {"neumann": 1, "truncated": 1, "phantom": 2}.get(name, 0)
    try:
        if len(words) != wanted:
            raise ValueError
        k = int(words[0]) if words else 0
        tau = float(words[1]) if wanted == 2 else 1.0
    except ValueError:
        raise SettingError(f"adjoint={spelling!r} is not allowed; it must read {NAMES[plain.index(name)]}, k a whole number, tau a number.") from None
    require(k >= (0 if name in ("neumann", "jfb") else 1) or wanted == 0, f"k of {name}", k, "0 or more" if name == "neumann" else "1 or more")
    require(0 < tau <= 1, f"tau of {name}", tau, "above 0, at most 1")
    return Adjoint(name, k, tau)


def chosen(name: str, point: Tensor, cache: Container[str] = ()) -> str:
    """What `auto` means at x [*batch, n]: the factors in hand, LU while the matrices are small, else GMRES."""
    size = point.shape[-1]
    if name == "auto" and ("lu" in cache or "cholesky" in cache):
        return "lu" if "lu" in cache else "cholesky"
    return name if name != "auto" else "lu" if size <= DENSE_SIZE and point.numel() * size <= DENSE_ELEMENTS else "gmres"


def solve(
    name: str, tangent: Linearised, b: Tensor, *, transpose: bool, tol: float, max_steps: int, cache: dict[str, tuple[Tensor, ...]]
) -> tuple[Tensor, AdjointInfo]:
    """y with A y = b, or Aᵀ y = b, for b [*columns, *batch, n], and how well it holds.

    Args:
        name: an exact adjoint.
        tangent: A.
        tol: relative residual.
        max_steps: iterations of each system at most.
        cache: factors kept between solves at this point; Newton's last ones may lie there: nearly those of A, so they are refined with true residuals.

    Errors: SingularError from the dense ones.
    """
    name = chosen(name, tangent.point, cache)
    apply, other = (tangent.transposed, tangent.product) if transpose else (tangent.product, tangent.transposed)
    outcome: LinearOutcome
    if name in ("lu", "cholesky"):
        y, outcome = dense(name, tangent, b, apply, tol, cache, transpose=transpose)
    elif name == "cg":
        y, outcome = cg(apply, b, tol=tol, max_steps=max_steps)
    elif name == "gmres":
        y, outcome = gmres(apply, b, tol=tol, max_steps=max_steps)
    elif name == "bicgstab":
        y, outcome = bicgstab(apply, b, tol=tol, max_steps=max_steps)
    else:
        y, outcome = normal_cg(apply, other, b, tol=tol, max_steps=max_steps)
    return y, AdjointInfo(name, outcome.residual, outcome.iterations, outcome.converged, outcome.products)


def dense(
    name: str, tangent: Linearised, b: Tensor, apply: Apply, tol: float, cache: dict[str, tuple[Tensor, ...]], *, transpose: bool
) -> tuple[Tensor, LinearOutcome]:
    """Solve with the factors of A, kept in `cache`; refine until the residual no longer shrinks; factor anew where old factors do not do.

    Converged: ‖b − A y‖ ≤ max(tol ‖b‖, 4 eps ‖A‖ ‖y‖), the second being what rounding leaves.
    """
    scale = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    products = 0
    columns = tuple(range(tangent.columns))
    tail = tuple(range(b.dim() - tangent.columns, b.dim()))
    while True:
        fresh = name not in cache
        if fresh:
            matrix = tangent.dense()
            cache[name] = cholesky(matrix) if name == "cholesky" else factored(matrix, torch.ones_like(matrix[..., 0, :1], dtype=torch.bool), "the solution")

        def inverse(v: Tensor) -> Tensor:
            right = v.movedim(columns, tail).reshape(*v.shape[tangent.columns :], -1) if columns else v.unsqueeze(-1)
            if name == "cholesky":
                factor, sign, _ = cache[name]
                found = torch.cholesky_solve(right * sign, factor)
            else:
                found = torch.linalg.lu_solve(*cache[name][:2], right, adjoint=transpose)
            return found.reshape(*v.shape[tangent.columns :], *v.shape[: tangent.columns]).movedim(tail, columns) if columns else found.squeeze(-1)

        y = inverse(b)
        remainder = b - apply(y)
        size = torch.linalg.vector_norm(remainder, dim=-1, keepdim=True)
        products += 1
        aim = torch.finfo(b.dtype).eps * 8 * scale  # a step of refinement is cheap: go for rounding, not for tol
        for _ in range(REFINEMENTS):
            if bool((size <= aim).all()):
                break
            better = y + inverse(remainder)
            rest = b - apply(better)
            norm = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
            products += 1
            shrinks = norm < size
            halved = bool((norm < 0.5 * size).any())
            y, remainder, size = torch.where(shrinks, better, y), torch.where(shrinks, rest, remainder), torch.where(shrinks, norm, size)
            if not halved:
                break
        good = size <= torch.maximum(tol * scale, rounding(cache[name][2], y))
        if fresh or bool(good.all()):
            break
        del cache[name]
    relative = (size / scale.clamp_min(torch.finfo(b.dtype).tiny)).squeeze(-1)
    return y, LinearOutcome(relative, torch.ones_like(relative, dtype=torch.int64), good.squeeze(-1), products)


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the lower factor of ±A, the sign, the norms): a fixed point's A = J − 1 is negative definite."""
    sign = matrix.diagonal(dim1=-2, dim2=-1).sum(-1).sign()[..., None, None]
    factor, info = torch.linalg.cholesky_ex(sign * matrix)
    if bool((info != 0).any()):
        raise SingularError(
            f"adjoint='cholesky' needs a definite dF/dx; {int((info != 0).sum())} of {info.numel()} systems are not (condition estimate "
            f"{condition(matrix):.1e}). Use adjoint='lu'."
        )
    return factor, sign, torch.linalg.matrix_norm(matrix).unsqueeze(-1)


def judge(info: AdjointInfo, tangent: Linearised, tol: float, *, strict: bool) -> None:
    """Warn, or raise where `strict`, when a linear solve did not converge; a small system's condition number is in the message."""
    if bool(info.converged.all()):
        return
    small = tangent.point.shape[-1] <= DENSE_SIZE and tangent.point.numel() * tangent.point.shape[-1] <= DENSE_ELEMENTS
    estimate = f", condition estimate {condition(tangent.dense()):.1e}" if small else ""
    complain(
        f"the adjoint solver {info.solver!r} did not converge for {int((~info.converged).sum())} of {info.converged.numel()} systems: relative residual "
        f"{float(info.residual.nan_to_num(nan=torch.inf).max()):.1e} after {int(info.iterations.max())} iterations, tol {tol:.1e}{estimate}. The derivative "
        "is off by up to residual × condition number; use another adjoint ('lu' for a few thousand unknowns, 'gmres' beyond), more adjoint_steps, or float64.",
        strict=strict,
    )


def complain(message: str, *, strict: bool) -> None:
    """NotConvergedError where `strict`, else NotConvergedWarning."""
    if strict:
        raise NotConvergedError(message)
    warnings.warn(message, NotConvergedWarning, stacklevel=3)
