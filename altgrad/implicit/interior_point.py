"""Quadratic programmes by a primal-dual interior point method, a batch at once, and then exactly on the active set that it found."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.errors import InfeasibleError, NumericsError, SingularError, require
from altgrad.fixed_point import Goal, Outcome
from altgrad.implicit.equation import Informed, Theta

STEP = 0.995  # share of the way to the boundary that a step may go


class Programme(NamedTuple):
    """P [*, n, n], q [*, n], A [*, m, n], b [*, m], G [*, k, n], h [*, k], all of one batch shape."""

    P: Tensor
    q: Tensor
    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor

    def parts(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x, ν, λ) of z [*, n + m + k]."""
        n, m, k = self.q.shape[-1], self.b.shape[-1], self.h.shape[-1]
        x, nu, lam = z.split([n, m, k], -1)
        return x, nu, lam

    def conditions(self, z: Tensor) -> Tensor:
        """(P x + q + Aᵀν + Gᵀλ,  A x − b,  λ ∘ (G x − h)), with the symmetric part of P, all that the objective sees."""
        x, nu, lam = self.parts(z)
        slope = (times(self.P, x) + times(self.P.mT, x)) / 2 + self.q + times(self.A.mT, nu) + times(self.G.mT, lam)
        return torch.cat([slope, times(self.A, x) - self.b, lam * (times(self.G, x) - self.h)], -1)

    def matrix(self, weight: Tensor, slack: Tensor) -> Tensor:
        """[[P, Aᵀ, Gᵀ], [A, 0, 0], [weight G, 0, −slack]]: the derivative of `conditions` at weight λ and slack h − G x."""
        n, m = self.q.shape[-1], self.b.shape[-1]
        whole = self.P.new_zeros(*self.q.shape[:-1], n + m + self.h.shape[-1], n + m + self.h.shape[-1])
        whole[..., :n, :n] = (self.P + self.P.mT) / 2
        whole[..., :n, n : n + m], whole[..., n : n + m, :n] = self.A.mT, self.A
        whole[..., :n, n + m :], whole[..., n + m :, :n] = self.G.mT, weight.unsqueeze(-1) * self.G
        whole[..., n + m :, n + m :] = torch.diag_embed(-slack)
        return whole


def times(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)


def factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    return factors, pivots


def back(factors: tuple[Tensor, Tensor], right: Tensor) -> Tensor:
    return torch.linalg.lu_solve(*factors, right.unsqueeze(-1)).squeeze(-1)


def largest(v: Tensor) -> Tensor:
    """max |v| over the last axis, 0 of nothing, [*, 1]."""
    return v.abs().amax(-1, keepdim=True) if v.shape[-1] else v.new_zeros(*v.shape[:-1], 1)


def room(v: Tensor, change: Tensor) -> Tensor:
    """The largest step t ≤ 1 with v + t change ≥ 0, [*, 1]."""
    if not v.shape[-1]:
        return v.new_ones(*v.shape[:-1], 1)
    return torch.where(change < 0, -v / torch.where(change < 0, change, -1.0), torch.inf).amin(-1, keepdim=True).clamp(max=1.0)


def definite(P: Tensor) -> None:
    """NumericsError unless every P [*, n, n] is positive semidefinite to rounding."""
    whole = (P + P.mT) / 2
    slack = 10 * torch.finfo(P.dtype).eps * P.shape[-1] * torch.linalg.matrix_norm(whole) + torch.finfo(P.dtype).tiny
    _, info = torch.linalg.cholesky_ex(whole + slack[..., None, None] * torch.eye(P.shape[-1], dtype=P.dtype, device=P.device))
    if bool((info != 0).any()):
        least = torch.linalg.eigvalsh(whole[info != 0]).amin(-1)
        raise NumericsError(
            f"P is not positive semidefinite in {int((info != 0).sum())} of {info.numel()} quadratic programmes: least eigenvalue {float(least.min()):.1e}. "
            "A non-convex programme has no unique minimum to differentiate; add a multiple of the identity, or write P as LᵀL."
        )


