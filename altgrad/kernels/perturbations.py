r"""Perturbations drawn where they are used, by address, in plain PyTorch: memory for a chunk of them, whatever the population.

    factors    A_p/√r [m, r] and B_p [n, r] of E_p = A_p B_pᵀ/√r
    update     Σ_p c_p E_p
    axpy       w += Σ_p c_p noise_p

Every law has mean 0 and variance 1, as altgrad/perturb.py draws them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from altgrad.errors import require
from altgrad.kernels.lowrank_plain import columns, plain_update
from altgrad.perturb import draw as unit_noise
from altgrad.perturb import factors
from altgrad.rng import Key

__all__ = ["check_members", "factors", "plain_addressed_update", "plain_axpy_", "unit_noise"]

CHUNK_BYTES = 1 << 25  # noise held at once while an update is summed
COUNTER = 128  # elements a counter serves at most: pieces of whole counters draw nothing twice


def plain_addressed_update(
    coefficients: Tensor,
    key: Key,
    *,
    tensor: int,
    members: Sequence[int],
    law: str,
    rank: int,
    shape: Sequence[int],
    chunk: int | None,
    dtype: torch.dtype,
) -> Tensor:
    rows, width = shape[0], math.prod(shape[1:])
    chunk = chunk or max(1, CHUNK_BYTES // (4 * max(1, (rows + width) * rank)))
    total: Tensor | None = None
    with torch.no_grad():
        for begin in range(0, len(members), chunk):
            part, weights = members[begin : begin + chunk], coefficients[begin : begin + chunk]
            a, b = factors(law, key, tensor=tensor, members=part, rank=rank, shape=shape, dtype=dtype, device=coefficients.device)
            if total is None:
                total = plain_update(weights, a, b)
            else:
                left, right = columns(weights, a, b)
                torch.addmm(total, left.t(), right, out=total)
    if total is None:
        total = torch.zeros(rows, width, dtype=torch.promote_types(dtype, torch.float32), device=coefficients.device)
    return total.view(*shape)


def plain_axpy_(out: Tensor, coefficients: Tensor, key: Key, *, tensor: int, members: Sequence[int], law: str, chunk: int | None) -> Tensor:
    wide = torch.promote_types(out.dtype, torch.float32)
    held = chunk or CHUNK_BYTES // 4
    width = max(COUNTER, held // max(1, len(members)) // COUNTER * COUNTER)
    with torch.no_grad():
        flat = out.view(-1) if out.is_contiguous() else out.reshape(-1)
        weights = coefficients.to(wide)
        for begin in range(0, len(flat) if len(members) else 0, width):
            piece = flat[begin : begin + width]
            drawn = unit_noise(law, key, tensor=tensor, members=members, shape=piece.shape, start=begin, dtype=wide, device=out.device)
            piece.copy_(torch.addmv(piece.to(wide), drawn.t(), weights))
        if not out.is_contiguous():
            out.copy_(flat.view(out.shape))
    return out


def check_members(coefficients: Tensor, members: Sequence[int], chunk: int | None) -> None:
    require(len(coefficients) == len(members), "coefficients", len(coefficients), f"one for each of the {len(members)} members")
    require(chunk is None or chunk >= 1, "chunk", chunk, "at least 1, or None")
