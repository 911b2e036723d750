"""Derivatives by tracing steps of the solver: what approximate adjoints are, and what exact ones are checked against."""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from altgrad.errors import CapabilityError, SettingError
from altgrad.fixed_point import Iteration, Newton
from altgrad.implicit.adjoints import AdjointInfo
from altgrad.implicit.equation import Equation, Theta
from altgrad.linearised import Linearised


def step(equation: Equation, x: Tensor, theta: Theta) -> Tensor:
    """One differentiable step of the solver, damped iteration or Newton."""
    value = equation.function(x, theta)
    if isinstance(equation.solver, Iteration):
        return x + equation.solver.damping * value
    if isinstance(equation.solver, Newton):
        matrix = Linearised(lambda x: equation.function(x, theta), x).dense()
        return x - equation.solver.damping * torch.linalg.solve(matrix, value.unsqueeze(-1)).squeeze(-1)
    raise SettingError(
        f"adjoint={equation.adjoint.name!r} follows the solver's steps, which only 'iteration' and 'newton' allow; use one of them, or adjoint='auto'."
    )


def with_value(value: Tensor, traced: Tensor) -> Tensor:
    """`value`, with the derivative of `traced`."""
    return value + (traced - traced.detach())


def series(equation: Equation, x: Tensor, theta: Theta) -> Tensor:
    """x with a truncated series in place of (1 − J)⁻¹, for x = f(x), J = df/dx.

    phantom(k, τ): τ Σ_{i<k} (τ J + 1 − τ)^i        neumann(k): Σ_{i≤k} J^i, phantom(k + 1, 1)        jfb: 1, neumann(0)

    Traced as that many damped steps from x held fixed, so every transform differentiates the series itself.

    Source: Geng et al., arXiv 2111.05177 (phantom); Fung et al., arXiv 2103.12803 (Jacobian-free).
    """
    name, k, tau = equation.adjoint.name, equation.adjoint.k, equation.adjoint.tau
    moved = x
    for _ in range({"neumann": k + 1, "jfb": 1}.get(name, k)):
        moved = moved + tau * equation.function(moved, theta)
    return with_value(x, moved)


def watch(equation: Equation, x: Tensor, held: Tensor, theta: Theta) -> None:
    """Fill `info.adjoint` when a reverse pass comes through x: how far the series' u is from (1 − J)ᵀ u = x̄, at the cost of as many products again.

    Not for unroll and checkpoint, which are as exact as their steps, nor for truncated Newton, nor under torch.func transforms: there it stays None.
    """
    name, k, tau = equation.adjoint.name, equation.adjoint.k, equation.adjoint.tau
    if name == "truncated" and isinstance(equation.solver, Iteration):
        tau = equation.solver.damping
    elif name not in ("neumann", "jfb", "phantom"):
        return
    if torch._C._functorch.maybe_current_level() is not None or not x.requires_grad:
        return
    count = {"neumann": k + 1, "jfb": 1}.get(name, k)

    def measured(bar: Tensor) -> None:
        with torch.no_grad():
            tangent = equation.tangent(held.detach(), tuple(tensor.detach() for tensor in theta))
            u = term = tau * bar.detach()
            for _ in range(count - 1):
                term = term + tau * tangent.transposed(term)  # (τ J + 1 − τ)ᵀ of it, for A = J − 1
                u = u + term
            scale = torch.linalg.vector_norm(bar, dim=-1)
            off = torch.linalg.vector_norm(bar + tangent.transposed(u), dim=-1)
            relative = torch.where(scale > 0, off / torch.where(scale > 0, scale, 1.0), off)
        steps = torch.full_like(relative, count, dtype=torch.int64)
        equation.info.adjoint = AdjointInfo(name, relative, steps, relative <= equation.adjoint_tol, count)

    x.register_hook(measured)


def replayed(equation: Equation, start: Tensor, x: Tensor, theta: Theta) -> Tensor:
    """x with the derivative of the solver's own steps: all from `start` (unroll, checkpoint), or k more from x held fixed (truncated).

    The steps are as many as the slowest example took. checkpoint keeps about 2 √steps of the states and recomputes the rest.

    Errors: CapabilityError for checkpoint inside torch.func transforms; SettingError for a solver whose steps cannot be followed.
    """
    if equation.adjoint.name == "truncated":
        moved, steps = x, equation.adjoint.k
    else:
        assert equation.info.iterations is not None
        moved, steps = start, int(equation.info.iterations.max())
    if equation.adjoint.name == "checkpoint":
        if torch._C._functorch.maybe_current_level() is not None:
            raise CapabilityError("adjoint='checkpoint' recomputes in the autograd engine, which torch.func transforms do not; use adjoint='unroll' there.")
        if not isinstance(equation.solver, Iteration):
            raise SettingError(
                "adjoint='checkpoint' needs solver='iteration' (or Iteration(damping=...)): Newton's steps differentiate within. Use adjoint='unroll'."
            )
        chunk = max(1, math.isqrt(steps))

        def several(x: Tensor, count: int) -> Tensor:
            for _ in range(count):
                x = step(equation, x, theta)
            return x

        for done in range(0, steps, chunk):
            moved = checkpoint(several, moved, min(chunk, steps - done), use_reentrant=False)
    else:
        for _ in range(steps):
            moved = step(equation, moved, theta)
    return with_value(x, moved)
