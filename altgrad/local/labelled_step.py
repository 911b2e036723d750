"""One step of a rule that judges inputs with labels: three rows an example, of which the heads are given the one without a label."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from altgrad.engine import Estimate, Tree
from altgrad.local.goodness import COPIES, Rows, normalised
from altgrad.local.labels import at_first, marks_of, no_label, wrong_labels
from altgrad.local.losses.frame import FEATURES, accuracy, flat
from altgrad.local.prefix import evaluating
from altgrad.local.step import Step
from altgrad.local.streaming import count_of
from altgrad.problem import Problem, first_tensor
from altgrad.samplers import AddressedSamplers

IGNORED = -100  # the label that PyTorch's losses leave out
PROBE = "probe."  # before the name of a block: a linear read-out of its activities, which the block does not follow
WRONG, NEUTRAL = 1, 2  # places among an example's rows; the right label has 0


class LabelledStep(Step):
    """Rows 3n, 3n + 1, 3n + 2 are example n with its right label, a wrong one, and none."""

    engine: Any  # a Blockwise with a label_scale

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.at_head = False  # rows are examples again
        for names, site in zip(self.heads, self.sites, strict=False):
            names += [f"{PROBE}{site.name}.weight", f"{PROBE}{site.name}.bias"]

    def sampling(self) -> AddressedSamplers:
        """One mask for an example's rows."""
        copies = 1 if self.at_head else COPIES
        count = copies * self.problem.batch_size_of(self.batch)
        self.sampler = AddressedSamplers(self.key.fold("samplers"), first=copies * self.batch.first, examples=count, copies=copies)
        return self.sampler

    def survey(self, inputs: Any) -> None:
        super().survey(inputs)
        self.at_head = False

    def enter(self) -> Any:
        labels, classes, batch = self.batch.targets, int(self.sites[0].classes or 0), self.batch
        self.sampling()
        known = labels != IGNORED
        labels = torch.where(known, labels, 0)
        chances = self.confused(batch.inputs) if self.engine.negatives == "hard" else None
        wrong = wrong_labels(labels, classes, self.key.fold("wrong"), first=batch.first, chances=chances)
        like = first_tensor(batch.inputs)
        marks = (marks_of(labels, classes, like), marks_of(wrong, classes, like), no_label(len(labels), classes, like))
        inputs = prepared(batch.inputs)
        scale = mark_of(like, self.engine.label_scale)
        parts = [self.problem.with_label(inputs, scale * mark) for mark in marks]
        self.total = COPIES * len(labels)
        weight = known * (COPIES * len(labels) / known.sum().clamp_min(1))
        off = torch.zeros_like(weight)
        self.targets = Rows(
            torch.tensor([1.0, -1.0, 0.0], device=labels.device).repeat(len(labels)),
            torch.stack([weight, weight, off], 1).flatten(),
            labels.repeat_interleave(COPIES),
        )
        return tree_map(lambda *rows: torch.stack(rows, 1).flatten(0, 1) if isinstance(rows[0], Tensor) else rows[0], *parts)

    def confused(self, inputs: Any) -> Tensor | None:
        """How likely the probes find every label of inputs without one [N, classes]; None before any block was trained."""
        with torch.no_grad(), evaluating(self.problem):
            told, _ = self.engine.outputs(self.problem, self.params, self.state, inputs)
        return torch.stack(told).mean(0).softmax(1) if told else None

    def bridge(self, position: int, output: Any) -> Any:
        """The model's head is given the rows without a label."""
        if position < len(self.sites) - 1:
            return super().bridge(position, output)
        if position == len(self.sites) or count_of(output) != self.total:
            return output
        self.at_head = True
        self.sampler.first, self.sampler.examples, self.sampler.copies = self.batch.first, self.total // COPIES, 1
        return super().bridge(position, output[NEUTRAL::COPIES])

    def objective(self, position: int, output: Any, leaves: Tree, rows: slice) -> Tensor:
        value = super().objective(position, output, leaves, rows)
        if position == len(self.sites):
            return value
        name, count = self.sites[position].name, rows.stop - rows.start
        neutral = slice((NEUTRAL - rows.start) % COPIES, None, COPIES)
        scores = probed(output.detach()[neutral], leaves, name)
        labels, weight = self.targets.labels[rows][neutral], self.targets.weight[::COPIES][(rows.start + neutral.start) // COPIES :][: len(scores)]
        missed = (F.cross_entropy(scores, labels, reduction="none") * weight).sum() / max(1, count)
        self.note_figure(f"probe_loss.{name}", missed, rows)
        self.note_figure(f"accuracy.{name}", accuracy(scores, labels) * (len(scores) * COPIES / max(1, count)) if len(scores) else missed * 0, rows)
        return value + missed

    def estimate(self, grads: Tree, buffers: Tree) -> Estimate:
        found = super().estimate(grads, buffers)
        metrics = dict(found.metrics)
        metrics["forwards"] = metrics["forwards"] * COPIES + (self.engine.negatives == "hard")
        return found._replace(metrics=metrics)


def prepared(inputs: Any) -> Any:
    """Inputs of one length, before the label is put in; token ids as they are."""
    return at_first(inputs, lambda first: normalised(first) if first.is_floating_point() and first.ndim > 1 else first)


def mark_of(inputs: Tensor, scale: float) -> float:
    """The size of a mark beside inputs of mean square 1: `scale` times their length."""
    return scale * math.sqrt(inputs.shape[1:].numel())


def probed(activity: Tensor, params: Tree, name: str) -> Tensor:
    """What the probe of block `name` reads out of its activities [N, classes]."""
    return F.linear(flat(normalised(activity), FEATURES), params[f"{PROBE}{name}.weight"], params[f"{PROBE}{name}.bias"])


def marked(problem: Problem, inputs: Any, scale: float, classes: int, labels: range) -> Any:
    """Rows of every input with each of `labels` in turn [labels · N], or of every input without one where there are none."""
    inputs = prepared(inputs)
    first = first_tensor(inputs)
    scale = mark_of(first, scale)
    if not labels:
        return problem.with_label(inputs, scale * no_label(len(first), classes, first))
    every = [marks_of(torch.full((len(first),), label, device=first.device), classes, first) for label in labels]
    parts = [problem.with_label(inputs, scale * mark) for mark in every]
    return tree_map(lambda *rows: torch.cat(rows) if isinstance(rows[0], Tensor) else rows[0], *parts)


__all__ = ["PROBE", "LabelledStep", "marked", "prepared", "probed"]
