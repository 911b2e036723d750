r"""Attention in its plain form, softmax(q kᵀ s + mask) v: PyTorch's fused kernels have no forward formula.

The projections go through the linear layer's rule with the batch as axis 0, so that their outputs can be perturbed example by
example and low-rank tangents stay factors. Dropout of attention weights is drawn from the addressed sampler, in every engine.
"""

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from altgrad import samplers
from altgrad.errors import ShapeError
from altgrad.forward_mode.dual import Dual, Trace, primal_of
from altgrad.forward_mode.ladder import lift
from altgrad.forward_mode.layers import finish, is_site
from altgrad.forward_mode.rules import rule
from altgrad.perturb import LowRank


@rule(F.softmax, torch.softmax, torch.Tensor.softmax)
def softmax(trace: Trace, x: Any, dim: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """ẏ = y (ẋ - Σ y ẋ)."""
    dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), None)
    if dim is None:
        return lift(trace, F.softmax, (x,), {"dtype": dtype})
    value = F.softmax(x.primal, dim, dtype=dtype)
    weighted = x.tangent * value
    return Dual(value, weighted - value * weighted.sum(dim if dim < 0 else dim + 1, keepdim=True), trace)


def attend(
    q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False
) -> tuple[Any, Any]:
    """(softmax(q kᵀ s + mask) v, the attention weights); a row with nothing to attend to gives zeros."""
    if enable_gqa:
        k, v = (part.repeat_interleave(q.shape[-3] // part.shape[-3], -3) for part in (k, v))
    scores = torch.matmul(q * (1 / math.sqrt(q.shape[-1]) if scale is None else scale), k.transpose(-2, -1))
    if is_causal and attn_mask is None:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if attn_mask is None:
        weights = F.softmax(scores, dim=-1)
    else:
        scores = scores.masked_fill(attn_mask.logical_not(), -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        empty = (primal_of(scores) == -math.inf).all(-1, keepdim=True)
        weights = F.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    if dropout_p > 0:
        weights = samplers.dropout(weights, dropout_p)
    return torch.matmul(weights, v), weights


@rule(F.scaled_dot_product_attention, decomposed=True)
def scaled_dot_product_attention(trace: Trace, *args: Any, **kwargs: Any) -> Any:
    return attend(*args, **kwargs)[0]


class Rows(LowRank):
    """Some rows of a low-rank tangent: (A Bᵀ)[rows] = A[rows] Bᵀ."""

    def __init__(self, whole: LowRank, rows: slice):
        self.whole, self.rows, self.members, self.used = whole, rows, whole.members, False
        self.shape = torch.Size([rows.stop - rows.start, *whole.shape[1:]])

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self.whole.factors()
        return a[:, self.rows], b


def project(trace: Trace | None, inputs: list[Any], weight: Any, bias: Any) -> list[Any]:
    """x_j W_jᵀ + b_j for the blocks of rows W_j of one stacked weight, [N, ..., rows]; one product where the x_j are one tensor."""
    rows = weight.shape[0] // len(inputs)
    if all(x is inputs[0] for x in inputs):
        return list(F.linear(inputs[0], weight, bias).split(rows, -1))
    blocks = [slice(j * rows, (j + 1) * rows) for j in range(len(inputs))]
    if trace is not None and (is_site(weight) or is_site(bias)):
        return [project_site(trace, x, weight, bias, block) for x, block in zip(inputs, blocks, strict=True)]
    return [F.linear(x, w, b) for x, w, b in zip(inputs, cut(weight, blocks), cut(bias, blocks), strict=True)]


def cut(parameter: Any, blocks: list[slice]) -> list[Any]:
    """Blocks of rows, whose tangents are cut likewise: low-rank ones stay factors."""
    if parameter is None:
        return [None] * len(blocks)
    if not isinstance(parameter, Dual):
        return [parameter[block] for block in blocks]
    if isinstance(parameter.source, LowRank):
        return [Dual(parameter.primal[block], None, parameter.taken_on, Rows(parameter.source, block)) for block in blocks]
    moves = parameter.tangent
    return [Dual(parameter.primal[block], moves[:, block], parameter.taken_on) for block in blocks]


def project_site(trace: Trace, x: Any, weight: Any, bias: Any, block: slice) -> Any:
    """One block as a layer output of its own; its gradient is that of the whole weight, zero in the other rows."""
    px, pw = primal_of(x), primal_of(weight)[block]
    value = F.linear(px, pw, None if bias is None else primal_of(bias)[block])
    tangent = F.linear(x.tangent, pw) if isinstance(x, Dual) else None

    def local(delta: Tensor) -> list[Tensor | None]:
        flat = delta.reshape(-1, delta.shape[-1])
        whole = flat.new_zeros(weight.shape)
        whole[block] = flat.T @ px.reshape(-1, px.shape[-1]).to(flat.dtype)
        shift = flat.new_zeros(weight.shape[0])
        shift[block] = flat.sum(0)
        return [whole, shift]

    return finish(trace, weight, bias, value, tangent, local, channel=-1)


def multi_head_attention(
    trace: Trace | None,
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """F.multi_head_attention_forward: query [L, N, E] or [L, E], key and value [S, N, ·] or [S, ·] -> (as query, weights or None)."""
    if query.shape[-1] != embed_dim_to_check or query.shape[-1] % num_heads:
        raise ShapeError(f"attention of width {embed_dim_to_check} with {num_heads} heads got a query of shape {tuple(query.shape)}.")
    batched = query.ndim == 3
    q, k, v = batch_first(query, key, value)
    if use_separate_proj_weight:
        biases = [None] * 3 if in_proj_bias is None else cut_bias(in_proj_bias, 3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), (q_proj_weight, k_proj_weight, v_proj_weight), biases, strict=True))
    else:
        q, k, v = project(trace, [q, k, v], in_proj_weight, in_proj_bias)
    width = q.shape[-1] // num_heads
    examples, length = q.shape[:2]
    if bias_k is not None:
        k, v = (torch.cat([x, b.expand(examples, 1, b.shape[-1])], 1) for x, b in ((k, bias_k), (v, bias_v)))
    q, k, v = (x.reshape(examples, -1, num_heads, width).transpose(1, 2) for x in (q, k, v))  # [N, heads, L, width]
    k, v = (x if fixed is None else fixed.reshape(examples, num_heads, -1, width) for x, fixed in ((k, static_k), (v, static_v)))
    if add_zero_attn:
        k, v = (torch.cat([x, torch.zeros(examples, num_heads, 1, width, dtype=x.dtype, device=x.device)], 2) for x in (k, v))
    mask = joint_mask(attn_mask, key_padding_mask, primal_of(q), k.shape[2])
    mixed, weights = attend(q, k, v, mask, dropout_p if training else 0.0, is_causal)
    output = F.linear(mixed.transpose(1, 2).reshape(examples, length, num_heads * width), out_proj_weight, out_proj_bias)
    output = output.transpose(0, 1) if batched else output.squeeze(0)
    if not need_weights:
        return output, None
    weights = weights.mean(1) if average_attn_weights else weights
    return output, weights if batched else weights.squeeze(0)


def batch_first(*values: Any) -> list[Any]:
    """[L, N, E] or [L, E] -> [N, L, E]; what was one tensor stays one."""
    known: dict[int, Any] = {}
    return [known.setdefault(id(x), x.transpose(0, 1) if x.ndim == 3 else x.unsqueeze(0)) for x in values]


def cut_bias(bias: Any, parts: int) -> list[Any]:
    rows = bias.shape[0] // parts
    return cut(bias, [slice(j * rows, (j + 1) * rows) for j in range(parts)])


def joint_mask(attn_mask: Any, padding: Any, like: Tensor, keys: int) -> Any:
    """Both masks as one to be added, broadcast to [N, heads, L, keys]; keys appended by the layer are open to all."""
    if attn_mask is None and padding is None:
        return None
    total = torch.zeros((), dtype=like.dtype, device=like.device)
    for mask, shape in ((attn_mask, None), (padding, (like.shape[0], 1, 1, -1))):
        if mask is None:
            continue
        if primal_of(mask).dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -math.inf)
        if shape is None:
            shape = (-1, like.shape[1], *mask.shape[1:]) if mask.ndim == 3 else mask.shape
        mask = F.pad(mask, (0, keys - mask.shape[-1]))
        total = total + mask.reshape(*shape[:-1], keys)
    return total


@rule(F.multi_head_attention_forward, decomposed=True, layer=True)
def multi_head_attention_forward(trace: Trace, *args: Any, **kwargs: Any) -> Any:
    return multi_head_attention(trace, *args, **kwargs)


def serve_multi_head(*args: Any, **kwargs: Any) -> Any:
    """Attention dropout from the addressed sampler in passes without tangents."""
    given = SIGNATURE.bind(None, *args, **kwargs).arguments
    if given["dropout_p"] == 0 or not given.get("training", True) or carries(args, kwargs):
        return NotImplemented
    return multi_head_attention(None, *args, **kwargs)


def serve_attention(*args: Any, **kwargs: Any) -> Any:
    """Likewise, for scaled_dot_product_attention."""
    chance = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    return NotImplemented if chance == 0 or carries(args, kwargs) else attend(*args, **kwargs)[0]


def carries(*values: Any) -> bool:
    return any(isinstance(leaf, Dual) for leaf in tree_leaves(values))


SIGNATURE = inspect.signature(multi_head_attention)
samplers.SERVED[F.multi_head_attention_forward] = serve_multi_head
samplers.SERVED[F.scaled_dot_product_attention] = serve_attention
