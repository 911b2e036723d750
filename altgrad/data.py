"""Data sets by name, as tensors: digits comes with scikit-learn, the others are read from the cache (see fetch.py) or from the user's files.

Inputs are standardised with the training set's own figures: x ← (x - mean) / std, per channel for images. Nothing is fetched here.
"""

import gzip
import zipfile
import zlib
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from altgrad.errors import DataError, MissingExtraError, UsageError, require
from altgrad.fetch import find, folder_of, get, listing, names, present, remedy, verify
from altgrad.rng import Key, permutation

Shape = tuple[int, int, int]  # channels, height, width
CLASSES = 10
SHAPES: dict[str, Shape] = {"mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
FOREIGN_FOLDERS = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw", "cifar10": "cifar-10-batches-bin"}  # where other tools leave them
DIGITS_TEST = 360  # of 1,797: every fifth


class Dataset(NamedTuple):
    """A set in memory: float32 inputs, int64 targets in 0 … classes - 1."""

    name: str
    train_inputs: Tensor  # [examples, channels, height, width] or [examples, features]
    train_targets: Tensor  # [examples]
    test_inputs: Tensor
    test_targets: Tensor
    classes: int


class Arrays(NamedTuple):
    """A set as its files hold it: images [examples, channels, height, width] and labels [examples]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(name: str, *, data_dir: str | Path | None = None) -> Dataset:
    """The set `name`, from the cache, or from the user's files where `data_dir` is given.

    Args:
        name: digits, mnist, fashion-mnist or cifar10.
        data_dir: a folder that holds the usual files, itself or in a folder called `name`: IDX (raw or .gz), CIFAR-10's binary
            version, or `name`.npz with x_train, y_train, x_test, y_test. Files of the cache are checked by sha256, the user's by their form.

    Raises:
        UsageError: no such set.
        DataError: the set is missing or damaged, or labels are out of range.
        MissingExtraError: digits needs scikit-learn.
    """
    of_images(name)
    if name == "digits":
        return digits()
    home = folder_of(name, data_dir)
    folders = [home] if data_dir is None else [home, home.parent / FOREIGN_FOLDERS[name], home.parent]
    if data_dir is None and present(name):
        verify(name, home)
    for folder in folders:
        for reader in (cifar_binary if name == "cifar10" else idx, npz):
            arrays = reader(name, folder)
            if arrays is not None:
                return dataset(name, arrays)
    pickled = " The files data_batch_1 … without .bin are pickles and are never read." if (home.parent / "cifar-10-batches-py").exists() else ""
    raise DataError(f"{name} is missing: none of its files is in {' or '.join(map(str, folders))}.{pickled} {remedy(name)}")


def shape_of(name: str) -> tuple[tuple[int, ...], int]:
    """(shape of one input, number of classes), known without reading the set."""
    of_images(name)
    return SHAPES.get(name, (64,)), CLASSES


def of_images(name: str) -> None:
    """Raise UsageError unless `name` is a set of images (text is read by text.py)."""
    if find(name).name not in {"digits", *SHAPES}:
        raise UsageError(f"{name} is a text, not a set of images; train on it with the problem char-lm. Images: {', '.join(sorted(['digits', *SHAPES]))}.")


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8: 1,437 to train on and 360 to test on, stratified, split seed 0; inputs [examples, 64]."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "data", "the digits data set") from error
    images, labels = load_digits(return_X_y=True)  # [1797, 64] in 0 … 16
    parts = train_test_split(images, labels, test_size=DIGITS_TEST, random_state=0, stratify=labels)
    return dataset("digits", Arrays(parts[0], parts[2], parts[1], parts[3]))


def dataset(name: str, arrays: Arrays) -> Dataset:
    """`arrays` checked and standardised."""
    for split, images, labels in (("training", arrays.train_images, arrays.train_labels), ("test", arrays.test_images, arrays.test_labels)):
        if not len(images) or len(images) != len(labels):
            raise DataError(f"{name}: the {split} set has {len(images)} images and {len(labels)} labels; it needs as many of each, and at least one.")
        if labels.min() < 0 or labels.max() >= CLASSES:
            raise DataError(f"{name}: labels of the {split} set lie in [{labels.min()}, {labels.max()}]; they must lie in [0, {CLASSES - 1}].")
    train, test = torch.from_numpy(arrays.train_images), torch.from_numpy(arrays.test_images)
    mean, std = moments(train)
    if not bool((torch.isfinite(std) & (std > 0)).all()):
        raise DataError(f"{name}: the training images have standard deviation {std.flatten().tolist()}; it must be finite and above 0 in every channel.")
    inputs = [images.float().sub_(mean.float()).div_(std.float()) for images in (train, test)]
    targets = [torch.from_numpy(labels.astype(np.int64)) for labels in (arrays.train_labels, arrays.test_labels)]
    if not bool(torch.isfinite(inputs[1]).all()):
        raise DataError(f"{name}: the test images hold NaN or infinite values.")
    return Dataset(name, inputs[0], targets[0], inputs[1], targets[1], CLASSES)


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel (over everything where there are no channels), in the shape that broadcasts.

    Sums run in float64, where sums of bytes are exact: the figures do not depend on the number of threads.
    """
    axes = (0, *range(2, images.ndim)) if images.ndim > 2 else (0, 1)
    total, square, count = torch.zeros(()), torch.zeros(()), 0
    for part in images.split(4096):
        wide = part.double()
        total, square = total + wide.sum(axes, keepdim=True), square + wide.square().sum(axes, keepdim=True)
        count += part[:, :1].numel() if images.ndim > 2 else part.numel()
    mean = total / count
    return mean, (square / count - mean.square()).clamp_min(0).sqrt()


def idx(name: str, folder: Path) -> Arrays | None:
    """The four IDX files in `folder`, raw or gzipped; None where there is none of them."""
    paths = {}
    for split in ("train", "t10k"):
        for kind, axes in (("images", 3), ("labels", 1)):
            spellings = [f"{split}-{kind}{mark}idx{axes}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
            paths[split, kind] = next((folder / file for file in spellings if (folder / file).is_file()), None)
    if not any(paths.values()):
        return None
    absent = [f"{split}-{kind}-idx{3 if kind == 'images' else 1}-ubyte" for (split, kind), path in paths.items() if path is None]
    if absent:
        raise DataError(f"{folder} lacks {', '.join(absent)} (or the same with .gz), which {name} needs beside the files that are there.")
    found = {spot: idx_array(path, SHAPES[name][1:] if spot[1] == "images" else ()) for spot, path in paths.items() if path is not None}
    return Arrays(found["train", "images"][:, None], found["train", "labels"], found["t10k", "images"][:, None], found["t10k", "labels"])


def idx_array(path: Path, item: tuple[int, ...]) -> np.ndarray:
    """uint8 [examples, *item] of one IDX file: 0, 0, 8 (bytes), number of axes; each axis' length as 4 bytes, big end first; then the values."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            content = bytearray(stream.read())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or truncated: {error}.") from error
    header, axes = 4 + 4 * (1 + len(item)), 1 + len(item)
    if len(content) < header or bytes(content[:4]) != bytes([0, 0, 8, axes]):
        raise DataError(f"{path} is no IDX file of bytes with {axes} axes: it begins with {bytes(content[:4]).hex()}, expected {bytes([0, 0, 8, axes]).hex()}.")
    shape = tuple(int(length) for length in np.frombuffer(content, dtype=">u4", count=axes, offset=4))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise DataError(f"{path} is damaged or truncated: {len(content)} bytes, expected {expected} for the shape {list(shape)} that its header states.")
    if shape[1:] != item:
        raise DataError(f"{path} holds items of shape {list(shape[1:])}, expected {list(item)}.")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def cifar_binary(name: str, folder: Path) -> Arrays | None:
    """CIFAR-10's binary version: records of one label byte and 3 x 32 x 32 pixel bytes; None where there is none of its files."""
    files = [folder / f"data_batch_{i}.bin" for i in range(1, 6)] + [folder / "test_batch.bin"]
    if not any(path.is_file() for path in files):
        return None
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise DataError(f"{folder} lacks {', '.join(absent)}, which {name} needs beside the files that are there.")
    record = 1 + int(np.prod(SHAPES[name]))
    batches = []
    for path in files:
        content = np.fromfile(path, dtype=np.uint8)
        if not len(content) or len(content) % record:
            raise DataError(f"{path} is damaged or truncated: {len(content)} bytes, expected a multiple of {record} ({10_000 * record} in the original).")
        batches.append(content.reshape(-1, record))
    train, test = np.concatenate(batches[:5]), batches[5]
    return Arrays(train[:, 1:].reshape(-1, *SHAPES[name]), train[:, 0], test[:, 1:].reshape(-1, *SHAPES[name]), test[:, 0])


def npz(name: str, folder: Path) -> Arrays | None:
    """`name`.npz with x_train, y_train, x_test, y_test (never pickled objects); None where there is no such file."""
    path = folder / f"{name}.npz"
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            absent = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in archive]
            if absent:
                raise DataError(f"{path} lacks {', '.join(absent)}; it has {', '.join(archive.files) or 'nothing'}.")
            parts = {key: np.array(archive[key]) for key in ("x_train", "y_train", "x_test", "y_test")}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged, or holds pickled objects, which are never read: {error}.") from error
    return Arrays(
        npz_images(parts["x_train"], path, SHAPES[name]),
        npz_labels(parts["y_train"], path),
        npz_images(parts["x_test"], path, SHAPES[name]),
        npz_labels(parts["y_test"], path),
    )


def npz_images(images: np.ndarray, path: Path, shape: Shape) -> np.ndarray:
    """`images` as [examples, channels, height, width]; channels last, or left out where there is one, is understood."""
    channels, height, width = shape
    if images.dtype.kind not in "uif":
        raise DataError(f"{path} holds images of type {images.dtype}; they must be numbers.")
    images = images if images.dtype == np.uint8 else images.astype(np.float32)
    if images.shape[1:] == shape:
        return images
    if images.shape[1:] == (height, width, channels):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if channels == 1 and images.shape[1:] == (height, width):
        return images[:, None]
    raise DataError(f"{path} holds images of shape {list(images.shape)}; they must be [examples, {channels}, {height}, {width}] or channels last.")


def npz_labels(labels: np.ndarray, path: Path) -> np.ndarray:
    """`labels` as [examples]; a second axis of length 1 is dropped."""
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.ndim != 1 or flat.dtype.kind not in "ui":
        raise DataError(f"{path} holds labels of type {labels.dtype} and shape {list(labels.shape)}; they must be integers of shape [examples].")
    return flat


class ResumableSampler(Sampler[int]):
    """The order of one epoch, as a function of (key, epoch) alone: a DataLoader that uses it resumes in mid-epoch with the same batches.

        sampler = ResumableSampler(dataset, key=Key(0))
        loader = DataLoader(dataset, batch_size=64, sampler=sampler)
        for epoch in range(first_epoch, epochs):
            sampler.set_epoch(epoch, start=64 * batches_done if epoch == first_epoch else 0)

    Args:
        examples: the data set, or anything else with a length.
        key: names the orders; keys that differ give unrelated ones.
        epoch: whose order; each epoch has its own.
        start: how many examples of the epoch are done already, in [0, len(examples)].
    """

    def __init__(self, examples: Sized, *, key: Key, epoch: int = 0, start: int = 0):
        self.count, self.key = len(examples), key
        self.set_epoch(epoch, start=start)

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Go to example `start` of `epoch`."""
        require(epoch >= 0, "epoch", epoch, "0 or more")
        require(0 <= start <= self.count, "start", start, f"in [0, {self.count}], the number of examples")
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.count, key=self.key, epoch=self.epoch)[self.start :].tolist())

    def __len__(self) -> int:
        return self.count - self.start


def epoch_order(count: int, *, key: Key, epoch: int) -> np.ndarray:
    """A permutation of 0 … count - 1 [count]; a function of (key, epoch). Problems that serve their own batches use the same one."""
    return permutation(key.fold("order").at(epoch), "epoch", count)


__all__ = ["Dataset", "ResumableSampler", "epoch_order", "get", "listing", "load", "names", "shape_of"]
