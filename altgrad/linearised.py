"""The derivative of a residual at a point, as products with its Jacobian: A v, Aᵀ v and, where it is small, A itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


@contextmanager
def no_saved_hooks() -> Iterator[None]:
    """Without the saved-tensor hooks of a caller (checkpointing, offloading, counting), which torch.func refuses; for passes whose graph stays inside."""
    machinery, hooks = torch._C._autograd, []
    while (top := machinery._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        machinery._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            machinery._push_saved_tensors_default_hooks(pack, unpack)


def pullback(function: Callable, *points: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """(f(x), u -> Aᵀ u); a point that f does not use gives zeros."""
    value, pull = torch.func.vjp(function, *points)[:2]
    return value, pull


def pushforward(function: Callable, *points: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """(f(x), v -> A v) by two reverse passes: u -> Aᵀ u is linear, and its transpose is A.

    So f needs no forward-mode formulas, is evaluated once, and forward mode is never nested (PyTorch then loses the outer tangent).
    """
    value, pull = pullback(function, *points)
    push = torch.func.vjp(pull, torch.zeros_like(value))[1]
    return value, lambda *tangents: push(tuple(tangents))[0]


def over_columns(apply: Callable[[Tensor], Tensor], columns: int) -> Callable[[Tensor], Tensor]:
    """`apply` on an argument with that many more axes in front."""
    for _ in range(columns):
        apply = torch.func.vmap(apply)
    return apply


class Linearised:
    """A = dF/dx at x [*batch, n], block by block: A[example] is [n, n], for F under which examples do not mix.

    Args:
        function: x -> F(x), both [*batch, n].
        point: x.
        columns: how many more axes the vectors have in front: [*columns, *batch, n].
    """

    def __init__(self, function: Function, point: Tensor, *, columns: int = 0):
        self.point, self.columns = point, columns
        self.value, self.pull = pullback(function, point)

    @cached_property
    def push(self) -> Callable[[Tensor], tuple[Tensor]]:
        return torch.func.vjp(lambda u: self.pull(u)[0], torch.zeros_like(self.value))[1]

    def product(self, v: Tensor) -> Tensor:
        """A v."""
        return over_columns(lambda one: self.push(one)[0], self.columns)(v)

    def transposed(self, u: Tensor) -> Tensor:
        """Aᵀ u."""
        return over_columns(lambda one: self.pull(one)[0], self.columns)(u)

    def dense(self) -> Tensor:
        """A itself, [*batch, n, n], by n products with Aᵀ in one pass."""
        size, lead = self.point.shape[-1], self.point.shape[:-1]
        eye = torch.eye(size, dtype=self.point.dtype, device=self.point.device)
        rows = eye.reshape(size, *[1] * len(lead), size).expand(size, *lead, size)
        return torch.func.vmap(lambda row: self.pull(row)[0])(rows).movedim(0, -2)


def condition(matrix: Tensor) -> float:
    """The largest 2-norm condition number of a batch of matrices; infinite where one is not finite or exactly singular."""
    if not bool(matrix.isfinite().all()):
        return float("inf")
    values = torch.linalg.svdvals(matrix.detach())
    return float((values[..., 0] / values[..., -1]).nan_to_num(nan=float("inf"), posinf=float("inf")).max())
