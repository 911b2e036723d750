r"""Which pixels each vertex and each texel can reach, from the geometry before anything is perturbed.

All vertices may move at once, each by at most ρ pixels in x and in y. A triangle t then stays within t ⊕ [-ρ, ρ]² (a point of it is a mean of its
corners, and moves no farther than they do), and it goes on covering p as long as p ± ρ was inside it (its points move continuously and none by more
than ρ: Brouwer). So, whatever the signs,

    t can cover p      only where p ∈ t ⊕ [-ρ, ρ]²        edge functions e_k(p) + ρ(|A_k| + |B_k|) ≥ 0, and p in t's box grown by ρ
    t can be seen at p only where no nearer triangle is sure to cover p
    what is read at p  lies within  uv(p) ± ρ(|∂uv/∂x| + |∂uv/∂y|),  and within t's part of the texture

A vertex reaches the pixels at which one of its triangles can be seen, a texel those that can read it. Nothing is missing for ρ at least the largest
move, and where no tile's list is full; what is too much costs variance, never the mean.

Source: the ID and UV buffers of Deliot, Heitz, Belcour, I3D 2024, arXiv 2404.09758, section 3; here grown so that the map is exact.
"""

import torch
from torch import Tensor

from altgrad.raster.render import Renderer, texel

SLACK = 1e-3  # pixels: rounding moves an edge by a hundredth of it
SURE = 0.05  # pixels: what is sure to cover a pixel is also sure to be large enough to be drawn


class Reach:
    """Where each triangle can be seen while the corners `vertices` [V, 2] (pixels) move by at most `move` pixels in x and in y."""

    def __init__(self, renderer: Renderer, vertices: Tensor, *, move: float):
        self.renderer, self.move = renderer, move + SLACK
        self.vertices, self.planes = vertices, renderer.planes(vertices)
        touching = renderer.touching(vertices, self.planes, margin=self.move)
        self.fullest = int(touching.sum(1).max())
        self.triangles, taken = renderer.listed(touching, max(1, min(self.fullest, renderer.count)))
        self.tile, self.place, self.row, self.column = self.seen(taken).nonzero(as_tuple=True)  # [E] each: a triangle and a pixel it can be seen at
        self.triangle = self.triangles[self.tile, self.place]  # [E]
        across, side = renderer.across, renderer.size // renderer.across
        self.pixel = (self.tile // across * side + self.row) * renderer.size + self.tile % across * side + self.column

    def seen(self, taken: Tensor) -> Tensor:
        """Which listed triangles can be seen where, [tiles, capacity, TILE, TILE] bool."""
        renderer, mesh = self.renderer, self.renderer.mesh
        edges = renderer.on_tiles(self.planes.edges, self.triangles)  # [tiles, capacity, 3, 3]
        slopes = edges[..., :2].abs().sum(-1)[..., None, None]  # what an edge function changes by, a pixel in x and in y
        values = renderer.over(edges)  # [tiles, capacity, 3, TILE, TILE]
        corners = self.vertices[mesh.triangles]
        low = renderer.origins[:, None] - (corners.amin(1) - self.move)[self.triangles]  # [tiles, capacity, 2]: the first pixel, from the box's start
        high = (corners.amax(1) + self.move)[self.triangles] - renderer.origins[:, None]
        step = renderer.within.double()
        inside = ((low[..., None] + step) >= 0) & (step <= high[..., None])  # [tiles, capacity, 2, TILE]
        possible = (values + self.move * slopes >= 0).all(2) & inside[..., 0, None, :] & inside[..., 1, :, None] & taken[..., None, None]
        sure = (values - max(2 * self.move, self.move + SURE) * slopes >= 0).all(2) & (taken & self.planes.drawn[self.triangles])[..., None, None]
        depths = mesh.depth[mesh.triangles]  # [T, 3]; between its corners a triangle is nowhere nearer or farther than they are
        farthest = depths.amax(1)[self.triangles][..., None, None]
        front = torch.where(sure, farthest, torch.inf).amin(1, keepdim=True)
        return possible & (depths.amin(1)[self.triangles][..., None, None] <= front)

    def of_vertices(self) -> tuple[Tensor, Tensor]:
        """Pairs (vertex, pixel) [M] int64, none twice."""
        pixels = self.renderer.size**2
        corners = self.renderer.mesh.triangles[self.triangle]  # [E, 3]
        mask = torch.zeros(len(self.vertices) * pixels, dtype=torch.bool, device=self.vertices.device)
        mask[(corners * pixels + self.pixel[:, None]).flatten()] = True
        found = mask.nonzero().squeeze(1)
        return found // pixels, found % pixels

    def of_texels(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Pairs (texel, pixel) [M] int64, the texel's number being row · width + column; a pair can come twice where two triangles meet."""
        renderer = self.renderer
        size = torch.tensor([width, height], device=self.vertices.device)
        slope_x, slope_y, offset = renderer.on_tiles(self.planes.uv, self.triangles)[self.tile, self.place].unbind(-1)  # [E, 2] each
        centre = slope_x * self.column[:, None] + slope_y * self.row[:, None] + offset
        spread = self.move * (slope_x.abs() + slope_y.abs()) + SLACK / size
        chart = renderer.mesh.uv[renderer.mesh.triangles[self.triangle]]  # [E, 3, 2]
        low, high = chart.amin(1) - SLACK / size, chart.amax(1) + SLACK / size
        drawn = self.planes.drawn[self.triangle][:, None]  # of one that is a line by now, any part may be read
        first = torch.where(drawn, torch.minimum(torch.maximum(centre - spread, low), high), low)
        last = torch.where(drawn, torch.maximum(torch.minimum(centre + spread, high), low), high)
        reads = 0 if renderer.lookup == "nearest" else 1  # beyond the texel at hand
        start = [texel(first[:, axis] * size[axis] - reads / 2, int(size[axis])) for axis in (0, 1)]
        stop = [texel(last[:, axis] * size[axis] - reads / 2 + reads, int(size[axis])) for axis in (0, 1)]
        across, down = (end - begin + 1 for begin, end in zip(start, stop, strict=True))
        counts = across * down
        entry = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)  # [M]
        number = torch.arange(len(entry), device=counts.device) - (counts.cumsum(0) - counts)[entry]  # within the entry's rectangle
        column = start[0][entry] + number % across[entry]
        row = start[1][entry] + number // across[entry]
        return row * width + column, self.pixel[entry]


__all__ = ["Reach"]
