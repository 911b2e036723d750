"""Labels made wrong on purpose."""

import torch
from torch import Tensor

from altgrad.rng import Key, integers, permutation, tensor_id


def corrupted_labels(labels: Tensor, share: float, classes: int, key: Key) -> tuple[Tensor, Tensor]:
    """(labels of which round(share · n) are replaced by another class, each with equal probability; bool [n], which), both functions of `key`.

    Args:
        labels: [n] in 0 … classes - 1.
        share: in [0, 1].
        classes: 2 or more.
    """
    count = len(labels)
    corrupted = torch.zeros(count, dtype=torch.bool)
    corrupted[torch.from_numpy(permutation(key, "which", count).copy())[: round(share * count)]] = True
    moved = torch.from_numpy(integers(key, tensor_id("labels"), [0], count)[0].astype("int64")) % (classes - 1) + 1  # 1 … classes - 1: never its own
    return torch.where(corrupted, (labels + moved) % classes, labels), corrupted
