r"""Prediction and similarity matching as an engine: every block tells the classes apart, and makes examples alike as their labels are.

    L_k = (1 - β) CE(a_k Wᵀ + b, y) + β mean (S(T a_k) - S(Y))²

The loss is in altgrad/local/losses/predsim.py.
"""

from dataclasses import dataclass
from functools import cached_property

from altgrad.engines.blockwise import Blockwise, option
from altgrad.local.losses.frame import FEATURES, LocalLoss
from altgrad.local.losses.predsim import PredSim as SimilarityLoss


@dataclass(frozen=True)
class PredSim(Blockwise):
    """A linear head and similarity matching a block.

    Raises:
        SettingError: as Blockwise, similarity outside [0, 1], or features < 1. CapabilityError, DataError: as Blockwise.

    Source: Nøkland, Eidnes 2019, arXiv 1901.06656.
    """

    similarity: float = option(0.99, "share of similarity matching in the loss, in [0, 1]; the rest is prediction")
    transform: bool = option(True, "a trained linear layer or 3 x 3 convolution before similarities are taken")
    features: int = option(FEATURES, "most inputs of a block's head; convolutions' outputs are averaged over patches until they fit")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rule  # noqa: B018 - checks its settings

    @cached_property
    def rule(self) -> LocalLoss:
        return SimilarityLoss(similarity=self.similarity, transform=self.transform, features=self.features)

    @property
    def name(self) -> str:
        return "predsim"

    @property
    def source(self) -> str:
        return "Nøkland, Eidnes 2019, arXiv 1901.06656"
