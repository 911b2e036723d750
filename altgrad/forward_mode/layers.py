"""Parametric layers: how parameter tangents enter their outputs, and how a perturbed output becomes a parameter gradient.

For y = W x + b:   ẏ = W ẋ + Ẇ x + ḃ,   and with Ẇ = A Bᵀ:  Ẇ x = A (Bᵀ x), two thin products.
A layer's `local` function maps δ = ∂L/∂y (estimated) to the gradients of its own parameters, in the order weight, bias: the local
outer product δ xᵀ, with no graph.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from altgrad.forward_mode.dual import Dual, Trace, primal_of, tangent_of
from altgrad.forward_mode.ladder import lift
from altgrad.forward_mode.lazy import Lazy, Outer, multiply
from altgrad.forward_mode.rules import add, align, mul, rule
from altgrad.kernels import scratch
from altgrad.local_gradients import correlation, outer, real, table, tuple_of
from altgrad.perturb import LowRank

Local = Callable[[Tensor], list[Tensor | None]]


def is_site(value: Any) -> bool:
    """Whether a parameter stands for a perturbed layer output rather than for tangents of its own."""
    return isinstance(value, Dual) and getattr(value.source, "is_site", False)


def has_tangents(value: Any) -> bool:
    return isinstance(value, Dual) and not is_site(value)


def finish(
    trace: Trace,
    weight: Any,
    bias: Any,
    value: Tensor,
    tangent: Tensor | Lazy | None,
    local: Local,
    *,
    channel: int,
    drawn: Tensor | None = None,
    included: bool = False,
) -> Any:
    """The layer's output: perturbed if one of its parameters is a site, with tangents if there are any.

    `drawn` is the site's noise where it was drawn ahead; `included` says that `tangent` already holds it.
    """
    if is_site(weight) or is_site(bias):
        tangent = tangent.whole() if isinstance(tangent, Lazy) else tangent
        tangent = trace.site(weight, bias, value, tangent, local, channel=channel, drawn=drawn, included=included)
    if tangent is None:
        return value
    output = Dual(value, tangent, trace)
    if is_site(weight) or is_site(bias):
        trace.perturbed(output)
    return output


@rule(F.linear, layer=True, keeping=True)
def linear(trace: Trace, x: Any, weight: Any, bias: Any = None) -> Any:
    """y = x Wᵀ + b over the last axis.

    What must be drawn is drawn first, while neither y nor its tangent is alive, and tangents are added up in place: at its peak a
    layer holds x, ẋ, y, ẏ and nothing else of their size, and not all of ẋ where that is made a block at a time.
    """
    px, pw = primal_of(x), primal_of(weight)
    low = has_tangents(weight) and isinstance(weight.source, LowRank)
    drawn, moves, own, included = None, None, None, False
    if is_site(weight) or is_site(bias):
        drawn = trace.draw_ahead(weight, bias, (*px.shape[:-1], pw.shape[0]), px)
    if has_tangents(weight) and not low:  # also beside a bias that is a site
        moves = weight.tangent  # [K, out, in]
    shift = bias.tangent if has_tangents(bias) else None
    value = F.linear(px, pw, primal_of(bias))
    if low:
        own, shift = moved_by_factors(px, weight, shift), None
    tangent: Tensor | Lazy | None = own
    if isinstance(x, Dual) and not trace.plain:
        start: Tensor | Lazy | None = None
        same = px.dtype == pw.dtype and not torch.is_autocast_enabled(px.device.type)  # autocast would choose the dtype
        if same and drawn is not None and drawn.dtype == pw.dtype:
            start = trace.base(drawn)
        included = start is not None
        if same and start is None and own is not None and own.dtype == pw.dtype:
            start, own = own, None
        moved = product(x, pw, start) if same else F.linear(x.tangent, pw)  # [K, ..., out]
        tangent = moved if own is None else moved.add_(own.whole())
    if moves is not None:
        tangent = moved_by_weight(px, moves, tangent if isinstance(tangent, Tensor) else None)
    if shift is not None:
        spread = align(shift, value.ndim)
        tangent = tangent.add_(spread) if isinstance(tangent, Tensor) else spread.expand(-1, *value.shape).contiguous()

    return finish(trace, weight, bias, value, tangent, partial(outer, px), channel=-1, drawn=drawn, included=included)


def product(x: Dual, weight: Tensor, start: Tensor | Lazy | None) -> Tensor:
    """start + ẋ Wᵀ, [K, ..., out], into `start` or a buffer that was used before; F.linear would run K small products."""
    if x.lazy is not None:
        return multiply(x.lazy, weight, start)
    rows, width = x.tangent.reshape(-1, weight.shape[1]), weight.shape[0]
    if start is None:
        room = scratch.empty((rows.shape[0], width), rows.dtype, rows.device)
        return torch.mm(rows, weight.T, out=room).view(*x.tangent.shape[:-1], width)
    result = start if isinstance(start, Tensor) else start.whole()
    result.view(-1, width).addmm_(rows, weight.T)
    return result


def moved_by_factors(px: Tensor, weight: Dual, shift: Tensor | None) -> Outer:
    """x Ẇ_kᵀ = (x b_k) a_kᵀ for every k, and the bias's tangent `shift` [K, out] with it."""
    flat = px.reshape(-1, px.shape[-1])  # [rows, in]
    a, b = weight.source.factors()  # [K, out, r], [K, in, r]
    members, rank = a.shape[0], a.shape[2]
    inner = (flat @ b.permute(1, 0, 2).reshape(b.shape[1], -1)).view(-1, members, rank).permute(1, 0, 2)  # [K, rows, r]
    shape = torch.Size((members, *px.shape[:-1], a.shape[1]))
    return Outer(inner.to(a.dtype), a.transpose(1, 2), None if shift is None else shift[:, None].to(a.dtype), shape)


