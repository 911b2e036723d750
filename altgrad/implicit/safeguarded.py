"""Newton's method on a (proximal) gradient step, falling back on the accelerated step itself: what the ready problems are solved with."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from altgrad.errors import require
from altgrad.fixed_point import Method, Residual, norm
from altgrad.linearised import Linearised

SMALL = 1e-12  # of the largest pivot: what lies below is a flat direction, along which Newton would run away
LONGEST = 1000  # accelerated steps between two trials of Newton


@dataclass(frozen=True)
class SafeguardedNewton(Method):
    """Newton on F = f − x for f a gradient, proximal or projected gradient step of a convex problem of at most a few thousand unknowns.

    x ← x − t A⁻¹ F with the first t of 1, 1/2, 1/4, … at which ‖F‖ falls to 1 − t/4 of itself; else accelerated steps x ← f(x + momentum), which converge
    for a step of at most one over the curvature: `plain` of them, twice as many at each failure. Where f is piecewise affine (lasso, box constraints) this
    is an active-set method and ends exactly; the last factors also serve the adjoint.

    Source: Qi and Sun 1993, for Newton on functions with kinks; Beck and Teboulle 2009 and O'Donoghue and Candès 2015, for steps with momentum and restarts.
    """

    plain: int = field(default=20, metadata={"help": "accelerated steps at the first failure of Newton's, 1 or more"})
    halvings: int = field(default=3, metadata={"help": "times that Newton's step is halved, 0 or more"})

    def __post_init__(self) -> None:
        require(self.plain >= 1, "plain", self.plain, "1 or more")
        require(self.halvings >= 0, "halvings", self.halvings, "0 or more")

    def step(self, function: Residual, x: Tensor, value: Tensor, active: Tensor, state: dict[str, Any]) -> Tensor:
        matrix = Linearised(function, x).dense()
        factors, pivots, info = torch.linalg.lu_factor_ex(matrix)
        pivot = factors.diagonal(dim1=-2, dim2=-1).abs()
        usable = ((info == 0) & (pivot.amin(-1) > SMALL * pivot.amax(-1)) & factors.isfinite().all(-1).all(-1)).unsqueeze(-1)
        factors = torch.where(usable.unsqueeze(-1), factors, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))
        state["factor"] = factors, pivots, torch.linalg.matrix_norm(matrix).unsqueeze(-1)
        direction = -torch.linalg.lu_solve(factors, pivots, value.unsqueeze(-1)).squeeze(-1)
        size, found, done = norm(value), x, ~active
        for halving in range(self.halvings + 1):
            share = 0.5**halving
            candidate = x + share * direction
            better = ~done & usable & (norm(function(candidate)) <= (1 - share / 4) * size)
            found, done = torch.where(better, candidate, found), done | better
            if bool(done.all()):
                return found
        count = state["count"] = min(2 * state.get("count", self.plain // 2), LONGEST)
        return torch.where(done, found, accelerated(function, x, max(count, 1)))


def accelerated(function: Residual, x: Tensor, count: int) -> Tensor:
    """x after that many steps of f = F + x with momentum, given up where it leads uphill."""
    ahead, pace = x, torch.ones_like(x[..., :1])
    for _ in range(count):
        moved = ahead + function(ahead)
        uphill = ((ahead - moved) * (moved - x)).sum(-1, keepdim=True) > 0
        faster = torch.where(uphill, 1.0, (1 + (1 + 4 * pace * pace).sqrt()) / 2)
        ahead, x = moved + torch.where(uphill, 0.0, (pace - 1) / faster) * (moved - x), moved
        pace = faster
    return x
