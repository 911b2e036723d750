"""Image classification on real data: a model of models.py, cross entropy, and a data set of data.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy

from altgrad import data, models
from altgrad.errors import require
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key


def cross_entropy_of_each(outputs: Tensor, targets: Tensor) -> Tensor:
    """-ln softmax(outputs)[target] of every example [N]; outputs [N, classes], targets [N]."""
    return cross_entropy(outputs, targets, reduction="none")


@dataclass(frozen=True)
class Images:
    """What the image problems share: `name` is the data set's unless `source` is, `defaults` is what the command line trains with unless told otherwise."""

    batch_size: int = field(default=64, metadata={"help": "examples a step"})
    model: str = field(default="mlp", metadata={"help": "a name of `altgrad models`, or package.module:callable"})

    name: ClassVar[str]
    source: ClassVar[str | None] = None  # the data set, where the problem has a name of its own
    model_settings: ClassVar[Mapping[str, Any]]  # of the default model
    defaults: ClassVar[Mapping[str, Any]]

    def build(self, key: Key, *, model: str | None = None, model_settings: Mapping[str, Any] | None = None, data_dir: str | Path | None = None) -> Supervised:
        """The problem.

        Args:
            key: addresses the first weights and the order of the data.
            model: in place of the setting `model`.
            model_settings: settings of the model, over this problem's own where the model is the default one.
            data_dir: where the data lie, if not in the cache.

        Raises:
            UsageError, SettingError: no such model or setting.
            DataError: the data are missing or damaged.
        """
        require(isinstance(self.batch_size, int) and self.batch_size >= 1, "batch_size", self.batch_size, "an integer of at least 1")
        chosen = model or self.model
        own = self.model_settings if chosen == type(self).model else {}
        source = self.source or self.name
        shape, classes = data.shape_of(source)
        network = models.build(chosen, {**own, **(model_settings or {})}, input_shape=shape, classes=classes, key=key)
        dataset = data.load(source, data_dir=data_dir)
        return Supervised(network, cross_entropy_of_each, dataset=dataset, batch_size=self.batch_size, key=key, name=self.name)


@dataclass(frozen=True)
class Digits(Images):
    """scikit-learn's handwritten digits, 8x8, embedded: 1,437 to train on, 360 to test on (stratified, split seed 0).

    Defaults of the command line: a 64-128-128-10 mlp (relu), Adam, lr 1e-3, batch 64, 30 epochs.
    """

    name: ClassVar[str] = "digits"
    model_settings: ClassVar[Mapping[str, Any]] = {"hidden": "128-128"}
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 1e-3, "epochs": 30}


@dataclass(frozen=True)
class MNIST(Images):
    """MNIST's handwritten digits, 28x28: 60,000 to train on, 10,000 to test on. Get them with `altgrad data get mnist`.

    Defaults of the command line: a 784-256-256-10 mlp (relu), Adam, lr 1e-3, batch 64, 20 epochs.
    """

    name: ClassVar[str] = "mnist"
    model_settings: ClassVar[Mapping[str, Any]] = {"hidden": "256-256"}
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 1e-3, "epochs": 20}


@dataclass(frozen=True)
class FashionMNIST(Images):
    """Fashion-MNIST's articles of clothing, 28x28: 60,000 to train on, 10,000 to test on. Get them with `altgrad data get fashion-mnist`.

    Defaults of the command line: a 784-256-256-10 mlp (relu), Adam, lr 1e-3, batch 64, 20 epochs.
    """

    name: ClassVar[str] = "fashion-mnist"
    model_settings: ClassVar[Mapping[str, Any]] = {"hidden": "256-256"}
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 1e-3, "epochs": 20}


@dataclass(frozen=True)
class CIFAR10(Images):
    """CIFAR-10's colour photographs, 32x32: 50,000 to train on, 10,000 to test on. Get them with `altgrad data get cifar10`.

    Defaults of the command line: a cnn with 32-64-128 channels, Adam, lr 1e-3, batch 64, 20 epochs.
    """

    model: str = field(default="cnn", metadata={"help": "a name of `altgrad models`, or package.module:callable"})

    name: ClassVar[str] = "cifar10"
    model_settings: ClassVar[Mapping[str, Any]] = {"channels": "32-64-128"}
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 1e-3, "epochs": 20}
