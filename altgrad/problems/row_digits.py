"""Digits as sequences: eight rows of eight pixels, read one after the other by a recurrent network. Training needs no backpropagation through time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from altgrad.problems.images import Images


@dataclass(frozen=True)
class RowDigits(Images):
    """The problem digits with a recurrent network that reads an image row by row; engine backprop is backpropagation through time.

    Defaults of the command line: a gru of 32 units, Adam, lr 1e-2, batch 64, 30 epochs.
    """

    model: str = field(default="gru", metadata={"help": "a name of `altgrad models`, or package.module:callable"})

    name: ClassVar[str] = "row-digits"
    source: ClassVar[str] = "digits"
    model_settings: ClassVar[Mapping[str, Any]] = {"hidden": 32}
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 1e-2, "epochs": 30}
