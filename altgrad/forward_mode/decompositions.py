r"""Forward formulas for functions PyTorch has none for: batch statistics, bags of embeddings, weight normalisation, joining.

batch norm   x̂ = (x - μ)/s,  ẋ̂ = (ẋ - mean ẋ - x̂ · mean(x̂ẋ))/s with means over the batch; running statistics see the primal only.
bags         y_b = Σ_{i∈b} c_i W[i] is linear in W: the K tangents of W, side by side as columns, go through one bag.
weight norm  W = g v/‖v‖.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from altgrad.errors import ShapeError
from altgrad.forward_mode.dual import Dual, Trace, primal_of, tangent_of
from altgrad.forward_mode.ladder import lift
from altgrad.forward_mode.layers import affine, finish, has_tangents
from altgrad.forward_mode.rules import rule
from altgrad.perturb import LowRank


@rule(F.batch_norm, layer=True)
def batch_norm(
    trace: Trace,
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """y = x̂ ⊙ γ + β; x̂ by the batch's statistics in training (counted as a decomposition), by the running ones otherwise."""
    x = primal_of(input)
    shape = (1, -1, *(1 for _ in range(x.ndim - 2)))
    if training:
        trace.fallbacks["decomposition:batch_norm"] += 1
        trace.mixes_examples.append("batch_norm")
        if x.numel() == x.shape[1]:
            raise ShapeError(f"batch norm in training got {tuple(x.shape)}: one value a channel has no variance; use a larger batch or model.eval().")
        value, _, scale = torch.native_batch_norm(x, None, None, running_mean, running_var, True, momentum, eps)  # updates the running statistics
    else:
        assert running_mean is not None
        assert running_var is not None
        scale = (running_var + eps).rsqrt()
        value = (x - running_mean.reshape(shape)) * scale.reshape(shape)
    tangent = tangent_of(input)
    if tangent is not None:
        if training:
            axes = (1, *range(3, tangent.ndim))
            along = (tangent * value).mean(axes, keepdim=True)
            tangent = (tangent - tangent.mean(axes, keepdim=True)).sub_(value * along)
        tangent = tangent * scale.reshape(shape).to(tangent.dtype)
    return affine(trace, value if tangent is None else Dual(value, tangent, trace), weight, bias, shape, 1)


@rule(torch.batch_norm, layer=True)
def batch_norm_builtin(
    trace: Trace, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: float, eps: float, cudnn_enabled: bool
) -> Any:
    """The builtin's order of arguments."""
    return batch_norm(trace, input, running_mean, running_var, weight, bias, training, momentum, eps)


