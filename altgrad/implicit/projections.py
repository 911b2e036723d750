"""The nearest point of a convex set, over the last axis, differentiable in the point and in the size of the set, to any order and under every transform.

Which constraints are active is found by comparisons, which carry no derivative; on them the answer is a formula, whose derivative is right by construction.
At a kink, where a point lies on the very edge, the derivative is that of the free side: the point counts as inside.
"""

import torch
from torch import Tensor

from altgrad.errors import ShapeError, require

Size = float | Tensor


def checked_point(v: Tensor) -> Tensor:
    if v.dim() == 0 or not v.is_floating_point():
        raise ShapeError(f"the point to project is {tuple(v.shape)} of {v.dtype}; it must be a float tensor with at least one axis.")
    return v


def checked_size(size: Size, name: str, *, zero: bool = False) -> Size:
    """Numbers are checked; tensors are taken as they are, for a check would read them back from the device."""
    if not isinstance(size, Tensor):
        require(size >= 0 if zero else size > 0, name, size, "0 or more" if zero else "above 0")
    return size


def axis(size: Size) -> Size:
    """A size [...] one for each vector, with the last axis kept; a scalar as it is."""
    return size.unsqueeze(-1) if isinstance(size, Tensor) and size.dim() else size


def project_nonnegative(v: Tensor) -> Tensor:
    """max(v, 0), with derivative 1 at 0."""
    return torch.where(v < 0, 0.0, v)


def project_box(v: Tensor, low: Size, high: Size) -> Tensor:
    """v held between low and high, elementwise, with derivative 1 in v on the edges; low ≤ high, broadcast to v."""
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        require(low <= high, "low", low, f"at most high={high!r}")
    return torch.where(v < low, low, torch.where(v > high, high, v))


def simplex_support(v: Tensor, size: Size) -> Tensor:
    """Where the projection of v on the simplex is above 0: v_i > τ, τ from the sorted values."""
    falling = v.sort(-1, descending=True).values
    count = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    thresholds = (falling.cumsum(-1) - size) / count
    used = (falling > thresholds).to(v.dtype).sum(-1, keepdim=True).clamp(min=1)
    last = falling.gather(-1, (used - 1).long())
    return v >= last


def project_simplex(v: Tensor, size: Size = 1.0) -> Tensor:
    """The nearest x with x ≥ 0 and Σ x = size: x = (v − τ)₊, τ = (Σ_S v − size) / |S| over the support S.

    dx/dv = diag(s) − s sᵀ / |s|, dx/dsize = s / |s|, for the indicator s of the support.

    Args:
        v: [..., n].
        size: above 0; a number or [...].

    Source: Held, Wolfe and Crowder 1974; Duchi et al. 2008; Blondel et al., arXiv 2105.15183, for the derivative.
    """
    size = axis(checked_size(size, "size"))
    support = simplex_support(checked_point(v), size)
    kept = torch.where(support, v, 0.0)
    share = (kept.sum(-1, keepdim=True) - size) / support.to(v.dtype).sum(-1, keepdim=True)
    return torch.where(support, v - share, 0.0)


def project_l2_ball(v: Tensor, radius: Size = 1.0) -> Tensor:
    """v where ‖v‖ ≤ radius, else radius v / ‖v‖; radius above 0, a number or [...]."""
    radius = axis(checked_size(radius, "radius"))
    inside = checked_point(v).square().sum(-1, keepdim=True) <= (radius * radius)
    length = torch.where(inside, 1.0, v).square().sum(-1, keepdim=True).sqrt()  # inside, a stand-in whose derivative exists
    return torch.where(inside, v, radius * v / length)


def project_l1_ball(v: Tensor, radius: Size = 1.0) -> Tensor:
    """v where ‖v‖₁ ≤ radius, else sign(v) times the projection of |v| on the simplex of that size; radius above 0, a number or [...]."""
    radius = axis(checked_size(radius, "radius"))
    sign = torch.where(checked_point(v) < 0, -1.0, 1.0).to(v.dtype)
    magnitude = sign * v
    inside = magnitude.sum(-1, keepdim=True) <= radius
    flat = radius.squeeze(-1) if isinstance(radius, Tensor) and radius.dim() else radius
    return torch.where(inside, v, sign * project_simplex(magnitude, flat))
