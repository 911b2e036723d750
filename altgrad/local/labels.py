r"""A label put into an input: what rules take that judge pairs (input, label) and have no other way to tell the model the label.

    overlay        x_1 … x_K ← m             the first K numbers are lost
    concatenation  x ← (x, m)                the model takes K inputs more (channels, of an image; one token more, of a text)
    embedding      x ← x + Σ_k m_k E_k       E is trained with the first block

m [K] marks the label: 1 for its class and 0 for the others, or 1/K for each where there is no label. Overlay needs nothing of the model. The others
are modules at the model's front: they take a plain tensor, which gets the marks of no label, or a Labelled one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_unflatten

from altgrad.errors import CapabilityError, ShapeError, require
from altgrad.kernels import noise
from altgrad.rng import Key, tensor_id


@dataclass(frozen=True)
class Labelled:
    """Inputs [N, …] and marks [N, classes] of their labels, on the way to the module that joins them."""

    inputs: Any
    marks: Any


register_pytree_node(Labelled, lambda pair: ([pair.inputs, pair.marks], None), lambda parts, _: Labelled(*parts))


class LabelInput(nn.Module):
    """Base of the modules that put a label into an input; the model's first.

    Args:
        classes: how many there are, two or more.

    Raises:
        SettingError: fewer. ShapeError: marks of another number of classes.
    """

    def __init__(self, classes: int):
        super().__init__()
        require(isinstance(classes, int) and classes >= 2, "classes", classes, "a whole number of at least 2")
        self.classes = classes

    def forward(self, input: Tensor | Labelled) -> Tensor:
        if isinstance(input, Labelled):
            if input.marks.shape[1] != self.classes:
                raise ShapeError(f"{type(self).__name__}({self.classes}) was given marks of {input.marks.shape[1]} classes; make it {input.marks.shape[1]}.")
            return self.join(input.inputs, input.marks)
        if not isinstance(input, Tensor):  # a tracer's stand-in: this module is one step of the trace
            raise TypeError(f"{type(self).__name__} takes a tensor, got {type(input).__name__}.")
        return self.join(input, no_label(len(input), self.classes, input))

    def join(self, inputs: Tensor, marks: Tensor) -> Tensor:
        """The inputs with marks [N, classes] put in."""
        raise NotImplementedError


class LabelOverlay(LabelInput):
    """The marks in place of an input's first numbers.

    Args:
        classes: how many there are; fewer than numbers.
    """

    def join(self, inputs: Tensor, marks: Tensor) -> Tensor:
        return overlay(inputs, marks)


class LabelConcat(LabelInput):
    """The marks behind an input's numbers: vectors and sequences get `classes` features more, images as many constant channels of the same length.

    Args:
        classes: how many there are.
        vocabulary: tokens there are, where inputs are token ids [N, T]: a token vocabulary + class is put before them, vocabulary + classes where
            there is no label; the model embeds vocabulary + classes + 1 of them.
    """

    def __init__(self, classes: int, *, vocabulary: int | None = None):
        super().__init__(classes)
        self.vocabulary = vocabulary

    def join(self, inputs: Tensor, marks: Tensor) -> Tensor:
        if not inputs.is_floating_point():
            if self.vocabulary is None or inputs.ndim != 2:
                raise ShapeError(f"LabelConcat takes whole numbers as token ids [N, T] and needs vocabulary=…; it was given {tuple(inputs.shape)}.")
            highest, label = marks.max(1)
            label = torch.where(highest > marks.mean(1), label, self.classes)
            return torch.cat([(self.vocabulary + label).to(inputs.dtype)[:, None], inputs], 1)
        if inputs.ndim >= 4:  # [N, channels, …]
            planes = marks.to(inputs) / math.sqrt(inputs[0, 0].numel())  # as long, all in all, as marks are
            return torch.cat([inputs, planes[(..., *(None for _ in inputs.shape[2:]))].expand(-1, -1, *inputs.shape[2:])], 1)
        if inputs.ndim == 3:
            marks = (marks / math.sqrt(inputs.shape[1]))[:, None].expand(-1, inputs.shape[1], -1)
        return torch.cat([inputs, marks.to(inputs)], -1)


class LabelEmbed(LabelInput):
    """Added to an input: a pattern of its own shape for every class, trained with the first block.

    Args:
        classes: how many there are.
        shape: of one example.
        scale: length of the first patterns beside the marks, > 0.
    """

    def __init__(self, classes: int, shape: tuple[int, ...], *, scale: float = 1.0):
        super().__init__(classes)
        require(scale > 0, "scale", scale, "a number > 0")
        self.shape = tuple(shape)
        first = noise.draw("normal", Key(0), tensor_id("altgrad.LabelEmbed"), [0], (classes, *self.shape))[0]
        self.pattern = nn.Parameter((scale * first).flatten() / math.sqrt(max(1, first[0].numel())))  # one axis: a matrix would be a block

    def join(self, inputs: Tensor, marks: Tensor) -> Tensor:
        return inputs + (marks.to(self.pattern) @ self.pattern.view(self.classes, -1)).view(-1, *self.shape)


def overlay(inputs: Tensor, marks: Tensor) -> Tensor:
    """The first numbers of every input replaced by marks [N, classes].

    Raises:
        CapabilityError: there are no more numbers than classes, or they are token ids.
    """
    classes, room = marks.shape[1], inputs[0].numel() if len(inputs) else marks.shape[1] + 1
    if not inputs.is_floating_point():
        raise CapabilityError(
            f"labels cannot be written over inputs of {inputs.dtype}; put altgrad.LabelConcat({classes}, vocabulary=…) in front of the model, which gives "
            "it one token more."
        )
    if room <= classes:
        raise CapabilityError(
            f"an input of {room} numbers has no room for a label of {classes} classes, which takes the place of its first {classes}. Concatenate it: put "
            f"altgrad.LabelConcat({classes}) in front of a model that takes {classes} inputs more; or add it: altgrad.LabelEmbed({classes}, shape)."
        )
    return torch.cat([marks.to(inputs), inputs.flatten(1)[:, classes:]], 1).view(inputs.shape)


def with_marks(model: nn.Module, inputs: Any, marks: Tensor) -> Any:
    """`inputs` with marks [N, classes]: Labelled where a module of the model joins them, written over the first numbers otherwise.

    Of a tuple or a dict of inputs the first tensor is labelled.
    """
    joins = joins_labels(model)
    return at_first(inputs, lambda first: Labelled(first, marks) if joins else overlay(first, marks))


def joins_labels(model: nn.Module) -> bool:
    """Whether a module of the model puts labels into its inputs."""
    return any(isinstance(module, LabelInput) for module in model.modules())


def at_first(inputs: Any, change: Callable[[Tensor], Any]) -> Any:
    """`inputs` with their first tensor changed."""
    leaves, form = tree_flatten(inputs)
    place = next(number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    return tree_unflatten([change(leaf) if number == place else leaf for number, leaf in enumerate(leaves)], form)


def marks_of(labels: Tensor, classes: int, like: Tensor) -> Tensor:
    """[N, classes], 1 at the label; of the dtype of `like` where that is a float."""
    return F.one_hot(labels, classes).to(like.dtype if like.is_floating_point() else torch.get_default_dtype())


def no_label(count: int, classes: int, like: Tensor) -> Tensor:
    """[count, classes], 1/classes everywhere."""
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    return torch.full((count, classes), 1 / classes, dtype=dtype, device=like.device)


def wrong_labels(labels: Tensor, classes: int, key: Key, *, first: int = 0, chances: Tensor | None = None) -> Tensor:
    """For every label another one, each of the others with the same chance: (y + 1 + r mod (K - 1)) mod K; int64 [N].

    Args:
        labels: int64 [N] in [0, classes).
        first: the global index of the first of them, so that ranks and parts of a batch draw the same.
        chances: [N, classes], >= 0: label k ≠ y is drawn with probability chances_k / Σ_{j≠y} chances_j instead.
    """
    drawn = noise.integers(key, tensor_id("wrong labels"), [0], labels.shape, start=first, device=labels.device)[0]
    if chances is None:
        return (labels + 1 + drawn % (classes - 1)) % classes
    # The other labels in turn from y + 1 on, so that no rounding can lead to y.
    others = (labels[:, None] + 1 + torch.arange(classes - 1, device=labels.device)) % classes
    bounds = chances.double().gather(1, others).add_(torch.finfo(torch.float64).tiny).cumsum(1)
    place = (bounds <= (drawn.double() / 2**32)[:, None] * bounds[:, -1:]).sum(1).clamp_max_(classes - 2)
    return others.gather(1, place[:, None])[:, 0]


__all__ = [
    "LabelConcat",
    "LabelEmbed",
    "LabelInput",
    "LabelOverlay",
    "Labelled",
    "at_first",
    "joins_labels",
    "marks_of",
    "no_label",
    "with_marks",
    "wrong_labels",
]
