"""Planted bugs of ask-and-tell strategies. A new one goes at the end of the list, its change above it."""

from mutants_form import Mutant, altered, own_losses, patched, scaled

from altgrad.engines import ask_tell
from altgrad.engines.ask_tell import AskTell
from altgrad.population.points import Points


def first_points(self, first, count):
    return POINTS(self, 0, count)


def seeded_once(rule, tensors, key):
    return STATE_OF(rule, tensors, key.at(0))


POINTS = Points.chunk
STATE_OF = ask_tell.state_of


MUTANTS = [
    Mutant("a move turned round", altered(AskTell, scaled(-1), population=8), ("whole_moves_lower_a_quadratic_loss",)),
    Mutant("a hundredth of a move", altered(AskTell, scaled(0.01), population=8), ("whole_moves_lower_a_quadratic_loss",)),
    Mutant(
        "ranks know their own members only",
        AskTell(population=8),
        ("ranks_that_divide_the_population_find_the_same_bits",),
        patched(ask_tell, "shared_among", own_losses),
    ),
    Mutant("the first members in every chunk", AskTell(population=8, chunk=3), ("chunks_change_nothing_but_rounding",), patched(Points, "chunk", first_points)),
    Mutant("a strategy's numbers at one address", AskTell(population=8), ("noise_changes_with_the_step",), patched(ask_tell, "state_of", seeded_once)),
]
