"""Losses whose tangent is worth a rule of its own: no temporaries of the size of K outputs, no transform overhead."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from altgrad.forward_mode.dual import Dual, Trace, primal_of
from altgrad.forward_mode.ladder import lift
from altgrad.forward_mode.rules import rule


@rule(F.cross_entropy)
def cross_entropy(
    trace: Trace,
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """D(-log softmax(z)_y)[ż] = ⟨softmax(z) - e_y, ż⟩ for class labels y; anything more elaborate goes to PyTorch's formula."""
    labels = isinstance(target, Tensor) and not isinstance(target, Dual) and target.ndim == 1 and not target.is_floating_point()
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0 and reduction in {"none", "mean", "sum"}
    if not (labels and plain and isinstance(input, Dual) and input.primal.ndim == 2) or bool((target == ignore_index).any()):
        rest = (target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        return lift(trace, F.cross_entropy, (input, *rest), {})
    value = F.cross_entropy(primal_of(input), target, reduction="none")  # [N]
    slope = torch.softmax(input.primal, 1)
    slope.scatter_add_(1, target[:, None], slope.new_full((1, 1), -1.0).expand(len(target), 1))  # [N, classes]
    moved = torch.matmul(input.tangent.transpose(0, 1).to(slope.dtype), slope[:, :, None])[:, :, 0].T.to(value.dtype)  # [K, N]
    if reduction == "none":
        return Dual(value, moved, trace)
    return Dual(value.mean(), moved.mean(1), trace) if reduction == "mean" else Dual(value.sum(), moved.sum(1), trace)
