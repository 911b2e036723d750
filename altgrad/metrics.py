"""What a piece of code costs: bytes saved for a backward sweep, bytes alive at its peak, floating-point operations."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from altgrad.kernels import scratch


@dataclass
class Meter:
    """Bytes counted inside a `with` block; `peak` is the most that was alive at once, `total` all that was ever counted."""

    peak: int = 0
    total: int = 0
    live: int = 0
    events: list[tuple[int, int]] = field(default_factory=list, repr=False)  # (serial number of a storage, ±bytes) in order
    alive: dict[int, tuple[StorageWeakRef, int, int]] = field(default_factory=dict, repr=False)  # address -> reference, bytes, serial number

    def peak_without(self, tensors: Iterable[Tensor]) -> int:
        """The peak, had the storages of `tensors` (gradients, say; still alive) not counted."""
        skip = {self.alive[handle][2] for tensor in tensors if (handle := tensor.untyped_storage()._cdata) in self.alive}
        live = peak = 0
        for handle, size in self.events:
            if handle not in skip:
                live += size
                peak = max(peak, live)
        return peak


@contextmanager
def saved_bytes(exclude: Iterable[Tensor] = ()) -> Iterator[Meter]:
    """Bytes that autograd keeps for a backward sweep (saved_tensors_hooks), those of `exclude` (parameters, inputs) not counted.

    Storage that is saved more than once counts once while it is alive.
    """
    meter, skip = Meter(), {tensor.untyped_storage().data_ptr() for tensor in exclude}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer not in skip:
            size = storage.nbytes()
            if pointer not in held:
                meter.live += size
                meter.total += size
            held[pointer] = held.get(pointer, 0) + 1
            meter.peak = max(meter.peak, meter.live)
            weakref.finalize(tensor, release, pointer, size)
        return tensor

    def release(pointer: int, size: int) -> None:
        held[pointer] -= 1
        if not held[pointer]:
            del held[pointer]
            meter.live -= size

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield meter


class LiveTensors(TorchDispatchMode):
    """Counts the storages that operations make while the mode is on, from their making until they are freed."""

    def __init__(self, exclude: Iterable[Tensor] = ()):
        super().__init__()
        self.meter = Meter()
        self.before: dict[int, StorageWeakRef] = {}  # storages that were there before the mode was on
        self.alive = self.meter.alive
        self.made = 0
        for tensor in exclude:
            self.note_before(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(args):  # what the operation was given was there before it
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:  # a sparse tensor's parts have been met as tensors of their own
                self.note_before(leaf)
        for handle in [handle for handle, (reference, *_) in self.alive.items() if reference.expired()]:
            _, size, serial = self.alive.pop(handle)
            self.meter.live -= size
            self.meter.events.append((serial, -size))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self.count(leaf)
        self.meter.peak = max(self.meter.peak, self.meter.live)
        return result

    def note_before(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive and storage._cdata not in self.before:
            self.before[storage._cdata] = StorageWeakRef(storage)  # which also keeps the address from being used again

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.before or storage._cdata in self.alive:
            return
        size = storage.nbytes()
        self.made += 1  # an address may be used again, a serial number is not
        self.alive[storage._cdata] = StorageWeakRef(storage), size, self.made
        self.meter.live += size
        self.meter.total += size
        self.meter.events.append((self.made, size))


@contextmanager
def live_bytes(exclude: Iterable[Tensor] = ()) -> Iterator[Meter]:
    """Bytes of tensors made inside the block and alive at once, those of `exclude` (parameters, gradients) not counted."""
    scratch.clear()  # buffers made before would not be seen
    mode = LiveTensors(exclude)
    with mode:
        yield mode.meter


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions in `function()`."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
