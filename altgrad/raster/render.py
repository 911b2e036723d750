r"""Triangles to pixels: an ID buffer and a UV buffer, by edge functions and a z-buffer; hard edges, nothing to differentiate.

    e_k(p) = A_k x + B_k y + C_k     twice the area of p and the edge across from corner k, positive inside
    p is covered where all e_k ≥ 0;  u = Σ_k e_k u_k / Σ_k e_k, likewise v and the depth;  the least depth is seen

The image is cut into tiles. Each lists the triangles that touch it (at most `capacity`), so that a pixel looks at a few triangles and not at all.
Shapes never depend on values: torch.func.vmap over the vertices and the texture of a population works. Sums that cancel are made in float64, and
relative to a tile's corner, so that an edge is where it should be to 1e-5 pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TILE = 16  # pixels a side
SMALLEST = 1e-3  # twice the area, in pixels, under which a triangle is not drawn: it would cover no pixel's centre but by rounding
LOOKUPS = ("nearest", "bilinear")


class Mesh(NamedTuple):
    """What joins vertices to triangles; fixed."""

    triangles: Tensor  # [T, 3] int64: the vertices of each, either way round
    uv: Tensor  # [V, 2] in [0, 1]: where each vertex is on the texture, u to the right, v down
    depth: Tensor  # [V]: the least is nearest


class Buffers(NamedTuple):
    """What is seen at each pixel."""

    triangle: Tensor  # [S, S] int64: which triangle; -1 where there is none
    uv: Tensor  # [S, S, 2] in [0, 1]; 0 where there is none


class Planes(NamedTuple):
    """Every triangle's linear functions of the place, A x + B y + C, in float64."""

    edges: Tensor  # [T, 3, 3]: (A, B, C) of the three edge functions
    depth: Tensor  # [T, 3]
    uv: Tensor  # [T, 2, 3]
    drawn: Tensor  # [T] bool: large enough


