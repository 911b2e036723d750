r"""How the nudged states of a step come about: every one at rest, from the free state; or online, a nudge that goes round while the state follows it.

    phases    s_k at rest under β_k, from s_0                                        each nudge a relaxation of its own
    online    s_k from s_{k-1} by a few sweeps under β_k, k = 0, 1, 2, …             β(t) = |β| e^{iωt} in steps; the state never goes back

Online the derivative at no nudge is (1/N) Σ_k f(s_k) / β_k over the last periods: an integral of f(s(t)) e^{-iωt} over time, in which f of the free state
has no part. A mode that a sweep shrinks by λ lags behind: of its share of the derivative (1 - λ^K) / (1 - λ^K e^{-2πi/N}) is seen with K sweeps at each of
N nudges, which goes to 1 as K grows. The first period, in which the state catches up, counts only where there is no other.

Source: Laborieux and Zenke 2022, arXiv 2209.00530, section 4.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from altgrad.equilibrium.energies import Energy
from altgrad.equilibrium.fields import Field
from altgrad.equilibrium.nudges import Nudge
from altgrad.equilibrium.relaxation import Disturb, Settled, State


class Told(NamedTuple):
    """A nudge, and where it has put the state."""

    nudge: Nudge
    found: Settled


def phases(system: Energy | Field, nudges: Sequence[Nudge], force: State, disturb: Callable[[str], Disturb | None], **relaxing: Any) -> list[Told]:
    """Every nudge relaxed from the free state.

    Args:
        force: what a nudge of 1 adds, -∂L/∂s.
        disturb: gives the noise of a relaxation by its name.
        relaxing: steps, tolerance, damping, corrected, of every relaxation.
    """
    return [Told(nudge, system.nudged(nudge, force, disturb=disturb(f"{nudge.beta:.6g}"), **relaxing)) for nudge in nudges]


def online(
    system: Energy | Field, nudges: Sequence[Nudge], force: State, disturb: Callable[[str], Disturb | None], *, periods: int, sweeps: int, **relaxing: Any
) -> list[Told]:
    """The nudges one after another, `periods` times round, each from where the one before has left the state.

    Args:
        nudges: the whole round (nudges.around).
        force, disturb, relaxing: as in `phases`.
        periods: how often round, >= 1.
        sweeps: at each nudge, the most, >= 1.
    """
    told: list[Told] = []
    state: State | None = None
    counted = max(1, periods - 1)
    for period in range(periods):
        for number, nudge in enumerate(nudges):
            found = system.nudged(nudge, force, start=state, disturb=disturb(f"{period}.{number}"), **{**relaxing, "steps": sweeps})
            state = found.state
            told.append(Told(Nudge(nudge.beta, nudge.weight / counted), found))
    return told[-counted * len(nudges) :]


__all__ = ["Told", "online", "phases"]
