r"""Images through a codebook: an autoencoder whose middle is vector-quantised.

    loss_n = mean over pixels of (x̂_n - x_n)² + the quantiser's own loss_n

Figures on held-out images: mse in units of the training pixels' variance (1 is one grey for all), usage (the share of the codes that
any vector of the set chose), perplexity (how evenly; 1 to `codes`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from altgrad import data, models
from altgrad.engine import Needs, Tree
from altgrad.errors import NumericsError, SettingError, ShapeError, near_miss, require
from altgrad.problem import Batch, not_finite
from altgrad.problems.supervised import Supervised, shapes_of
from altgrad.rng import Key
from altgrad.vector import VectorQuantizer, perplexity, shares, used
from altgrad.vector.affine import AFFINES
from altgrad.vector.autoencoder import Autoencoder, Reconstruction
from altgrad.vector.gradients import GRADIENTS
from altgrad.world import World

SETS = ("digits", *data.SHAPES)
INITS = ("uniform", "kmeans")
SHOWN = 10  # test images in a row of the picture
SMALL = 16  # pixels a side: smaller images are shown four times as large


def errors_of_each(outputs: Reconstruction, targets: Tensor) -> Tensor:
    """Mean square error of the pixels, and the quantiser's loss: [N]."""
    return (outputs.images - targets).square().flatten(1).mean(1) + outputs.losses


class VQAutoencoderProblem(Supervised):
    """The autoencoder on a set of images, which are their own targets; it has no blocks and no labels."""

    model: Autoencoder

    @property
    def provides(self) -> Needs:
        return super().provides & ~(Needs.BLOCKS | Needs.LABELS)

    @property
    def classes(self) -> int | None:
        return None

    def batch(self, step: int, world: World) -> Batch:
        found = super().batch(step, world)
        return found._replace(targets=found.inputs)

    def check_batch(self, batch: Batch) -> None:
        """Look at the training set, and run the model once (its buffers stay as they are).

        Raises:
            NumericsError: the images hold NaN. ShapeError: the model does not give images back.
        """
        if wrong := not_finite(self.dataset.train_inputs):
            raise NumericsError(f"{self.name}, training set: {wrong}")
        with torch.no_grad():
            outputs = self.forward(self.params(), batch.inputs, self.fresh_buffers())
        if outputs.images.shape != batch.inputs.shape:
            raise ShapeError(f"the model returned images of {shapes_of(outputs.images)} for inputs of {shapes_of(batch.inputs)}; they must be the same.")
        self.split_loss = "each"

    def evaluate(self, predict: Any, *, split: str = "test", chunk: int = 1000) -> dict[str, float]:
        """{"mse", "loss", "usage", "perplexity"} of `predict(inputs)` on a split; the model is in evaluation mode meanwhile.

        loss is mse plus the quantiser's own; usage is in [0, 1].
        """
        inputs = getattr(self.dataset, f"{split}_inputs")
        codes, mode, mse, loss = self.model.quantizer.codes, self.model.training, 0.0, 0.0
        counts = torch.zeros(codes, dtype=torch.float64)
        self.model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(inputs), chunk):
                    x = inputs[start : start + chunk]
                    outputs = predict(x)
                    mse += float((outputs.images - x).square().double().flatten(1).mean(1).sum())
                    loss += float(errors_of_each(outputs, x).double().sum())
                    counts += shares(outputs.indices.cpu(), codes) * len(x)
        finally:
            self.model.train(mode)
        share = counts / counts.sum()
        return {"mse": mse / len(inputs), "loss": loss / len(inputs), "usage": float(used(share)), "perplexity": float(perplexity(share))}

    def pictures(self, params: Tree) -> Mapping[str, Tensor]:
        """The first test images, and below them what came back."""
        seen, mode = self.dataset.test_inputs[:SHOWN], self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                back = self.forward(params, seen, self.fresh_buffers()).images
        finally:
            self.model.train(mode)
        low, high = seen.min(), seen.max()
        rows = [torch.cat(list(images.reshape(-1, *self.model.shape)), 2) for images in (seen, back)]  # [C, height, N · width]
        picture = ((torch.cat(rows, 1) - low) / (high - low).clamp_min(1e-12)).movedim(0, -1)
        if self.model.shape[1] < SMALL:
            picture = picture.repeat_interleave(4, 0).repeat_interleave(4, 1)
        return {"reconstructions": picture.expand(*picture.shape[:2], 3)}


