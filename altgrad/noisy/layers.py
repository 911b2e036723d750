"""Which functions are layers: how each computes its output, and how δ = ∂L/∂y, estimated, becomes the gradients of its parameters.

linear        ∂W = δᵀ x, ∂b = Σ δ            convolution   ∂W = the correlation of x with δ
embedding     ∂W[t] += δ                     norms         y = x̂ γ + β: ∂γ = Σ δ x̂, ∂β = Σ δ
Recurrent layers run step by step and attention in its parts, as linear layers. A parameter met anywhere else is perturbed itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from altgrad.forward_mode.layers import pad_same
from altgrad.local_gradients import correlation, outer, table
from altgrad.noisy.parameters import Noisy, rule, value_of
from altgrad.noisy.trace import NoisyTrace
from altgrad.population.evaluate import batch_norm as normalised
from altgrad.population.layers import TAKEN_APART
from altgrad.stand_ins import centre_of


def trace_of(*parameters: Any) -> NoisyTrace | None:
    """The pass of the first noisy parameter among `parameters`."""
    return next((part.made_on for part in parameters if isinstance(part, Noisy)), None)


@rule(F.linear)
def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    trace, x = trace_of(weight, bias), value_of(input)
    if trace is None:
        return F.linear(x, weight, bias)
    return trace.site(weight, bias, x, lambda: F.linear(x, centre_of(weight), centre_of(bias)), outer, units=-1)


@rule.products
def matmul(input: Any, other: Any) -> Any:
    """x W, and W x for matrices."""
    if isinstance(other, Noisy) and other.ndim == 2 and centre_of(input).ndim >= 2:
        return linear(input, other.T)
    if isinstance(input, Noisy) and input.ndim == 2 and centre_of(other).ndim == 2:
        return linear(other.T, input).T
    return NotImplemented


@rule(torch.addmm, torch.Tensor.addmm)
def addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if (beta, alpha) != (1, 1) or not isinstance(mat2, Noisy) or centre_of(input).ndim != 1:
        return NotImplemented
    return linear(mat1, mat2.T, input)


@rule(F.embedding)
def embedding(input: Tensor, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, **rest: Any) -> Any:
    """norm_type, scale_grad_by_freq and sparse (`rest`) change no output where there is no max_norm."""
    if max_norm is not None:
        return NotImplemented
    local = partial(table, shape=weight.shape, padding=padding_idx)
    return weight.made_on.site(weight, None, input, lambda: F.embedding(input, weight.centre), local)


def convolution(func: Any, axes: int) -> Callable[..., Any]:
    def run(input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Any:
        trace, x = trace_of(weight, bias), value_of(input)
        if trace is None:
            return func(x, weight, bias, stride, padding, dilation, groups)
        if x.ndim == axes + 1:  # one example without a batch axis
            return run(x.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
        w, shift = centre_of(weight), centre_of(bias)
        if isinstance(padding, str):
            x, padding = pad_same(x, w, stride, dilation, axes, padding), 0
        return trace.site(
            weight,
            bias,
            x,
            lambda: func(x, w, shift, stride, padding, dilation, groups),
            correlation(w, stride, padding, dilation, groups, axes),
            units=1,
        )

    return run


def transposed_convolution(func: Any, axes: int) -> Callable[..., Any]:
    def run(input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Any:
        trace, x = trace_of(weight, bias), value_of(input)
        if trace is None:
            return func(x, weight, bias, stride, padding, output_padding, groups, dilation)
        if x.ndim == axes + 1:
            return run(x.unsqueeze(0), weight, bias, stride, padding, output_padding, groups, dilation).squeeze(0)
        w, shift = centre_of(weight), centre_of(bias)
        local = correlation(w, stride, padding, dilation, groups, axes, output_padding=output_padding, transposed=True)
        return trace.site(weight, bias, x, lambda: func(x, w, shift, stride, padding, output_padding, groups, dilation), local)

    return run


for dimensions in (1, 2, 3):
    plain, turned = getattr(F, f"conv{dimensions}d"), getattr(F, f"conv_transpose{dimensions}d")
    rule(plain)(convolution(plain, dimensions))
    rule(turned)(transposed_convolution(turned, dimensions))


def affine(normed: Tensor, weight: Any, bias: Any, *, channel: int | None) -> Any:
    """x̂ γ + β, the trainable end of a norm layer: γ and β over the last axes, or over axis `channel`."""
    trace = trace_of(weight, bias)
    if trace is None:
        return NotImplemented
    shape = next(part.shape for part in (weight, bias) if part is not None)
    wide = shape if channel is None else (*shape, *(1 for _ in range(normed.ndim - channel - 1)))

    def compute() -> Tensor:
        value = normed if weight is None else normed * centre_of(weight).reshape(wide).to(normed.dtype)
        return value if bias is None else value + centre_of(bias).reshape(wide).to(normed.dtype)

    def narrowed(product: Tensor) -> Tensor:
        if channel is None:
            return product.reshape(-1, *shape).sum(0)
        return product.sum([axis for axis in range(product.ndim) if axis != channel])

    def local(inputs: Tensor, delta: Tensor) -> list[Tensor | None]:
        return [None if weight is None else narrowed(delta * inputs), None if bias is None else narrowed(delta)]

    return trace.site(weight, bias, normed, compute, local)


@rule(F.layer_norm)
def layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    return affine(F.layer_norm(value_of(input), normalized_shape, None, None, eps), weight, bias, channel=None)


@rule(F.rms_norm)
def rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    return affine(F.rms_norm(value_of(input), normalized_shape, None, eps), weight, None, channel=None)


@rule(F.group_norm)
def group_norm(input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    return affine(F.group_norm(value_of(input), num_groups, None, None, eps), weight, bias, channel=1)


@rule(F.instance_norm)
def instance_norm(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    statistics = (None, None) if use_input_stats else (running_mean, running_var)  # the running ones follow the clean pass
    return affine(F.instance_norm(value_of(input), statistics[0], statistics[1], None, None, use_input_stats, momentum, eps), weight, bias, channel=1)


@rule(F.batch_norm)
def batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """By the statistics of each copy's own batch; the running ones follow the clean pass."""
    return affine(normalised(value_of(input), running_mean, running_var, None, None, training, momentum, eps), weight, bias, channel=1)


for function, decomposed in TAKEN_APART.items():
    rule(function)(decomposed)
