"""Tangents made a few members at a time, just before a layer multiplies them: they stay in the processor's cache, and no pass over all K is paid.

What a layer's rank-1 noise does to its output is an outer product, and what relu does to a tangent is a mask: both cost less to make
again than to read from memory. Whatever else asks for such a tangent gets all of it, made at once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from altgrad.kernels import scratch

BLOCK = 1 << 20  # bytes of tangents at once: they stay in the second-level cache, and are rows enough for the matrix product's own blocking
NARROW = 16  # outputs below which W ẋᵀ is faster than ẋ Wᵀ (0.5 against 0.75 ms for 10 outputs of 4096 rows of 256)


class Lazy:
    """K tangents of `shape` [K, *shape], not made yet; what they are made from must not be written to while they wait (see `Trace.make`)."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = shape, dtype, device

    def write(self, low: int, high: int, out: Tensor) -> None:
        """Members [low, high) into out [high - low, *shape]."""
        raise NotImplementedError

    def whole(self) -> Tensor:
        """All of them, [K, *shape]."""
        out = scratch.empty(self.shape, self.dtype, self.device)
        for low, high in self.spans():
            self.write(low, high, out[low:high])
        return out

    def spans(self) -> Iterator[tuple[int, int]]:
        """[low, high) of the blocks in which the members are best made."""
        members = self.shape[0]
        step = members if self.device.type != "cpu" else max(1, BLOCK // max(1, self.shape[1:].numel() * self.dtype.itemsize))
        for low in range(0, members, step):
            yield low, min(low + step, members)


class Copied(Lazy):
    """Tangents that another owns and reads again: a copy, so that whoever gets them may write."""

    def __init__(self, base: Tensor):
        super().__init__(base.shape, base.dtype, base.device)
        self.base = base

    def write(self, low: int, high: int, out: Tensor) -> None:
        out.copy_(self.base[low:high])


class Outer(Lazy):
    """shift_k + s_k a_kᵀ: what a low-rank move of the weights, and one of the bias, do to a layer's output.

    Args:
        inner: s [K, rows, r]; left: aᵀ [K, r, out]; shift [K, 1, out], or None.
        shape: [K, ..., out] with `rows` between.
    """

    def __init__(self, inner: Tensor, left: Tensor, shift: Tensor | None, shape: torch.Size):
        super().__init__(shape, left.dtype, left.device)
        self.inner, self.left, self.shift = inner, left, shift

    def write(self, low: int, high: int, out: Tensor) -> None:
        view = out.view(high - low, self.inner.shape[1], self.left.shape[2])
        inner, left = self.inner[low:high], self.left[low:high]
        thin = inner.shape[2] == 1
        if self.shift is None:
            (torch.mul if thin else torch.bmm)(inner, left, out=view)
        else:
            (torch.addcmul if thin else torch.baddbmm)(self.shift[low:high], inner, left, out=view)


class Masked(Lazy):
    """A tangent where relu let its value through, else 0.

    Args:
        base: the tangents before relu, [K, *shape].
        value: what relu put out, [*shape].
    """

    def __init__(self, base: Tensor | Lazy, value: Tensor):
        super().__init__(torch.Size(base.shape), base.dtype, base.device)
        self.base, self.value = base, value

    def write(self, low: int, high: int, out: Tensor) -> None:
        source = self.base.base if isinstance(self.base, Copied) else self.base  # what is only read needs no copy
        if isinstance(source, Lazy):
            source.write(low, high, out)
        rows = out if isinstance(source, Lazy) else source[low:high]
        torch.ops.aten.threshold_backward.grad_input(rows, self.value.expand_as(rows), 0, grad_input=out)


def multiply(tangents: Lazy, weight: Tensor, start: Tensor | Lazy | None) -> Tensor:
    """start + ẋ Wᵀ for waiting ẋ [K, ..., in] -> [K, ..., out]; into `start` itself where that is a tensor."""
    width = weight.shape[0]
    result = start if isinstance(start, Tensor) else scratch.empty((*tangents.shape[:-1], width), tangents.dtype, tangents.device)
    room: Tensor | None = None
    for low, high in tangents.spans():
        room = torch.empty((high - low, *tangents.shape[1:]), dtype=tangents.dtype, device=tangents.device) if room is None else room
        rows, part = room[: high - low], result[low:high]
        tangents.write(low, high, rows)
        flat, view = rows.view(-1, weight.shape[1]), part.view(-1, width)
        if start is None:
            torch.mm(flat, weight.T, out=view)
            continue
        if isinstance(start, Lazy):
            start.write(low, high, part)
        if width < NARROW:
            view.add_(torch.mm(weight, flat.T).T)
        else:
            view.addmm_(flat, weight.T)
    return result
