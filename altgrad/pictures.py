"""What a problem shows of itself along a run: PNG files in the run folder, written without any package for it.

pictures/NAME-STEP.png     every picture of Problem.pictures at the start and at every evaluation; one that is as it was at the start is not repeated
"""

import struct
import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from altgrad import durable
from altgrad.errors import ShapeError

if TYPE_CHECKING:
    from altgrad.training import Training

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def save(training: "Training") -> None:
    """Write the pictures of this step to the run folder, if there is one and this rank writes.

    Raises:
        AltgradError: a file cannot be written. ShapeError: what the problem shows is no picture.
    """
    if training.run is None or not training.world.is_main:
        return
    folder = training.run.pictures
    for name, picture in training.problem.pictures(training.values()).items():
        data, first, path = png(picture), folder / f"{name}-{0:06d}.png", folder / f"{name}-{training.step:06d}.png"
        with durable.explained(path, losing="Checkpoints written before stay."):
            folder.mkdir(exist_ok=True)
            if path == first or not first.exists() or first.read_bytes() != data:
                durable.replace(path, data)


def png(picture: Tensor) -> bytes:
    """`picture` [H, W, 3], colours in [0, 1] (cut off there; NaN as 0), as the bytes of a PNG file of 8 bits a channel.

    Raises:
        ShapeError: it is no picture.
    """
    if not isinstance(picture, Tensor) or picture.ndim != 3 or picture.shape[-1] != 3 or not picture.is_floating_point():
        seen = f"{picture.dtype} of shape {tuple(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
        raise ShapeError(f"a picture is {seen}; it must be a float tensor [height, width, 3] with colours in [0, 1].")
    height, width, _ = picture.shape
    colours = (picture.detach().cpu().float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), colours.flatten(1)], 1)  # each row starts with its filter: 0, none
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, true colour
    body = zlib.compress(rows.numpy().tobytes(), 6)
    return SIGNATURE + part(b"IHDR", header) + part(b"IDAT", body) + part(b"IEND", b"")


def part(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file: length, kind, data, checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


__all__ = ["png", "save"]
