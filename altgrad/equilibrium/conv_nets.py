r"""Hopfield nets of convolutions, with the pooling inside the energy, and a dense last layer.

    up_l(s) = Pool(w_l * s) + b_l,     down_l(s_l, s_{l+1}) = w_{l+1} *ᵀ [ Pool'(w_{l+1} * s_l) s_{l+1} ]

over windows that do not overlap; what is left over at an edge is not looked at:

    max       z of the greatest                          kinks: for real nudges
    softmax   Σ z eᶻ / Σ eᶻ,  Pool' = p (1 + z - Pool)   holomorphic, p = eᶻ / Σ eᶻ
    mean      Σ z / n                                    linear

Source: Laborieux et al. 2021, arXiv 2006.03824, section 2.3; softmax pooling: Laborieux and Zenke 2022, arXiv 2209.00530.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad.engine import Tree
from altgrad.equilibrium.layered import Layered, check_activation, first_weights
from altgrad.equilibrium.nets import check_readout
from altgrad.errors import SettingError, near_miss, require
from altgrad.rng import Key

POOLINGS = ("max", "softmax", "mean")


def windows(z: Tensor, size: int) -> Tensor:
    """[N, C, H, W] as [N, C, H // size, W // size, size²]."""
    tall, wide = z.shape[2] // size, z.shape[3] // size
    parts = z[:, :, : tall * size, : wide * size].reshape(*z.shape[:2], tall, size, wide, size)
    return parts.transpose(3, 4).flatten(4)


def whole(parts: Tensor, size: int, like: Tensor) -> Tensor:
    """`windows` undone; zeros where it left something over."""
    count, channels, tall, wide, _ = parts.shape
    z = parts.unflatten(4, (size, size)).transpose(3, 4).reshape(count, channels, tall * size, wide * size)
    return F.pad(z, (0, like.shape[3] - wide * size, 0, like.shape[2] - tall * size))


def shares(parts: Tensor) -> Tensor:
    """eᶻ / Σ eᶻ over the last axis; the largest real part is taken off, which changes nothing but the size of the numbers."""
    grown = torch.exp(parts - parts.real.amax(-1, keepdim=True).detach())
    return grown / grown.sum(-1, keepdim=True)


def pool(kind: str, z: Tensor, size: int) -> Tensor:
    """Pool(z) [N, C, H // size, W // size]."""
    parts = windows(z, size)
    if kind == "max":
        return parts.gather(-1, parts.argmax(-1, keepdim=True))[..., 0]  # of equals the first, as in `spread`
    return parts.mean(-1) if kind == "mean" else (parts * shares(parts)).sum(-1)


def spread(kind: str, z: Tensor, size: int, push: Tensor) -> Tensor:
    """Pool'(z) applied to `push` [N, C, H // size, W // size], shaped like z."""
    parts, push = windows(z, size), push.unsqueeze(-1)
    if kind == "max":
        found = torch.zeros_like(parts).scatter(-1, parts.argmax(-1, keepdim=True), push)
    elif kind == "mean":
        found = (push / size**2).expand_as(parts)
    else:
        share = shares(parts)
        found = push * share * (1 + parts - (parts * share).sum(-1, keepdim=True))
    return whole(found, size, z)


class ConvHopfield(Layered):
    """A Hopfield net of convolutions and one dense layer.

    Args:
        shape: of the inputs, (channels, height, width); they may come flat.
        channels: of every convolutional layer.
        outputs: units of the output.
        key: addresses the first weights.
        kernel: odd side of the filters; the edge is padded with zeros.
        size: side of the pooled windows, 1 for none.
        pooling: "max", "softmax" or "mean".
        hidden: activation of the convolutional layers, "sigmoid" or "tanh".
        output: of the output, "linear", "sigmoid" or "tanh".
        sweeps: of the plain forward pass, from ρ(0).
        readout: "inside", the output settles with the rest, or "outside", it is a linear map of the last convolutional layer.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: Sequence[int],
        outputs: int,
        *,
        key: Key,
        kernel: int = 3,
        size: int = 2,
        pooling: str = "softmax",
        hidden: str = "sigmoid",
        output: str = "linear",
        sweeps: int = 30,
        readout: str = "inside",
    ):
        require(len(shape) == 3 and min(shape) >= 1, "shape", tuple(shape), "(channels, height, width) of the inputs, each at least 1")
        require(len(channels) >= 1 and min(channels) >= 1, "channels", tuple(channels), "one number or more, each at least 1")
        require(isinstance(kernel, int) and kernel >= 1 and kernel % 2 == 1, "kernel", kernel, "an odd whole number >= 1")
        require(isinstance(size, int) and size >= 1, "size", size, "a whole number >= 1")
        if pooling not in POOLINGS:
            raise SettingError(near_miss("pooling", pooling, POOLINGS))
        check_activation("hidden", hidden)
        check_activation("output", output)
        check_readout(readout, output)
        shapes: list[tuple[int, ...]] = []
        _, tall, wide = shape
        for number in channels:
            tall, wide = tall // size, wide // size
            require(
                min(tall, wide) >= 1, "channels", tuple(channels), f"fewer: windows of {size} leave nothing of {shape[1]}x{shape[2]} after {len(shapes)} layers"
            )
            shapes.append((number, tall, wide))
        outside = readout == "outside"
        layers = shapes if outside else [*shapes, (outputs,)]
        super().__init__(layers, [hidden] * len(channels) + [output] * (not outside), key=key, sweeps=sweeps, classes=outputs if outside else None)
        self.kernel, self.size, self.pooling, self.pixels = kernel, size, pooling, tuple(shape)
        pairs = [(after, before, kernel, kernel) for before, after in itertools.pairwise([shape[0], *channels])]
        matrices = [*pairs, *([] if outside else [(outputs, math.prod(shapes[-1]))])]
        self.weights = nn.ParameterList(first_weights(key, f"weights.{number}", matrix, 0.5) for number, matrix in enumerate(matrices))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(matrix[0])) for matrix in matrices)

    @property
    def kink(self) -> str:
        """What complex nudges cannot pass, and what may stand in its place; empty where there is nothing."""
        return "pooling='max' (use pooling='softmax' or 'mean')" if self.pooling == "max" and self.size > 1 else ""

    def convolved(self, params: Tree, number: int, below: Tensor) -> Tensor:
        below = below if number else below.reshape(len(below), *self.pixels)
        return F.conv2d(below, params[f"weights.{number}"], padding=self.kernel // 2)

    def up(self, params: Tree, number: int, below: Tensor) -> Tensor:
        bias = params[f"biases.{number}"]
        if len(self.shapes[number]) == 1:
            return below.flatten(1) @ params[f"weights.{number}"].T + bias
        return pool(self.pooling, self.convolved(params, number, below), self.size) + bias[:, None, None]

    def down(self, params: Tree, number: int, own: Tensor, above: Tensor) -> Tensor:
        weight = params[f"weights.{number + 1}"]
        if above.ndim == 2:
            return (above @ weight).unflatten(1, self.shapes[number])
        told = spread(self.pooling, self.convolved(params, number + 1, own), self.size, above)
        return F.conv_transpose2d(told, weight, padding=self.kernel // 2)


__all__ = ["POOLINGS", "ConvHopfield", "pool", "spread"]
