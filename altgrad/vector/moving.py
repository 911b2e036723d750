r"""Codebooks that follow the vectors by averages in the place of a gradient.

    moving average     w_k ← γ w_k + (1 - γ) n_k / M,   t_k ← γ t_k + (1 - γ) Σ_{j: k} z_j / M,   c_k = t_k / w_k
    alternating        before each step of the encoder m times:  choose the nearest codes, then c_k ← c_k + η (mean_{j: k} z_j - c_k)

n_k of the M vectors of a batch chose code k. Both minimise Σ_j |z_j - c_k(j)|², at η = 1 in one step for the choices at hand. The averages w and t are
linear in the vectors, so that the mean over processes is what the whole batch would give.

Source: moving average: van den Oord et al. 2017, arXiv 1711.00937, appendix A.1; alternating: Huh et al. 2023 (VQ-STE++), ICML, arXiv 2305.08842.
"""

import torch
from torch import Tensor

FLOOR = 1e-12  # below it no share decays: a code that nobody chooses stays where it is, and 0/0 is never met


def nearest(points: Tensor, table: Tensor) -> Tensor:
    """argmin_k |z_j - c_k|² of points [M, D] among table [K, D]: [M], in float32 or better."""
    wide = torch.promote_types(points.dtype, torch.float32)
    points, table = points.to(wide), table.to(wide)
    return (table.square().sum(-1) - 2 * points @ table.mT).argmin(-1)


def gathered(points: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """(n_k / M [K], Σ_{j: k} z_j / M [K, D]) of points [M, D] that chose codes `indices` [M]."""
    chosen = (indices[:, None] == torch.arange(codes, device=indices.device)).to(points.dtype)  # [M, K]
    return chosen.mean(0), chosen.mT @ points / len(points)


def averaged(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], *, decay: float) -> tuple[Tensor, Tensor]:
    """(w, t) one batch on."""
    (weight, total), (share, sums) = old, new
    keep = torch.where(share > 0, decay, (FLOOR / weight).clamp(decay, 1.0)).to(weight.dtype)
    return keep * weight + (1 - decay) * share, keep[:, None] * total + (1 - decay) * sums


def alternated(table: Tensor, points: Tensor, *, steps: int, rate: float) -> Tensor:
    """The codes [K, D] after `steps` inner steps towards points [M, D]; codes that no point chooses stay."""
    for _ in range(steps):
        share, sums = gathered(points, nearest(points, table), len(table))
        means = sums / share.clamp_min(FLOOR)[:, None]
        table = torch.where(share[:, None] > 0, table + rate * (means - table), table)
    return table
