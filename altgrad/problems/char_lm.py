r"""Next-character prediction on a real text: the loss of a sequence is its mean cross entropy in nats.

    loss_n = -(1/T) Σ_t ln p(c_{t+1} | c_1 … c_t),     bits per character = loss / ln 2

The figure to beat is `bigram_entropy`, the least loss of a table of character pairs on the training text.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from altgrad import models, text
from altgrad.data import Dataset
from altgrad.errors import DataError, ShapeError, UsageError, near_miss, require
from altgrad.problems.supervised import Supervised, shapes_of
from altgrad.rng import Key

TEST_SEQUENCES = 2048  # at most, evenly spread over the test text


def cross_entropy_of_each(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean -ln softmax(outputs)[target] of every sequence [N]; outputs [N, characters, places], targets [N, places]."""
    rows = outputs.transpose(1, 2)  # how `window` makes them: no copy
    return cross_entropy(rows.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).mean(1)


class CharLM(Supervised):
    """`model` on sequences of `context` characters of `corpus`; its outputs are [N, vocabulary, places]."""

    def __init__(self, model: torch.nn.Module, corpus: text.Corpus, *, context: int, batch_size: int, key: Key):
        train, test = (sequences(corpus.name, part, context) for part in (corpus.train, corpus.test))
        if len(test[0]) > TEST_SEQUENCES:
            spread = torch.linspace(0, len(test[0]) - 1, TEST_SEQUENCES).long()
            test = test[0][spread], test[1][spread]
        dataset = Dataset(corpus.name, *train, *test, corpus.vocabulary)
        super().__init__(model, cross_entropy_of_each, dataset=dataset, batch_size=batch_size, key=key, name="char-lm")
        self.corpus = corpus

    @property
    def bigram_entropy(self) -> float:
        """The conditional bigram entropy of the training text, in nats: what a model must get below to know more than pairs of characters."""
        return self.recall("bigram_entropy", lambda: text.bigram_entropy(self.corpus.train, self.corpus.vocabulary))

    def check_batch(self, batch: Any) -> None:
        with torch.no_grad():
            outputs = self.forward(self.params(), batch.inputs[:1], self.fresh_buffers())
        expected = (1, self.corpus.vocabulary, batch.inputs.shape[1])
        if not isinstance(outputs, Tensor) or tuple(outputs.shape) != expected:
            raise ShapeError(f"the model returned {shapes_of(outputs)} for 1 sequence; it must return {list(expected)}: [N, characters, places].")
        super().check_batch(batch)

    def evaluate(self, predict: Any, *, split: str = "test", chunk: int = 64) -> dict[str, float]:
        """{"loss", "bits_per_character", "accuracy", "bigram_entropy"} on a split: nats a character, what they are in bits, the share of characters
        that were the likeliest, and the figure to beat."""
        mode, right, total = self.model.training, 0.0, 0.0
        inputs, targets = getattr(self.dataset, f"{split}_inputs"), getattr(self.dataset, f"{split}_targets")
        self.model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(inputs), chunk):
                    outputs, y = predict(inputs[start : start + chunk]), targets[start : start + chunk]
                    right += float((outputs.argmax(1) == y).sum())
                    total += float(self.score(outputs, y).double().sum())
        finally:
            self.model.train(mode)
        loss = total / len(inputs)
        return {"loss": loss, "bits_per_character": loss / math.log(2), "accuracy": right / targets.numel(), "bigram_entropy": self.bigram_entropy}


def sequences(name: str, tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """`tokens` cut into sequences [N, context], and the character that follows each of their characters [N, context].

    Raises:
        DataError: the text is too short for one.
    """
    count = (len(tokens) - 1) // context
    if count < 1:
        raise DataError(f"{name}: a part of {len(tokens)} characters is too short for one sequence of {context}; give a longer text, or lower context.")
    return tokens[: count * context].view(count, context), tokens[1 : count * context + 1].view(count, context)


@dataclass(frozen=True)
class CharacterModel:
    """The next character of Moby-Dick or of 18 books: trained on the first nine tenths of the text, tested on the last. `altgrad data get moby-dick`.

    Defaults of the command line: a window model of 3 characters (18-32-84, 3,884 parameters), Adam, lr 1e-2, batch 16, 2 epochs.
    """

    corpus: str = field(default="moby-dick", metadata={"help": "moby-dick (1.2 million characters) or gutenberg (11.7 million)"})
    context: int = field(default=64, metadata={"help": "characters a sequence; every one of them is predicted from those before it"})
    batch_size: int = field(default=16, metadata={"help": "sequences a step"})
    model: str = field(default="window", metadata={"help": "window, or package.module:callable: int64 [N, places] to scores [N, characters, places]"})

    name: ClassVar[str] = "char-lm"
    model_settings: ClassVar[Mapping[str, Any]] = {"size": 3, "width": 6, "hidden": "32"}  # of the default model
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 1e-2, "epochs": 2}

    def __post_init__(self) -> None:
        if self.corpus not in text.CORPORA:
            raise UsageError(near_miss("corpus", self.corpus, text.CORPORA))
        for label in ("context", "batch_size"):
            value = getattr(self, label)
            require(isinstance(value, int) and value >= 1, label, value, "an integer of at least 1")

    def build(self, key: Key, *, model: str | None = None, model_settings: Mapping[str, Any] | None = None, data_dir: str | Path | None = None) -> CharLM:
        """The problem.

        Args:
            key: addresses the first weights and the order of the sequences.
            model: in place of the setting `model`.
            model_settings: settings of the model, over this problem's own where the model is the default one.
            data_dir: where the text lies, if not in the cache.

        Raises:
            UsageError, SettingError: no such model or setting, or a model that does not read characters.
            DataError: the text is missing, damaged or too short.
        """
        chosen = model or self.model
        readers = [name for name, cls in models.TABLE.items() if getattr(cls, "reads", "") == "characters"]
        if chosen in models.TABLE and chosen not in readers:
            raise UsageError(f"the model {chosen} does not read characters. Use one of: {', '.join(readers)}; or give package.module:callable.")
        own = self.model_settings if chosen == type(self).model else {}
        corpus = text.load(self.corpus, data_dir=data_dir)
        network = models.build(chosen, {**own, **(model_settings or {})}, input_shape=(self.context,), classes=corpus.vocabulary, key=key)
        return CharLM(network, corpus, context=self.context, batch_size=self.batch_size, key=key)
