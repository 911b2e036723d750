"""An equation F(x, θ) = 0 with everything needed to solve and to differentiate it, and what it becomes under vmap."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad.errors import ShapeError, require
from altgrad.fixed_point import Goal, Method, Outcome, norm
from altgrad.implicit.adjoints import Adjoint, AdjointInfo, complain, judge, solve
from altgrad.linearised import Linearised, swept, taped

Theta = tuple[Tensor, ...]


def filled(theta: Theta, which: Sequence[int], values: Sequence[Tensor]) -> Theta:
    """θ with `values` at `which`."""
    full = list(theta)
    for index, value in zip(which, values, strict=True):
        full[index] = value
    return tuple(full)


@dataclass
class Info:
    """How a call went: ‖F(x)‖, iterations and convergence of each example; `adjoint` when a derivative has been taken.

    Under vmap the tensors hold every example of the whole batch, in front.
    """

    residual: Tensor | None = None
    iterations: Tensor | None = None
    converged: Tensor | None = None
    adjoint: AdjointInfo | None = None


class Solved(NamedTuple):
    """What a solver of your own may return in place of x: also factors of A = dF/dx there (of 1 − df/dx for a fixed point), with which `lu`, `cholesky` and
    `auto` solve the adjoint's system. They are checked by its true residual, and A is factored anew where they do not do.

    Args:
        x: as the unknown is.
        lu: (LU, pivots) of torch.linalg.lu_factor, [*batch, n, n] and [*batch, n].
        cholesky: the lower factor, [*batch, n, n], of a positive definite A.
    """

    x: Any
    lu: tuple[Tensor, Tensor] | None = None
    cholesky: Tensor | None = None

    def factors(self, shape: torch.Size, dtype: torch.dtype, *, fixed: bool) -> tuple[str, tuple[Tensor, ...]]:
        """(the dense adjoint they are for, its factors of ±A, as dF/dx = −A of a fixed point has it) for an unknown of `shape` [*batch, n].

        Errors: ShapeError, SettingError.
        """
        require((self.lu is None) != (self.cholesky is None), "Solved(...)", "both or neither of lu and cholesky", "one of them")
        matrix = self.cholesky if self.lu is None else self.lu[0]
        if not isinstance(matrix, Tensor) or matrix.shape != (*shape, shape[-1]):
            seen = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ShapeError(f"the solver returned factors of {seen}; for an unknown of {tuple(shape)} they must be {(*shape, shape[-1])}.")
        if matrix.dtype != dtype:
            raise ShapeError(f"the solver returned factors of {matrix.dtype} for an unknown of {dtype}; they must have its dtype.")
        matrix = matrix.detach()
        sign = matrix.new_full((1, 1), -1.0 if fixed else 1.0)
        none = matrix.new_zeros(())  # no norm of A: the residual alone says whether they do
        return ("cholesky", (matrix, sign, none)) if self.lu is None else ("lu", (matrix - 2 * matrix.triu() if fixed else matrix, self.lu[1], none))


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
        solver: a method, one that looks at θ, or (x₀, θ) -> x, or (x, adjoint, its factors), of one example.
        goal: when the solver stops.
        adjoint: how linear systems with dF/dx are solved.
        adjoint_tol, adjoint_steps: their relative residual, and iterations at most (None: 10 n + 100).
        strict: raise rather than warn.
        info: filled in as things happen.
        first: F at the guess, where it is known.
        columns: more axes in front of the vectors in linear systems, not of x.
        factors: LU or Cholesky factors of dF/dx at the solution.
        offspring: the equations of this one under vmap, so that they share factors.
    """

    function: Callable[[Tensor, Theta], Tensor]
    solver: Method | Informed | Callable[[Tensor, Theta], Any]
    goal: Goal
    adjoint: Adjoint
    adjoint_tol: float
    adjoint_steps: int | None
    strict: bool
    info: Info
    first: Tensor | None = None
    columns: int = 0
    factors: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    offspring: dict[Any, "Equation"] = field(default_factory=dict)

    def batched(self, size: int, dims: Sequence[int | None]) -> "Equation":
        """The equation of `size` examples at once: x has a new first axis, and so have the θ whose dim is 0."""
        key = (size, tuple(dims))
        if key not in self.offspring:
            mapped = torch.func.vmap(self.function, in_dims=(0, tuple(dims)))
            solver = self.solver if isinstance(self.solver, Method | Informed) else each(self.solver, dims)
            self.offspring[key] = replace(self, function=mapped, solver=solver, first=None, factors={}, offspring={})
        return replace(self.offspring[key], columns=self.columns)

    def with_columns(self) -> "Equation":
        """The same equation, whose linear systems have one more axis of right-hand sides in front."""
        return replace(self, columns=self.columns + 1)

    def solved(self, x: Tensor, theta: Theta) -> Tensor:
        """The solution from the guess x; fills in `info`, keeps factors, warns or raises where it did not converge."""
        theta = tuple(tensor.detach() for tensor in theta)
        residual = lambda x: self.function(x, theta)  # noqa: E731
        if isinstance(self.solver, Method):
            found, outcome = self.solver.solve(residual, x.detach(), self.goal, self.first)
        elif isinstance(self.solver, Informed):
            found, outcome = self.solver.solve(theta, self.goal)
        else:
            with torch.enable_grad():
                found = self.solver(x.detach(), theta)
            if isinstance(found, tuple):
                found, name, self.factors[name] = found
            found = found.detach()
            start, end = norm(residual(x.detach()) if self.first is None else self.first), norm(residual(found))
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
        return self.solved_linear(self.tangent(x, theta), b, transpose=transpose)

    def solved_linear(self, tangent: Linearised, b: Tensor, *, transpose: bool) -> Tensor:
        """`inverse` of an A in hand."""
        x = tangent.point
        steps = 10 * x.shape[-1] + 100 if self.adjoint_steps is None else self.adjoint_steps
        y, info = solve(self.adjoint.name, tangent, b, transpose=transpose, tol=self.adjoint_tol, max_steps=steps, cache=self.factors)
        self.info.adjoint = info
        judge(info, tangent, self.adjoint_tol, strict=self.strict)
        return y

    def pulled(self, bar: Tensor, x: Tensor, theta: Theta, which: list[int]) -> tuple[Tensor, ...]:
        """−(dF/dθ)ᵀ A⁻ᵀ x̄ for the θ at `which`, all from one evaluation of F; for a result that is not differentiated again."""
        tape = taped(lambda x, *values: self.function(x, filled(theta, which, values)), x, *(theta[index] for index in which))
        u = self.solved_linear(Linearised(lambda x: self.function(x, theta), x, tape=tape), bar, transpose=True)
        return swept(tape[1], tape[0][1:], -u)

    def tangent(self, x: Tensor, theta: Theta) -> Linearised:
        """dF/dx at x, as products."""
        return Linearised(lambda x: self.function(x, theta), x, columns=self.columns)


def each(solver: Callable[[Tensor, Theta], Any], dims: Sequence[int | None]) -> Callable[[Tensor, Theta], Any]:
    """A solver of one example, run on one after another: it may branch on values, which vmap cannot follow."""

    def loop(x: Tensor, theta: Theta) -> Any:
        found = [solver(one, tuple(t if dim is None else t[index] for t, dim in zip(theta, dims, strict=True))) for index, one in enumerate(x)]
        if isinstance(found[0], tuple):
            solutions, names, factors = zip(*found, strict=True)
            return torch.stack(solutions), names[0], tuple(torch.stack(part) for part in zip(*factors, strict=True))
        return torch.stack(found)

    return loop
