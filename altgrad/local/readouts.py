r"""What a model trained block by block predicts: its own output, or what its blocks' local heads say together.

    own    f(x)                       the model's last block
    last   G_L(x)                     the last block with a local head
    sum    (1/L) Σ_l G_l(x)           ranks classes as the sum of all heads does, on the scale of one head
    vote   ln (1/L) Σ_l softmax(G_l)  the mean of the heads' probabilities

Any block's name stands for its head alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from altgrad.errors import SettingError, near_miss

OWN = "own"
HEADS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "last": lambda heads: heads[-1],
    "sum": lambda heads: torch.stack(list(heads)).mean(0),
    "vote": lambda heads: torch.stack([head.log_softmax(1) for head in heads]).logsumexp(0) - math.log(len(heads)),
}
READOUTS = (OWN, *HEADS)


def check(readout: str, blocks: Sequence[str]) -> None:
    """Raise SettingError unless `readout` is one of READOUTS or the name of a block with a head."""
    if readout not in READOUTS and readout not in blocks:
        raise SettingError(near_miss("readout", readout, [*READOUTS, *blocks]))


def read(readout: str, heads: Mapping[str, Tensor], own: Tensor) -> Tensor:
    """What `readout` makes of the heads' scores, by block in order, and of the model's own output; that alone where no head has been trained."""
    if readout == OWN or not heads:
        return own
    return heads[readout] if readout in heads else HEADS[readout](list(heads.values()))


__all__ = ["OWN", "READOUTS", "check", "read"]
