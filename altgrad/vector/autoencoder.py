r"""A small convolutional autoencoder with a codebook in its middle: image -> grid of vectors -> their codes -> image.

    encoder   3x3 convolutions of stride 2, each halving the side, then 1x1 to D channels
    decoder   3x3 from D channels, then for each halving: every pixel four times, 3x3

The last convolution of the decoder has no activation: pixels are standardised.
"""

import math
from typing import NamedTuple

from torch import Tensor, nn

from altgrad.errors import ShapeError, require
from altgrad.vector.quantizer import VectorQuantizer


class Reconstruction(NamedTuple):
    """What the autoencoder gives."""

    images: Tensor  # in the shape of the inputs
    indices: Tensor  # [N, height, width] the codes of the grid
    losses: Tensor  # [N] the quantiser's own


class Autoencoder(nn.Module):
    """x [N, …] of `shape` (channels, height, width) -> Reconstruction; rows of numbers are read as such images.

    Args:
        hidden: channels inside, >= 1.
        halvings: of the side, >= 0; both sides must be multiples of 2 to this power.
    """

    def __init__(self, shape: tuple[int, int, int], quantizer: VectorQuantizer, *, hidden: int, halvings: int):
        super().__init__()
        require(isinstance(hidden, int) and hidden >= 1, "hidden", hidden, "a whole number >= 1")
        fits = isinstance(halvings, int) and halvings >= 0 and all(side % 2**halvings == 0 for side in shape[1:])
        require(fits, "halvings", halvings, f"a whole number >= 0 that leaves whole sides of {shape[1]} x {shape[2]} pixels")
        self.shape, channels = shape, shape[0]
        down: list[nn.Module] = []
        for number in range(halvings):
            down += [nn.Conv2d(hidden if number else channels, hidden, 3, stride=2, padding=1), nn.ReLU()]
        width = hidden if halvings else channels
        self.encoder = nn.Sequential(*down, nn.Conv2d(width, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, quantizer.dim, 1))
        self.quantizer = quantizer
        up: list[nn.Module] = [nn.Conv2d(quantizer.dim, hidden, 3, padding=1), nn.ReLU()]
        for _ in range(halvings):
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(hidden, hidden, 3, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(*up, nn.Conv2d(hidden, channels, 3, padding=1))

    def encode(self, x: Tensor) -> Tensor:
        """The grid of vectors [N, height, width, D].

        Raises:
            ShapeError: x is no batch of such images.
        """
        if x.ndim < 2 or math.prod(x.shape[1:]) != math.prod(self.shape):
            raise ShapeError(f"the autoencoder was given inputs of shape {tuple(x.shape)}; it reads [examples, {', '.join(map(str, self.shape))}].")
        grid: Tensor = self.encoder(x.reshape(-1, *self.shape))
        return grid.movedim(1, -1)

    def forward(self, x: Tensor) -> Reconstruction:
        values, indices, losses = self.quantizer(self.encode(x))
        images = self.decoder(values.movedim(-1, 1))
        return Reconstruction(images.reshape(x.shape), indices, losses)
