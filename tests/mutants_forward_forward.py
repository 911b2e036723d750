"""Planted bugs of rules that judge inputs with labels."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

from mutants_form import Mutant, patched
from mutants_local import one_sweep
from torch import Tensor

from altgrad.engines.forward_forward import ForwardForward
from altgrad.kernels import noise
from altgrad.local import goodness, labelled_step
from altgrad.local import step as local_step
from altgrad.rng import Key


def one_side(self: Any, margin: Any, look: Any) -> Any:
    """Wrong labels are pulled up too."""
    return RIGHT_LOSSES(self, margin, look._replace(targets=look.targets._replace(side=look.targets.side.abs())))


def other_way(self: Any, margin: Any, look: Any) -> Any:
    """Right labels are pushed down, wrong ones up."""
    return RIGHT_LOSSES(self, margin, look._replace(targets=look.targets._replace(side=-look.targets.side)))


def noted(self: Any, position: int, output: Any) -> None:
    """Other blocks' goodness with its graph."""
    self.notes.append(self.rule.note(output, self.sites[position]))


def attached() -> Callable[[], AbstractContextManager[Any]]:
    @contextmanager
    def enter() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(local_step, "stream", one_sweep(detach=True)))
            stack.enter_context(mock.patch.object(local_step.Step, "noted", noted))
            yield

    return enter


def any_labels(labels: Tensor, classes: int, key: Key, *, first: int = 0, chances: Tensor | None = None) -> Tensor:
    """Labels drawn from all classes."""
    return noise.integers(key, 1, [0], labels.shape, start=first)[0] % classes


RIGHT_LOSSES = goodness.Logistic.losses
LIFTS = ("training_lifts_right_labels_above_wrong_ones",)
ALONE = "every_block_follows_its_own_loss_alone"

MUTANTS = [
    Mutant(
        "sign of wrong labels, forward-forward",
        ForwardForward(),
        ("training_lifts_right_labels_above_wrong_ones",),
        patched(goodness.Logistic, "losses", one_side),
    ),
    Mutant("both signs, forward-forward", ForwardForward(), LIFTS, patched(goodness.Logistic, "losses", other_way)),
    Mutant(
        "wrong labels that may be right",
        ForwardForward(),
        ("wrong_labels_are_never_right",),
        patched(labelled_step, "wrong_labels", any_labels),
    ),
    Mutant(
        "hard wrong labels that may be right",
        ForwardForward(negatives="hard"),
        ("wrong_labels_are_never_right",),
        patched(labelled_step, "wrong_labels", any_labels),
    ),
    Mutant(
        "blocks in one graph, forward-forward",
        ForwardForward(),
        (ALONE, "saved_bytes_do_not_grow_with_depth"),
        patched(local_step, "stream", one_sweep(detach=False)),
    ),
    Mutant("others' goodness not stopped", ForwardForward(variant="collaboration", others="before"), (ALONE,), attached()),
]
