"""The derivative of a residual at a point, as products with its Jacobian: A v, Aᵀ v and, where it is small, A itself."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = Callable[[Tensor], Tensor]


def no_saved_hooks() -> AbstractContextManager[None]:
    """Without the saved-tensor hooks of a caller (checkpointing, offloading, counting), which torch.func refuses; for passes whose graph stays inside."""
    return nullcontext() if torch._C._autograd._top_saved_tensors_default_hooks(True) is None else hooks_aside()


@contextmanager
def hooks_aside() -> Iterator[None]:
    machinery, hooks = torch._C._autograd, []
    while (top := machinery._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        machinery._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            machinery._push_saved_tensors_default_hooks(pack, unpack)


def first_order() -> bool:
    """Whether nothing differentiates or maps what happens here, so that a tape of its own will do, which costs a tenth of torch.func's."""
    return not torch.is_grad_enabled() and torch._C._functorch.maybe_current_level() is None and forward_ad._current_level < 0


def pullback(function: Callable, *points: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """(f(x), u -> Aᵀ u); a point that f does not use gives zeros."""
    if first_order():
        leaves, value = taped(function, *points)
        return value.detach(), lambda u: swept(value, leaves, u)
    value, pull = torch.func.vjp(function, *points)[:2]
    return value, pull


def taped(function: Callable, *points: Tensor) -> tuple[list[Tensor], Tensor]:
    """(leaves, f(leaves)) with the graph between them."""
    leaves = [point.detach().requires_grad_() for point in points]
    with torch.enable_grad():
        return leaves, function(*leaves)


def swept(value: Tensor, leaves: Sequence[Tensor], u: Tensor) -> tuple[Tensor, ...]:
    """Aᵀ u by a reverse pass over a tape."""
    if not value.requires_grad:
        return tuple([leaf.new_zeros(leaf.shape) for leaf in leaves])
    # What torch.autograd.grad does behind its checks, which cost as much as the pass itself for a small system.
    found = torch.autograd.Variable._execution_engine.run_backward((value,), (u,), True, False, tuple(leaves), allow_unreachable=True, accumulate_grad=False)
    return tuple([leaf.new_zeros(leaf.shape) if one is None else one for one, leaf in zip(found, leaves, strict=True)])


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
        tape: (leaves, F) where F has been taped already, its first leaf being x.
    """

    def __init__(self, function: Function, point: Tensor, *, columns: int = 0, tape: tuple[list[Tensor], Tensor] | None = None):
        self.point, self.columns = point, columns
        self.tape = taped(function, point) if tape is None and first_order() else tape
        if self.tape is not None:
            value, leaves = self.tape[1], self.tape[0][:1]
            self.value, self.pull = value.detach(), lambda u: swept(value, leaves, u)
        else:
            self.value, self.pull = torch.func.vjp(function, point)[:2]

    @cached_property
    def push(self) -> Callable[[Tensor], tuple[Tensor, ...]]:
        if self.tape is not None:
            leaves, value = self.tape[0][:1], self.tape[1]
            if not value.requires_grad:
                return lambda v: (torch.zeros_like(v),)
            with torch.enable_grad():
                u = torch.zeros_like(value).requires_grad_()
                (linear,) = torch.autograd.grad(value, leaves, u, create_graph=True, allow_unused=True)
            return lambda v: swept(linear, [u], v) if linear is not None else (torch.zeros_like(v),)
        return torch.func.vjp(lambda u: self.pull(u)[0], torch.zeros_like(self.value))[1]

    def product(self, v: Tensor) -> Tensor:
        """A v."""
        if self.columns == 0:
            return self.push(v)[0]
        push = self.push  # made here: not under the vmap
        return over_columns(lambda one: push(one)[0], self.columns)(v)

    def transposed(self, u: Tensor) -> Tensor:
        """Aᵀ u."""
        if self.columns == 0:
            return self.pull(u)[0]
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
