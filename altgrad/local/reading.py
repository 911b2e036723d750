"""What every read-out of a trained model comes to on held-out data, and what linear probes find in its blocks."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from altgrad.engine import Engine, Tree
from altgrad.errors import NumericsError
from altgrad.local import linear_probe
from altgrad.local.prefix import evaluating
from altgrad.problem import Problem

CHUNK = 1000  # examples at a time
MOST = 10_000  # training examples that a probe is fitted on
PROBE = "linear-probe"  # of all blocks together; "linear-probe.<block>" of one


def accuracies(engine: Engine, problem: Problem, params: Tree, state: Tree) -> dict[str, float]:
    """Test accuracy by read-out, from one pass; nothing for rules with a single read-out, or where there are no classes."""
    right: dict[str, float] = {}
    total = 0
    with torch.no_grad(), evaluating(problem):
        for inputs, labels in parts(problem, "test"):
            found = engine.reads(problem, params, state, inputs)
            if not found:
                return {}
            for name, scores in found.items():
                right[name] = right.get(name, 0.0) + float((scores.argmax(1) == labels).sum())
            total += len(labels)
    return {name: count / total for name, count in right.items()}


def probed(engine: Engine, problem: Problem, params: Tree, state: Tree) -> dict[str, float]:
    """Test accuracy of linear probes fitted on training data: "linear-probe" sees all blocks, "linear-probe.<block>" one; nothing for rules without blocks."""
    with torch.no_grad(), evaluating(problem):

        def features(split: str, most: int | None = None) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            for inputs, labels in parts(problem, split, most):
                yield engine.activities(problem, params, state, inputs), labels

        first = next(features("train", 1), None)
        if first is None or not first[0]:
            return {}
        names = list(first[0])
        try:
            fitted = linear_probe.fit(features("train", MOST), classes_of(problem), groups=[names, *([name] for name in names)])
        except NumericsError:
            return {}  # a run that diverged has no features to speak of
        labelled = dict(zip([PROBE, *(f"{PROBE}.{name}" for name in names)], fitted, strict=True))
        right, total = dict.fromkeys(labelled, 0.0), 0
        for given, labels in features("test"):
            for name, probe in labelled.items():
                right[name] += float((probe.scores(given).argmax(1) == labels).sum())
            total += len(labels)
    return {name: count / total for name, count in right.items()}


def parts(problem: Problem, split: str, most: int | None = None) -> Iterator[tuple[Any, Tensor]]:
    """(inputs, labels) of a split, some at a time; of no more than `most` examples, evenly spaced. Nothing where there are no classes."""
    data: Any = getattr(problem, "dataset", None)
    if data is None or not classes_of(problem):
        return
    inputs, labels = getattr(data, f"{split}_inputs"), getattr(data, f"{split}_targets")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        return
    count = len(labels) if most is None else min(most, len(labels))
    index = torch.arange(count, device=labels.device) * len(labels) // max(1, count)
    for some in index.split(CHUNK):
        yield inputs[some], labels[some]


def classes_of(problem: Problem) -> int:
    """How many classes a problem's labels have; 0 where it has no labels."""
    return int(getattr(problem, "classes", None) or 0)


__all__ = ["PROBE", "accuracies", "probed"]
