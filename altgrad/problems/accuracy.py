r"""A supervised image set scored by the 0/1 error: loss_n = 1 - [argmax f(x_n) = y_n]. It is piecewise constant: its gradient is 0 or does not exist."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from altgrad.errors import UsageError, near_miss, require
from altgrad.problems.images import CIFAR10, MNIST, Digits, FashionMNIST, Images
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key

SETS: dict[str, type[Images]] = {factory.name: factory for factory in (Digits, MNIST, FashionMNIST, CIFAR10)}


def error_of_each(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the greatest of outputs [N, classes] is not at targets [N], else 0: [N], in the outputs' dtype."""
    return (outputs.argmax(1) != targets).to(outputs.dtype)


class ZeroOne(Supervised):
    """Supervised, without a derivative."""

    differentiable = False


@dataclass(frozen=True)
class Accuracy:
    """Image classification whose loss is the share of wrong answers itself: no gradient exists.

    Defaults of the command line: digits with a 64-128-128-10 mlp (relu), Adam, lr 1e-2, batch 256, 60 epochs.
    """

    dataset: str = field(default="digits", metadata={"help": "digits, mnist, fashion-mnist or cifar10"})
    batch_size: int = field(default=256, metadata={"help": "examples a step; the loss moves in steps of one over this"})
    model: str | None = field(default=None, metadata={"help": "a name of `altgrad models`, or package.module:callable; none for the data set's own"})

    name: ClassVar[str] = "accuracy"
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 1e-2, "epochs": 60}

    def __post_init__(self) -> None:
        if self.dataset not in SETS:
            raise UsageError(near_miss("data set", self.dataset, SETS))
        require(isinstance(self.batch_size, int) and self.batch_size >= 1, "batch_size", self.batch_size, "an integer of at least 1")

    def build(self, key: Key, *, model: str | None = None, model_settings: Mapping[str, Any] | None = None, data_dir: str | Path | None = None) -> ZeroOne:
        """The problem; arguments and errors as for the image problems."""
        images = SETS[self.dataset](batch_size=self.batch_size)
        plain = images.build(key, model=model or self.model, model_settings=model_settings, data_dir=data_dir)
        return ZeroOne(plain.model, error_of_each, dataset=plain.dataset, batch_size=self.batch_size, key=key, name=self.name)
