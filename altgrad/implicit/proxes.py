"""Proximal operators, prox(v) = argmin_x ‖x − v‖² / 2 + scale g(x), differentiable in the point and in every strength.

As in `projections`: comparisons choose the case, a formula gives the answer; at a kink the derivative is that of the free side.
"""

import torch
from torch import Tensor

from altgrad.implicit.projections import Size, axis, checked_point, checked_size


def prox_l1(v: Tensor, scale: Size) -> Tensor:
    """Soft thresholding, g = ‖x‖₁: v − scale sign(v) where |v| ≥ scale, else 0; scale 0 or more, broadcast to v."""
    scale = checked_size(scale, "scale", zero=True)
    return torch.where(v.abs() < scale, 0.0, v - scale * v.sign())


def prox_elastic_net(v: Tensor, lasso: Size, ridge: Size) -> Tensor:
    """Of lasso ‖x‖₁ + ridge ‖x‖² / 2: soft thresholding by lasso, divided by 1 + ridge; both 0 or more, broadcast to v, and scaled by the step already."""
    return prox_l1(v, lasso) / (1.0 + checked_size(ridge, "ridge", zero=True))


def prox_group_lasso(v: Tensor, scale: Size) -> Tensor:
    """g = ‖x‖ of each vector along the last axis: (1 − scale / ‖v‖) v where ‖v‖ ≥ scale, else 0; scale 0 or more, a number or [...].

    Source: Yuan and Lin 2006.
    """
    scale = axis(checked_size(scale, "scale", zero=True))
    squared = checked_point(v).square().sum(-1, keepdim=True)
    zero = squared < scale * scale
    safe = zero | (squared == 0)
    length = torch.where(safe, 1.0, v).square().sum(-1, keepdim=True).sqrt()
    return torch.where(zero, 0.0, v - torch.where(safe, 0.0, scale / length) * v)
