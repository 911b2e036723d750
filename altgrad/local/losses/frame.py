r"""What a block of a model minimises by itself, and what it reads out: local losses, each a small frozen dataclass without state.

    mono-forward   G = a Mᵀ,        L_n = -ln softmax(G_n)[y_n]        M [classes, n], trained with the block
    greedy         o = a Wᵀ + b,    L_n = loss(o_n, y_n)               the problem's own loss on a linear head

a [N, n] are the block's activities, flattened, or averaged over patches until they are no more than `features`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from altgrad.engine import Tree
from altgrad.errors import require
from altgrad.kernels import noise
from altgrad.problem import Problem
from altgrad.rng import Key, tensor_id

FEATURES = 2048  # a head on a convolution's whole output would be larger than the convolution
SEES = ("none", "before", "all")


class Site(NamedTuple):
    """What a local loss knows of its block before there is a batch."""

    name: str
    position: int
    total: int  # blocks with a local loss
    shape: tuple[int, ...]  # of one example's activity
    classes: int | None
    outputs: tuple[int, ...]  # of one example's output of the whole model
    dtype: torch.dtype
    device: torch.device


class Look(NamedTuple):
    """What a local loss is shown of one step."""

    activity: Tensor  # [rows, *shape], with the block's graph
    targets: Any  # of the rows, as `enter` gave them
    head: Tree  # the loss's own trainables for this block, by short name
    state: Tree  # its own state for this block, by short name
    site: Site
    problem: Problem
    before: tuple[Tensor, ...]  # what the blocks before noted of the rows, [rows] each, without a graph; empty unless `sees` asks for it
    after: tuple[Tensor, ...]  # the same of the blocks after
    key: Key


class Judged(NamedTuple):
    """What a local loss found."""

    losses: Tensor  # [rows]; their mean is minimised
    state: Mapping[str, Tensor] = {}  # what changes in the block's state
    metrics: Mapping[str, Tensor] = {}  # 0-d, detached; reported as "<name>.<block>"


def option(default: Any, meaning: str) -> Any:
    """A settings field with its meaning."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class LocalLoss:
    """Base of the local losses: settings (the fields) and pure methods.

    labels: it asks for class labels int64 [N]. by_rows: a row's loss depends on that row alone and no state changes, so that rows may come in parts.
    sees: whose notes it is shown, "none", "before" or "all" (one more pass a step).
    """

    labels = True
    by_rows = True
    sees = "none"

    def heads(self, site: Site, key: Key) -> Tree:
        """The loss's own trainables for one block, by short name."""
        return {}

    def first_state(self, site: Site) -> Tree:
        """The loss's own state for one block, by short name."""
        return {}

    def enter(self, inputs: Any, targets: Any, key: Key, site: Site) -> tuple[Any, Any]:
        """(inputs, targets) of the rows that the first block is given: the batch itself, or rows made of it."""
        return inputs, targets

    def judge(self, look: Look) -> Judged:
        """What the block minimises."""
        raise NotImplementedError

    def scores(self, activity: Tensor, head: Tree, site: Site) -> Tensor | None:
        """What the block reads out: [N, classes] or as the model's own outputs; None where it reads nothing out."""
        return None

    def note(self, activity: Tensor, site: Site) -> Tensor | None:
        """What the other blocks may see of this one: [rows]."""
        return None

    def bridge(self, activity: Tensor) -> Tensor:
        """What the next block is given."""
        return activity


@dataclass(frozen=True)
class MonoForward(LocalLoss):
    r"""G = a Mᵀ, L = cross entropy of softmax(G); the block and M both follow it.

    Source: Gong, Li, Abdulla 2025, arXiv 2501.09238, equations 3 to 5.
    """

    features: int = option(FEATURES, "most inputs of a block's projection; convolutions' outputs are averaged over patches until they fit")

    def __post_init__(self) -> None:
        require(isinstance(self.features, int) and self.features >= 1, "features", self.features, "a whole number >= 1")

    def heads(self, site: Site, key: Key) -> Tree:
        return {"projection": drawn(key, f"{site.name}.projection", (int(site.classes or 0), width(site.shape, self.features)), site)}

    def judge(self, look: Look) -> Judged:
        scores = self.scores(look.activity, look.head, look.site)
        return Judged(F.cross_entropy(scores, look.targets, reduction="none"), metrics={"accuracy": accuracy(scores, look.targets)})

    def scores(self, activity: Tensor, head: Tree, site: Site) -> Tensor:
        return F.linear(flat(activity, self.features, site.shape), head["projection"])


