"""Digits on a net that settles without an energy: the ways up and down have weights of their own, symmetric only if training makes them so."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from altgrad import data
from altgrad.equilibrium.feedback import LayeredFeedback
from altgrad.equilibrium.homeostatic import Homeostatic
from altgrad.equilibrium.nets import check_activation
from altgrad.equilibrium.settling import Settling, squared_error
from altgrad.errors import UsageError, require
from altgrad.rng import Key


@dataclass(frozen=True)
class RecurrentDigits:
    """scikit-learn's digits on a 64-64-64-10 net with backward weights of its own; backprop unrolls its sweeps.

    Defaults of the command line: Adam, lr 2e-3, batch 64, 30 epochs.
    """

    batch_size: int = field(default=64, metadata={"help": "examples a step"})
    hidden: str = field(default="64-64", metadata={"help": "units of the hidden layers, with - between"})
    activation: str = field(default="tanh", metadata={"help": "of the hidden layers: 'sigmoid' or 'tanh'"})
    output: str = field(default="linear", metadata={"help": "activation of the output: 'linear', 'sigmoid' or 'tanh'"})
    angle: float = field(default=90.0, metadata={"help": "between the first weights up and down, in degrees; 0 is a Hopfield net's"})
    gain: float = field(default=0.5, metadata={"help": "of the first weights: large ones do not settle"})
    homeostasis: float = field(default=0.0, metadata={"help": "weight of the homeostatic loss, which every engine then trains too"})
    sweeps: int = field(default=30, metadata={"help": "of the net's plain forward pass, which engines other than equilibrium train"})

    name: ClassVar[str] = "recurrent-digits"
    source: ClassVar[str] = "digits"
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 2e-3, "epochs": 30}

    def __post_init__(self) -> None:
        require(isinstance(self.batch_size, int) and self.batch_size >= 1, "batch_size", self.batch_size, "an integer of at least 1")
        units = str(self.hidden).split("-")
        require(all(part.isdecimal() and int(part) >= 1 for part in units), "hidden", self.hidden, "whole numbers >= 1 with - between, such as 64 or 64-64")
        check_activation("activation", self.activation)
        check_activation("output", self.output)
        require(0 <= self.angle <= 180, "angle", self.angle, "in [0, 180] degrees")
        require(0 < self.gain < math.inf, "gain", self.gain, "a number > 0")
        require(0 <= self.homeostasis < math.inf, "homeostasis", self.homeostasis, "a number >= 0")
        require(isinstance(self.sweeps, int) and self.sweeps >= 1, "sweeps", self.sweeps, "a whole number >= 1")

    def build(self, key: Key, *, model: str | None = None, model_settings: Mapping[str, Any] | None = None, data_dir: str | Path | None = None) -> Settling:
        """The problem; `key` addresses the first weights and the order of the data. There is no other model to choose (UsageError).

        Raises:
            DataError: the data are missing or damaged.
        """
        if model or model_settings:
            raise UsageError(f"{self.name} has a net of its own, but model={model or dict(model_settings or {})!r} was given; use its setting hidden.")
        shape, classes = data.shape_of(self.source)
        sizes = [math.prod(shape), *(int(part) for part in str(self.hidden).split("-")), classes]
        net = LayeredFeedback(sizes, key=key, hidden=self.activation, output=self.output, angle=self.angle, gain=self.gain, sweeps=self.sweeps)
        served: dict[str, Any] = {"dataset": data.load(self.source, data_dir=data_dir), "batch_size": self.batch_size, "key": key, "name": self.name}
        if self.homeostasis:
            return Homeostatic(net, squared_error, homeostasis=self.homeostasis, **served)
        return Settling(net, squared_error, **served)
