"""How well a score tells two kinds of examples apart."""

import torch
from torch import Tensor


def roc_auc(score: Tensor, positive: Tensor) -> float:
    """The area under the ROC curve: the probability that a positive scores above a negative, ties counted half; NaN where one kind is missing.

    Args:
        score: [n].
        positive: bool [n].
    """
    first, second = score[positive].double(), score[~positive].double().sort().values
    if not len(first) or not len(second):
        return float("nan")
    below = torch.searchsorted(second, first, side="left") + torch.searchsorted(second, first, side="right")
    return float(below.double().mean() / (2 * len(second)))