class Renderer:
    """Renders `mesh` on an image of `size` × `size` pixels.

    Args:
        mesh: the triangles. Where several are equally near, the one that comes first is seen.
        size: pixels, a multiple of TILE. Pixel (row i, column j) is sampled at x = j + 1/2, y = i + 1/2.
        capacity: triangles that a tile can list; more than that and the last of `mesh.triangles` are left out there, so put the nearest first.
        lookup: "nearest" texel or "bilinear".
    """

    def __init__(self, mesh: Mesh, *, size: int, capacity: int = 16, lookup: str = "nearest"):
        self.mesh, self.size, self.lookup = mesh, size, lookup
        self.count = len(mesh.triangles)
        self.capacity = min(capacity, self.count)
        self.across = size // TILE
        starts = torch.arange(self.across, dtype=torch.float64, device=mesh.uv.device) * TILE
        rows, columns = torch.meshgrid(starts, starts, indexing="ij")
        self.origins = torch.stack([columns.flatten(), rows.flatten()], 1) + 0.5  # [tiles, 2]: the first pixel's place (x, y)
        self.within = torch.arange(TILE, dtype=torch.float32, device=mesh.uv.device)

    def planes(self, vertices: Tensor) -> Planes:
        """The linear functions of all triangles with corners `vertices` [V, 2], in pixels."""
        corners = vertices.double()[self.mesh.triangles]  # [T, 3, 2]
        after, last = corners.roll(-1, 1), corners.roll(-2, 1)
        x, y = after.unbind(-1)
        far_x, far_y = last.unbind(-1)
        edges = torch.stack([y - far_y, far_x - x, x * far_y - far_x * y], -1)  # [T, 3, 3]
        side, other = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
        area = side[:, 0] * other[:, 1] - side[:, 1] * other[:, 0]  # twice, signed
        drawn = area.abs() > SMALLEST
        shares = edges / torch.where(drawn, area, 1.0)[:, None, None]  # barycentric coordinates: their sum is 1
        depth = (shares * self.mesh.depth[self.mesh.triangles].double()[..., None]).sum(1)
        uv = (shares[:, :, None] * self.mesh.uv[self.mesh.triangles].double()[..., None]).sum(1)
        return Planes(edges * area.sign()[:, None, None], depth, uv, drawn)

    def touching(self, vertices: Tensor, planes: Planes, *, margin: float = 0.0) -> Tensor:
        """Which triangles may cover a pixel of each tile, [tiles, T] bool, where their corners are up to `margin` pixels off in x and in y.

        The tile, grown by the margin, is held against the triangle's box and edges: no point in common, and one of these tells them apart.
        """
        corners = vertices.double()[self.mesh.triangles]
        half = (TILE - 1) / 2
        centre = self.origins + half  # [tiles, 2]
        away = half + margin + 1e-3
        low, high = corners.amin(1), corners.amax(1)  # [T, 2]
        near = ((centre[:, None] >= low - away) & (centre[:, None] <= high + away)).all(-1)
        slopes, offsets = planes.edges[..., :2], planes.edges[..., 2]
        greatest = torch.einsum("nx,tkx->ntk", centre, slopes) + offsets + away * slopes.abs().sum(-1)  # of each edge function on the grown tile
        return near & (greatest >= 0).all(-1)

    def listed(self, touching: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """The first `capacity` triangles of each tile [tiles, capacity], in order, and which of these places are taken."""
        places = torch.arange(self.count, 0, -1, dtype=torch.int32, device=touching.device)
        rank = torch.where(touching, places, 0).topk(capacity, -1).values.long()
        return (self.count - rank).clamp(max=self.count - 1), rank > 0

    def on_tiles(self, planes: Tensor, triangles: Tensor) -> Tensor:
        """(A, B, C) [T, …, 3] of the listed triangles, relative to their tile's first pixel: [tiles, capacity, …, 3] in float32."""
        found = planes[triangles]  # [tiles, capacity, …, 3]
        origins = self.origins.reshape(-1, *(1 for _ in range(found.ndim - 2)), 2)
        offset = (found[..., :2] * origins).sum(-1) + found[..., 2]
        return torch.cat([found[..., :2], offset[..., None]], -1).float()

    def over(self, plane: Tensor) -> Tensor:
        """A linear function on the pixels of its tile: [..., 3] to [..., TILE, TILE], rows first."""
        slope_x, slope_y, offset = plane.unbind(-1)
        return (slope_y[..., None] * self.within + offset[..., None])[..., :, None] + (slope_x[..., None] * self.within)[..., None, :]

    def buffers(self, vertices: Tensor) -> Buffers:
        """What is seen of the mesh with corners `vertices` [V, 2], in pixels, x to the right and y down."""
        planes = self.planes(vertices)
        triangles, taken = self.listed(self.touching(vertices, planes), self.capacity)
        taken = taken & planes.drawn[triangles]
        edges = self.on_tiles(planes.edges, triangles)  # [tiles, capacity, 3, 3]
        inside = torch.minimum(torch.minimum(self.over(edges[:, :, 0]), self.over(edges[:, :, 1])), self.over(edges[:, :, 2]))
        depth = self.over(self.on_tiles(planes.depth, triangles))
        depth = torch.where((inside >= 0) & taken[..., None, None], depth, torch.inf)  # [tiles, capacity, TILE, TILE]
        nearest, place = depth.min(1)  # the first of equals
        covered = nearest.isfinite().flatten(1)
        seen = triangles.gather(1, place.flatten(1))  # [tiles, TILE²]
        slope_x, slope_y, offset = self.on_tiles(planes.uv, seen).unbind(-1)  # [tiles, TILE², 2] each
        down, right = self.within.repeat_interleave(TILE)[:, None], self.within.repeat(TILE)[:, None]
        uv = torch.where(covered[..., None], (slope_x * right + slope_y * down + offset).clamp(0, 1), 0.0)
        return Buffers(self.assembled(torch.where(covered, seen, -1)), self.assembled(uv))

    def assembled(self, tiles: Tensor) -> Tensor:
        """[tiles, TILE², …] as an image [S, S, …]."""
        rest = tiles.shape[2:]
        blocks = tiles.reshape(self.across, self.across, TILE, TILE, *rest).transpose(1, 2)
        return blocks.reshape(self.size, self.size, *rest)

    def image(self, vertices: Tensor, texture: Tensor) -> Tensor:
        """The colours [S, S, 3] in [0, 1]: of the texture [H, W, 3] where a triangle is, 0 elsewhere."""
        seen = self.buffers(vertices)
        colour = look_up(texture, seen.uv, lookup=self.lookup)
        return torch.where((seen.triangle >= 0)[..., None], colour.clamp(0, 1), 0.0)


def look_up(texture: Tensor, uv: Tensor, *, lookup: str) -> Tensor:
    """`texture` [H, W, C] at `uv` [..., 2]: the texel there, or the mean of the four nearest, weighted by their nearness."""
    height, width, channels = texture.shape
    flat = texture.reshape(height * width, channels)
    x, y = uv[..., 0] * width, uv[..., 1] * height
    if lookup == "nearest":
        return flat[texel(y, height) * width + texel(x, width)]
    x, y = x - 0.5, y - 0.5
    share_x, share_y = (x - x.floor())[..., None], (y - y.floor())[..., None]
    left, right, top, bottom = texel(x, width), texel(x + 1, width), texel(y, height), texel(y + 1, height)
    upper = flat[top * width + left] * (1 - share_x) + flat[top * width + right] * share_x
    lower = flat[bottom * width + left] * (1 - share_x) + flat[bottom * width + right] * share_x
    return upper * (1 - share_y) + lower * share_y


def texel(place: Tensor, count: int) -> Tensor:
    """The number of the texel at `place`, in texels from the edge; outside, the outermost."""
    return place.floor().long().clamp(0, count - 1)


__all__ = ["LOOKUPS", "TILE", "Buffers", "Mesh", "Planes", "Renderer", "look_up", "texel"]
