"""A small rasteriser in plain tensors, without a derivative anywhere: triangles, a z-buffer, a texture; and which pixel each parameter can reach."""

from altgrad.raster.render import Buffers, Mesh, Renderer

__all__ = ["Buffers", "Mesh", "Renderer"]
