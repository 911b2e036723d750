r"""Layers on a perturbed weight W + L Rᵀ, without writing it out.

linear       x (W + L Rᵀ)ᵀ          = x Wᵀ + (x R) Lᵀ
embedding    (W + L Rᵀ)[t]          = W[t] + L[t] Rᵀ
conv         W as [out, in/g · k]:    conv(x, W) + Σ_r L_r · conv(x, R_r as one filter a group)
transposed   W as [in, out/g · k]:    convᵀ(x, W) + Σ_r convᵀ(Σ_i x_i L_ir, R_r as one input a group)
bilinear     W as [out, in₁ · in₂]:   x₁ᵀ W x₂ + Σ_r L_r · (x₁ᵀ R_r x₂)

Written for one member; under vmap the products with W are shared. Recurrent cells and attention are taken apart into linear layers.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from altgrad.forward_mode import attention, recurrent
from altgrad.kernels import lowrank
from altgrad.population.parameters import Perturbed, plain, rule
from altgrad.stand_ins import centre_of


def shifted(value: Tensor, bias: Any, axes: int = 0) -> Tensor:
    """value + bias, the bias along the axis before the last `axes`."""
    return value if bias is None else value + plain(bias).to(value.dtype).reshape(-1, *(1 for _ in range(axes)))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast would run a product here, or None."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@rule(F.linear)
def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    x, bias = plain(input), plain(bias)
    if not isinstance(weight, Perturbed):
        return F.linear(x, weight, bias)
    dtype = autocast_dtype(x.device)
    if dtype is None and weight.pairs is not None:
        found = lowrank.paired_linear(x, weight.centre, bias, weight.pairs)
        if found is not None:
            return found
    centre, left, right = weight.centre, weight.left, weight.right
    if dtype is not None:
        x, centre, left, right, bias = (None if part is None else part.to(dtype) for part in (x, centre, left, right, bias))  # type: ignore[assignment]
    return lowrank.member_linear(x, centre, bias, left, right)


@rule.products
def matmul(input: Any, other: Any) -> Any:
    """x W + (x L) Rᵀ and W x + L (Rᵀ x), for matrices."""
    first, second = input, other
    if centre_of(first).ndim < 2 or centre_of(second).ndim < 2:
        return NotImplemented
    if isinstance(second, Perturbed) and second.ndim == 2:
        return linear(plain(first), second.like(second.centre.mT, second.right, second.left))
    if isinstance(first, Perturbed) and first.ndim == 2:
        second = plain(second)
        return torch.matmul(first.centre, second) + torch.matmul(first.left, torch.matmul(first.right.mT, second))
    return NotImplemented


@rule(torch.addmm, torch.Tensor.addmm)
def addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """β b + α x (W + L Rᵀ): the form of GPT-2's layers."""
    product = matmul(mat1, mat2)
    if product is NotImplemented:
        return NotImplemented
    bias = plain(input).to(product.dtype)
    return bias * beta + product * alpha if (alpha, beta) != (1, 1) else product + bias


@rule(F.embedding)
def embedding(input: Tensor, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, **rest: Any) -> Any:
    """norm_type, scale_grad_by_freq and sparse (`rest`) change no output where there is no max_norm."""
    if max_norm is not None or not isinstance(weight, Perturbed):
        return NotImplemented
    return F.embedding(input, weight.centre) + torch.matmul(weight.left[input], weight.right.mT)


@rule(torch.embedding)
def embedding_of_torch(weight: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    return embedding(ids, weight)


def under_autocast(x: Any, weight: Any) -> tuple[Any, Any]:
    """Both in the dtype of autocast, which does not reach every convolution under vmap."""
    dtype = autocast_dtype(x.device)
    return (x, weight) if dtype is None or x.dtype == torch.float64 else (x.to(dtype), weight.to(dtype))


def convolution(func: Any) -> Callable[..., Any]:
    def run(input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Any:
        if not isinstance(weight, Perturbed):
            return NotImplemented
        x, weight = under_autocast(plain(input), weight)
        where = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        rank, window = weight.left.shape[-1], weight.shape[1:]
        batched = x.ndim == len(window) + 1
        x = x if batched else x.unsqueeze(0)
        filters = weight.right.mT.reshape(rank, *window).repeat(groups, *(1 for _ in window))  # [groups · r, in/groups, k…]
        thin = func(x, filters, None, **where)  # [N, groups · r, …]
        grouped = thin.reshape(x.shape[0], groups, rank, -1)
        left = weight.left.reshape(groups, -1, rank)  # [groups, out/groups, r]
        value = func(x, weight.centre, None, **where)
        value = value + torch.matmul(left, grouped).reshape(value.shape)
        value = shifted(value, bias, len(window) - 1)
        return value if batched else value.squeeze(0)

    return run


def transposed_convolution(func: Any) -> Callable[..., Any]:
    def run(input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Any:
        if not isinstance(weight, Perturbed):
            return NotImplemented
        x, weight = under_autocast(plain(input), weight)
        where = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation, "groups": groups}
        rank, window = weight.left.shape[-1], weight.shape[1:]
        batched = x.ndim == len(window) + 1
        x = x if batched else x.unsqueeze(0)
        left = weight.left.reshape(groups, -1, rank)  # [groups, in/groups, r]
        grouped = x.reshape(x.shape[0], groups, left.shape[1], -1)
        thin = torch.matmul(left.mT, grouped).reshape(x.shape[0], groups * rank, *x.shape[2:])
        filters = weight.right.mT.reshape(rank, *window).repeat(groups, *(1 for _ in window))  # [groups · r, out/groups, k…]
        value = shifted(func(x, weight.centre, None, **where) + func(thin, filters, None, **where), bias, len(window) - 1)
        return value if batched else value.squeeze(0)

    return run


for name in ("conv1d", "conv2d", "conv3d"):
    rule(getattr(F, name))(convolution(getattr(F, name)))
for name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
    rule(getattr(F, name))(transposed_convolution(getattr(F, name)))


@rule(F.bilinear)
def bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, Perturbed):
        return NotImplemented
    first, second = plain(input1), plain(input2)
    planes = weight.right.reshape(*weight.shape[1:], -1)  # [in1, in2, r]
    thin = torch.einsum("...i,ijr,...j->...r", first, planes, second)
    return shifted(F.bilinear(first, second, weight.centre) + torch.matmul(thin, weight.left.mT), bias)


@rule(F.multi_head_attention_forward)
def multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    return attention.multi_head_attention(None, *args, **kwargs)


def narrowed(args: Any) -> Any:
    """Arguments as autocast hands them to a recurrent layer: all of them in its dtype."""
    leaves = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    dtype = autocast_dtype(leaves[0].device)
    return args if dtype is None else tree_map(lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, args)


def recurrence(func: Any) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        call = recurrent.Call(func, narrowed(args))
        return call.run(call.by_steps)

    return run


def cell(kin: Any) -> Callable[..., Any]:
    def run(x: Any, hx: Any, *weights: Any) -> Any:
        state = recurrent.CELLS[kin](x, tuple(hx) if kin is torch.lstm else (hx,), (*weights, None, None)[:4])
        return state if kin is torch.lstm else state[0]

    return run


RECURRENT = {func: recurrence(func) for func in recurrent.CELLS} | {func: cell(kin) for func, kin in recurrent.SINGLE.items()}
for function, decomposed in RECURRENT.items():
    rule(function)(decomposed)
TAKEN_APART = {**RECURRENT, F.multi_head_attention_forward: multi_head_attention}
