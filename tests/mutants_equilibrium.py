"""Planted bugs of equilibrium propagation."""

from mutants_form import Mutant, altered, patched, scaled

from altgrad.engines import equilibrium
from altgrad.engines.equilibrium import Equilibrium
from altgrad.equilibrium import fields
from altgrad.equilibrium.nudges import Nudge, around, nudges

ORDER = ("the_error_vanishes_at_the_declared_order",)
REVERSED = ("is_not_reversed_on_network",)
TURNED = fields.Field.turned


def doubled_pair(kind, beta, points, key):
    """Conjugates counted once."""
    return [Nudge(nudge.beta, nudge.weight / 2 if isinstance(nudge.beta, complex) else nudge.weight) for nudge in nudges(kind, beta, points, key)]


def undivided(kind, beta, points, key):
    """The symmetric difference over β in place of 2β."""
    return [Nudge(nudge.beta, 2 * nudge.weight) for nudge in nudges(kind, beta, points, key)]


def other_way(self, vectors):
    """Jᵀ - J."""
    return tuple(-part for part in TURNED(self, vectors))


def late(kind, beta, points, key):
    """The round is counted half a turn late."""
    made = around(kind, beta, points, key)
    half = len(made) // 2
    return [Nudge(nudge.beta, other.weight) for nudge, other in zip(made, made[half:] + made[:half], strict=True)]


MUTANTS = [
    Mutant("wrong sign", altered(Equilibrium, scaled(-1)), (*ORDER, "is_not_reversed_on_network")),
    Mutant("gradient summed over the batch", altered(Equilibrium, scaled(6.0)), ORDER),
    Mutant("symmetric difference over one nudge", Equilibrium(), ORDER, patched(equilibrium, "nudges", undivided)),
    Mutant("conjugates counted once", Equilibrium(nudge="holomorphic"), ORDER, patched(equilibrium, "nudges", doubled_pair)),
    Mutant(
        "a round counted half a turn late", Equilibrium(nudge="holomorphic", online=6), ("is_not_reversed_on_network",), patched(equilibrium, "around", late)
    ),
    Mutant("nudges that go to and fro the other way", Equilibrium(online=6), REVERSED, patched(equilibrium, "around", late)),
    Mutant("correction transposed", Equilibrium(), ORDER, patched(fields.Field, "turned", other_way)),
    Mutant("no correction", Equilibrium(), ORDER, patched(fields.Field, "turned", lambda self, vectors: tuple(0 * part for part in vectors))),
]
