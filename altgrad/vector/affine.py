r"""Codes that move together: c'_k = s ∘ c_k + b with one scale s and one shift b [D] for the whole codebook.

A code that no vector chooses gets no gradient of its own; through s and b it follows the others.

    learned   s = 1 + r u, b = r v with trained u, v [D], 0 at first, and a rate r that makes them faster than the codes
    running   s = √(var e / var c), b = mean e - s mean c, from running statistics of the vectors e: c' has their mean and variance

s and b of the running form are constants in the derivative.

Source: Huh, Cheung, Agrawal, Isola 2023 (VQ-STE++), ICML, arXiv 2305.08842.
"""

import torch
from torch import Tensor

AFFINES = ("none", "learned", "running")
LEAST = 1e-6  # of a scale that is divided by, and of a variance


def learned(scale: Tensor, shift: Tensor, *, rate: float) -> tuple[Tensor, Tensor]:
    """(s, b) of the trained u and v."""
    return 1 + rate * scale, rate * shift


def running(codes: Tensor, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """(s, b) that give codes [K, D] the mean and the variance of vectors whose first and second moments are `mean` and `square` [D]."""
    codes = codes.detach()
    middle = codes.mean(0)
    spread = (codes - middle).square().mean(0)
    scale = ((square - mean.square()).clamp_min(0.0) / spread.clamp_min(LEAST**2)).sqrt()
    scale = torch.where(spread > 0, scale, 1.0)  # one code, or equal ones: they are moved, not stretched
    return scale, mean - scale * middle


def away_from_zero(scale: Tensor) -> Tensor:
    """A scale to divide by."""
    return torch.where(scale.abs() < LEAST, LEAST, scale)
