"""Quadratic programmes as a layer: solved in a batch, differentiable in every matrix and vector, to any order."""

from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.errors import ShapeError
from altgrad.fixed_point import Goal
from altgrad.implicit.adjoints import Adjoint
from altgrad.implicit.calls import DEFAULT_TOL, differentiable
from altgrad.implicit.equation import Equation, Info, Theta
from altgrad.implicit.interior_point import InteriorPoint, Programme


class Optimum(NamedTuple):
    """The minimum x [*batch, n] and the multipliers of the equalities [*batch, m] and inequalities [*batch, k]."""

    x: Tensor
    equality: Tensor
    inequality: Tensor


def qp(
    P: Tensor,
    q: Tensor,
    *,
    equality: tuple[Tensor, Tensor] | None = None,
    inequality: tuple[Tensor, Tensor] | None = None,
    tol: float | None = None,
    max_steps: int = 50,
    strict: bool = False,
) -> Optimum:
    """argmin_x xᵀP x / 2 + qᵀx subject to A x = b and G x ≤ h, with its multipliers.

    Solved by an interior point method; differentiated by the implicit function theorem on the conditions of optimality, whose factors are those of the last
    step. At a solution where some inequality is tight and its multiplier zero there is a kink: the derivative raises SingularError.

    Args:
        P: [*batch, n, n], positive semidefinite; its symmetric part counts.
        q: [*batch, n].
        equality: (A [*batch, m, n], b [*batch, m]), the rows of A independent; None: none.
        inequality: (G [*batch, k, n], h [*batch, k]); None: none. All batch shapes are broadcast.
        tol: every violation of optimality, relative to the data; 1e-10 in float64, 1e-6 in float32.
        max_steps: of the interior point method, 1 or more.
        strict: raise NotConvergedError in place of a warning.

    Errors: ShapeError; NumericsError where P is not positive semidefinite; InfeasibleError; SingularError.

    Source: Amos and Kolter, arXiv 1703.00443.
    """
    theta, lead = aligned(P, q, equality, inequality)
    size = sum(theta[index].shape[-1] for index in (1, 3, 5))
    equation = Equation(
        function=lambda z, theta: Programme(*theta).conditions(z),
        solver=InteriorPoint(),
        goal=Goal(DEFAULT_TOL[q.dtype] if tol is None else tol, max_steps, False),
        adjoint=Adjoint("lu"),
        adjoint_tol=DEFAULT_TOL[q.dtype],
        adjoint_steps=None,
        strict=strict,
        info=Info(),
    )
    z = differentiable(equation, q.new_zeros(*lead, size), theta)
    return Optimum(*z.split([theta[index].shape[-1] for index in (1, 3, 5)], -1))


def aligned(P: Tensor, q: Tensor, equality: tuple[Tensor, Tensor] | None, inequality: tuple[Tensor, Tensor] | None) -> tuple[Theta, torch.Size]:
    """(P, q, A, b, G, h) of one batch shape, empty where there is nothing; every one mapped where any is, for torch.func.vmap."""
    if q.dim() < 1 or P.dim() < 2 or P.shape[-1] != P.shape[-2] or P.shape[-1] != q.shape[-1]:
        raise ShapeError(f"P is {tuple(P.shape)} and q {tuple(q.shape)}; they must be [*batch, n, n] and [*batch, n].")
    n = q.shape[-1]
    parts, seen = [P, q], {"P": P, "q": q}
    for name, letters, given in (("equality", "Ab", equality), ("inequality", "Gh", inequality)):
        matrix, right = (q.new_zeros(0, n), q.new_zeros(0)) if given is None else given
        if matrix.dim() < 2 or right.dim() < 1 or matrix.shape[-1] != n or matrix.shape[-2] != right.shape[-1]:
            raise ShapeError(
                f"{name}: {letters[0]} is {tuple(matrix.shape)} and {letters[1]} {tuple(right.shape)}; with n = {n} unknowns they must be "
                f"[*batch, rows, {n}] and [*batch, rows]."
            )
        parts += [matrix, right]
        seen.update(zip(letters, (matrix, right), strict=True))
    for name, part in seen.items():
        if part.dtype != q.dtype or q.dtype not in DEFAULT_TOL:
            raise ShapeError(f"{name} is {part.dtype} and q {q.dtype}; all must be float32, or all float64.")
    leads = [part.shape[: part.dim() - (1 if name in "qbh" else 2)] for name, part in seen.items()]
    try:
        lead = torch.broadcast_shapes(*leads)
    except RuntimeError:
        raise ShapeError(f"the batch shapes {', '.join(f'{name} {tuple(one)}' for name, one in zip(seen, leads, strict=True))} do not broadcast.") from None
    nothing = sum(part.detach().reshape(-1)[:0].sum() for part in parts)  # zero, and mapped where any part is
    return tuple(part.expand(*lead, *part.shape[len(one) :]) + nothing for part, one in zip(parts, leads, strict=True)), lead