@dataclass(frozen=True)
class Greedy(LocalLoss):
    """A linear head a block that gives what the model gives, scored by the problem's own loss; takes any loss.

    Source: Belilovsky, Eickenberg, Oyallon 2019, arXiv 1812.11446, section 2 (k = 1).
    """

    features: int = option(FEATURES, "most inputs of a block's head; convolutions' outputs are averaged over patches until they fit")

    labels = False

    def __post_init__(self) -> None:
        require(isinstance(self.features, int) and self.features >= 1, "features", self.features, "a whole number >= 1")

    def heads(self, site: Site, key: Key) -> Tree:
        outputs, inputs = math.prod(site.outputs), width(site.shape, self.features)
        weight = drawn(key, f"{site.name}.weight", (outputs, inputs), site)
        return {"weight": weight, "bias": torch.zeros(outputs, dtype=site.dtype, device=site.device)}

    def judge(self, look: Look) -> Judged:
        scores = self.scores(look.activity, look.head, look.site)
        return Judged(look.problem.score(scores, look.targets))

    def scores(self, activity: Tensor, head: Tree, site: Site) -> Tensor:
        return F.linear(flat(activity, self.features, site.shape), head["weight"], head["bias"]).unflatten(1, site.outputs or (1,)).reshape(-1, *site.outputs)


def drawn(key: Key, name: str, shape: tuple[int, int], site: Site) -> Tensor:
    """A first weight, uniform on ±1/√inputs as nn.Linear's, addressed by `name`."""
    unit = noise.draw("uniform", key, tensor_id(name), [0], shape, device=site.device)[0]
    return ((2 * unit - 1) / math.sqrt(shape[1])).to(site.dtype)


def width(shape: tuple[int, ...], most: int) -> int:
    """How many numbers `flat` makes of one example's activity."""
    return flat(torch.empty(1, *shape, device="meta"), most).shape[1]


def flat(activity: Tensor, most: int, shape: tuple[int, ...] | None = None) -> Tensor:
    """Activities as [N, n]: flattened; maps [N, C, …] and sequences [N, T, width] averaged over patches first, until n <= most where that is possible.

    A vector [N, n] is left as it is. `shape` is one example's, where it is known beforehand: nothing is asked of `activity` then, which a graph may stand for.
    """
    shape = tuple(activity.shape[1:]) if shape is None else shape
    if len(shape) <= 1 or math.prod(shape) <= most:
        return activity.flatten(1) if shape else activity[:, None]
    if len(shape) == 2:  # [N, T, width]: over time
        length = max(1, min(shape[0], most // shape[1]))
        return F.adaptive_avg_pool1d(activity.transpose(1, 2), length).flatten(1)
    dims = len(shape) - 1
    side = max(1, int((most / shape[0]) ** (1 / dims) + 1e-9))
    sizes = [min(side, length) for length in shape[1:]]
    if dims == 2:
        return F.adaptive_avg_pool2d(activity, (sizes[0], sizes[1])).flatten(1)
    return F.adaptive_avg_pool3d(activity, (sizes[0], sizes[1], sizes[2])).flatten(1) if dims == 3 else activity.flatten(2).mean(2)


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """The share of rows whose greatest score is the label's, 0-d."""
    return (scores.detach().argmax(1) == labels).float().mean()


TABLE: dict[str, type[LocalLoss]] = {"mono-forward": MonoForward, "greedy": Greedy}

__all__ = ["SEES", "TABLE", "Greedy", "Judged", "LocalLoss", "Look", "MonoForward", "Site", "accuracy", "drawn", "flat", "width"]
