r"""Text as numbers: a corpus of sources.py or of the user's, its characters, and what a table of character pairs would know of it.

    conditional bigram entropy   H = -Σ_ab p(a b) ln p(b | a)   in nats, p from the counts of the training text

is the least loss that a model which sees one character can reach on that text.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from altgrad.errors import DataError, UsageError, near_miss
from altgrad.fetch import find, folder_of, present, remedy, verify

CORPORA = ("gutenberg", "moby-dick")
UNSEEN = 0  # the number of a character that the training text lacks, and of what comes before the beginning
TEST_SHARE = 10  # the last tenth of a text is the test


class Corpus(NamedTuple):
    """A text cut in two by position, as numbers of characters."""

    name: str
    train: Tensor  # int64 [characters], in 1 … vocabulary - 1
    test: Tensor  # int64 [characters], in 0 … vocabulary - 1
    characters: str  # of the training text, in order of code point: the first has number 1

    @property
    def vocabulary(self) -> int:
        """How many numbers there are, UNSEEN among them."""
        return len(self.characters) + 1


def load(name: str, *, data_dir: str | Path | None = None) -> Corpus:
    """The corpus `name` from the cache, or `name`.txt from the user's folder `data_dir` (or its subfolder `name`).

    Args:
        name: one of CORPORA.
        data_dir: where the text lies; files of the cache are checked by sha256, the user's may hold any text.

    Raises:
        UsageError: no such corpus.
        DataError: the text is missing or damaged.
    """
    if name not in CORPORA:
        raise UsageError(near_miss("corpus", name, CORPORA))
    home, file = folder_of(name, data_dir), next(iter(find(name).files))
    if data_dir is None and present(name):
        verify(name, home)
    paths = [home / file] if data_dir is None else [home / file, home.parent / file]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise DataError(f"{name} is missing: there is no {' or '.join(map(str, paths))}. {remedy(name)}")
    return corpus(name, decoded(path.read_bytes()))


def decoded(content: bytes) -> str:
    """UTF-8, or Latin-1 where it is not; lines end in one character."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def corpus(name: str, text: str) -> Corpus:
    """`text` as numbers, its last tenth set aside."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)  # [characters]
    cut = len(points) - len(points) // TEST_SHARE
    known = np.unique(points[:cut])
    place = np.searchsorted(known, points).clip(max=max(len(known) - 1, 0))
    numbers = np.where(known[place] == points, place + 1, UNSEEN) if len(known) else np.zeros(0)
    tokens = torch.from_numpy(numbers.astype(np.int64))
    return Corpus(name, tokens[:cut], tokens[cut:], "".join(map(chr, known.tolist())))


def bigram_entropy(tokens: Tensor, vocabulary: int) -> float:
    """The conditional bigram entropy of `tokens` [characters] in nats; see above.

    Args:
        tokens: numbers in 0 … vocabulary - 1, at least two of them.
    """
    pairs = torch.bincount(tokens[:-1] * vocabulary + tokens[1:], minlength=vocabulary**2).view(vocabulary, vocabulary).double()  # [first, second]
    joint = pairs / pairs.sum()
    return float(torch.xlogy(joint.sum(1), joint.sum(1)).sum() - torch.xlogy(joint, joint).sum())


__all__ = ["CORPORA", "Corpus", "bigram_entropy", "load"]
