"""An equation F(x, θ) = 0 with everything needed to solve and to differentiate it, and what it becomes under vmap."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from altgrad.fixed_point import Goal, Method, Outcome, norm
from altgrad.implicit.adjoints import Adjoint, AdjointInfo, complain, judge, solve
from altgrad.linearised import Linearised

Theta = tuple[Tensor, ...]


@dataclass
class Info:
    """How a call went: ‖F(x)‖, iterations and convergence of each example; `adjoint` when a derivative has been taken.

    Under vmap the tensors hold every example of the whole batch, in front.
    """

    residual: Tensor | None = None
    iterations: Tensor | None = None
    converged: Tensor | None = None
    adjoint: AdjointInfo | None = None


class Informed:
    """A solver that looks at θ rather than at F: every θ has x's batch axes in front, those of vmap included."""

    def solve(self, theta: Theta, goal: Goal) -> tuple[Tensor, Outcome]:
        """x and how it went."""
        raise NotImplementedError


@dataclass(frozen=True)
class Equation:
    """F(x, θ) = 0 for x [*batch, n], block diagonal over the batch.

    Args:
        function: (x, θ) -> F, of x's shape.
        solver: a method, one that looks at θ, or (x₀, θ) -> x of one example.
        goal: when the solver stops.
        adjoint: how linear systems with dF/dx are solved.
        adjoint_tol, adjoint_steps: their relative residual, and iterations at most (None: 10 n + 100).
        strict: raise rather than warn.
        info: filled in as things happen.
        columns: more axes in front of the vectors in linear systems, not of x.
        factors: LU or Cholesky factors of dF/dx at the solution.
        offspring: the equations of this one under vmap, so that they share factors.
    """

    function: Callable[[Tensor, Theta], Tensor]
    solver: Method | Informed | Callable[[Tensor, Theta], Tensor]
    goal: Goal
    adjoint: Adjoint
    adjoint_tol: float
    adjoint_steps: int | None
    strict: bool
    info: Info
    columns: int = 0
    factors: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    offspring: dict[Any, "Equation"] = field(default_factory=dict)

    def batched(self, size: int, dims: Sequence[int | None]) -> "Equation":
        """The equation of `size` examples at once: x has a new first axis, and so have the θ whose dim is 0."""
        key = (size, tuple(dims))
        if key not in self.offspring:
            mapped = torch.func.vmap(self.function, in_dims=(0, tuple(dims)))
            solver = self.solver if isinstance(self.solver, Method | Informed) else each(self.solver, dims)
            self.offspring[key] = replace(self, function=mapped, solver=solver, factors={}, offspring={})
        return replace(self.offspring[key], columns=self.columns)

    def with_columns(self) -> "Equation":
        """The same equation, whose linear systems have one more axis of right-hand sides in front."""
        return replace(self, columns=self.columns + 1)

    def solved(self, x: Tensor, theta: Theta) -> Tensor:
        """The solution from the guess x; fills in `info`, keeps factors, warns or raises where it did not converge."""
        theta = tuple(tensor.detach() for tensor in theta)
        residual = lambda x: self.function(x, theta)  # noqa: E731
        if isinstance(self.solver, Method):
            found, outcome = self.solver.solve(residual, x.detach(), self.goal)
        elif isinstance(self.solver, Informed):
            found, outcome = self.solver.solve(theta, self.goal)
        else:
            with torch.enable_grad():
                found = self.solver(x.detach(), theta).detach()
            start, end = norm(residual(x.detach())), norm(residual(found))
            outcome = Outcome(end.squeeze(-1), torch.zeros_like(end.squeeze(-1), dtype=torch.int64), (end <= self.goal.target(found, start)).squeeze(-1))
        if outcome.factor is not None:
            self.factors["lu"] = outcome.factor
        self.info.residual, self.info.iterations, self.info.converged = outcome.residual, outcome.iterations, outcome.converged
        if not bool(outcome.converged.all()):
            worst = float(outcome.residual.nan_to_num(nan=torch.inf).max())
            name = type(self.solver).__name__ if isinstance(self.solver, Method | Informed) else "the solver given"
            complain(
                f"{name} did not converge for {int((~outcome.converged).sum())} of {outcome.converged.numel()} examples: residual {worst:.1e} after "
                f"{int(outcome.iterations.max())} iterations, tol {self.goal.tol:.1e}. x solves nothing there and its derivative means little; raise "
                "max_steps or tol, damp the step, start nearer, or try another solver.",
                strict=self.strict,
            )
        return found

    def inverse(self, b: Tensor, x: Tensor, theta: Theta, *, transpose: bool) -> Tensor:
        """y with A y = b, or Aᵀ y = b, A = dF/dx at x; fills in `info.adjoint`, warns or raises where it did not converge."""
        tangent = self.tangent(x, theta)
        steps = 10 * x.shape[-1] + 100 if self.adjoint_steps is None else self.adjoint_steps
        y, info = solve(self.adjoint.name, tangent, b, transpose=transpose, tol=self.adjoint_tol, max_steps=steps, cache=self.factors)
        self.info.adjoint = info
        judge(info, tangent, self.adjoint_tol, strict=self.strict)
        return y

    def tangent(self, x: Tensor, theta: Theta) -> Linearised:
        """dF/dx at x, as products."""
        return Linearised(lambda x: self.function(x, theta), x, columns=self.columns)


def each(solver: Callable[[Tensor, Theta], Tensor], dims: Sequence[int | None]) -> Callable[[Tensor, Theta], Tensor]:
    """A solver of one example, run on one after another: it may branch on values, which vmap cannot follow."""

    def loop(x: Tensor, theta: Theta) -> Tensor:
        found = [solver(one, tuple(t if dim is None else t[index] for t, dim in zip(theta, dims, strict=True))) for index, one in enumerate(x)]
        return torch.stack(found)

    return loop
