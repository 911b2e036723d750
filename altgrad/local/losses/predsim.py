r"""Prediction and similarity matching: a block tells the classes apart, and makes examples alike as their labels are.

    L_n = (1 - β) · -ln softmax(a_n Wᵀ + b)[y_n]  +  β · mean_m (S(T a)_nm - S(Y)_nm)²

S(x)_nm = ⟨x̃_n, x̃_m⟩ / (‖x̃_n‖ ‖x̃_m‖) with x̃ = x less its own mean; Y the one-hot labels; T a linear layer or a 3 × 3 convolution of the block's own,
after which a map's channel counts by its standard deviation over positions. The mean over m runs over the examples of the batch (of one process).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from altgrad.engine import Tree
from altgrad.errors import require
from altgrad.local.losses.frame import FEATURES, Judged, LocalLoss, Look, Site, accuracy, drawn, flat, option, width
from altgrad.rng import Key

IGNORED = -100  # the label that PyTorch's losses leave out
TINY = 1e-8  # a length below which an example is alike to nothing
FEW = 3  # channels: so few say too little by their spread alone, as an image's three would
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class PredSim(LocalLoss):
    r"""(1 - β) cross entropy of a linear head + β mean squared difference of similarity matrices.

    Args of the equation: β = `similarity` in [0, 1], 0.99 as in the paper; T is left out with transform=false, which saves a square matrix a block.

    Source: Nøkland, Eidnes 2019, arXiv 1901.06656.
    """

    similarity: float = option(0.99, "share of similarity matching in the loss, in [0, 1]; the rest is prediction")
    transform: bool = option(True, "a trained linear layer or 3 x 3 convolution before similarities are taken")
    features: int = option(FEATURES, "most inputs of a block's head; convolutions' outputs are averaged over patches until they fit")

    by_rows = False

    def __post_init__(self) -> None:
        require(0 <= self.similarity <= 1, "similarity", self.similarity, "in [0, 1]")
        require(isinstance(self.features, int) and self.features >= 1, "features", self.features, "a whole number >= 1")

    def heads(self, site: Site, key: Key) -> Tree:
        classes = int(site.classes or 0)
        weight = drawn(key, f"{site.name}.weight", (classes, width(site.shape, self.features)), site)
        found = {"weight": weight, "bias": torch.zeros(classes, dtype=site.dtype, device=site.device)}
        space = len(site.shape) - 1
        if self.transform and (space <= 1 or space in CONVOLUTIONS):
            channels = (site.shape or (1,))[-1 if space <= 1 else 0]
            kernel = (3,) * space if space > 1 else ()
            matrix = drawn(key, f"{site.name}.kernel", (channels, channels * math.prod(kernel)), site)
            found["kernel"] = matrix.reshape(channels, channels, *kernel)
        return found

    def judge(self, look: Look) -> Judged:
        scores, labels = self.scores(look.activity, look.head, look.site), look.targets
        known = labels != IGNORED
        wanted = similarities(F.one_hot(labels.clamp_min(0), int(look.site.classes or 0)).to(scores.dtype))
        apart = (similarities(embedded(look.activity, look.head, look.site)) - wanted).square() * (known[:, None] & known)  # [rows, rows]
        matched, told = apart.mean(1), F.cross_entropy(scores, labels, reduction="none")
        metrics = {"accuracy": accuracy(scores, labels), "similarity": matched.detach().mean()}
        return Judged((1 - self.similarity) * told + self.similarity * matched, metrics=metrics)

    def scores(self, activity: Tensor, head: Tree, site: Site) -> Tensor:
        return F.linear(flat(activity, self.features, site.shape), head["weight"], head["bias"])


def embedded(activity: Tensor, head: Tree, site: Site) -> Tensor:
    """What similarities are taken of: [rows, n]."""
    space, kernel = len(site.shape) - 1, head.get("kernel")
    if space < 1:
        vectors = activity.reshape(len(activity), -1)
        return vectors if kernel is None else F.linear(vectors, kernel)
    if space == 1:  # [rows, T, width]
        maps = (activity if kernel is None else F.linear(activity, kernel)).transpose(1, 2)
    else:
        maps = activity if kernel is None else CONVOLUTIONS[space](activity, kernel, padding=1)
    maps = maps.flatten(2)  # [rows, channels, positions]
    return maps.std(2) if maps.shape[1] > FEW and maps.shape[2] > 1 else maps.flatten(1)


def similarities(x: Tensor) -> Tensor:
    """S(x) [rows, rows]: the cosines between rows, each less its own mean; a row that is constant is alike to nothing."""
    unit = F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=TINY)
    return unit @ unit.T


__all__ = ["PredSim", "embedded", "similarities"]
