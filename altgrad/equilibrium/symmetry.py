r"""The same update for a weight and for the one that goes the other way.

    weights W_l up, B_l down, of one shape:   both get (g_W + g_B) / 2        one matrix W among all units:   (g + gᵀ) / 2

A rule whose update of a connection is a product of what its two ends do, as every update of an energy is, gives both directions the same. What W and B
differ by is then never added to: it stays, and weight decay takes it away (Kolen and Pollack 1994).

Source: Laborieux et al. 2021, arXiv 2006.03824, section 3.3, and its "same update" option.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from altgrad.engine import Tree
from altgrad.errors import CapabilityError
from altgrad.problem import Problem

Pairs = Sequence[tuple[str, str]]


def pairs_of(problem: Problem, who: str) -> Pairs:
    """(up, down) of every pair of weights that join the same units, as the net's `pairs` names them; a matrix among all units is its own partner.

    Raises:
        CapabilityError: there are none.
    """
    found: Pairs = getattr(getattr(problem, "model", None), "pairs", ())
    if not found:
        raise CapabilityError(
            f"{who} gives weights that go up and down the same update, and {problem.name} has no such pairs: its directions share their weights already, or "
            "nothing goes back. Leave update='own', or give the net `pairs`, the names of every two weights of one shape that join the same units."
        )
    return found


def same(grads: Mapping[str, Tensor], pairs: Pairs) -> Tree:
    """The gradients with those of every pair replaced by their mean."""
    found = dict(grads)
    for up, down in pairs:
        if up == down:
            found[up] = (grads[up] + grads[up].T) / 2
        elif up in grads and down in grads:
            found[up] = (grads[up] + grads[down]) / 2
            found[down] = found[up].clone()
    return found


__all__ = ["pairs_of", "same"]
