"""Which counters a draw needs, as tensors: Philox words 0 (element), 1 (tensor) and 2 (member), in blocks.

The addresses of short draws are the same in every step, so they are kept; long ones are made block by block.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

KEPT = 1 << 14  # counters: plans up to this length (384 KiB) are kept
PLANS = 32  # kept at once


class Part(NamedTuple):
    """Counters first … first + width - 1 of every member, for one tensor."""

    tensor: int
    first: int
    width: int


class Piece(NamedTuple):
    """Counters [low, high) of the members in rows [top, bottom), at `offset` of a block."""

    offset: int
    top: int
    bottom: int
    low: int
    high: int

    @property
    def size(self) -> int:
        return (self.bottom - self.top) * (self.high - self.low)


def pieces(rows: int, width: int, begin: int, end: int, limit: int) -> list[Piece]:
    """Counters [begin, end) of the list of rows · width as rectangles of at most `limit` counters (or one row)."""
    at, found = begin, []
    while at < end:
        row, low = divmod(at, width)
        whole = min(end - at, limit) // width
        if low == 0 and whole:
            found.append(Piece(at - begin, row, row + whole, 0, width))
        else:
            found.append(Piece(at - begin, row, row + 1, low, min(width, low + min(end - at, limit))))
        at += found[-1].size
    return found


def names(members: Sequence[int], device: torch.device) -> Tensor:
    """The members' ids, int64 [members]."""
    if isinstance(members, range):
        return torch.arange(members.start, members.start + members.step * len(members), members.step, device=device)
    return torch.tensor(list(members), dtype=torch.int64, device=device)


def write(counters: Tensor, owners: Tensor, parts: list[Piece], first: int, ids: Tensor) -> None:
    """Fill words 0 (element) and 2 (member) of a block."""
    for offset, top, bottom, low, high in parts:
        end = offset + (bottom - top) * (high - low)
        torch.arange(first + low, first + high, out=counters[offset : offset + high - low])
        if bottom - top > 1:
            grid = counters[offset:end].view(bottom - top, -1)
            grid[1:].copy_(grid[0])
            owners[offset:end].view(bottom - top, -1).copy_(ids[top:bottom, None])
        else:
            owners[offset:end].fill_(ids[top])


def plan(parts: tuple[Part, ...], members: Sequence[int], sizes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """The addresses of several tensors in a row, int64 [3, lanes] (words 0, 1, 2) for each block of `sizes` lanes; zeros after the end.

    Kept from step to step, so nothing may write to them. Under a dispatch mode (fake tensors, say) or in inference mode they are made anew.
    """
    ids = members if isinstance(members, range) else tuple(members)
    if torch._C._len_torch_dispatch_stack() or torch.is_inference_mode_enabled():
        return _plan.__wrapped__(parts, ids, sizes, device)
    return _plan(parts, ids, sizes, device)


@lru_cache(maxsize=PLANS)
def _plan(parts: tuple[Part, ...], members: Sequence[int], sizes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    rows, ids, at = len(members), names(members, device), 0
    table = torch.zeros(3, sum(sizes), dtype=torch.int64, device=device)
    for tensor, first, width in parts:
        end = at + rows * width
        write(table[0, at:end], table[2, at:end], [Piece(0, 0, rows, 0, width)], first, ids)
        table[1, at:end] = tensor
        at = end
    return [block.contiguous() for block in table.split(list(sizes), 1)]


@lru_cache(maxsize=8)
def _base(lanes: int) -> tuple[Tensor, Tensor]:
    return torch.arange(lanes, device="cpu"), torch.zeros(lanes, dtype=torch.int64, device="cpu")


def base(lanes: int) -> tuple[Tensor, Tensor]:
    """0 … lanes - 1 and zeros, int64 on the CPU: the addresses of a block within one member, relative to its start."""
    if torch._C._len_torch_dispatch_stack() or torch.is_inference_mode_enabled():
        return _base.__wrapped__(lanes)
    return _base(lanes)


def blocks(total: int, capacity: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of blocks of `capacity`, the last one shorter."""
    for begin in range(0, total, capacity):
        yield begin, min(begin + capacity, total)