@dataclass(frozen=True)
class VQAutoencoder:
    """A small convolutional autoencoder with a codebook in its middle; the loss is the square error of the pixels plus the codebook's.

    Defaults of the command line: digits (8x8, a 4x4 grid of codes), engine straight-through, Adam, lr 3e-3, batch 64, 30 epochs.
    Ten test images and their reconstructions of every evaluation are written to the run folder.
    """

    data: str = field(default="digits", metadata={"help": "digits, mnist, fashion-mnist or cifar10"})
    codes: int = field(default=128, metadata={"help": "in the codebook, >= 1 and at most the vectors of the training set"})
    dim: int = field(default=16, metadata={"help": "length of a code, >= 1"})
    gradient: str = field(default="straight-through", metadata={"help": "what the encoder is told: straight-through or rotation"})
    commitment: float = field(default=0.25, metadata={"help": "weight of (z - sg q)², >= 0"})
    pull: float = field(default=1.0, metadata={"help": "weight of (sg z - q)², by which codes follow their vectors, >= 0; nothing with ema or alternating"})
    sync: float = field(default=0.0, metadata={"help": "synchronised commitment: codes get this times the gradient at the values, >= 0"})
    affine: str = field(default="none", metadata={"help": "codes under one map for all: none, learned or running"})
    affine_rate: float = field(default=1.0, metadata={"help": "affine learned: how much faster than the codes, > 0"})
    alternating: int = field(default=0, metadata={"help": "inner steps of the codes before each of the encoder's, >= 0"})
    alternating_rate: float = field(default=0.5, metadata={"help": "of an inner step: 1 goes to the mean of a code's vectors, in (0, 1]"})
    ema: bool = field(default=False, metadata={"help": "codes are moving averages of their vectors, and no parameter"})
    decay: float = field(default=0.95, metadata={"help": "of moving averages, in [0, 1)"})
    revive: int = field(default=0, metadata={"help": "updates after which dead codes are put on vectors of the batch, again and again; 0 for never"})
    dead: float = field(default=0.1, metadata={"help": "a code is dead below this share of its even part of the vectors, in [0, 1]"})
    init: str = field(default="uniform", metadata={"help": "first codes: uniform on ±1/codes, or kmeans of the first batch's vectors"})
    hidden: int = field(default=32, metadata={"help": "channels of the convolutions, >= 1"})
    halvings: int | None = field(default=None, metadata={"help": "of the side, so many 2x2 fewer codes than pixels; none for 1 on digits, else 2"})
    batch_size: int = field(default=64, metadata={"help": "examples a step"})

    name: ClassVar[str] = "vq-autoencoder"
    defaults: ClassVar[Mapping[str, Any]] = {"engine": "straight-through", "engine_settings": {}, "optimizer": "Adam", "lr": 3e-3, "epochs": 30}

    def __post_init__(self) -> None:
        for name, allowed in (("data", SETS), ("init", INITS), ("gradient", GRADIENTS), ("affine", AFFINES)):
            if getattr(self, name) not in allowed:
                raise SettingError(near_miss(name, str(getattr(self, name)), allowed))
        require(isinstance(self.batch_size, int) and self.batch_size >= 1, "batch_size", self.batch_size, "an integer of at least 1")

    def build(self, key: Key, *, data_dir: str | Path | None = None) -> VQAutoencoderProblem:
        """The problem; `key` addresses first weights and codes, the order of the data, and where dead codes go.

        Raises:
            SettingError: a setting of the quantiser or the network out of range; more codes than vectors. DataError: the data are missing or damaged.
        """
        shape: Any = (1, 8, 8) if self.data == "digits" else data.SHAPES[self.data]
        halvings = (1 if self.data == "digits" else 2) if self.halvings is None else self.halvings
        quantizer = VectorQuantizer(
            self.codes,
            self.dim,
            gradient=self.gradient,
            commitment=self.commitment,
            pull=self.pull,
            sync=self.sync,
            affine=self.affine,
            affine_rate=self.affine_rate,
            alternating=self.alternating,
            alternating_rate=self.alternating_rate,
            ema=self.ema,
            decay=self.decay,
            revive=self.revive,
            dead=self.dead,
            key=key,
        )
        with torch.random.fork_rng(devices=[]):  # PyTorch's constructors draw from the global generator: what they draw is overwritten
            model = Autoencoder(shape, quantizer, hidden=self.hidden, halvings=halvings)
        models.initialise(model, key)
        dataset = data.load(self.data, data_dir=data_dir)
        vectors = len(dataset.train_inputs) * prod(side // 2**halvings for side in shape[1:])
        require(self.codes <= vectors, "codes", self.codes, f"at most {vectors}, the vectors of {self.data}'s training set: lower it, or take a larger set")
        problem = VQAutoencoderProblem(model, errors_of_each, dataset=dataset, batch_size=self.batch_size, key=key, name=self.name)
        if self.init == "kmeans":
            with torch.no_grad():
                quantizer.start_from(model.encode(problem.batch(0, World()).inputs), key=key)
        return problem
