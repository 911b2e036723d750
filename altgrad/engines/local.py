"""The engine `local`: a model's blocks trained by any of the local losses of altgrad.local.losses."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from altgrad import registry
from altgrad.engines.blockwise import Blockwise, option
from altgrad.errors import SettingError, near_miss
from altgrad.local import losses as rules
from altgrad.local.losses.frame import LocalLoss


@dataclass(frozen=True)
class Local(Blockwise):
    """Any local loss of altgrad.local.losses on every block but the last."""

    loss: str = option("greedy", "the local loss: " + ", ".join(rules.TABLE))
    loss_settings: str = option("", "of the local loss, as features=512 (with , between them); " + rules.settings_of())

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.loss_settings
        if isinstance(given, Mapping):  # kept as text: settings are plain values
            object.__setattr__(self, "loss_settings", ",".join(f"{name}={value}" for name, value in given.items()))
        if self.loss not in rules.TABLE:
            raise SettingError(near_miss("loss", str(self.loss), rules.TABLE))
        self.rule  # noqa: B018 - checks its settings

    @cached_property
    def rule(self) -> LocalLoss:
        pairs = [part for part in re.split(r"[,;\s]+", self.loss_settings) if part]
        found: LocalLoss = registry.build(rules.TABLE[self.loss], registry.split_pairs(pairs), f"loss {self.loss}")
        return found

    @property
    def name(self) -> str:
        return "local"

    @property
    def source(self) -> str:
        return "Nøkland, Eidnes 2019, arXiv 1901.06656; Belilovsky et al. 2019, arXiv 1812.11446"
