r"""Local guesses: at each guided layer, the direction in which a small head of its own would move the layer's output.

For a layer's output y (channels averaged over positions to h = pool(relu(y))) and a head M:  z = M h,  local loss ℓ(z, target),

    g = ∂ℓ/∂y = relu'(y) ⊙ unpool(Mᵀ ∂ℓ/∂z),   u = g / ‖g‖ per example,   ∂M = (1/N) Σ_n (∂ℓ/∂z)_n h_nᵀ.

∂ℓ/∂z comes from forward mode over the classes, so no reverse graph exists. The layer whose output is the model's takes the loss
itself as its local loss. What is *applied* is always u times a measured derivative of the true loss along u.

Source: Fournier, Rivaud, Belilovsky, Eickenberg, Oyallon, "Can Forward Gradient Match Backpropagation?", ICML 2023, arXiv 2306.06968.
"""

from collections.abc import Callable

import torch
from torch import Tensor

PREFIX = "guess."


class Guide:
    """Unit directions for the layers in `heads`.

    Args:
        heads: parameter name of a layer's weight -> head [classes, channels], in the order of their tangents.
        last: the weight of the layer that gives the model's output; it has no head of its own.
        score: local losses [N] of logits [N, classes] against the batch's targets.
    """

    def __init__(self, heads: dict[str, Tensor], last: str, score: Callable[[Tensor], Tensor], examples: int):
        self.heads, self.last, self.score, self.examples = heads, last, score, examples
        self.slots = {name: index for index, name in enumerate([*heads, last])}
        self.count = len(self.slots)
        self.grads: dict[str, Tensor] = {}

    def slot(self, name: str) -> int:
        """Which of the guides' tangents the layer owns."""
        return self.slots[name]

    def knows(self, name: str, output: Tensor, channel: int) -> bool:
        """Whether the layer is guided: it has a head that fits, and rows that are examples."""
        if output.shape[0] != self.examples or name not in self.slots:
            return False
        return output.ndim == 2 if name == self.last else output.shape[channel] == self.heads[name].shape[1]

    def direction(self, name: str, output: Tensor, channel: int) -> Tensor:
        """The unit guess for every example, in `output`'s shape; the head's own gradient is noted in `grads`."""
        if name == self.last:
            guess = self.slope(output)
        else:
            head, rows = self.heads[name], output.movedim(channel, -1).flatten(1, -2) if output.ndim > 2 else output[:, None]
            pooled = torch.relu(rows).mean(1)  # [N, channels]
            slope = self.slope(pooled @ head.T)  # [N, classes]
            self.grads[PREFIX + name] = slope.T @ pooled / self.examples
            back = (slope @ head)[:, None] * (rows > 0)  # [N, positions, channels]
            guess = back.reshape(output.movedim(channel, -1).shape).movedim(-1, channel)
        norm = guess.flatten(1).norm(dim=1).clamp_min(1e-12)
        return guess / norm.reshape(-1, *(1 for _ in output.shape[1:]))

    def slope(self, logits: Tensor) -> Tensor:
        """∂ℓ_n/∂z_n [N, classes], one forward-mode sweep over the unit vectors."""
        units = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)

        def along(unit: Tensor) -> Tensor:
            return torch.func.jvp(self.score, (logits,), (unit.expand_as(logits),))[1]

        return torch.func.vmap(along)(units).T
