"""Digits on a Hopfield net: a system that settles, with squared errors; what equilibrium propagation was made for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from altgrad import data
from altgrad.equilibrium.nets import LayeredHopfield, check_activation
from altgrad.equilibrium.settling import Settling, squared_error
from altgrad.errors import UsageError, require
from altgrad.rng import Key


@dataclass(frozen=True)
class HopfieldDigits:
    """scikit-learn's digits on a 64-256-10 Hopfield net; backprop unrolls its sweeps.

    Defaults of the command line: Adam, lr 2e-3, batch 64, 30 epochs.
    """

    batch_size: int = field(default=64, metadata={"help": "examples a step"})
    hidden: str = field(default="256", metadata={"help": "units of the hidden layers, with - between"})
    activation: str = field(default="sigmoid", metadata={"help": "of the hidden layers: 'sigmoid' or 'tanh'"})
    output: str = field(default="linear", metadata={"help": "activation of the output: 'linear', 'sigmoid' or 'tanh'"})
    sweeps: int = field(default=30, metadata={"help": "of the net's plain forward pass, which engines other than equilibrium train"})

    name: ClassVar[str] = "hopfield-digits"
    source: ClassVar[str] = "digits"
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 2e-3, "epochs": 30}

    def __post_init__(self) -> None:
        require(isinstance(self.batch_size, int) and self.batch_size >= 1, "batch_size", self.batch_size, "an integer of at least 1")
        units = str(self.hidden).split("-")
        require(all(part.isdecimal() and int(part) >= 1 for part in units), "hidden", self.hidden, "whole numbers >= 1 with - between, such as 256 or 256-256")
        check_activation("activation", self.activation)
        check_activation("output", self.output)
        require(isinstance(self.sweeps, int) and self.sweeps >= 1, "sweeps", self.sweeps, "a whole number >= 1")

    def build(self, key: Key, *, model: str | None = None, model_settings: Mapping[str, Any] | None = None, data_dir: str | Path | None = None) -> Settling:
        """The problem; `key` addresses the first weights and the order of the data. There is no other model to choose (UsageError).

        Raises:
            DataError: the data are missing or damaged.
        """
        if model or model_settings:
            raise UsageError(f"{self.name} has a net of its own, but model={model or dict(model_settings or {})!r} was given; use its setting hidden.")
        shape, classes = data.shape_of(self.source)
        pixels = 1
        for length in shape:
            pixels *= length
        sizes = [pixels, *(int(part) for part in str(self.hidden).split("-")), classes]
        net = LayeredHopfield(sizes, key=key, hidden=self.activation, output=self.output, sweeps=self.sweeps)
        return Settling(net, squared_error, dataset=data.load(self.source, data_dir=data_dir), batch_size=self.batch_size, key=key, name=self.name)
