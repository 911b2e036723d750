"""The noise of a model's small directions in one draw: many short draws cost more in calls than in numbers."""

from collections.abc import Sequence
from typing import Any

from altgrad.kernels import noise
from altgrad.perturb import SMALL, Dense, LowRank, split
from altgrad.rng import Key, tensor_id


def draw_together(moves: dict[str, Any], key: Key, members: Sequence[int], law: str) -> None:
    """Draw the factors of low-rank directions and dense directions of at most SMALL numbers, and leave them with their owners."""
    groups: dict[Any, list[tuple[Dense | LowRank, tuple[int, tuple[int, ...]]]]] = {}
    for name, move in moves.items():
        if isinstance(move, LowRank) or (isinstance(move, Dense) and len(members) * move.shape.numel() <= SMALL):
            shape = (move.shape[0] + move.shape[1:].numel(), move.rank) if isinstance(move, LowRank) else tuple(move.shape)
            groups.setdefault((move.dtype, move.device), []).append((move, (tensor_id(name), shape)))
    for (dtype, device), group in groups.items():
        drawn = noise.draw_many(law, key, [request for _, request in group], members, dtype=dtype, device=device)
        for (move, _), values in zip(group, drawn, strict=True):
            if isinstance(move, LowRank):
                move.cache = split(values, move.shape[0])
            else:
                move.kept = values
