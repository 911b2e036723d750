"""Solvers of F(x) = 0 and x = f(x) -> (x, outcome): damped iteration, Anderson, Broyden, Newton; every example of a batch stops by itself.

x is [*batch, n] and F keeps its shape; for a fixed point F = f − x. An example that has converged is frozen, so what it ends at does not depend on its batch
mates. Converged means ‖F(x)‖ ≤ tol · scale with scale = ‖F(x₀)‖ for a root and max(‖x‖, ‖F(x₀)‖) for a fixed point, whose F has the unit of x; for Newton
and Broyden also a step of at most tol ‖x‖, so that a good first guess is no handicap; for Newton also a residual that is rounding, ‖F‖ ≤ 4 eps ‖A‖ ‖x‖.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from altgrad.errors import SettingError, SingularError, near_miss, require
from altgrad.linear_solvers import gmres
from altgrad.linearised import Linearised, condition

Residual = Callable[[Tensor], Tensor]


class Outcome(NamedTuple):
    """How a solve ended, per example [*batch]: ‖F(x)‖, iterations taken, converged; and, from Newton, the last (LU, pivots, matrix norm)."""

    residual: Tensor
    iterations: Tensor
    converged: Tensor
    factor: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Goal:
    """When to stop: `tol` above 0, `max_steps` 1 or more, `fixed` for F = f − x."""

    tol: float
    max_steps: int
    fixed: bool

    def __post_init__(self) -> None:
        require(self.tol > 0, "tol", self.tol, "above 0")
        require(self.max_steps >= 1, "max_steps", self.max_steps, "1 or more")

    def target(self, x: Tensor, first: Tensor) -> Tensor:
        """The norm to reach, [*batch, 1]; `first` is ‖F(x₀)‖."""
        return self.tol * (torch.maximum(norm(x), first) if self.fixed else first)


def norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def rounding(matrix_norm: Tensor, x: Tensor) -> Tensor:
    """The residual that rounding alone leaves, 4 eps ‖A‖ ‖x‖ for ‖A‖ [*batch, 1]."""
    return 4 * torch.finfo(x.dtype).eps * matrix_norm * norm(x)


class Method:
    """A solver: `steps` advances x; this loop freezes what has converged and counts."""

    by_step: ClassVar[bool] = False  # whether a small step means a small error

    def solve(self, function: Residual, x: Tensor, goal: Goal, value: Tensor | None = None) -> tuple[Tensor, Outcome]:
        """x with F(x) = 0 from the guess x [*batch, n], and how it went; `value` is F at the guess where it is known.

        Errors: SingularError where a step needs the inverse of a singular matrix.
        """
        value = function(x) if value is None else value
        first = size = norm(value)
        active = size > goal.target(x, first)
        steps = torch.zeros_like(active, dtype=torch.int64)
        small = torch.zeros_like(active)
        target = goal.target(x, first)
        state: dict[str, Any] = {}
        for _ in range(goal.max_steps):
            if not bool(active.any()):
                break
            moved = self.step(function, x, value, active, state)
            if not bool(active.all()):
                moved = torch.where(active, moved, x)
            if self.by_step:
                small = small | (active & (norm(moved - x) <= goal.tol * norm(moved)))
            x, value = moved, function(moved)
            steps, size = steps + active, norm(value)
            target = goal.target(x, first)
            if "factor" in state:
                target = torch.maximum(target, rounding(state["factor"][2], x))
            active = active & (size > target) & ~small & size.isfinite()
        reached = ((size <= target) | small) & size.isfinite()
        return x, Outcome(size.squeeze(-1), steps.squeeze(-1), reached.squeeze(-1), state.get("factor"))

    def step(self, function: Residual, x: Tensor, value: Tensor, active: Tensor, state: dict[str, Any]) -> Tensor:
        """The next x; `value` is F(x); what the method remembers goes into `state`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Iteration(Method):
    """x ← x + damping · F(x): plain iteration of f at damping 1."""

    damping: float = field(default=1.0, metadata={"help": "share of the step taken, above 0; below 1 tames an f that overshoots"})

    def __post_init__(self) -> None:
        require(self.damping > 0, "damping", self.damping, "above 0")

    def step(self, function: Residual, x: Tensor, value: Tensor, active: Tensor, state: dict[str, Any]) -> Tensor:
        return x + self.damping * value


