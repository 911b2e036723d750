r"""Estimators as parts of a model: an activation, a parametrisation of weights, and a linear layer that has one.

    ŵ = α q(w),   α = mean|w| over the layer, over each output channel, or 1

The trained tensor stays real and keeps its place in the state dict, as `parametrizations.weight.original`; the gradient passes through α too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from altgrad.errors import SettingError, near_miss
from altgrad.surrogates import pointwise_of
from altgrad.surrogates.pointwise import Pointwise

SCALES = ("tensor", "channel", "none")
OF_INPUTS, OF_WEIGHTS = ("sign", "ternary"), ("sign", "square-wave")  # operations


class SignActivation(nn.Module):
    """q(x) with a surrogate derivative; `estimator` is a name, with settings as in "reste,o=2", or a pointwise estimator.

    Raises:
        UsageError: no such estimator, or one that is not for the sign (or for three levels).
    """

    def __init__(self, estimator: str | Pointwise = "bireal"):
        super().__init__()
        self.estimator = pointwise_of(estimator, operations=OF_INPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.estimator(x)

    def extra_repr(self) -> str:
        return str(self.estimator)


class BinaryWeight(nn.Module):
    """w -> α q(w), for torch.nn.utils.parametrize.register_parametrization(module, "weight", BinaryWeight("reste")).

    Args:
        estimator: as for SignActivation.
        scale: "tensor" (α one number a layer), "channel" (one for each entry of the first axis) or "none" (1).

    Raises:
        UsageError: no such estimator, or one that is not for the sign or the square wave. SettingError: another scale.
    """

    def __init__(self, estimator: str | Pointwise = "clipped", *, scale: str = "tensor"):
        super().__init__()
        if scale not in SCALES:
            raise SettingError(near_miss("scale", str(scale), SCALES))
        self.estimator, self.scale = pointwise_of(estimator, operations=OF_WEIGHTS), scale

    def forward(self, w: Tensor) -> Tensor:
        binary = self.estimator(w, role="weight")
        if self.scale == "none":
            return binary
        dims = list(range(1, w.ndim)) if self.scale == "channel" else list(range(w.ndim))
        return binary * w.abs().mean(dims, keepdim=True)

    def right_inverse(self, w: Tensor) -> Tensor:
        """What is assigned to the weight becomes the trained tensor as it is."""
        return w

    def extra_repr(self) -> str:
        return f"{self.estimator}, scale={self.scale}"


class BinaryLinear(nn.Linear):
    """A linear layer whose weight is α q(w)."""

    def __init__(self, inputs: int, outputs: int, *, estimator: str | Pointwise = "clipped", scale: str = "tensor", **options: Any):
        super().__init__(inputs, outputs, **options)
        parametrize.register_parametrization(self, "weight", BinaryWeight(estimator, scale=scale))


@torch.no_grad()
def binary_weights(model: nn.Module) -> dict[str, Tensor]:
    """The quantised value of every weight that has such a parametrisation, by the name of the weight."""
    found = {}
    for name, module in model.named_modules():
        for own, chain in getattr(module, "parametrizations", {}).items():
            if any(isinstance(part, BinaryWeight) for part in chain):
                found[f"{name}.{own}".lstrip(".")] = getattr(module, own)
    return found


__all__ = ["SCALES", "BinaryLinear", "BinaryWeight", "SignActivation", "binary_weights"]
