"""Digits for a spiking network: no derivative passes its spikes, unless a surrogate's is put in its place."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from altgrad.problems.images import Images


@dataclass(frozen=True)
class SpikingDigits(Images):
    """The problem digits with a network of leaky integrate-and-fire units; engine backprop sees the surrogate derivative of their spikes.

    Defaults of the command line: a spiking net of 64-64-64-10 units over 8 steps, Adam, lr 3e-3, batch 64, 30 epochs.
    """

    model: str = field(default="spiking", metadata={"help": "a name of `altgrad models`, or package.module:callable"})

    name: ClassVar[str] = "spiking-digits"
    source: ClassVar[str] = "digits"
    model_settings: ClassVar[Mapping[str, Any]] = {"hidden": "64-64", "steps": 8}
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 3e-3, "epochs": 30}