def moved_by_weight(px: Tensor, moves: Tensor, tangent: Tensor | None) -> Tensor:
    """x Ẇ_kᵀ for every k, moves [K, out, in], added to `tangent` [K, ..., out] where there is one."""
    flat = px.reshape(-1, px.shape[-1])  # [rows, in]
    if tangent is None:
        return torch.matmul(flat, moves.transpose(1, 2)).reshape(moves.shape[0], *px.shape[:-1], moves.shape[1])
    view = tangent.view(moves.shape[0], -1, moves.shape[1])
    if moves.dtype == view.dtype == flat.dtype:
        for k in range(moves.shape[0]):  # in place, so that no second [K, rows, out] is alive
            view[k].addmm_(flat, moves[k].T)
    else:
        view.add_(torch.matmul(flat, moves.transpose(1, 2)))
    return tangent


CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
TRANSPOSED = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}


def fold(function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """`function` over [K, N, ...] with K folded into the batch."""
    return function(stack.flatten(0, 1)).unflatten(0, stack.shape[:2])


def convolution(func: Any, axes: int) -> Callable[..., Any]:
    def apply_convolution(
        trace: Trace, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Any:
        if primal_of(input).ndim == axes + 1:  # one example without a batch axis
            lifted = input.unsqueeze(0)
            return RULE(trace, lifted, weight, bias, stride, padding, dilation, groups).squeeze(0)
        if isinstance(padding, str):
            input, padding = pad_same(input, primal_of(weight), stride, dilation, axes, padding), 0
        x, w = primal_of(input), primal_of(weight)

        def run(a: Tensor, b: Tensor, channels: int = groups) -> Tensor:
            return func(a, b, None, stride, padding, dilation, channels)

        value = func(x, w, primal_of(bias), stride, padding, dilation, groups)
        tangent = fold(lambda t: run(t, w), input.tangent) if isinstance(input, Dual) else None
        if has_tangents(weight):
            moved = moved_kernels(run, x, weight, groups, trace)
            tangent = moved if tangent is None else tangent.add_(moved)
        tangent = add_bias(bias, value, tangent, axes)
        local = partial(correlation(w, stride, padding, dilation, groups, axes), x)
        return finish(trace, weight, bias, value, tangent, local, channel=1)

    RULE = apply_convolution
    return apply_convolution


def moved_kernels(run: Callable[..., Tensor], x: Tensor, weight: Dual, groups: int, trace: Trace) -> Tensor:
    """conv(x, Ẇ_k) for every k: one convolution with K times the channels; K·r where Ẇ = A Bᵀ."""
    if groups > 1:  # channels of the K kernels would land in the wrong group: one convolution each
        return torch.stack([run(x, w) for w in weight.tangent])
    if isinstance(weight.source, LowRank):
        a, b = weight.source.factors()
        members, rank = a.shape[0], a.shape[2]
        kernels = b.transpose(1, 2).reshape(members * rank, *weight.shape[1:])
        inner = run(x, kernels, 1).unflatten(1, (members, rank))  # [N, K, r, ...]
        return torch.einsum("nkr...,kor->kno...", inner, a)
    moves = weight.tangent  # [K, out, in, ...]
    return run(x, moves.flatten(0, 1), 1).unflatten(1, moves.shape[:2]).transpose(0, 1)


def add_bias(bias: Any, value: Tensor, tangent: Tensor | None, axes: int) -> Tensor | None:
    if not has_tangents(bias):
        return tangent
    moved = bias.tangent.reshape(-1, 1, bias.shape[0], *(1 for _ in range(axes)))
    return moved.expand(-1, *value.shape).contiguous() if tangent is None else tangent + moved


def pad_same(x: Any, w: Tensor, stride: Any, dilation: Any, axes: int, mode: str) -> Any:
    """Zero padding that `padding="same"` stands for (nothing for "valid")."""
    if mode == "valid":
        return x
    pads: list[int] = []
    for size, step in zip(reversed(w.shape[2:]), reversed(tuple_of(dilation, axes)), strict=True):
        total = step * (size - 1)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def transposed_convolution(func: Any, axes: int) -> Callable[..., Any]:
    def apply_transposed(
        trace: Trace, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1
    ) -> Any:
        x, w = primal_of(input), primal_of(weight)
        value = func(x, w, primal_of(bias), stride, padding, output_padding, groups, dilation)

        def run(a: Tensor, b: Tensor) -> Tensor:
            return func(a, b, None, stride, padding, output_padding, groups, dilation)

        tangent = fold(lambda t: run(t, w), input.tangent) if isinstance(input, Dual) else None
        if has_tangents(weight):
            moved = torch.stack([run(x, m) for m in weight.tangent])
            tangent = moved if tangent is None else tangent + moved
        tangent = add_bias(bias, value, tangent, axes)
        local = partial(correlation(w, stride, padding, dilation, groups, axes, output_padding=output_padding, transposed=True), x)
        return finish(trace, weight, bias, value, tangent, local, channel=1)

    return apply_transposed


for plain, count in CONVOLUTIONS.items():
    rule(plain, layer=True)(convolution(plain, count))
for turned, count in TRANSPOSED.items():
    rule(turned, layer=True)(transposed_convolution(turned, count))


@rule(F.embedding, layer=True)
def embedding(
    trace: Trace,
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """y = W[index]; the padding row has no derivative, as in autograd."""
    if max_norm is not None:
        return lift(trace, F.embedding, (input, weight, padding_idx, max_norm, norm_type), {})
    w = primal_of(weight)
    value = F.embedding(input, w, padding_idx)
    tangent = None
    if has_tangents(weight):
        if isinstance(weight.source, LowRank):
            a, b = weight.source.factors()
            tangent = torch.einsum("k...r,ker->k...e", a[:, input], b)
        else:
            tangent = weight.tangent[:, input]
        if padding_idx is not None:
            tangent = tangent * real(input, padding_idx, w.shape[0])
    return finish(trace, weight, None, value, tangent, partial(table, input, shape=w.shape, padding=padding_idx), channel=-1)


def affine(trace: Trace, normed: Any, weight: Any, bias: Any, shape: tuple[int, ...], channel: int) -> Any:
    """y = x̂ ⊙ γ + β with γ, β broadcast by `shape`: the trainable end of every normalisation layer."""

    def spread(parameter: Any) -> Any:
        return None if parameter is None else primal_of(parameter).reshape(shape)

    if not (is_site(weight) or is_site(bias)):
        result = normed if weight is None else mul(trace, normed, weight.reshape(shape))
        return (
            result
            if bias is None
            else add(trace, result, bias.reshape(shape))
            if isinstance(bias, Dual) or isinstance(result, Dual)
            else result + bias.reshape(shape)
        )
    x, gamma, beta = primal_of(normed), spread(weight), spread(bias)
    value = x if gamma is None else x * gamma
    value = value if beta is None else value + beta
    tangent = tangent_of(normed)
    tangent = tangent if tangent is None or gamma is None else tangent * gamma

    def local(delta: Tensor) -> list[Tensor | None]:
        pairs = ((p, d) for p, d in ((weight, delta * x), (bias, delta)))
        return [None if p is None else reduce_to(d, spread(p).shape).reshape(primal_of(p).shape) for p, d in pairs]

    return finish(trace, weight, bias, value, tangent, local, channel=channel)


def reduce_to(delta: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum away the leading axes that `shape` lacks, and those in which it has one."""
    return (delta if delta.ndim == len(shape) else delta.flatten(0, delta.ndim - len(shape) - 1).sum(0)).sum_to_size(shape)


@rule(F.layer_norm, layer=True)
def layer_norm(trace: Trace, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    normed = (
        F.layer_norm(input, normalized_shape, None, None, eps)
        if not isinstance(input, Dual)
        else lift(trace, F.layer_norm, (input, normalized_shape, None, None, eps), {})
    )
    return affine(trace, normed, weight, bias, tuple(normalized_shape), -1)


@rule(F.rms_norm, layer=True)
def rms_norm(trace: Trace, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    normed = (
        F.rms_norm(input, normalized_shape, None, eps) if not isinstance(input, Dual) else lift(trace, F.rms_norm, (input, normalized_shape, None, eps), {})
    )
    return affine(trace, normed, weight, None, tuple(normalized_shape), -1)


@rule(F.group_norm, layer=True)
def group_norm(trace: Trace, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    normed = (
        F.group_norm(input, num_groups, None, None, eps) if not isinstance(input, Dual) else lift(trace, F.group_norm, (input, num_groups, None, None, eps), {})
    )
    return affine(trace, normed, weight, bias, (1, -1, *(1 for _ in range(input.ndim - 2))), 1)


@rule(F.instance_norm, layer=True)
def instance_norm(
    trace: Trace,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    run = (input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    normed = lift(trace, F.instance_norm, run, {}) if isinstance(input, Dual) else F.instance_norm(*run)
    return affine(trace, normed, weight, bias, (1, -1, *(1 for _ in range(input.ndim - 2))), 1)
