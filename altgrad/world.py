"""torch.distributed in one place: who we are among the ranks, and how the ranks agree."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes. The default is one process, which needs no process group and sends nothing."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def from_environment(*, timeout_seconds: float = 60.0, rendezvous: str = "env://") -> "World":
        """The world torchrun describes (RANK, WORLD_SIZE), its process group started if need be; one process otherwise.

        Args:
            timeout_seconds: how long a rank waits for the others before it gives up.
            rendezvous: where the ranks meet; "file:///path" needs no port.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return World()
        if not dist.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, init_method=rendezvous, rank=int(os.environ["RANK"]), world_size=size, timeout=timedelta(seconds=timeout_seconds))
        return World(rank=dist.get_rank(), size=dist.get_world_size())

    def close(self) -> None:
        """Wait for the others, then leave the process group: for the end of a program, so that no rank hangs up while another still reads."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's `tensor`, in the order of ranks; shape and dtype must be the same everywhere."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return parts

    def shares(self, weight: float, *, device: torch.device | str = "cpu") -> list[float]:
        """w_r / Σ w for the weight w_r that every rank gives; the weights are sent once."""
        if self.size == 1:
            return [1.0]
        weights = [float(part) for part in self.gather(torch.tensor(weight, dtype=torch.float64, device=device))]
        return [part / sum(weights) for part in weights]

    def mean(self, tensor: Tensor, *, shares: Sequence[float] | None = None) -> Tensor:
        """Σ_r share_r · tensor_r over the ranks r; every rank gets the same bits, since the parts are gathered and added in rank order.

        Args:
            tensor: of one shape everywhere. Integers come back rounded.
            shares: from `shares`; None for equal ones.
        """
        if self.size == 1:
            return tensor
        shares = shares if shares and len(set(shares)) > 1 else None  # equal ones are divided by exactly
        exact = torch.float64 if not (tensor.is_floating_point() or tensor.is_complex()) else torch.promote_types(tensor.dtype, torch.float32)
        total = torch.zeros_like(tensor, dtype=exact, memory_format=torch.contiguous_format)
        for part, share in zip(self.gather(tensor), shares or [1.0] * self.size, strict=True):
            total += part.to(exact) * share
        total = total if shares else total / self.size
        return total.round().to(tensor.dtype) if exact is torch.float64 and tensor.dtype is not exact else total.to(tensor.dtype)

    def mean_tree(self, tree: Mapping[str, Tensor], *, shares: Sequence[float] | None = None) -> Mapping[str, Tensor]:
        """`mean` of every tensor, in the order of the names; the mapping itself where there is one process."""
        return tree if self.size == 1 else {name: self.mean(tree[name], shares=shares) for name in sorted(tree)}

    def place(self, count: int, *, device: torch.device | str = "cpu") -> int:
        """The global index of this rank's first example, where each rank brings `count` of its own."""
        if self.size == 1:
            return 0
        counts = [int(part) for part in self.gather(torch.tensor(count, device=device))]
        return sum(counts[: self.rank])

    def share(self, count: int) -> range:
        """This rank's contiguous share of `count` items."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)
