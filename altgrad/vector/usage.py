r"""Which codes are used, how evenly, and how those that are not come back.

    share p_k = n_k / M,     used = #{k: p_k > 0} / K,     perplexity = exp(-Σ_k p_k ln p_k), from 1 (one code) to K (all alike)

The choice of the vectors that dead codes are put on is addressed, so that a resumed run makes it again.
"""

import torch
from torch import Tensor

from altgrad.rng import Key, permutation


def shares(indices: Tensor, codes: int) -> Tensor:
    """p [K] of indices of any shape, in float64."""
    counts = torch.bincount(indices.flatten(), minlength=codes).double()
    return counts / counts.sum().clamp_min(1.0)


def used(share: Tensor) -> Tensor:
    """The part of the codes that anything chose, 0-d in [0, 1]."""
    return (share > 0).double().mean()


def perplexity(share: Tensor) -> Tensor:
    """exp of the entropy of p [K] in nats, 0-d in [1, K]."""
    return torch.special.entr(share).sum().exp()


def revived(table: Tensor, dead: Tensor, points: Tensor, *, key: Key) -> tuple[Tensor, Tensor]:
    """(codes, which of them moved): dead ones put on vectors of the batch.

    Args:
        table: codes [K, D]; dead: bool [K].
        points: vectors [M, D], each of which takes one code at most: of M < dead codes the first M come back.
        key: the address of the choice, at the update's number.
    """
    order = torch.from_numpy(permutation(key.fold("revive"), "points", len(points)).copy()).to(table.device)
    place = dead.cumsum(0) - 1  # of every dead code among the dead
    moved = dead & (place < len(points))
    chosen = points[order[place.clamp(0, len(points) - 1)]].to(table.dtype)  # [K, D]
    return torch.where(moved[:, None], chosen, table), moved
