"""Images on Hopfield nets: systems that settle, with squared errors or cross-entropy; what equilibrium propagation was made for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from altgrad import data
from altgrad.equilibrium.conv_nets import POOLINGS, ConvHopfield
from altgrad.equilibrium.layered import check_activation
from altgrad.equilibrium.nets import LayeredHopfield, check_readout
from altgrad.equilibrium.settling import Settling, squared_error
from altgrad.errors import SettingError, UsageError, near_miss, require
from altgrad.problems.images import cross_entropy_of_each
from altgrad.rng import Key

NETS = ("mlp", "conv")
LOSSES = {"squared": squared_error, "cross-entropy": cross_entropy_of_each}


def numbers(setting: str, given: Any) -> list[int]:
    """Whole numbers >= 1 out of text such as 256-256."""
    parts = str(given).split("-")
    require(all(part.isdecimal() and int(part) >= 1 for part in parts), setting, given, "whole numbers >= 1 with - between, such as 256 or 256-256")
    return [int(part) for part in parts]


@dataclass(frozen=True)
class Hopfield:
    """What the Hopfield problems share: `name`, the data set's name `source`, and `defaults`, what the command line trains with unless told otherwise."""

    batch_size: int = field(default=64, metadata={"help": "examples a step"})
    net: str = field(default="mlp", metadata={"help": "'mlp', dense layers, or 'conv', convolutions with pooling and a dense output"})
    hidden: str = field(default="256", metadata={"help": "net='mlp': units of the hidden layers, with - between"})
    channels: str = field(default="16-32", metadata={"help": "net='conv': channels of the layers, with - between"})
    kernel: int = field(default=3, metadata={"help": "net='conv': side of the filters, odd"})
    pool: int = field(default=2, metadata={"help": "net='conv': side of the pooled windows, 1 for none"})
    pooling: str = field(default="softmax", metadata={"help": "net='conv': 'softmax' (holomorphic), 'max' or 'mean'"})
    activation: str = field(default="sigmoid", metadata={"help": "of the hidden layers: 'sigmoid' or 'tanh'"})
    output: str = field(default="linear", metadata={"help": "activation of the output: 'linear', 'sigmoid' or 'tanh'"})
    readout: str = field(default="inside", metadata={"help": "'inside': the output settles with the rest; 'outside': it is a linear map of the last layer"})
    loss: str = field(default="squared", metadata={"help": "'squared' errors, or 'cross-entropy' of a linear output"})
    sweeps: int = field(default=30, metadata={"help": "of the net's plain forward pass, which engines other than equilibrium train"})

    name: ClassVar[str]
    source: ClassVar[str]
    pixels: ClassVar[tuple[int, int, int] | None] = None  # (channels, height, width), where the data are flat
    defaults: ClassVar[Mapping[str, Any]]

    def __post_init__(self) -> None:
        for setting, allowed in (("net", NETS), ("pooling", POOLINGS), ("loss", LOSSES)):
            if getattr(self, setting) not in allowed:
                raise SettingError(near_miss(setting, str(getattr(self, setting)), allowed))
        require(isinstance(self.batch_size, int) and self.batch_size >= 1, "batch_size", self.batch_size, "an integer of at least 1")
        numbers("hidden", self.hidden)
        numbers("channels", self.channels)
        check_activation("activation", self.activation)
        check_activation("output", self.output)
        check_readout(self.readout, self.output)
        require(self.loss == "squared" or self.output == "linear", "output", self.output, "'linear' with loss='cross-entropy', whose logits may be any number")
        require(isinstance(self.sweeps, int) and self.sweeps >= 1, "sweeps", self.sweeps, "a whole number >= 1")

    def network(self, key: Key) -> nn.Module:
        """The net, for the data set's shape and classes."""
        shape, classes = data.shape_of(self.source)
        kinds: dict[str, Any] = {"hidden": self.activation, "output": self.output, "sweeps": self.sweeps, "readout": self.readout}
        if self.net == "mlp":
            return LayeredHopfield([prod(shape), *numbers("hidden", self.hidden), classes], key=key, **kinds)
        pixels, channels = self.pixels or shape, numbers("channels", self.channels)
        return ConvHopfield(pixels, channels, classes, key=key, kernel=self.kernel, size=self.pool, pooling=self.pooling, **kinds)

    def build(self, key: Key, *, model: str | None = None, model_settings: Mapping[str, Any] | None = None, data_dir: str | Path | None = None) -> Settling:
        """The problem; `key` addresses the first weights and the order of the data. There is no other model to choose (UsageError).

        Raises:
            SettingError: sizes that do not fit the images. DataError: the data are missing or damaged.
        """
        if model or model_settings:
            raise UsageError(f"{self.name} has a net of its own, but model={model or dict(model_settings or {})!r} was given; use its settings net and hidden.")
        net = self.network(key)
        return Settling(net, LOSSES[self.loss], dataset=data.load(self.source, data_dir=data_dir), batch_size=self.batch_size, key=key, name=self.name)


@dataclass(frozen=True)
class HopfieldDigits(Hopfield):
    """scikit-learn's digits on a 64-256-10 Hopfield net; backprop unrolls its sweeps.

    Defaults of the command line: Adam, lr 2e-3, batch 64, 30 epochs.
    """

    name: ClassVar[str] = "hopfield-digits"
    source: ClassVar[str] = "digits"
    pixels: ClassVar[tuple[int, int, int] | None] = (1, 8, 8)
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 2e-3, "epochs": 30}


@dataclass(frozen=True)
class HopfieldMNIST(Hopfield):
    """MNIST on a 784-512-10 Hopfield net; backprop unrolls its sweeps. Get the data with `altgrad data get mnist`.

    Defaults of the command line: Adam, lr 1e-3, batch 128, 10 epochs.
    """

    batch_size: int = field(default=128, metadata={"help": "examples a step"})
    hidden: str = field(default="512", metadata={"help": "net='mlp': units of the hidden layers, with - between"})

    name: ClassVar[str] = "hopfield-mnist"
    source: ClassVar[str] = "mnist"
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 1e-3, "epochs": 10}


@dataclass(frozen=True)
class HopfieldFashionMNIST(HopfieldMNIST):
    """Fashion-MNIST on a 784-512-10 Hopfield net; backprop unrolls its sweeps. Get the data with `altgrad data get fashion-mnist`.

    Defaults of the command line: Adam, lr 1e-3, batch 128, 10 epochs.
    """

    name: ClassVar[str] = "hopfield-fashion-mnist"
    source: ClassVar[str] = "fashion-mnist"
