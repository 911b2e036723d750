"""Another surrogate for a model's quantisers, for the length of a `with`: the model stays as it is, and so do its outputs."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from altgrad.surrogates.pointwise import ACTIVE, Pointwise, Soft


class Replacing:
    """What takes the place of each quantiser's own surrogate.

    Args:
        estimator: for every quantiser of the same operation; None leaves each its own.
        share: of the run that is done: where the estimators' own schedules stand; None leaves their settings alone.
        soft: roles ("weight", "activation") in which the primitive F takes the place of the quantiser q too.
    """

    def __init__(self, estimator: Pointwise | None = None, *, share: float | None = None, soft: tuple[str, ...] = ()):
        self.estimator, self.share, self.soft = estimator, share, soft
        self.met: Counter[str] = Counter()  # operation -> calls

    def chosen(self, own: Pointwise, role: str) -> tuple[Any, Pointwise]:
        """(what gives the value, what gives the derivative) at a call of `own`."""
        self.met[own.operation] += 1
        slope = self.estimator if self.estimator is not None and self.estimator.operation == own.operation else own
        if self.share is not None:
            slope = slope.at(self.share)
        return (Soft(slope) if role in self.soft else own), slope


@contextmanager
def replacing(estimator: Pointwise | str | None = None, *, share: float | None = None, soft: tuple[str, ...] = ()) -> Iterator[Replacing]:
    """Within it, quantisers that are called take their derivative from `estimator`; arguments as in `Replacing`, or a name with settings.

        with altgrad.surrogates.replacing("reste,o=2"):
            learner.backward(x, y)

    Raises:
        UsageError: no such estimator, or none that is pointwise.
    """
    from altgrad.surrogates import pointwise_of

    active = Replacing(None if estimator is None else pointwise_of(estimator), share=share, soft=soft)
    ACTIVE.append(active)
    try:
        yield active
    finally:
        ACTIVE.pop()
