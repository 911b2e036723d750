"""Large CPU buffers used again: tangents of K members are megabytes that every layer would ask the system for, and return, each step.

A fresh page costs about as much as the arithmetic done on it. A buffer is free when nothing but this pool holds its storage; buffers
that a whole round of steps did not use are dropped. CUDA has an allocator of its own that does this.
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes: below this the C allocator keeps pages itself
LARGEST = 1 << 29  # bytes kept in all
ALONE = 2  # the pool's tensor and the wrapper made to ask

use_count = getattr(torch._C, "_storage_Use_Count", None)


class Pool(threading.local):
    """The buffers of one thread: bytes -> tensors of that many bytes, with the round each was last used in."""

    def __init__(self) -> None:
        self.buffers: dict[int, list[list]] = {}
        self.held = 0
        self.round = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape)
        count = size.numel() * dtype.itemsize
        if device.type != "cpu" or count < SMALLEST or use_count is None:
            return torch.empty(size, dtype=dtype, device=device)
        for entry in self.buffers.get(count, ()):
            if use_count(entry[0].untyped_storage()._cdata) == ALONE:
                entry[1] = self.round
                return entry[0].view(dtype).view(size)
        if self.held + count > LARGEST:
            return torch.empty(size, dtype=dtype, device=device)
        buffer = torch.empty(count, dtype=torch.uint8)
        self.buffers.setdefault(count, []).append([buffer, self.round])
        self.held += count
        return buffer.view(dtype).view(size)

    def turn(self) -> None:
        """A step has ended: drop what neither it nor the one before used."""
        for count in list(self.buffers):
            kept = [entry for entry in self.buffers[count] if entry[1] >= self.round - 1]
            self.held -= count * (len(self.buffers[count]) - len(kept))
            self.buffers[count] = kept
            if not kept:
                del self.buffers[count]
        self.round += 1


POOL = Pool()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor, from the pool where it is large and on the CPU."""
    return POOL.empty(shape, dtype, device)


def turn() -> None:
    """Call at the end of a step."""
    POOL.turn()


def clear() -> None:
    """Forget every buffer (before memory is measured, say)."""
    POOL.buffers.clear()
    POOL.held = 0
