r"""Mono-Forward: every block has a projection of its own onto the classes, and both follow the cross entropy of what it says.

    a_k = f_k(detach a_{k-1}),   G_k = a_k M_kᵀ,   L_k = -ln softmax(G_k)[y],   (W_k, M_k) follow ∂L_k

One pass, no negative examples, one matrix a block more than the model has.
"""

from dataclasses import dataclass
from functools import cached_property

from altgrad.engines.blockwise import Blockwise, option
from altgrad.local.losses.frame import FEATURES, LocalLoss
from altgrad.local.losses.frame import MonoForward as ProjectionLoss


@dataclass(frozen=True)
class MonoForward(Blockwise):
    """A projection M a block, trained with the block by cross entropy.

    Raises:
        SettingError: as Blockwise, or features < 1. CapabilityError, DataError: as Blockwise.

    Source: Gong, Li, Abdulla 2025, arXiv 2501.09238.
    """

    features: int = option(FEATURES, "most inputs of a block's projection; convolutions' outputs are averaged over patches until they fit")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rule  # noqa: B018 - checks its settings

    @cached_property
    def rule(self) -> LocalLoss:
        return ProjectionLoss(self.features)

    @property
    def name(self) -> str:
        return "mono-forward"

    @property
    def source(self) -> str:
        return "Gong, Li, Abdulla 2025, arXiv 2501.09238, equations 3 to 5"
