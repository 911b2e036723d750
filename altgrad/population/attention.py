"""Attention of all members as one call: PyTorch's fused kernels have no batched form, and would run member by member."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import maybe_current_level

from altgrad.forward_mode import attention


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention, [..., heads, L, width]; dropout is drawn from the addressed sampler."""
    if dropout_p > 0:
        return attention.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)[0]
    if maybe_current_level() is None:
        return fused(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    return torch.ops.altgrad.attend(query, key, value, attn_mask, is_causal, scale, enable_gqa)


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, grouped: bool) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped)


def folded(info: Any, in_dims: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *rest: Any) -> tuple[Tensor, int]:
    """Members [P, N, ...] as a longer batch [P · N, ...]."""
    size, axes = info.batch_size, in_dims[:4]

    def each(part: Tensor, axis: int | None) -> Tensor:
        return part.expand(size, *part.shape) if axis is None else part.movedim(axis, 0)

    parts = [each(part, axis) for part, axis in zip((query, key, value), axes, strict=False)]
    inner = parts[0].ndim - 1  # axes of one member's query
    if inner < 4:  # no batch of its own: the members are the batch; a mask of the same axes broadcasts
        lead = 0
    else:
        lead = parts[0].shape[1]
        parts = [part.flatten(0, 1) for part in parts]
    if mask is not None and (axes[3] is not None or (lead and mask.ndim == inner and mask.shape[0] > 1)):
        mask = each(mask, axes[3])
        mask = mask.reshape(size, *(1 for _ in range(inner + 1 - mask.ndim)), *mask.shape[1:])
        mask = mask.expand(size, lead, *mask.shape[2:]).flatten(0, 1) if lead else mask
    found = fused(parts[0], parts[1], parts[2], mask, *rest)
    return (found.unflatten(0, (size, lead)) if lead else found), 0


torch.library.define("altgrad::attend", "(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float? scale, bool grouped) -> Tensor")
torch.library.impl("altgrad::attend", "default", fused)
torch.library.register_vmap("altgrad::attend", folded)