@dataclass(frozen=True)
class Anderson(Method):
    """Anderson acceleration, type II: the combination of the last m steps whose residuals nearly cancel.

    γ = argmin ‖F − ΔF γ‖² + ridge ‖ΔF‖² ‖γ‖²,  x ← x + mixing F − (ΔX + mixing ΔF) γ

    Source: Anderson 1965; Walker and Ni 2011.
    """

    memory: int = field(default=5, metadata={"help": "differences kept, 1 or more"})
    ridge: float = field(default=1e-12, metadata={"help": "relative to ‖ΔF‖², 0 or more; keeps near-parallel differences from blowing up"})
    mixing: float = field(default=1.0, metadata={"help": "share of the residual added, above 0"})

    def __post_init__(self) -> None:
        require(self.memory >= 1, "memory", self.memory, "1 or more")
        require(self.ridge >= 0, "ridge", self.ridge, "0 or more")
        require(self.mixing > 0, "mixing", self.mixing, "above 0")

    def step(self, function: Residual, x: Tensor, value: Tensor, active: Tensor, state: dict[str, Any]) -> Tensor:
        plain = x + self.mixing * value
        if "x" in state:
            state["moves"] = [*state["moves"], x - state["x"]][-self.memory :]
            state["changes"] = [*state["changes"], value - state["value"]][-self.memory :]
        else:
            state["moves"], state["changes"] = [], []
        state["x"], state["value"] = x, value
        if not state["moves"]:
            return plain
        moves, changes = torch.stack(state["moves"], -1), torch.stack(state["changes"], -1)  # [*batch, n, m]
        count = changes.shape[-1]
        weight = changes.square().sum((-2, -1), keepdim=True)
        rows = (self.ridge * weight).sqrt() * torch.eye(count, dtype=x.dtype, device=x.device)
        scale = torch.where(weight > 0, weight.sqrt(), 1.0)  # a frozen example has differences of zero
        stacked = torch.cat([changes / scale, rows / scale], -2)
        right = torch.cat([value / scale[..., 0], torch.zeros_like(rows[..., 0])], -1)
        gamma = torch.linalg.pinv(stacked) @ right.unsqueeze(-1)
        mixed = plain - ((moves + self.mixing * changes) @ gamma).squeeze(-1)
        return torch.where(mixed.isfinite().all(-1, keepdim=True), mixed, plain)


