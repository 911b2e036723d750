"""The table of local losses: name -> class. The engine `local` takes any of them; a new one is one file and one line here."""

from dataclasses import fields

from altgrad.local.losses.channel_goodness import ChannelGoodness
from altgrad.local.losses.frame import TABLE as SIMPLE
from altgrad.local.losses.frame import LocalLoss
from altgrad.local.losses.predsim import PredSim
from altgrad.local.losses.prototypes import Prototypes

TABLE: dict[str, type[LocalLoss]] = {**SIMPLE, "predsim": PredSim, "channel-goodness": ChannelGoodness, "prototypes": Prototypes}


def settings_of() -> str:
    """The settings of every loss in the table, in words."""
    return "; ".join(f"{name}: {', '.join(entry.name for entry in fields(loss))}" for name, loss in TABLE.items())


__all__ = ["TABLE", "ChannelGoodness", "PredSim", "Prototypes", "settings_of"]
