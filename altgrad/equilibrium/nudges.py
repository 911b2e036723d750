r"""Which nudges a step makes, and the weights with which their states give a derivative at no nudge.

    one-sided    (f(β) - f(0)) / β                             error O(β)
    random-sign  the same with ±β                              O(β), and O(β²) on average
    symmetric    (f(β) - f(-β)) / 2β                           O(β²)
    holomorphic  (1/N) Σ_k f(β_k) / β_k,  β_k = |β| e^{2πik/N}   O(|β|^N), Cauchy's integral

f(β*) = f(β)* for a system that is real where β is, so the nudges k and N - k need one relaxation, counted as 2 Re.

Source: Scellier and Bengio 2017, arXiv 1602.05179; Laborieux et al. 2021, arXiv 2006.03824; Laborieux and Zenke 2022, arXiv 2209.00530.
"""

import cmath
from typing import NamedTuple

from altgrad.rng import Key

NUDGES = ("one-sided", "random-sign", "symmetric", "holomorphic")


class Nudge(NamedTuple):
    """One relaxation: at `beta`, counted with `weight`; the derivative is the sum of Re(weight · state)."""

    beta: complex  # a float where it is real
    weight: complex


def nudges(kind: str, beta: float, points: int, key: Key) -> list[Nudge]:
    """The relaxations of a step; one at β = 0 is the free state.

    Args:
        kind: one of NUDGES.
        beta: strength of the nudge, != 0.
        points: holomorphic: points on the circle, N >= 1; one point is the one-sided difference.
        key: random-sign: the step's address.
    """
    if kind == "symmetric":
        return [Nudge(beta, 0.5 / beta), Nudge(-beta, -0.5 / beta)]
    if kind == "holomorphic" and points > 1:
        found = []
        for k in range(points // 2 + 1):
            real = k == 0 or 2 * k == points
            at = (beta if k == 0 else -beta) if real else beta * cmath.exp(2j * cmath.pi * k / points)
            found.append(Nudge(at, (1 if real else 2) / (points * at)))
        return found
    sign = 1.0 if kind != "random-sign" or key.fold("nudge", key.step).seed % 2 == 0 else -1.0
    return [Nudge(sign * beta, sign / beta), Nudge(0.0, -sign / beta)]


def around(kind: str, beta: float, points: int, key: Key) -> list[Nudge]:
    """One whole round of the nudge, for a state that follows it: on the circle no conjugates are left out, and every β is complex."""
    if kind != "holomorphic" or points <= 2:
        return nudges(kind, beta, points, key)
    circle = [beta * cmath.exp(2j * cmath.pi * k / points) for k in range(points)]
    return [Nudge(at, 1 / (points * at)) for at in circle]


def order(kind: str, points: int) -> int:
    """The power of |β| with which the error falls."""
    return {"one-sided": 1, "random-sign": 1, "symmetric": 2, "holomorphic": points}[kind]


__all__ = ["NUDGES", "Nudge", "around", "nudges", "order"]
