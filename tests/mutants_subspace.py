"""Planted bugs of the random subspace. A new one goes at the end of the list, its change above it."""

from typing import Any

from mutants_form import Mutant, altered, patched

from altgrad.engine import Estimate
from altgrad.engines.subspace import INNER, Projection, RandomSubspace
from altgrad.problem import Problem


def stateless_inside(found: Estimate, *_: Any) -> Estimate:
    return found._replace(state={name: value for name, value in found.state.items() if not name.startswith(INNER)})


def another_subspace(self: RandomSubspace, problem: Problem, state: Any, origin: Any) -> Projection:
    looks = problem.facts["looks"] = problem.facts.get("looks", 0) + 1
    return Projection(looks, origin, self.dimension)


MUTANTS = [
    Mutant(
        "a subspace forgets its engine's state",
        altered(RandomSubspace, stateless_inside, dimension=6, inner="eggroll", inner_settings="population=8,shaping=nes,adapt=nes"),
        ("state_holds_tensors_only_under_stable_names",),
    ),
    Mutant(
        "another subspace at every look",
        RandomSubspace(dimension=6, inner="eggroll", inner_settings="population=8,shaping=raw"),
        ("same_key_gives_the_same_bits", "is_unbiased_for_the_smoothed_loss"),
        patched(RandomSubspace, "projection", another_subspace),
    ),
]
