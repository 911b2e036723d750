r"""Claims about estimates whose error vanishes in a limit: that it does, at the order they declare.

An engine with Bias.LIMIT states `order` (0 where a bias stays) and gives `shrunk(factor)`, itself with the small quantity h made factor · h:

    log₂ ‖ĝ(h) - g‖ / ‖ĝ(h/2) - g‖ ≥ order - 0.25    unless the error is rounding
"""

import math

import torch

from altgrad.conformance import probes
from altgrad.conformance.claim import Subject, claim, hold
from altgrad.engine import Bias, Engine

SLACK = 0.25  # of the order: terms above the leading one
ROUNDING = 1e-10  # relative, in float64: what is lost when a small difference is divided by h


def has_limit(engine: Engine) -> bool:
    return engine.bias is Bias.LIMIT and getattr(engine, "order", 1) > 0


@claim(applies=has_limit)
def the_error_vanishes_at_the_declared_order(subject: Subject) -> None:
    """On a small network in float64."""
    engine = subject.engine
    hold(hasattr(engine, "order") and hasattr(engine, "shrunk"), "Bias.LIMIT declares an `order`, and gives `shrunk(factor)`; see altgrad.conformance.limits.")
    errors = []
    for factor in (1.0, 0.5):
        bench = type(subject)(engine.shrunk(factor), subject.factory).bench(probes.network(torch.float64))  # type: ignore[attr-defined]
        exact = bench.exact()
        wanted = bench.flat(exact, exact)
        errors.append(float((bench.flat(dict(bench.estimate().grads), exact) - wanted).norm() / wanted.norm()))
    hold(math.isfinite(errors[1]), f"the error is {errors[1]}.")
    if errors[1] > ROUNDING:
        seen, stated = math.log2(errors[0] / errors[1]), engine.order  # type: ignore[attr-defined]
        hold(seen >= stated - SLACK, f"halving takes the relative error from {errors[0]:.3g} to {errors[1]:.3g}: order {seen:.2f}, where {stated} is declared.")