@dataclass(frozen=True)
class Broyden(Method):
    """Broyden's good method with limited memory: H ≈ A⁻¹ by rank-one updates, H₀ = −1 (exact for F = f − x where f is constant).

    x ← x − H F,  H ← H + (Δx − H ΔF) (Δxᵀ H) / (Δxᵀ H ΔF); the memory is emptied when full.

    Source: Broyden 1965.
    """

    memory: int = field(default=50, metadata={"help": "rank-one updates kept, 1 or more"})
    by_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.memory >= 1, "memory", self.memory, "1 or more")

    @staticmethod
    def inverse(v: Tensor, updates: list[tuple[Tensor, Tensor]]) -> Tensor:
        """H v."""
        return -v + sum((left * (right * v).sum(-1, keepdim=True) for left, right in updates), torch.zeros_like(v))

    @staticmethod
    def inverse_transposed(v: Tensor, updates: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Hᵀ v."""
        return -v + sum((right * (left * v).sum(-1, keepdim=True) for left, right in updates), torch.zeros_like(v))

    def step(self, function: Residual, x: Tensor, value: Tensor, active: Tensor, state: dict[str, Any]) -> Tensor:
        updates = state.setdefault("updates", [])
        if "x" in state:
            move, change = x - state["x"], value - state["value"]
            if len(updates) >= self.memory:
                updates.clear()
            image, row = self.inverse(change, updates), self.inverse_transposed(move, updates)
            below = (row * change).sum(-1, keepdim=True)
            usable = active & (below.abs() > torch.finfo(x.dtype).tiny)
            updates.append((torch.where(usable, (move - image) / torch.where(usable, below, 1.0), 0.0), torch.where(usable, row, 0.0)))
        state["x"], state["value"] = x, value
        return x - self.inverse(value, updates)


@dataclass(frozen=True)
class Newton(Method):
    """x ← x − damping A⁻¹ F with A = dF/dx from n products, factored; the last factors also serve the adjoint."""

    damping: float = field(default=1.0, metadata={"help": "share of the step, above 0, at most 1"})
    by_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 < self.damping <= 1, "damping", self.damping, "above 0, at most 1")

    def step(self, function: Residual, x: Tensor, value: Tensor, active: Tensor, state: dict[str, Any]) -> Tensor:
        matrix = Linearised(function, x).dense()
        factors, pivots, _ = state["factor"] = factored(matrix, active, "an iterate of Newton's method")
        return x - self.damping * torch.linalg.lu_solve(factors, pivots, value.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class NewtonKrylov(Method):
    """Newton without a matrix: A Δx = −F by GMRES, each to `inner_tol`; for n beyond a few thousand."""

    inner_tol: float = field(default=1e-3, metadata={"help": "relative residual of each linear solve, above 0, below 1"})
    restart: int = field(default=50, metadata={"help": "GMRES basis vectors, 1 or more"})
    by_step: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(0 < self.inner_tol < 1, "inner_tol", self.inner_tol, "above 0, below 1")
        require(self.restart >= 1, "restart", self.restart, "1 or more")

    def step(self, function: Residual, x: Tensor, value: Tensor, active: Tensor, state: dict[str, Any]) -> Tensor:
        tangent = Linearised(function, x)
        change, _ = gmres(tangent.product, torch.where(active, -value, 0.0), tol=self.inner_tol, max_steps=4 * self.restart, restart=self.restart)
        return x + change


def factored(matrix: Tensor, wanted: Tensor, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """LU factors, pivots and Frobenius norms [*batch, 1] of a batch of matrices [*batch, n, n].

    Errors: SingularError, with the condition estimate, where a wanted one [*batch, 1] is singular to rounding: condition number ≥ 1 / (4 eps).
    """
    factors, pivots, info = torch.linalg.lu_factor_ex(matrix)
    limit = 4 * torch.finfo(matrix.dtype).eps
    pivot = factors.diagonal(dim1=-2, dim2=-1).abs()
    suspect = (info != 0) | ~(pivot.amin(-1) > 100 * limit * pivot.amax(-1))  # also True for NaN
    suspect = suspect & wanted.squeeze(-1)
    if bool(suspect.any()):
        estimate = condition(matrix[suspect])
        if not estimate < 1 / limit:
            kind = "not finite or exactly singular" if estimate == float("inf") else "singular to rounding"
            raise SingularError(
                f"dF/dx is {kind} at {where} ({int(suspect.sum())} of {suspect.numel()} systems of size {matrix.shape[-1]}): condition estimate "
                f"{estimate:.1e}, which must stay below {1 / limit:.1e} in {matrix.dtype}. Start elsewhere, or add equations that make the solution unique "
                "(a ridge, say)."
            )
    return factors, pivots, torch.linalg.matrix_norm(matrix).unsqueeze(-1)


METHODS: dict[str, Method] = {
    "newton": Newton(),
    "newton-krylov": NewtonKrylov(),
    "broyden": Broyden(),
    "anderson": Anderson(),
    "iteration": Iteration(),
}


def method(name: "str | Method") -> Method:
    """The solver of a name, or the one given with settings of its own; SettingError for an unknown name."""
    if isinstance(name, Method):
        return name
    if name not in METHODS:
        raise SettingError(near_miss("solver", str(name), METHODS))
    return METHODS[name]