@dataclass(frozen=True)
class InteriorPoint(Informed):
    """Mehrotra's predictor and corrector on the conditions of optimality, then Newton once on the active set.

    min xᵀP x / 2 + qᵀx,  A x = b,  G x + s = h,  s ≥ 0, λ ≥ 0, s ∘ λ = μ → 0

    The last system, of the active set, is the derivative of the conditions at the solution up to rounding: its factors serve the adjoint.

    Source: Mehrotra 1992; Amos and Kolter, arXiv 1703.00443, for the layer.
    """

    certificate: float = field(default=1e-4, metadata={"help": "how nearly a certificate must hold to call a programme infeasible or unbounded, above 0"})

    def __post_init__(self) -> None:
        require(self.certificate > 0, "certificate", self.certificate, "above 0")

    def solve(self, theta: Theta, goal: Goal) -> tuple[Tensor, Outcome]:
        """z = (x, ν, λ) and how it went: the largest violation relative to the data, steps and convergence of each programme.

        Errors: NumericsError where P is not positive semidefinite; InfeasibleError where no point satisfies the constraints or the objective is unbounded.
        """
        definite(theta[0])
        data = Programme(*theta)
        k = data.h.shape[-1]
        ones = torch.ones_like(data.h)
        z = back(factor(data.matrix(ones, ones)), torch.cat([-data.q, data.b, data.h], -1))
        x, nu, lam = data.parts(z)
        if not k:  # equalities only: that was the solution
            return self.ended(data, z, torch.ones_like(z[..., :1], dtype=torch.int64), data.h, goal)
        s = -lam
        s, lam = (v + torch.where(v.amin(-1, keepdim=True) > 0, 0.0, 1 - v.amin(-1, keepdim=True)) for v in (s, lam))
        steps = torch.zeros_like(z[..., :1], dtype=torch.int64)
        for _ in range(goal.max_steps):
            slope, level, _ = data.parts(data.conditions(torch.cat([x, nu, lam], -1)))
            gap = times(data.G, x) + s - data.h
            mu = (s * lam).mean(-1, keepdim=True)
            active = torch.cat([self.violation(data, slope, level, gap), mu / self.scale(data, x)], -1).amax(-1, keepdim=True) > goal.tol
            active = active & slope.isfinite().all(-1, keepdim=True)
            if not bool(active.any()):
                break
            factors = factor(data.matrix(lam, s))

            def direction(product: Tensor) -> tuple[Tensor, ...]:
                """(Δx, Δν, Δλ, Δs) towards s ∘ λ = that much less than `product`."""
                change = data.parts(back(factors, torch.cat([-slope, -level, product - lam * gap], -1)))
                return *change, -gap - times(data.G, change[0])

            *_, lam_move, s_move = direction(s * lam)
            ahead = ((s + room(s, s_move) * s_move) * (lam + room(lam, lam_move) * lam_move)).mean(-1, keepdim=True)
            centre = (ahead / mu.clamp(min=torch.finfo(mu.dtype).tiny)).clamp(0.0, 1.0) ** 3
            x_move, nu_move, lam_move, s_move = direction(s * lam + s_move * lam_move - centre * mu)
            share = (STEP * torch.minimum(room(s, s_move), room(lam, lam_move))).clamp(max=1.0)
            moves = [torch.where(active & move.isfinite(), share * move, 0.0) for move in (x_move, nu_move, lam_move, s_move)]
            x, nu, lam, s = x + moves[0], nu + moves[1], lam + moves[2], s + moves[3]
            steps = steps + active
        return self.ended(data, torch.cat([x, nu, lam], -1), steps, s, goal)

    def scale(self, data: Programme, x: Tensor) -> Tensor:
        """What the objective is measured by."""
        return 1 + (x * data.q).sum(-1, keepdim=True).abs()

    def violation(self, data: Programme, slope: Tensor, level: Tensor, gap: Tensor) -> Tensor:
        """The three residuals, each relative to its own data, [*, 3]."""
        return torch.cat([largest(slope) / (1 + largest(data.q)), largest(level) / (1 + largest(data.b)), largest(gap) / (1 + largest(data.h))], -1)

    def ended(self, data: Programme, z: Tensor, steps: Tensor, s: Tensor, goal: Goal) -> tuple[Tensor, Outcome]:
        """Solve on the active set, s < λ, and keep what is the better for it."""
        x, _, lam = data.parts(z)
        before = self.error(data, z)
        bound = s < lam
        slack = (data.h - times(data.G, x)).clamp(min=0.0)
        whole = data.matrix(torch.where(bound, lam, 0.0), torch.where(bound, 0.0, torch.maximum(slack, torch.finfo(z.dtype).eps * (1 + largest(slack)))))
        factors = factor(whole)
        right = torch.cat([-data.q, data.b, torch.where(bound, lam * data.h, 0.0)], -1)
        found = back(factors, right)
        found = found + back(factors, right - times(whole, found))
        x, nu, lam = data.parts(found)
        found = torch.cat([x, nu, torch.where(bound, lam, 0.0)], -1)
        after = self.error(data, found)
        better = (after <= before) & found.isfinite().all(-1, keepdim=True)
        z, error = torch.where(better, found, z), torch.where(better, after, before)
        good = error <= goal.tol
        if not bool(good.all()):
            self.explain(data, z, good)
        kept = (*factors, torch.linalg.matrix_norm(whole).unsqueeze(-1)) if bool(better.all()) else None
        return z, Outcome(error.squeeze(-1), steps.squeeze(-1), good.squeeze(-1), kept)

    def error(self, data: Programme, z: Tensor) -> Tensor:
        """The largest of all violations of optimality, [*, 1]; NaN counts as infinite."""
        slope, level, product = data.parts(data.conditions(z))
        x, _, lam = data.parts(z)
        over = (times(data.G, x) - data.h).clamp(min=0.0)
        rest = [largest(product) / self.scale(data, x), largest(lam.clamp(max=0.0)) / (1 + largest(lam))]
        return torch.cat([self.violation(data, slope, level, over), *rest], -1).nan_to_num(nan=torch.inf).amax(-1, keepdim=True)

    def dependent(self, data: Programme, good: Tensor) -> None:
        """InfeasibleError where the equalities contradict each other, SingularError where some follow from the others."""
        chosen = data.A[~good.squeeze(-1)]
        if not chosen.shape[-2] or not bool((torch.linalg.matrix_rank(chosen) < chosen.shape[-2]).any()):
            return
        right = data.b[~good.squeeze(-1)]
        nearest = times(torch.linalg.pinv(chosen), right)
        if bool((largest(times(chosen, nearest) - right) > self.certificate * (1 + largest(right))).any()):
            raise InfeasibleError(f"the equalities A x = b contradict each other in at least 1 of {good.numel()} quadratic programmes: no x satisfies them.")
        raise SingularError(f"the rows of A are dependent in at least 1 of {good.numel()} quadratic programmes: leave out those that follow from the others.")

    def explain(self, data: Programme, z: Tensor, good: Tensor) -> None:
        """InfeasibleError where what the steps diverged along is a certificate.

        No point:     Aᵀν + Gᵀλ = 0, bᵀν + hᵀλ < 0, λ ≥ 0        Unbounded:    P x = 0, A x = 0, G x ≤ 0, qᵀx < 0
        """
        self.dependent(data, good)
        x, nu, lam = data.parts(z)
        row = largest(torch.cat([data.A, data.G], -2).abs().sum(-1))
        size = largest(torch.cat([nu, lam], -1))
        below = -((data.b * nu).sum(-1, keepdim=True) + (data.h * lam).sum(-1, keepdim=True))
        none = ~good & (largest(times(data.A.mT, nu) + times(data.G.mT, lam)) <= self.certificate * row * size) & (below > self.certificate * size)
        if bool(none.any()):
            raise InfeasibleError(
                f"{int(none.sum())} of {none.numel()} quadratic programmes have no feasible point: the constraints contradict each other (a combination of "
                "them reads 0 < 0, multipliers growing without bound). Relax h or b, or give the constraint a slack variable with a cost."
            )
        far = largest(x)
        flat = torch.cat([largest(times(data.P, x)), largest(times(data.A, x)), largest(times(data.G, x).clamp(min=0.0))], -1).amax(-1, keepdim=True)
        endless = ~good & (flat <= self.certificate * far) & ((data.q * x).sum(-1, keepdim=True) < -self.certificate * far)
        if bool(endless.any()):
            raise InfeasibleError(
                f"{int(endless.sum())} of {endless.numel()} quadratic programmes have no minimum: the objective falls without bound along a direction that P "
                "does not see and the constraints allow. Add a small multiple of the identity to P, or bounds on x."
            )
