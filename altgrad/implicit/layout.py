"""A pytree as one tensor [*batch, n] and back: what the solvers see of the unknown."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from altgrad.errors import ShapeError, require

SINGLE = tree_flatten(torch.empty(0))[1]  # the structure of a tensor by itself


class Layout:
    """The shape of an unknown.

    Args:
        unknown: a pytree of float32 or float64 tensors of one dtype.
        batch_dims: how many first axes are examples; every leaf has the same ones.

    Errors: ShapeError naming the leaf that will not do.
    """

    def __init__(self, unknown: Any, batch_dims: int):
        require(isinstance(batch_dims, int) and batch_dims >= 0, "batch_dims", batch_dims, "a whole number, 0 or more")
        leaves, self.spec = ([unknown], SINGLE) if isinstance(unknown, Tensor) else tree_flatten(unknown)
        if not leaves:
            raise ShapeError("the unknown x0 holds no tensor; give a float tensor, or a pytree of them.")
        for index, leaf in enumerate(leaves):
            seen = str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
            if not isinstance(leaf, Tensor) or leaf.dtype not in (torch.float32, torch.float64):
                raise ShapeError(f"leaf {index} of the unknown x0 is {seen}; every leaf must be a float32 or float64 tensor: x0 = x0.double(), say.")
            if leaf.dtype != leaves[0].dtype:
                raise ShapeError(f"leaf {index} of the unknown x0 is {seen} and leaf 0 is {leaves[0].dtype}; they are solved as one vector: use one dtype.")
            if leaf.dim() < batch_dims or leaf.shape[:batch_dims] != leaves[0].shape[:batch_dims]:
                raise ShapeError(
                    f"leaf {index} of the unknown x0 is {tuple(leaf.shape)} and leaf 0 is {tuple(leaves[0].shape)}; with batch_dims={batch_dims} they must "
                    "share that many first axes."
                )
        self.shapes = [leaf.shape for leaf in leaves]
        self.batch = self.shapes[0][:batch_dims]
        self.sizes = [leaf.shape[batch_dims:].numel() for leaf in leaves]
        self.flat_shape = torch.Size((*self.batch, sum(self.sizes)))
        self.dtype = leaves[0].dtype

    def flat(self, tree: Any) -> Tensor:
        """[*batch, n]."""
        if isinstance(tree, Tensor):
            return tree if tree.shape == self.flat_shape else tree.reshape(self.flat_shape)
        leaves = tree_flatten(tree)[0]
        return torch.cat([leaf.reshape(*self.batch, size) for leaf, size in zip(leaves, self.sizes, strict=True)], -1)

    def tree(self, flat: Tensor) -> Any:
        if self.spec is SINGLE:
            return flat if flat.shape == self.shapes[0] else flat.reshape(self.shapes[0])
        return tree_unflatten([part.reshape(shape) for part, shape in zip(flat.split(self.sizes, -1), self.shapes, strict=True)], self.spec)

    def check(self, tree: Any, what: str) -> None:
        """ShapeError unless `tree`, the output named `what`, has the unknown's structure, shapes and dtype."""
        leaves, spec = ([tree], SINGLE) if isinstance(tree, Tensor) else tree_flatten(tree)
        if spec != self.spec:
            raise ShapeError(f"{what} returned {described(spec)}; it must return what the unknown is: {described(self.spec)}.")
        for index, (leaf, shape) in enumerate(zip(leaves, self.shapes, strict=True)):
            if not isinstance(leaf, Tensor) or leaf.shape != shape or leaf.dtype != self.dtype:
                seen = f"{tuple(leaf.shape)} of {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ShapeError(
                    f"{what} returned {seen} for leaf {index} of the unknown, which is {tuple(shape)} of {self.dtype}; there must be one "
                    "equation for each unknown."
                )


def described(spec: TreeSpec) -> str:
    return f"a pytree of {spec.num_leaves} leaves ({spec.type.__name__ if spec.type else 'a single leaf'})"
