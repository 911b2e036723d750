"""Planted bugs of mixes. A new one goes at the end of the list, its change above it."""

import torch
from mutants_form import Mutant, altered, on, patched

from altgrad.engines import mixed
from altgrad.engines.mixed import Merged, Mixed
from altgrad.problems.held import Held

EXACT = {"rest": "backprop", "parts": "*.weight=backprop"}
POPULATION = {"rest": "eggroll,population=8,shaping=raw", "parts": "*.weight=likelihood-ratio,copies=4"}


def others_at_zero(self, params):
    return {**{name: torch.zeros_like(value) for name, value in self.constants.items()}, **params}


def first_part_only(self, parts, found):
    MERGED(self, parts[:1], found[:1])


MERGED = Merged.__init__


def a_mask_for_each_part(self, part, view, own, state, batch, key, world):
    return LOOK(self, part, view, own, state, batch, key.fold(part.prefix), world)


LOOK = Mixed.look


def moved_once_more(found, problem, params, state, batch, *_):
    buffers = {name: value.clone() for name, value in found.buffers.items()}
    with torch.no_grad():
        problem.loss(params, batch, buffers)
    return found._replace(buffers=buffers)


MUTANTS = [
    Mutant("the others held at zero", Mixed(**EXACT), on("is_exact_on", "network"), patched(Held, "all", others_at_zero)),
    Mutant("the rest of a mix forgotten", Mixed(**EXACT), on("is_exact_on", "network", "batch_norm"), patched(Merged, "__init__", first_part_only)),
    Mutant("a dropout mask for each part", Mixed(**EXACT), ("one_dropout_mask_serves_a_whole_estimate",), patched(Mixed, "look", a_mask_for_each_part)),
    Mutant("running statistics moved by two parts", altered(Mixed, moved_once_more, **EXACT), ("running_statistics_move_once_a_step_as_in_plain_pytorch",)),
    Mutant(
        "ranks keep what a part found on their own examples",
        Mixed(**POPULATION),
        ("ranks_that_divide_the_population_find_the_same_bits",),
        patched(mixed, "over_ranks", lambda rule, found, world, examples: found),
    ),
]
