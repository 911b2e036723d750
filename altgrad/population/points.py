"""Members given as points of the parameters' space, in place of noise about its middle."""

import numpy as np
import torch

from altgrad.engine import Tree
from altgrad.population.draws import Chunk, Draws


class Space:
    """Tensors by name as one vector [n] of float64, and back."""

    def __init__(self, params: Tree):
        self.params, self.sizes = params, [value.numel() for value in params.values()]
        self.size = sum(self.sizes)
        self.rounding = max(torch.finfo(value.dtype).eps for value in params.values())

    def vector(self) -> np.ndarray:
        """The parameters, [n]."""
        return torch.cat([value.detach().reshape(-1).cpu().double() for value in self.params.values()]).numpy()

    def trees(self, rows: np.ndarray) -> Tree:
        """[P, n] as tensors [P, *shape] in the parameters' dtypes."""
        parts = torch.from_numpy(rows).split(self.sizes, 1)
        return {name: part.to(value).reshape(len(rows), *value.shape) for part, (name, value) in zip(parts, self.params.items(), strict=True)}

    def moves(self, goal: np.ndarray) -> Tree:
        """θ - goal, the differences taken in float64."""
        apart = torch.from_numpy(self.vector() - goal).split(self.sizes)
        return {name: part.to(value).reshape(value.shape) for part, (name, value) in zip(apart, self.params.items(), strict=True)}


class Points(Draws):
    """Members that stand at the points `rows` [λ, n] of `space`; `chunk` of them are evaluated at once."""

    def __init__(self, space: Space, rows: np.ndarray, *, chunk: int | None = None):
        self.space, self.rows, self.params, self.count = space, rows, space.params, len(rows)
        self.antithetic, self.size = False, min(chunk or self.count, self.count)

    def chunk(self, first: int, count: int) -> Chunk:
        """These members' parameters, written out."""
        return Chunk(first, count, {}, self.space.trees(self.rows[first : first + count]))
