"""Linear solvers that need no matrix: A x = b for many right-hand sides at once, each stopping by itself.

`b` is [..., n]; the last axis is the unknown, the axes before it are independent systems. `apply(v)` is A v, of v's shape. Every solver returns
(x, LinearOutcome), whose residual is ‖b − A x‖ / ‖b‖ computed from x itself, not from the recursion, which drifts away from it on ill-conditioned systems;
where the two disagree the solver starts again from x while it gains.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad.errors import require

ROOM = 16  # basis vectors that GMRES has room for at first
Apply = Callable[[Tensor], Tensor]
Inner = Callable[[Apply, Tensor, Tensor, int], tuple[Tensor, Tensor, int]]  # (apply, b, target norms, steps) -> (x, steps each took, products)
RESTARTS = 20  # of the whole solver, each only if the residual has at least halved


class LinearOutcome(NamedTuple):
    """How a solve ended: residual [...] relative to ‖b‖, iterations [...] of each system, converged [...], products with A (or Aᵀ) in all."""

    residual: Tensor
    iterations: Tensor
    converged: Tensor
    products: int


def dot(left: Tensor, right: Tensor) -> Tensor:
    """⟨left, right⟩ over the last axis, which stays with size 1."""
    return (left * right).sum(-1, keepdim=True)


def divided(numerator: Tensor, denominator: Tensor, where: Tensor) -> Tensor:
    """numerator / denominator where `where` holds and the denominator is not zero, else 0."""
    usable = where & (denominator != 0)
    return torch.where(usable, numerator / torch.where(usable, denominator, 1.0), 0.0)


def checked(apply: Apply, b: Tensor, tol: float, max_steps: int, inner: Inner) -> tuple[Tensor, LinearOutcome]:
    """Run `inner` until the true residual is at most tol ‖b‖, again from where it stopped while that halves the residual."""
    require(tol > 0, "tol", tol, "above 0")
    require(max_steps >= 1, "max_steps", max_steps, "1 or more")
    scale = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    target = tol * scale
    x, remainder, norm = torch.zeros_like(b), b, scale
    steps, products = torch.zeros_like(scale, dtype=torch.int64), 0
    for _ in range(RESTARTS):
        left = max_steps - int(steps.max()) if steps.numel() else 0
        if left <= 0 or not bool((norm > target).any()):
            break
        wanted = torch.where(norm > target, target, torch.inf)  # systems that are done take no step
        change, taken, used = inner(apply, remainder, wanted, left)
        candidate = x + change
        fresh = b - apply(candidate)
        fresh_norm = torch.linalg.vector_norm(fresh, dim=-1, keepdim=True)
        if bool((fresh_norm <= target).all()):
            x, norm, steps, products = candidate, fresh_norm, steps + taken, products + used + 1
            break
        better = fresh_norm < norm  # False for NaN: what is kept is never worse than what was there
        gained = (fresh_norm <= 0.5 * norm) & better
        x, remainder = torch.where(better, candidate, x), torch.where(better, fresh, remainder)
        norm, steps, products = torch.where(better, fresh_norm, norm), steps + taken, products + used + 1
        if not bool((gained & (norm > target)).any()):
            break
    relative = norm / scale.clamp_min(torch.finfo(b.dtype).tiny)
    return x, LinearOutcome(relative.squeeze(-1), steps.squeeze(-1), (norm <= target).squeeze(-1), products)


def cg(apply: Apply, b: Tensor, *, tol: float, max_steps: int) -> tuple[Tensor, LinearOutcome]:
    """Conjugate gradients, for symmetric definite A (either sign): the smallest A-norm error in each Krylov space.

    α = ⟨r, r⟩ / ⟨p, A p⟩,  x ← x + α p,  r ← r − α A p,  p ← r + (⟨r', r'⟩ / ⟨r, r⟩) p

    Args:
        apply: v -> A v.
        b: [..., n].
        tol: converged when ‖b − A x‖ ≤ tol ‖b‖; above 0.
        max_steps: iterations of any one system at most, 1 or more.

    Source: Hestenes and Stiefel 1952.
    """
    return checked(apply, b, tol, max_steps, conjugate)


def single(apply: Apply, b: Tensor, target: Tensor, max_steps: int) -> tuple[Tensor, Tensor, int]:
    """CG of one system, its scalars numbers: a third of the operations."""
    x = torch.zeros_like(b).flatten()
    r = p = b.flatten()
    aim, rho, products = target.item() ** 2, torch.dot(r, r).item(), 0
    while products < max_steps and aim < rho < math.inf:
        image = apply(p.view_as(b)).flatten()
        products += 1
        curvature = torch.dot(p, image).item()
        if curvature == 0:
            break
        x, r = torch.add(x, p, alpha=rho / curvature), torch.sub(r, image, alpha=rho / curvature)
        rho, before = torch.dot(r, r).item(), rho
        p = torch.add(r, p, alpha=rho / before)
    return x.view_as(b), torch.full_like(target, products, dtype=torch.int64), products


def conjugate(apply: Apply, b: Tensor, target: Tensor, max_steps: int) -> tuple[Tensor, Tensor, int]:
    if target.numel() == 1:
        return single(apply, b, target, max_steps)
    x, r, p, rho = torch.zeros_like(b), b, b, dot(b, b)
    steps, products = torch.zeros_like(rho, dtype=torch.int64), 0
    active = rho.sqrt() > target
    while products < max_steps and bool(active.any()):
        image = apply(p)
        products += 1
        steps = steps + active
        curvature = dot(p, image)
        alpha = divided(rho, curvature, active)
        x, r = x + alpha * p, r - alpha * image
        fresh = dot(r, r)
        p = torch.where(active, r + divided(fresh, rho, active) * p, p)
        rho = torch.where(active, fresh, rho)
        active = active & (rho.sqrt() > target) & (curvature != 0) & rho.isfinite()
    return x, steps, products


def gmres(apply: Apply, b: Tensor, *, tol: float, max_steps: int, restart: int = 200) -> tuple[Tensor, LinearOutcome]:
    """GMRES(restart), for any square A: the smallest residual in each Krylov space, from an orthogonal basis of it.

    A V_k = V_{k+1} H_k (Arnoldi, every vector orthogonalised twice),  x = V_k argmin_y ‖ ‖b‖ e₁ − H_k y ‖ by Givens rotations

    Args:
        apply, b, tol, max_steps: as in `cg`.
        restart: basis vectors kept before starting again, 1 or more; memory is restart times that of b. 200 needs no restart up to spectral radius 0.999.

    Source: Saad and Schultz 1986.
    """
    require(restart >= 1, "restart", restart, "1 or more")

    def cycles(apply: Apply, b: Tensor, target: Tensor, max_steps: int) -> tuple[Tensor, Tensor, int]:
        return arnoldi(apply, b, target, min(restart, max_steps, b.shape[-1]))

    return restarted(apply, b, tol, max_steps, cycles)


def restarted(apply: Apply, b: Tensor, tol: float, max_steps: int, cycle: Inner) -> tuple[Tensor, LinearOutcome]:
    """`checked`, where a short cycle may gain less than half and still go on: the cycles run inside until they gain less than one part in 1,000."""

    def inner(apply: Apply, b: Tensor, target: Tensor, max_steps: int) -> tuple[Tensor, Tensor, int]:
        x, remainder = torch.zeros_like(b), b
        norm = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
        steps, products = torch.zeros_like(norm, dtype=torch.int64), 0
        while True:
            change, taken, used = cycle(apply, remainder, target, max_steps - int(steps.max()))
            x, steps, products = x + change, steps + taken, products + used
            if int(steps.max()) >= max_steps or used < 1:
                break
            fresh = b - apply(x)
            products += 1
            fresh_norm = torch.linalg.vector_norm(fresh, dim=-1, keepdim=True)
            going = (fresh_norm > target) & (fresh_norm < 0.999 * norm)
            remainder, norm = fresh, fresh_norm
            if not bool(going.any()):
                break
            target = torch.where(going, target, torch.inf)
        return x, steps, products

    return checked(apply, b, tol, max_steps, inner)


def arnoldi(apply: Apply, b: Tensor, target: Tensor, size: int) -> tuple[Tensor, Tensor, int]:
    """One GMRES cycle of at most `size` steps from zero."""
    lead = b.shape[:-1]
    kind: dict[str, Any] = {"dtype": b.dtype, "device": b.device}
    beta = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    active = beta > target
    room = min(size, ROOM)  # grows as it fills: most systems need a few steps, and a batch's full basis does not fit in the cache
    basis = torch.zeros(*lead, room + 1, b.shape[-1], **kind)
    triangle = torch.zeros(*lead, room + 1, room, **kind)
    turned = torch.zeros(*lead, room + 1, room + 1, **kind) + torch.eye(room + 1, **kind)  # the product of the Givens rotations so far
    basis[..., 0, :] = divided(b, beta, active)
    steps, taken = torch.zeros_like(beta, dtype=torch.int64), 0
    for j in range(size):
        if not bool(active.any()):
            break
        if j == room:
            more = min(size, 2 * room) - room
            room += more
            basis, triangle = torch.nn.functional.pad(basis, (0, 0, 0, more)), torch.nn.functional.pad(triangle, (0, more, 0, more))
            turned = torch.nn.functional.pad(turned, (0, more, 0, more)) + torch.diag(torch.arange(room + 1, device=b.device) > j).to(b.dtype)
        w = apply(basis[..., j, :])
        taken, steps = j + 1, steps + active
        known = basis[..., : j + 1, :]
        column = torch.zeros(*lead, room + 1, **kind)
        length = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        for _ in range(2):  # classical Gram-Schmidt twice is orthogonal to rounding
            part = (known @ w.unsqueeze(-1)).squeeze(-1)
            w = w - (part.unsqueeze(-2) @ known).squeeze(-2)
            column[..., : j + 1] += part
        rest = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        rest = torch.where(rest > 10 * torch.finfo(b.dtype).eps * length, rest, 0.0)  # rounding is no direction: the space is exhausted
        column[..., j + 1] = rest.squeeze(-1)
        basis[..., j + 1, :] = divided(w, rest, active)
        column = (turned @ column.unsqueeze(-1)).squeeze(-1)
        a, c = column[..., j, None], column[..., j + 1, None]
        hypotenuse = torch.hypot(a, c)
        cosine = torch.where(hypotenuse > 0, a / torch.where(hypotenuse > 0, hypotenuse, 1.0), 1.0)
        sine = divided(c, hypotenuse, hypotenuse > 0)
        upper, lower = turned[..., j, :].clone(), turned[..., j + 1, :].clone()
        turned[..., j, :], turned[..., j + 1, :] = cosine * upper + sine * lower, cosine * lower - sine * upper
        column[..., j], column[..., j + 1] = hypotenuse.squeeze(-1), 0.0
        triangle[..., j] = column
        error = beta * turned[..., j + 1, :1].abs()
        active = active & (error > target) & (rest > 0) & error.isfinite()
    right = beta * turned[..., :taken, 0]
    upper = triangle[..., :taken, :taken]
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    right = torch.where(diagonal != 0, right, 0.0)  # a zero pivot: a direction that A does not see
    upper = upper + torch.diag_embed((diagonal == 0).to(b.dtype))
    weights = torch.linalg.solve_triangular(upper, right.unsqueeze(-1), upper=True)
    return (weights.transpose(-1, -2) @ basis[..., :taken, :]).squeeze(-2), steps, taken


def bicgstab(apply: Apply, b: Tensor, *, tol: float, max_steps: int) -> tuple[Tensor, LinearOutcome]:
    """BiCGSTAB, for any square A in the memory of eight vectors; two products a step, and no guarantee that the residual falls.

    Arguments as in `cg`. Source: van der Vorst 1992.
    """
    return checked(apply, b, tol, max_steps, stabilised)


def stabilised(apply: Apply, b: Tensor, target: Tensor, max_steps: int) -> tuple[Tensor, Tensor, int]:
    x, r, shadow, p, v = torch.zeros_like(b), b, b, torch.zeros_like(b), torch.zeros_like(b)
    rho = alpha = omega = torch.ones_like(dot(b, b))
    steps, products = torch.zeros_like(rho, dtype=torch.int64), 0
    active = dot(b, b).sqrt() > target
    best, least = x, dot(b, b).sqrt()
    while products < 2 * max_steps and bool(active.any()):
        fresh = dot(shadow, r)
        beta = divided(fresh, rho, active) * divided(alpha, omega, active)
        p = torch.where(active, r + beta * (p - omega * v), 0.0)
        v = apply(p)
        alpha = divided(fresh, dot(shadow, v), active)
        s = r - alpha * v
        image = apply(s)
        products += 2
        steps = steps + active
        omega = divided(dot(image, s), dot(image, image), active)
        x, r, rho = x + alpha * p + omega * s, s - omega * image, torch.where(active, fresh, rho)
        norm = dot(r, r).sqrt()
        best, least = torch.where(active & (norm < least), x, best), torch.where(active & (norm < least), norm, least)
        active = active & (norm > target) & norm.isfinite() & (fresh != 0) & (omega != 0)
    return best, steps, products


def normal_cg(apply: Apply, transposed: Apply, b: Tensor, *, tol: float, max_steps: int) -> tuple[Tensor, LinearOutcome]:
    """CG on Aᵀ A x = Aᵀ b, for any A; the condition number is squared, so it is never chosen for you.

    The residual watched is ‖b − A x‖, not that of the normal equations, which is small long before x is right.

    Args:
        transposed: v -> Aᵀ v.
        apply, b, tol, max_steps: as in `cg`.
    """

    def inner(apply: Apply, b: Tensor, target: Tensor, max_steps: int) -> tuple[Tensor, Tensor, int]:
        x, r = torch.zeros_like(b), b
        slope = transposed(r)
        p, gamma = slope, dot(slope, slope)
        steps, products = torch.zeros_like(gamma, dtype=torch.int64), 1
        active = dot(r, r).sqrt() > target
        while int(steps.max()) < max_steps and bool(active.any()):
            image = apply(p)
            alpha = divided(gamma, dot(image, image), active)
            x, r = x + alpha * p, r - alpha * image
            slope = transposed(r)
            products, steps = products + 2, steps + active
            fresh = dot(slope, slope)
            p = torch.where(active, slope + divided(fresh, gamma, active) * p, 0.0)
            gamma = torch.where(active, fresh, gamma)
            norm = dot(r, r).sqrt()
            active = active & (norm > target) & (gamma > 0) & norm.isfinite()
        return x, steps, products

    return checked(apply, b, tol, max_steps, inner)
