"""torch.distributed in one place: who we are among the ranks, and how the ranks agree."""

import os
from collections.abc import Mapping
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
    def from_environment(*, timeout_seconds: float = 60.0) -> "World":
        """The world torchrun describes (RANK, WORLD_SIZE), its process group started if need be; one process otherwise."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return World()
        if not dist.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        return World(rank=dist.get_rank(), size=dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of `tensor` over ranks; every rank gets the same bits (gathered, then added in rank order)."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        total = torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        for part in parts:
            total += part
        return (total / self.size).to(tensor.dtype)

    def mean_tree(self, tree: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`mean` of every tensor, in the order of the names; the mapping itself where there is one process."""
        return tree if self.size == 1 else {name: self.mean(tree[name]) for name in sorted(tree)}

    def share(self, count: int) -> range:
        """This rank's contiguous share of `count` items."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)
