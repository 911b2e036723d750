r"""Goodness by groups of channels: every class owns some of a block's channels, and their activity is its score. One pass, no negatives, no head.

G_nj = mean over the channels c of group j and all positions p of a_ncp²,    L_n = -ln softmax(G_n / τ)[y_n]
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from altgrad.engine import Tree
from altgrad.errors import CapabilityError, SettingError, near_miss, require
from altgrad.local.losses.frame import Judged, LocalLoss, Look, Site, accuracy, option
from altgrad.rng import Key

GOODNESS = ("square", "mean")
BRIDGES = ("none", "layer")


@dataclass(frozen=True)
class ChannelGoodness(LocalLoss):
    r"""Cross entropy of the goodness of channel groups, as many as there are classes and as even as they can be.

    goodness='mean' with normalise='layer' is the form that goes deeper: what a block is given has no length left by which the block before told the
    class, so that each must find its own features.

    Raises:
        CapabilityError: a block with fewer channels than classes.

    Source: Papachristodoulou et al. 2024 (CwC), arXiv 2312.12668; goodness='mean', normalise='layer': Sun et al. 2025 (DeeperForward).
    """

    goodness: str = option("square", "of a channel: 'square' (mean of its squares) or 'mean' (of itself)")
    normalise: str = option("none", "between blocks: 'none' or 'layer' (every example less its mean, over its standard deviation)")
    temperature: float = option(1.0, "what goodness is divided by before the softmax, > 0")

    def __post_init__(self) -> None:
        for name, value, allowed in (("goodness", self.goodness, GOODNESS), ("normalise", self.normalise, BRIDGES)):
            if value not in allowed:
                raise SettingError(near_miss(name, str(value), allowed))
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "a finite number > 0")

    def heads(self, site: Site, key: Key) -> Tree:
        channels, classes = channels_of(site), int(site.classes or 0)
        if channels < classes:
            raise CapabilityError(
                f"loss channel-goodness gives every class channels of its own, but block {site.name!r} has {channels} for {classes} classes. "
                "Widen it, start no block there (cut='…'), or use loss=mono-forward."
            )
        return {}

    def judge(self, look: Look) -> Judged:
        scores = self.scores(look.activity, look.head, look.site)
        return Judged(F.cross_entropy(scores, look.targets, reduction="none"), metrics={"accuracy": accuracy(scores, look.targets)})

    def scores(self, activity: Tensor, head: Tree, site: Site) -> Tensor:
        values, channels, classes = activity.square() if self.goodness == "square" else activity, channels_of(site), int(site.classes or 0)
        if len(site.shape) == 2:
            values = values.mean(1)
        elif len(site.shape) > 2:
            values = values.flatten(2).mean(2)  # [rows, channels]
        if channels % classes == 0:
            groups = values.unflatten(1, (classes, channels // classes)).mean(2)
        else:
            edges = [channels * number // classes for number in range(classes + 1)]
            groups = torch.stack([values[:, start:stop].mean(1) for start, stop in itertools.pairwise(edges)], dim=1)
        return groups / self.temperature  # [rows, classes]

    def bridge(self, activity: Tensor) -> Tensor:
        return activity if self.normalise == "none" else F.layer_norm(activity, activity.shape[1:])


def channels_of(site: Site) -> int:
    """Units of a vector, channels of a map, the width of a sequence [T, width]."""
    return (site.shape or (1,))[-1 if len(site.shape) == 2 else 0]


__all__ = ["ChannelGoodness"]
