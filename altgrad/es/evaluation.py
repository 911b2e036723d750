"""Calling somebody's f on a population: failures become the worst rank, what is no number is refused."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from altgrad.errors import ShapeError, UsageError
from altgrad.es.base import numbers


class FailedEvaluations(UserWarning):
    """f raised; said once in a search."""


def evaluate(f: Callable[[np.ndarray], Any], points: np.ndarray, *, generation: int, vectorized: bool, silent: bool) -> tuple[np.ndarray, int, str]:
    """f at every member.

    Args:
        f: of x [n] -> a real number; `vectorized`: of the population [λ, n] -> [λ].
        points: [λ, n].
        generation: for messages.
        silent: whether a failure has been reported before.

    Returns:
        fitness [λ] with NaN where f raised; how many raised; the first of them in words ("" if none).

    Raises:
        UsageError: f returned something else than a real number. ShapeError: a vectorized f returned another shape.
    """
    if vectorized:
        return whole(f, points, generation=generation, silent=silent)
    fitness, failures, first = np.full(len(points), np.nan), 0, ""
    for member, x in enumerate(points):
        try:
            value = f(x.copy())  # f may write into its argument
        except Exception as error:
            failures += 1
            first = first or f"member {member} of generation {generation}: {in_words(error)}"
        else:
            fitness[member] = real(value, member)
    report(first, silent=silent)
    return fitness, failures, first


def whole(f: Callable[[np.ndarray], Any], points: np.ndarray, *, generation: int, silent: bool) -> tuple[np.ndarray, int, str]:
    """f of the whole population at once; if it raises, every member has failed."""
    try:
        value = f(points.copy())
    except Exception as error:
        first = f"all members of generation {generation}: {in_words(error)}"
        report(first, silent=silent)
        return np.full(len(points), np.nan), len(points), first
    found = numbers(value, "what f returned")
    if found.shape != (len(points),):
        raise ShapeError(
            f"f returned an array of shape {found.shape} for a population of shape {points.shape}; a vectorized f must return shape {(len(points),)}."
        )
    return found, 0, ""


def in_words(error: Exception) -> str:
    """An exception on one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def report(first: str, *, silent: bool) -> None:
    """Warn of the first failure of a search."""
    if first and not silent:
        warnings.warn(f"f raised at {first}. It takes the worst rank; further failures are counted and not reported.", FailedEvaluations, stacklevel=6)


def real(value: Any, member: int) -> float:
    """`value` as a float: a number, or a 0-dimensional array or tensor of one."""
    found = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        return float(found)
    shown = f"an array of shape {tuple(value.shape)}" if getattr(value, "shape", ()) else f"{type(value).__name__} ({value!r:.60})"
    raise UsageError(f"f returned {shown} at member {member}; it must return one real number. NaN is allowed and takes the worst rank.")
