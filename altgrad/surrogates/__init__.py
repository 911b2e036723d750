"""Derivatives that stand in for those of sign, rounding and random choice: one table of estimators, by kind and name.

    reste = altgrad.surrogates.get("reste", o=2)
    y = reste(x)                                   # the sign, with ReSTE's derivative under autograd, torch.func and vmap
    altgrad.surrogates.names(kind="pointwise")

What each kind is called with: estimator.py.
"""

from typing import Any

from altgrad import registry
from altgrad.errors import UsageError, near_miss
from altgrad.surrogates.control import Rebar, Relax
from altgrad.surrogates.estimator import KINDS, Estimator
from altgrad.surrogates.learned import LSQ, LSQPlus
from altgrad.surrogates.levels import DSQ, Round, Ternary, bits_range
from altgrad.surrogates.periodic import BiPer
from altgrad.surrogates.pointwise import Pointwise, sign
from altgrad.surrogates.prox import BinaryRelax, Prox, ProxQuant, ProxTernary
from altgrad.surrogates.replacing import replacing
from altgrad.surrogates.rounding import StochasticRounding, StochasticSign
from altgrad.surrogates.scheduled import EDE, ReSTE
from altgrad.surrogates.smooth import ATan, Erf, Exponential, FastSigmoid, Sigmoid, SwishSign
from altgrad.surrogates.steps import BiReal, Clipped, Identity, Rectangle, Triangle
from altgrad.surrogates.stochastic import GumbelSoftmax, ReinMax, StraightThroughSample

CLASSES: tuple[type[Estimator], ...] = (
    *(Identity, Clipped, BiReal, SwishSign, EDE, ReSTE, BiPer, ATan, Sigmoid, Triangle, FastSigmoid, Erf, Exponential, Rectangle, DSQ, Round, Ternary),
    *(LSQ, LSQPlus),
    *(StraightThroughSample, GumbelSoftmax, ReinMax, Rebar, Relax, StochasticRounding, StochasticSign),
    *(ProxQuant, ProxTernary, BinaryRelax),
)
TABLE: dict[str, type[Estimator]] = {cls.name: cls for cls in CLASSES}


def names(kind: str | None = None, *, operation: str | None = None) -> list[str]:
    """The names of all estimators, of those of a `kind`, or of the pointwise ones whose default settings serve an `operation` ("sign", …).

    Raises:
        UsageError: no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(near_miss("kind of surrogate", kind, KINDS))
    found = [name for name, cls in TABLE.items() if kind in {None, cls.kind}]
    return found if operation is None else [name for name in found if getattr(TABLE[name](), "operation", None) == operation]


def get(name: str, **settings: Any) -> Any:
    """The estimator `name` with `settings`, which may also stand behind the name: get("reste", o=2) is get("reste,o=2").

    Raises:
        UsageError: no such estimator (the nearest name is suggested). SettingError: no such setting, or one out of range.
    """
    short, *pairs = str(name).split(",")
    short = short.strip()
    if short not in TABLE:
        raise UsageError(near_miss("surrogate", short, TABLE))
    return registry.build(TABLE[short], {**registry.split_pairs(pairs), **settings}, f"surrogate {short}")


def pointwise_of(given: Any, *, operations: tuple[str, ...] = ()) -> Pointwise:
    """A pointwise estimator, or what names one.

    Args:
        operations: what it may stand for, as in ("sign", "square-wave"); empty for anything.

    Raises:
        UsageError: no such estimator, or one of another kind or operation.
    """
    found = given if isinstance(given, Estimator) else get(given)
    if not isinstance(found, Pointwise):
        raise UsageError(f"surrogate {found.name!r} is {found.kind}; here one acts on every number alone: {', '.join(names('pointwise'))}.")
    if operations and found.operation not in operations:
        fitting = ", ".join(name for operation in operations for name in names("pointwise", operation=operation))
        raise UsageError(f"surrogate {str(found)!r} is for {found.operation}, which has no place here; take one for {' or '.join(operations)}: {fitting}.")
    return found


__all__ = [
    "KINDS",
    "TABLE",
    "Estimator",
    "Pointwise",
    "Prox",
    "bits_range",
    "get",
    "names",
    "pointwise_of",
    "replacing",
    "sign",
]
