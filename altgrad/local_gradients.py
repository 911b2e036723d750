"""What δ = ∂L/∂y of a layer's output tells of the layer's own parameters, with the layer's input x at hand and no graph: (x, δ) -> [∂W, ∂b].

linear         ∂W = δᵀ x, ∂b = Σ δ
embedding      ∂W[t] += δ
convolution    ∂W = the correlation of x with δ, ∂b = Σ δ
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def outer(inputs: Tensor, delta: Tensor) -> list[Tensor | None]:
    """Of y = x Wᵀ + b over the last axis."""
    flat = delta.reshape(-1, delta.shape[-1])
    return [flat.T @ inputs.reshape(-1, inputs.shape[-1]).to(flat.dtype), flat.sum(0)]


def table(ids: Tensor, delta: Tensor, *, shape: Sequence[int], padding: int | None) -> list[Tensor | None]:
    """Of y = W[ids], W of `shape`; the row `padding` has no derivative, as in autograd."""
    if padding is not None:
        delta = delta * real(ids, padding, shape[0])
    return [delta.new_zeros(shape).index_add_(0, ids.reshape(-1), delta.reshape(-1, shape[1]))]


def real(ids: Tensor, padding: int, rows: int) -> Tensor:
    """Where `ids` are not the row `padding`, [*ids.shape, 1]; functions see a negative one before PyTorch counts it from the end."""
    return (ids != padding % rows)[..., None]


def correlation(
    w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, axes: int, *, output_padding: Any = 0, transposed: bool = False
) -> Callable[[Tensor, Tensor], list[Tensor | None]]:
    """Of a convolution, or of a transposed one, over `axes` axes."""
    shape = tuple(w.shape)  # all that ∂W takes of it; a quantised weight may belong to a vmap that is over by then

    def gradients(inputs: Tensor, delta: Tensor) -> list[Tensor | None]:
        _, grad, bias = torch.ops.aten.convolution_backward(
            delta, inputs.to(delta.dtype), delta.new_empty(shape), [delta.shape[1]], tuple_of(stride, axes), tuple_of(padding, axes), tuple_of(dilation, axes),
            transposed, tuple_of(output_padding, axes), groups, [False, True, True],
        )  # fmt: skip
        return [grad, bias]

    return gradients


def tuple_of(value: Any, axes: int) -> list[int]:
    """`value` for each of `axes` axes."""
    return [value] * axes if isinstance(value, int) else list(value) * (axes if len(value) == 1 else 1)
