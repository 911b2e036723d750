"""A claim about local losses: a map of what touches what must leave the mean of an estimate alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad.conformance.claim import Subject, claim
from altgrad.conformance.gradients import KEYS, hold_mean, samples, unscaled
from altgrad.conformance.probes import CLASSES, Probe, data


class Heads(nn.Module):
    """Two linear layers with outputs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


def local_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    goal = F.one_hot(targets, CLASSES)
    return (outputs - torch.cat([goal, 2 * goal], 1)).square()


def heads(dtype: torch.dtype = torch.float32) -> Probe:
    """Local losses [N, 2 · CLASSES], the first half of the left head, the second of the right one; quadratic, so that smoothing leaves the gradient."""
    left = torch.arange(2 * CLASSES) < CLASSES
    maps = {f"{side}.{part}": mask for side, mask in (("left", left), ("right", ~left)) for part in ("weight", "bias")}
    return Probe(Heads, data("heads", 4), loss=local_squares, dtype=dtype, influence=maps)


@claim(applies=unscaled)
def is_unbiased_with_influence_maps(subject: Subject) -> None:
    bench = subject.bench(heads(torch.float64)).warm()
    exact = bench.exact()
    hold_mean(samples(bench, exact), bench.flat(exact, exact), f"{KEYS} keys", [value.numel() for value in exact.values()])
