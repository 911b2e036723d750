r"""Cosine prototypes: every class has a direction in a block's activities, and the nearest wins.

G_nj = ⟨a_n, p_j⟩ / (‖a_n‖ ‖p_j‖ τ),    L_n = -ln softmax(G_n)[y_n]
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from altgrad.engine import Tree
from altgrad.errors import require
from altgrad.local.losses.frame import FEATURES, Judged, LocalLoss, Look, Site, accuracy, drawn, flat, option, width
from altgrad.rng import Key

TINY = 1e-8  # a length below which activities point nowhere


@dataclass(frozen=True)
class Prototypes(LocalLoss):
    r"""Cross entropy of cosines to class prototypes, which are learnt with the block, or stay where they were drawn (learned=false).

    Source: hierarchical forward-forward with prototypes, 2026, arXiv 2605.00082; cosine softmax: Wang et al. 2017, arXiv 1704.06369.
    """

    temperature: float = option(0.1, "τ, what cosines are divided by, > 0: the least loss that can be had falls with it")
    learned: bool = option(True, "false: the prototypes stay as they were drawn")
    features: int = option(FEATURES, "most numbers of a prototype; convolutions' outputs are averaged over patches until they fit")

    def __post_init__(self) -> None:
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "a finite number > 0")
        require(isinstance(self.features, int) and self.features >= 1, "features", self.features, "a whole number >= 1")

    def heads(self, site: Site, key: Key) -> Tree:
        return {"prototypes": drawn(key, f"{site.name}.prototypes", (int(site.classes or 0), width(site.shape, self.features)), site)}

    def judge(self, look: Look) -> Judged:
        head = look.head if self.learned else {name: value.detach() for name, value in look.head.items()}
        scores = self.scores(look.activity, head, look.site)
        return Judged(F.cross_entropy(scores, look.targets, reduction="none"), metrics={"accuracy": accuracy(scores, look.targets)})

    def scores(self, activity: Tensor, head: Tree, site: Site) -> Tensor:
        vectors = F.normalize(flat(activity, self.features, site.shape), dim=1, eps=TINY)
        return F.linear(vectors, F.normalize(head["prototypes"], dim=1, eps=TINY)) / self.temperature


__all__ = ["Prototypes"]
