"""Planted bugs of populations. A new one goes at the end of the list, its change above it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from mutants_form import EVERYWHERE, POPULATION, Mutant, altered, on, own_losses, patched, scaled, summed_loss, without_root

from altgrad import perturb, shaping
from altgrad.credit import Influence
from altgrad.engines import evolution
from altgrad.engines.evolution import ES, Eggroll
from altgrad.kernels import operators
from altgrad.perturb import LowRank
from altgrad.population import Draws
from altgrad.population import evaluate as members
from altgrad.population.credited import Credit
from altgrad.problem import Problem


def scaled_under_autocast(found, *_):
    return scaled(0.3)(found) if torch.is_autocast_enabled("cpu") else found


def both_plus(self, drawn, name, first):
    return SIGNED(self, drawn, name, first).abs() * torch.cat([drawn, drawn]).sign() if self.antithetic else SIGNED(self, drawn, name, first)


def pairs_of_plus(x, weight, bias, a, b, scale, shared, pairs):
    twice = (torch.cat([a, a]), torch.cat([b, b])) if pairs else (a, b)
    return LINEAR(x, weight, bias, *twice, scale, shared, False)


@contextmanager
def minus_at_plus() -> Iterator[None]:
    """In what layers make of pairs as in what is written out."""
    with mock.patch.object(Draws, "signed", both_plus), mock.patch.object(operators, "plain_linear", pairs_of_plus):
        yield


def first_directions(self, name, first, count):
    return MOVES(self, name, 0, count)


def mean_of_all(fitness, quiet):
    return fitness.double().mean(), fitness.double().std(), (~fitness.isfinite()).sum()


@contextmanager
def members_write_statistics() -> Iterator[None]:
    """The model's own buffers are handed out, and batch norm is left to write them."""
    live = mock.patch.object(Problem, "fresh_buffers", lambda self: self.buffers())
    with live, mock.patch.object(members, "batch_norm", torch.nn.functional.batch_norm):
        yield


SIGNED = Draws.signed
LINEAR = operators.plain_linear
MOVES = Draws.moves


def first_group(members: int, groups: int, *, pairs: bool) -> torch.Tensor:
    return torch.zeros(members, dtype=torch.int64)


def of_what_is_not_touched(self, losses):
    return losses.mean((-2, -1))[..., None] - SUMS(self, losses)


def of_another_parameter(self, rows, **settings):
    found = SHAPED(self, rows, **settings)
    return dict(zip(found, list(found.values())[::-1], strict=True))


SUMS, SHAPED = Influence.sums, Credit.shaped


MUTANTS = [
    Mutant("minus halves at plus", Eggroll(**POPULATION), on("is_not_reversed_on", *EVERYWHERE), minus_at_plus),
    Mutant("wrong sign, smoothed", altered(Eggroll, scaled(-1), population=16), on("is_not_reversed_on", *EVERYWHERE)),
    Mutant("sigma not divided out", altered(Eggroll, scaled(0.01), **POPULATION), ("is_unbiased_for_the_smoothed_loss",)),
    Mutant("no 1/√r in a population", Eggroll(**POPULATION, rank=2), ("is_unbiased_for_the_smoothed_loss",), patched(LowRank, "factors", without_root)),
    Mutant("one noise for all layers", Eggroll(**POPULATION), ("is_unbiased_for_the_smoothed_loss",), patched(perturb, "tensor_id", lambda name: 0)),
    Mutant(
        "running statistics written by members", Eggroll(population=4), ("running_statistics_move_once_a_step_as_in_plain_pytorch",), members_write_statistics
    ),
    Mutant(
        "a chunk's first direction forgotten",
        Eggroll(**POPULATION, chunk=2),
        ("chunks_change_nothing_but_rounding",),
        patched(Draws, "moves", first_directions),
    ),
    Mutant(
        "ranks know their own losses only",
        Eggroll(**POPULATION),
        ("ranks_that_divide_the_population_find_the_same_bits",),
        patched(evolution, "shared_among", own_losses),
    ),
    Mutant("NaN in the mean loss", Eggroll(population=4), ("members_that_are_not_finite_are_survived",), patched(evolution, "told", mean_of_all)),
    Mutant("the loss summed, smoothed", altered(Eggroll, summed_loss, population=8), ("loss_is_the_problems_own",)),
    Mutant("the estimate halved under autocast", altered(Eggroll, scaled_under_autocast, population=8), ("autocast_changes_rounding_only",)),
    Mutant(
        "every group sees the first part of the batch",
        Eggroll(population=16, shaping="group-z-score", groups=2),
        ("loss_is_the_problems_own",),
        patched(shaping, "group_index", first_group),
    ),
    Mutant(
        "uniform noise of another variance",
        Eggroll(**POPULATION, noise="uniform"),
        ("is_unbiased_for_the_smoothed_loss",),
        patched(perturb, "WIDTH", 1.0),
    ),
    Mutant(
        "a group hears of what it does not touch", ES(**POPULATION), ("is_unbiased_with_influence_maps",), patched(Influence, "sums", of_what_is_not_touched)
    ),
    Mutant(
        "groups hear of each other's outputs",
        ES(**POPULATION),
        ("is_unbiased_with_influence_maps",),
        patched(Credit, "shaped", of_another_parameter),
    ),
]
