"""The shipped scene: a landscape on a grid, and four things in front of it, one texture for all; the same at every resolution.

The texture holds the background in its upper three quarters and the things side by side below.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.raster.render import Mesh

HORIZON = 0.75  # the background's share of the texture's height
BORDER = 0.06  # how far the background reaches beyond the image, so that a moved corner bares nothing


class Scene(NamedTuple):
    """A mesh and where its vertices belong."""

    mesh: Mesh
    vertices: Tensor  # [V, 2] in [0, 1] of the image
    triangles_of: dict[str, slice]  # by the name of the thing


class Thing(NamedTuple):
    """One part of the scene, with places of its own in [-1, 1]²."""

    outline: Tensor  # [n, 2]: joined to a fan about the origin
    centre: tuple[float, float]  # in the image
    radius: float
    depth: float


def circle(count: int, *, turn: float = 0.0) -> Tensor:
    """`count` places on the unit circle."""
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count) + turn
    return torch.stack([angle.cos(), angle.sin()], 1)


def star(points: int) -> Tensor:
    """A star of so many points."""
    length = torch.tensor([1.0, 0.45], dtype=torch.float64).repeat(points)
    return circle(2 * points, turn=-math.pi / 2) * length[:, None]


THINGS = {
    "star": Thing(star(5), (0.36, 0.60), 0.17, 0.2),
    "tile": Thing(circle(4, turn=0.35), (0.70, 0.66), 0.19, 0.4),
    "ball": Thing(circle(14), (0.50, 0.36), 0.18, 0.6),
    "leaf": Thing(circle(6) * torch.tensor([0.7, 1.0], dtype=torch.float64), (0.20, 0.28), 0.14, 0.8),
}


def scene(cells: int) -> Scene:
    """The things, nearest first, and behind them the background as a grid of `cells` × `cells` squares, two triangles each."""
    vertices, uv, depth, triangles, triangles_of = [], [], [], [], {}
    count = first = 0
    for place, (name, thing) in enumerate(THINGS.items()):
        own = torch.cat([torch.zeros(1, 2, dtype=torch.float64), thing.outline])
        rim = torch.arange(1, len(own))
        fan = torch.stack([torch.zeros_like(rim), rim, rim.roll(-1)], 1)
        chart = (0.5 + 0.47 * own) / torch.tensor([len(THINGS), 1 / (1 - HORIZON)], dtype=torch.float64)
        vertices.append(torch.tensor(thing.centre, dtype=torch.float64) + thing.radius * own)
        uv.append(chart + torch.tensor([place / len(THINGS), HORIZON], dtype=torch.float64))
        depth.append(torch.full((len(own),), thing.depth, dtype=torch.float64))
        triangles.append(fan + count)
        triangles_of[name] = slice(first, first + len(fan))
        count, first = count + len(own), first + len(fan)
    line = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    down, right = torch.meshgrid(line, line, indexing="ij")
    grid = torch.stack([right.flatten(), down.flatten()], 1)  # [(cells + 1)², 2]
    corner = (torch.arange(cells)[:, None] * (cells + 1) + torch.arange(cells)).flatten()
    squares = torch.stack([corner, corner + 1, corner + cells + 1, corner + 1, corner + cells + 2, corner + cells + 1], 1)
    vertices.append(grid * (1 + 2 * BORDER) - BORDER)
    uv.append(grid * torch.tensor([1, HORIZON], dtype=torch.float64))
    depth.append(torch.ones(len(grid), dtype=torch.float64))
    triangles.append(squares.reshape(-1, 3) + count)
    triangles_of["background"] = slice(first, first + 2 * cells * cells)
    mesh = Mesh(torch.cat(triangles), torch.cat(uv).float(), torch.cat(depth).float())
    return Scene(mesh, torch.cat(vertices).float(), triangles_of)


def painted(texels: int) -> Tensor:
    """The texture that the scene is painted with, [texels, texels, 3] in [0, 1]."""
    line = (torch.arange(texels, dtype=torch.float64) + 0.5) / texels
    v, u = torch.meshgrid(line, line, indexing="ij")
    high = v / HORIZON  # 0 at the top of the background, 1 at its foot
    hills = 0.62 + 0.06 * torch.sin(9 * u) + 0.03 * torch.sin(23 * u + 1)
    sky = mix((0.25, 0.45, 0.85), (0.95, 0.80, 0.60), high / 0.7)
    grass = mix((0.20, 0.50, 0.20), (0.55, 0.70, 0.30), 0.5 + 0.5 * torch.sin(40 * u + 12 * torch.sin(15 * high)))
    colour = torch.where((high > hills)[..., None], grass, sky)
    x, y = 2 * torch.remainder(u * len(THINGS), 1) - 1, 2 * (v - HORIZON) / (1 - HORIZON) - 1  # in [-1, 1] on a thing's own part
    radius = torch.sqrt(x * x + y * y)
    coats = [
        mix((1.00, 0.85, 0.20), (0.85, 0.30, 0.10), radius),
        mix((0.90, 0.90, 0.90), (0.15, 0.20, 0.45), (torch.remainder((3 * x).floor() + (3 * y).floor(), 2) > 0).double()),
        mix((0.85, 0.15, 0.20), (1.00, 0.95, 0.90), (torch.sin(12 * y + 3 * x) > 0).double()),
        mix((0.10, 0.35, 0.15), (0.50, 0.75, 0.25), 0.5 + 0.5 * torch.cos(14 * x) * torch.cos(6 * y)),
    ]
    part = (u * len(THINGS)).long().clamp(0, len(THINGS) - 1)
    for place, coat in enumerate(coats):
        colour = torch.where(((v >= HORIZON) & (part == place))[..., None], coat, colour)
    return colour.clamp(0, 1).float()


def mix(low: tuple[float, float, float], high: tuple[float, float, float], share: Tensor) -> Tensor:
    """From the colour `low` to the colour `high`, [..., 3]."""
    first, last = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    return first + (last - first) * share.clamp(0, 1)[..., None]


__all__ = ["THINGS", "Scene", "painted", "scene"]
