r"""The linear probe: what a linear classifier, fitted afterwards, finds in the features of a trained model. A measurement, no part of training.

    W = (Z'Z / N + λ I)⁻¹ Z'(Y - ȳ) / N,    scores = z W + ȳ

Z are the features less their mean, over their standard deviation, and Y the one-hot labels: ridge regression, solved in float64 from sums over the data.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from altgrad.errors import DataError, NumericsError, require

PENALTY = 1e-3  # λ, against features of variance 1
DEAD = 1e-10  # share of a feature's mean square below which its variance is rounding
Features = Mapping[str, Tensor]  # [N, n] by name


class Probe(NamedTuple):
    """A linear classifier of the features `names`, side by side."""

    names: tuple[str, ...]
    mean: Tensor  # [n]
    scale: Tensor  # [n]
    weight: Tensor  # [n, classes]
    bias: Tensor  # [classes]

    def scores(self, features: Features) -> Tensor:
        """[N, classes]; the greatest is the class."""
        joined = torch.cat([features[name].double() for name in self.names], 1)
        return (joined - self.mean) / self.scale @ self.weight + self.bias


def fit(parts: Iterable[tuple[Features, Tensor]], classes: int, *, penalty: float = PENALTY, groups: Sequence[Sequence[str]] | None = None) -> list[Probe]:
    """One probe for every group of features, from one pass over the data.

    Args:
        parts: (features by name [N, n], labels int64 [N]) of some examples at a time.
        classes: how many.
        penalty: λ > 0.
        groups: names of the features that a probe sees; None for one probe that sees all of them.

    Raises:
        DataError: no examples. NumericsError: features that are not finite. SettingError: λ <= 0.
    """
    require(penalty > 0, "penalty", penalty, "above 0")
    count, total, squares, crossed, shares, sizes = 0, *[torch.zeros(())] * 4, {}
    for features, labels in parts:
        joined = torch.cat([value.double() for value in features.values()], 1)
        wanted = F.one_hot(labels, classes).double()
        sizes = {name: value.shape[1] for name, value in features.items()}
        count, total, shares = count + len(labels), total + joined.sum(0), shares + wanted.sum(0)
        squares, crossed = squares + joined.T @ joined, crossed + joined.T @ wanted
    if not count:
        raise DataError("there are no examples to fit a linear probe on.")
    mean, shares = total / count, shares / count
    if not bool(torch.isfinite(squares.diagonal()).all()):
        raise NumericsError("the features that a linear probe is to be fitted on are not finite; the run has diverged.")
    spread = squares.diagonal() / count - mean.square()
    scale = torch.where(spread > DEAD * squares.diagonal() / count, spread, 1.0).sqrt()
    covariance = (squares / count - torch.outer(mean, mean)) / torch.outer(scale, scale)
    aligned = (crossed / count - torch.outer(mean, shares)) / scale[:, None]
    edges = dict(zip(sizes, torch.arange(len(mean)).split(list(sizes.values())), strict=True))
    found = []
    for names in groups if groups is not None else [tuple(sizes)]:
        index = torch.cat([edges[name] for name in names]).to(mean.device)
        matrix = covariance[index][:, index]
        matrix.diagonal().add_(penalty)
        weight = torch.cholesky_solve(aligned[index], torch.linalg.cholesky(matrix))
        found.append(Probe(tuple(names), mean[index], scale[index], weight, shares))
    return found


__all__ = ["PENALTY", "Probe", "fit"]