@rule(F.embedding_bag, decomposed=True, layer=True)
def embedding_bag(
    trace: Trace,
    input: Tensor,
    weight: Any,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """y_b = Σ c_i W[i], the mean, or the elementwise maximum over the entries i of bag b."""
    w, share = primal_of(weight), primal_of(per_sample_weights)
    bags = Bags(input, offsets, include_last_offset, padding_idx, mode, w.shape[0])
    value = F.embedding_bag(input, w, offsets, max_norm, norm_type, False, mode, False, share, include_last_offset, padding_idx)  # max_norm rescales w in place
    if mode == "max":
        return bags.maximum(trace, weight, w, value)

    def run(table: Tensor, each: Tensor | None = share) -> Tensor:
        return F.embedding_bag(input, table, offsets, mode=mode, per_sample_weights=each, include_last_offset=include_last_offset, padding_idx=padding_idx)

    tangent = None
    if has_tangents(weight):
        low = isinstance(weight.source, LowRank)
        rows, columns = weight.source.factors() if low else (weight.tangent, None)  # [K, V, r or E], [K, E, r]
        beside = rows.transpose(0, 1).flatten(1)  # [V, K·(r or E)]
        tangent = run(beside, None if share is None else share.to(beside.dtype)).unflatten(1, (rows.shape[0], -1)).transpose(0, 1)
        tangent = tangent if columns is None else torch.matmul(tangent, columns.transpose(1, 2))
    if isinstance(per_sample_weights, Dual):
        moved = torch.stack([run(w, each) for each in per_sample_weights.tangent])
        tangent = moved if tangent is None else tangent + moved

    def local(delta: Tensor) -> list[Tensor | None]:
        spread = delta[bags.owner] * bags.weights(delta, share)[:, None]
        return [torch.zeros_like(w).index_add_(0, bags.entries, spread.to(w.dtype))]

    return finish(trace, weight, None, value, tangent, local, channel=-1)


class Bags:
    """Which bag every entry belongs to: `entries` [n], `owner` [n]."""

    def __init__(self, input: Tensor, offsets: Tensor | None, include_last: bool, padding: int | None, mode: str, rows: int):
        self.entries, self.mode = input.reshape(-1), mode
        place = torch.arange(self.entries.numel(), device=input.device)
        if offsets is None:
            self.count = input.shape[0]
            self.owner = place // max(1, input.shape[1])
        else:
            starts = offsets[:-1] if include_last else offsets
            self.count = starts.numel()
            self.owner = torch.searchsorted(starts.contiguous(), place.to(starts.dtype), right=True) - 1
        padding = None if padding is None else padding % rows
        self.real = torch.ones_like(place, dtype=torch.bool) if padding is None else self.entries != padding

    def weights(self, like: Tensor, share: Tensor | None) -> Tensor:
        """The coefficient of every entry in its bag's sum, [n]."""
        real = self.real.to(like.dtype)
        if self.mode == "mean":
            sizes = torch.zeros(self.count, dtype=like.dtype, device=like.device).index_add_(0, self.owner, real).clamp_min(1)
            return real / sizes[self.owner]
        return real if share is None else real * share.reshape(-1).to(like.dtype)

    def maximum(self, trace: Trace, weight: Any, w: Tensor, value: Tensor) -> Any:
        """The entry that wins in every feature of every bag carries the tangent; ties go to the first, as in PyTorch."""
        winner = torch.full((self.count, w.shape[1]), self.entries.numel(), device=w.device)
        owner, entries, place = self.owner[self.real], self.entries[self.real], torch.arange(self.entries.numel(), device=w.device)[self.real]
        wins = w[entries] == value[owner]
        candidates = torch.where(wins, place[:, None], self.entries.numel())
        winner.scatter_reduce_(0, owner[:, None].expand_as(candidates), candidates, "amin")
        filled = winner < self.entries.numel()  # empty bags give 0 and have no winner
        row = self.entries[winner.clamp_max(max(0, self.entries.numel() - 1))] if self.entries.numel() else torch.zeros_like(winner)
        column = torch.arange(w.shape[1], device=w.device).expand_as(row)
        tangent = weight.tangent[:, row, column] * filled if has_tangents(weight) else None

        def local(delta: Tensor) -> list[Tensor | None]:
            return [torch.zeros_like(w).index_put_((row, column), (delta * filled).to(w.dtype), accumulate=True)]

        return finish(trace, weight, None, value, tangent, local, channel=-1)


@rule(torch._weight_norm, decomposed=True)
def weight_norm(trace: Trace, v: Any, g: Any, dim: int = 0) -> Any:
    """g v/‖v‖, the norm over every axis but `dim` (over all of them for dim=-1)."""
    axes = [axis for axis in range(v.ndim) if dim == -1 or axis != dim]
    square = v * v
    norm = (square.sum(axes, keepdim=True) if axes else square).sqrt()
    return v * (g / norm)


@rule(F.bilinear)
def bilinear(trace: Trace, input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    """x₁ᵀ W x₂ + b as a contraction, which has a batching rule where the builtin has none."""

    def contract(a: Tensor, b: Tensor, w: Tensor, shift: Tensor | None) -> Tensor:
        value = torch.einsum("...i,oij,...j->...o", a, w, b)
        return value if shift is None else value + shift

    return lift(trace, contract, (input1, input2, weight, bias), {})


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(trace: Trace, tensors: Any, dim: int = 0, **kwargs: Any) -> Any:
    """Tangents are joined like the values; what carries none is joined as zeros."""
    value = torch.cat([primal_of(t) for t in tensors], dim=kwargs.get("axis", dim))
    return Dual(value, torch.cat(filled(trace, tensors), dim=behind_members(kwargs.get("axis", dim))), trace)


@rule(torch.stack)
def stack(trace: Trace, tensors: Any, dim: int = 0) -> Any:
    """As `cat`, along a new axis."""
    value = torch.stack([primal_of(t) for t in tensors], dim=dim)
    return Dual(value, torch.stack(filled(trace, tensors), dim=behind_members(dim)), trace)


def behind_members(dim: int) -> int:
    return dim if dim < 0 else dim + 1


def filled(trace: Trace, tensors: Any) -> list[Tensor]:
    """The tangents of every tensor, zeros where there are none."""
    return [t.tangent if isinstance(t, Dual) else torch.zeros(1, device=t.device, dtype=t.dtype).expand(trace.members, *t.shape) for t in tensors]
