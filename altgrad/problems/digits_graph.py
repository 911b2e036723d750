"""Digits as nodes of a graph: few have labels, all lend their images to their neighbours, and the test nodes are scored (transductive)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from altgrad import data, models, registry
from altgrad.errors import UsageError, require
from altgrad.graphs import GraphNetwork, nearest_neighbours, normalised
from altgrad.implicit.networks import ConvergentGraph
from altgrad.problems.images import cross_entropy_of_each
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key, permutation


class NodeClassification(Supervised):
    """Supervised on numbers of nodes; `unlabelled` are the training nodes whose labels training does not see, `labels` those of all nodes."""

    unlabelled: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DigitsGraph:
    """scikit-learn's digits joined to their nearest neighbours: a two-layer graph convolution learns from a few labelled nodes.

    Nodes are all 1,797 images; a share of the 1,437 training ones, drawn anew for every seed, has labels; the 360 test nodes are scored.
    Defaults of the command line: 64-32-10, Adam, lr 1e-2, batch 48 nodes, 100 epochs.
    """

    k: int = field(default=5, metadata={"help": "nearest neighbours by Euclidean distance; joined are nodes either of which is among the other's"})
    labelled: float = field(default=0.1, metadata={"help": "share of the training nodes that have labels, in (0, 1]"})
    hidden: int = field(default=32, metadata={"help": "width of the layer between the two convolutions"})
    batch_size: int = field(default=48, metadata={"help": "labelled nodes a step"})
    whole: bool = field(default=False, metadata={"help": "compute each layer for all nodes at once (examples mix), not node by node in its neighbourhood"})

    name: ClassVar[str] = "digits-graph"
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "Adam", "lr": 1e-2, "epochs": 100}

    def __post_init__(self) -> None:
        for label in ("k", "hidden", "batch_size"):
            value = getattr(self, label)
            require(isinstance(value, int) and not isinstance(value, bool) and value >= 1, label, value, "an integer of at least 1")
        require(isinstance(self.labelled, (int, float)) and 0 < self.labelled <= 1, "labelled", self.labelled, "in (0, 1]")

    def build(
        self, key: Key, *, model: str | None = None, model_settings: Mapping[str, Any] | None = None, data_dir: str | Path | None = None
    ) -> NodeClassification:
        """The problem; `key` addresses the first weights, which nodes have labels, and their order.

        Raises:
            UsageError: a model other than graph-solver is named; the graph network is the problem's own.
            SettingError: more neighbours than nodes, or a share of labels that leaves no node.
        """
        if model not in (None, "graph-solver") or (model_settings and not model):
            raise UsageError(
                f"digits-graph has its own model, but model={model or dict(model_settings or {})!r} was given; set hidden, k or whole, or take graph-solver."
            )
        digits = data.load("digits", data_dir=data_dir)
        features, labels = torch.cat([digits.train_inputs, digits.test_inputs]), torch.cat([digits.train_targets, digits.test_targets])
        training = len(digits.train_inputs)
        count = round(self.labelled * training)
        require(count >= 1, "labelled", self.labelled, f"at least {1 / training:.1g}, one of {training} training nodes")
        graph = normalised(nearest_neighbours(features, self.k))
        network: nn.Module
        if model:
            network = registry.build(ConvergentGraph, model_settings or {}, f"model {model}").on(features, graph, digits.classes)
        else:
            network = GraphNetwork(features, graph, hidden=self.hidden, classes=digits.classes, whole=self.whole)
        models.initialise(network, key)
        order = torch.from_numpy(permutation(key.fold("labels"), "labelled", training).copy())
        seen, tested = order[:count], torch.arange(training, len(labels))
        nodes = data.Dataset(self.name, seen, labels[seen], tested, labels[tested], digits.classes)
        problem = NodeClassification(network, cross_entropy_of_each, dataset=nodes, batch_size=min(self.batch_size, count), key=key, name=self.name)
        problem.unlabelled, problem.labels = order[count:], labels
        return problem
