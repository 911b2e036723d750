r"""Goodness: local losses that raise a block's activity on inputs with their right label, and lower it on those with a wrong one.

    g = Σ_j a_j²  (or its mean),   θ = threshold · units  (or threshold)

    logistic       L = softplus(-(g⁺ - θ)) + softplus(g⁻ - θ)
    symba          L = softplus(-α (g⁺ - g⁻))
    collaboration  L as logistic, with g + γ for g:  γ = c Σ_t (g_t - θ_t) over the other blocks t (or those before), constant in the gradient

The next block sees a / √mean a²: nothing of the goodness that is there already. Peer normalisation adds λ mean_j (mean_k m_k - m_j)², with m a
running mean of the units' activity on right labels, so that none falls silent.

Source: Hinton 2022, arXiv 2212.13345, sections 2 and 3; Lee, Song 2023, arXiv 2303.08418; Lorberbom, Gat, Adi, Schwing, Hazan 2024, arXiv 2305.12393.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from altgrad.engine import Tree
from altgrad.errors import require
from altgrad.local.losses.frame import Judged, LocalLoss, Look, Site, option

EPSILON = 1e-8  # of the mean square: a silent row stays silent
MEMORY = 0.9  # of the running mean activity
COPIES = 3  # rows an example: its right label, a wrong one, none


class Rows(NamedTuple):
    """The rows made of a batch, COPIES for an example, one after another: right label, wrong label, no label."""

    side: Tensor  # [rows] +1, -1, 0
    weight: Tensor  # [rows] COPIES, over the share of examples that have a label; 0 of an example without one, and where side is 0
    labels: Tensor  # [rows] int64, the right ones


@dataclass(frozen=True)
class Goodness(LocalLoss):
    """What losses on goodness share."""

    goodness: str = option("sum", "'sum' or 'mean' of a block's squared activities")
    threshold: float = option(1.0, "the goodness that separates right from wrong, per unit")
    peer: float = option(0.0, "weight of peer normalisation, which keeps units from falling silent (the forward-forward paper has 0.03)")

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        return self.peer == 0

    def __post_init__(self) -> None:
        require(self.goodness in {"sum", "mean"}, "goodness", self.goodness, "'sum' or 'mean'")
        require(0 < self.threshold < math.inf, "threshold", self.threshold, "a number > 0")
        require(0 <= self.peer < math.inf, "peer", self.peer, "a number >= 0")

    def first_state(self, site: Site) -> Tree:
        units = site.shape[0] if site.shape else 1
        return {"activity": torch.zeros(units, dtype=site.dtype, device=site.device)} if self.peer else {}

    def of(self, activity: Tensor) -> Tensor:
        """The goodness of every row [rows]."""
        squares = widened(activity).reshape(len(activity), -1).square()
        return squares.sum(1) if self.goodness == "sum" else squares.mean(1)

    def limit(self, site: Site) -> float:
        """θ."""
        return self.threshold * (math.prod(site.shape) if self.goodness == "sum" else 1)

    def note(self, activity: Tensor, site: Site) -> Tensor:
        return self.of(activity) - self.limit(site)

    def bridge(self, activity: Tensor) -> Tensor:
        return normalised(activity)

    def judge(self, look: Look) -> Judged:
        found, limit, rows = self.of(look.activity), self.limit(look.site), look.targets
        losses, right = self.losses(found - limit, look)
        seen = found.detach() * rows.weight / limit
        metrics = {"goodness": (seen * (rows.side > 0)).mean(), "wrong_goodness": (seen * (rows.side < 0)).mean(), "right": right}
        if not self.peer:
            return Judged(losses, metrics=metrics)
        mean = (1 - MEMORY) * unit_means(look.activity, rows.weight * (rows.side > 0)) + MEMORY * look.state["activity"]
        return Judged(losses + self.peer * (mean.mean() - mean).square().mean(), {"activity": mean.detach()}, metrics)

    def losses(self, margin: Tensor, look: Look) -> tuple[Tensor, Tensor]:
        """(losses whose mean is minimised, the share of rows or pairs told right); `margin` [rows] is g - θ."""
        raise NotImplementedError


@dataclass(frozen=True)
class Logistic(Goodness):
    """softplus(-(g⁺ - θ)) + softplus(g⁻ - θ).

    Source: Hinton 2022, arXiv 2212.13345, section 2.
    """

    def losses(self, margin: Tensor, look: Look) -> tuple[Tensor, Tensor]:
        rows: Rows = look.targets
        signed = rows.side * margin
        return rows.weight * F.softplus(-signed), (rows.weight * (signed.detach() > 0)).mean() / 2


@dataclass(frozen=True)
class Collaboration(Logistic):
    """Logistic, where a block is judged by its own goodness and the others' together, whose gradient it does not see.

    Source: Lorberbom, Gat, Adi, Schwing, Hazan 2024, arXiv 2305.12393, section 3.
    """

    others: str = option("all", "whose goodness counts beside a block's own: 'all' others', or that of the blocks 'before'")
    gamma: float = option(1.0, "weight of the others' goodness, each above its own threshold; 0 is plain forward-forward")

    @property
    def sees(self) -> str:  # type: ignore[override]
        return self.others

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.others in {"all", "before"}, "others", self.others, "'all' or 'before'")
        require(0 <= self.gamma < math.inf, "gamma", self.gamma, "a number >= 0")

    def losses(self, margin: Tensor, look: Look) -> tuple[Tensor, Tensor]:
        notes = [*look.before, *(look.after if self.others == "all" else ())]
        return super().losses(margin + self.gamma * torch.stack(notes).sum(0) if notes else margin, look)


@dataclass(frozen=True)
class SymBa(Goodness):
    """softplus(-α (g⁺ - g⁻)) of the two rows of an example; there is no threshold to miss, `threshold` is the unit of reports alone.

    Source: Lee, Song 2023, arXiv 2303.08418.
    """

    alpha: float | None = option(None, "steepness; none for 4 where goodness is a mean, 4 over the number of units where it is a sum")

    by_rows = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", self.alpha, "None or a number > 0")

    def losses(self, margin: Tensor, look: Look) -> tuple[Tensor, Tensor]:
        alpha = 4 * self.threshold / self.limit(look.site) if self.alpha is None else self.alpha
        weight = look.targets.weight[::COPIES] / COPIES
        apart = margin[::COPIES] - margin[1::COPIES]
        return weight * F.softplus(-alpha * apart), (weight * (apart.detach() > 0)).mean()


def normalised(activity: Tensor) -> Tensor:
    """a / √mean a² of every row."""
    wide = widened(activity)
    mean = wide.reshape(len(wide), -1).square().mean(1).add(EPSILON)
    return (wide * mean.rsqrt().view(-1, *(1 for _ in wide.shape[1:]))).to(activity.dtype)


def unit_means(activity: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean over rows, and over positions, of every unit (the first axis after the rows) [units]."""
    wide = widened(activity)
    flat = wide.reshape(len(wide), wide.shape[1] if wide.ndim > 1 else 1, -1).mean(2)
    return (flat * weight[:, None]).mean(0)


def widened(activity: Tensor) -> Tensor:
    """At least float32: squares of short floats are rounded away in a sum."""
    return activity.float() if activity.dtype in {torch.bfloat16, torch.float16} else activity


LOSSES: Mapping[str, type[Goodness]] = {"logistic": Logistic, "symba": SymBa, "collaboration": Collaboration}

__all__ = ["COPIES", "LOSSES", "Collaboration", "Goodness", "Logistic", "Rows", "SymBa", "normalised"]
