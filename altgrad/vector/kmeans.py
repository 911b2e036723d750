r"""Codes to begin with: k-means on vectors at hand, from as many of the vectors themselves.

    assign every z_j to its nearest c_k, then c_k ← mean of its own; `sweeps` times

A code that loses all its vectors stays where it is.
"""

import torch
from torch import Tensor

from altgrad.errors import SettingError, require
from altgrad.rng import Key, permutation
from altgrad.vector.moving import alternated


@torch.no_grad()
def kmeans(points: Tensor, codes: int, *, key: Key, sweeps: int = 10) -> Tensor:
    """Codes [K, D] for points [M, D].

    Args:
        points: finite, M >= codes.
        codes: K >= 1.
        key: addresses which points are the first codes.
        sweeps: Lloyd steps, >= 0.

    Raises:
        SettingError: more codes than points.
    """
    require(isinstance(codes, int) and codes >= 1, "codes", codes, "a whole number >= 1")
    require(isinstance(sweeps, int) and sweeps >= 0, "sweeps", sweeps, "a whole number >= 0")
    if codes > len(points):
        raise SettingError(f"codes={codes} is not allowed: there are {len(points)} vectors to start from. Take at most {len(points)} codes, or a larger batch.")
    order = permutation(key.fold("kmeans"), "points", len(points))[:codes].copy()
    return alternated(points[torch.from_numpy(order).to(points.device)], points, steps=sweeps, rate=1.0)
