"""Planted bugs. Each names the claims that must fail on it (`altgrad.testing.checks`); test_mutants.py holds them to it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from altgrad import perturb, shaping
from altgrad.conformance.probes import GRADIENT_PROBES
from altgrad.engine import Engine, Estimate
from altgrad.engines import ask_tell, backprop, evolution, forward
from altgrad.engines.ask_tell import AskTell
from altgrad.engines.backprop import Backprop
from altgrad.engines.evolution import Eggroll
from altgrad.engines.forward import Forward
from altgrad.engines.likelihood_ratio import LikelihoodRatio
from altgrad.engines.subspace import INNER, Projection, RandomSubspace
from altgrad.forward_mode.activities import ActivityTrace
from altgrad.noisy import baselines, draws
from altgrad.noisy import trace as noisy_trace
from altgrad.noisy.trace import NoisyTrace
from altgrad.perturb import Dense, LowRank, Steered
from altgrad.population import Draws
from altgrad.population import evaluate as members
from altgrad.population.points import Points
from altgrad.problem import Problem
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers

POPULATION = {"population": 16, "shaping": "raw"}
WEIGHTS = {"space": "weights", "tangents": 8}
EVERYWHERE = tuple(GRADIENT_PROBES)


@dataclass(frozen=True)
class Mutant:
    """`engine` under `patch` breaks every claim in `caught_by`."""

    name: str
    engine: Engine
    caught_by: tuple[str, ...]
    patch: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)


def altered(base: type[Engine], change: Callable[..., Estimate], **settings: Any) -> Engine:
    """`base` whose estimates go through change(estimate, self, problem, params, state, batch, key, world)."""

    class Altered(base):  # type: ignore[valid-type, misc]
        def estimate(self, problem, params, state, batch, key, world):
            found = super().estimate(problem, params, state, batch, key, world)
            return change(found._replace(grads=dict(found.grads)), problem, params, state, batch, key, world)

    return Altered(**settings)


def rekeyed(base: type[Engine], change: Callable[[Any, Key], tuple[Any, Key]], **settings: Any) -> Engine:
    """`base` that is handed another batch or key."""

    class Rekeyed(base):  # type: ignore[valid-type, misc]
        def estimate(self, problem, params, state, batch, key, world):
            batch, key = change(batch, key)
            return super().estimate(problem, params, state, batch, key, world)

    return Rekeyed(**settings)


def patched(owner: Any, name: str, value: Any, *, create: bool = False) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(owner, name, value, create=create)


def scaled(factor: float) -> Callable[..., Estimate]:
    return lambda found, *_: found._replace(grads={name: grad * factor for name, grad in found.grads.items()})


def shifts_the_weights(found, problem, params, *_):
    with torch.no_grad():
        for value in params.values():
            value.add_(0.3).sub_(0.3)  # "restored"
    return found


def global_noise(batch, key):
    return batch, Key(int(torch.randint(2**31, ())))


def wide(found, *_):
    return found._replace(grads={name: grad.double() for name, grad in found.grads.items()})


def uncounted(found, *_):
    return found._replace(metrics={name: value for name, value in found.metrics.items() if name != "forwards"})


def synced(found, *_):
    return found._replace(metrics={name: float(value) for name, value in found.metrics.items()})


def counting_state(found, problem, params, state, *_):
    return found._replace(state={"steps": 1.0})


def summed_loss(found, problem, params, state, batch, *_):
    return found._replace(loss=found.loss * problem.batch_size_of(batch))


def attached(found, problem, params, *_):
    return found._replace(loss=found.loss + 0 * sum(value.sum() for value in params.values()))


def graph_kept(found, problem, params, state, batch, *_):
    with torch.enable_grad():
        problem.loss(params, batch, problem.fresh_buffers())
    return found


def nan_hidden(found, *_):
    return found._replace(loss=found.loss.nan_to_num())


def writes_grad(found, problem, params, *_):
    for value in params.values():
        value.grad = torch.zeros_like(value)
    return found


def narrow_under_autocast(found, *_):
    return wide_to(found, torch.bfloat16) if torch.is_autocast_enabled("cpu") else found


def scaled_under_autocast(found, *_):
    return scaled(0.3)(found) if torch.is_autocast_enabled("cpu") else found


def wide_to(found, dtype):
    return found._replace(grads={name: grad.to(dtype) for name, grad in found.grads.items()})


def all_parameters(found, problem, *_):
    model = getattr(problem, "model", None)
    extra = {} if model is None else {name: torch.zeros_like(p) for name, p in model.named_parameters() if not p.requires_grad}
    return found._replace(grads={**found.grads, **extra})


def by_length(found, problem, params, state, batch, *_):
    factor = len(batch.inputs) / problem.batch_size_of(batch)  # a dict's length is no batch size
    return found._replace(grads={name: grad * factor for name, grad in found.grads.items()})


def statistics_twice(found, problem, params, state, batch, *_):
    with torch.no_grad():
        problem.losses(params, batch, found.buffers)
    return found


def bias_in_the_weight(found, *_):
    grads = dict(found.grads)
    for name, grad in found.grads.items():
        weight = name.replace("bias", "weight")
        if name.endswith("bias") and weight in grads and grads[weight].ndim > 1:
            grads[weight] = grads[weight] + grad.reshape(-1, *(1 for _ in grads[weight].shape[1:]))
            grads[name] = grad * 0
    return found._replace(grads=grads)


def flipped_kernels(found, *_):
    return found._replace(grads={name: grad.flip(-1) if grad.ndim == 4 else grad for name, grad in found.grads.items()})


class Predicts(Backprop):
    def predict(self, problem, params, state, inputs):
        shifts_the_weights(None, problem, params)
        return super().predict(problem, params, state, inputs)


class Anonymous(Forward):
    source = ""


class Unsolved(Forward):
    """Orthogonal without (VᵀV)⁻¹."""

    def combined(self, slopes, drawn, params):
        return slopes


class LongGuide(Forward):
    """A momentum guide that is no unit vector."""

    def moves(self, params, state, members, key, *, lead):
        found = super().moves(params, state, members, key, lead=lead)
        return {name: Steered(move.base, 2 * move.guide, 2 * move.overlap, lead=lead) for name, move in found.items()}


class NoMix:
    """An attribute that stays empty whatever is written to it."""

    def __get__(self, instance, owner):
        return []

    def __set__(self, instance, value):
        pass


@contextmanager
def other_masks() -> Iterator[None]:
    """Every pass has dropout masks of its own."""
    passes = iter(range(10**9))
    with mock.patch.object(forward, "AddressedSamplers", lambda key, **where: AddressedSamplers(key.fold(next(passes)), **where)):
        yield


@contextmanager
def mixing_ignored() -> Iterator[None]:
    """Neither the layers' word nor the probe of rows is heeded."""
    with mock.patch.object(ActivityTrace, "mixes_examples", NoMix(), create=True), mock.patch.object(forward, "independent_rows", return_value=True):
        yield


@contextmanager
def unguided_later() -> Iterator[None]:
    """Only the first pass knows the guides."""
    plain = ActivityTrace.__init__

    def start(self, *args, guide, lead, **named):
        plain(self, *args, guide=guide if lead else None, lead=lead, **named)

    with mock.patch.object(ActivityTrace, "__init__", start):
        yield


def other_noise(self):
    self.plain = True
    self.calls.clear()
    self.key = self.key.fold("again")


def one_site(self, site, *rest):
    return DRAW(self, site.split("@")[0], *rest)


def without_root(self):
    a, b = FACTORS(self)
    return a * self.rank**0.5, b


def other_directions(self, coefficients):
    moved = Dense(self.key.fold("other"), "x", torch.empty(self.shape, dtype=self.dtype), self.members, self.law)
    return COMBINE(moved, coefficients)


def forgotten_weights(self):
    self.weights = {}
    return GRADIENTS(self)


def both_plus(self, drawn, name, first):
    return SIGNED(self, drawn, name, first).abs() * torch.cat([drawn, drawn]).sign() if self.antithetic else SIGNED(self, drawn, name, first)


def first_directions(self, name, first, count):
    return MOVES(self, name, 0, count)


def own_losses(own, draws, world):
    """The others' taken for zero."""
    share, halves = world.share(draws.count), 2 if draws.antithetic else 1
    whole = own.new_zeros(halves, draws.count)
    whole[:, share.start : share.stop] = own.reshape(halves, -1)
    return whole.flatten()


def mean_of_all(fitness, quiet):
    return fitness.double().mean(), fitness.double().std(), (~fitness.isfinite()).sum()


@contextmanager
def members_write_statistics() -> Iterator[None]:
    """The model's own buffers are handed out, and batch norm is left to write them."""
    live = mock.patch.object(Problem, "fresh_buffers", lambda self: self.buffers())
    with live, mock.patch.object(members, "batch_norm", torch.nn.functional.batch_norm):
        yield


def unequal_parts(batch, parts, count):
    for part, _ in CUT(batch, parts, count):
        yield part, 1.0


def first_points(self, first, count):
    return POINTS(self, 0, count)


def seeded_once(rule, tensors, key):
    return STATE_OF(rule, tensors, key.at(0))


POINTS, STATE_OF = Points.chunk, ask_tell.state_of
SIGNED, MOVES = Draws.signed, Draws.moves
DRAW, FACTORS, COMBINE, GRADIENTS, CUT = ActivityTrace.draw, LowRank.factors, Dense.combine, ActivityTrace.gradients, backprop.cut


def of_another_copy(losses, count, baseline):
    return ((losses - baseline) / (count * losses.shape[1])).roll(1, 0)


def inputs_of_another_example(inputs, delta, *, batched):
    inputs, delta = FOLDED(inputs, delta, batched=batched)
    return inputs.roll(1, 0), delta


FOLDED = noisy_trace.folded


def other_noise_in_the_replay(self, record, site, value):
    if self.coefficients is not None:
        site = f"{site} again"
    return NOISED(self, record, site, value)


NOISED = NoisyTrace.noised


def on(kind: str, *probes: str) -> tuple[str, ...]:
    return tuple(f"{kind}_{probe}" for probe in probes)


def stateless_inside(found: Estimate, *_: Any) -> Estimate:
    return found._replace(state={name: value for name, value in found.state.items() if not name.startswith(INNER)})


def another_subspace(self: RandomSubspace, problem: Problem, state: Any, origin: Any) -> Projection:
    looks = problem.facts["looks"] = problem.facts.get("looks", 0) + 1
    return Projection(looks, origin, self.dimension)


def first_group(members: int, groups: int, *, pairs: bool) -> torch.Tensor:
    return torch.zeros(members, dtype=torch.int64)


MUTANTS = [
    Mutant("no source is given", Anonymous(), ("traits_are_declared_and_settings_are_plain",)),
    Mutant("noise from the global generator", rekeyed(Forward, global_noise), ("same_key_gives_the_same_bits", "global_random_state_is_untouched")),
    Mutant("weights moved and moved back", altered(Backprop, shifts_the_weights), ("parameters_buffers_and_state_are_left_as_they_were",)),
    Mutant("p.grad written by the engine", altered(Backprop, writes_grad), ("parameters_buffers_and_state_are_left_as_they_were",)),
    Mutant(
        "the same noise at every step",
        rekeyed(Forward, lambda batch, key: (batch, key.at(0))),
        ("noise_changes_with_the_step", "one_dropout_mask_serves_a_whole_estimate"),
    ),
    Mutant("gradients in another dtype", altered(Backprop, wide), ("gradients_have_the_parameters_shapes_and_dtypes",)),
    Mutant("forwards not counted", altered(Backprop, uncounted), ("metrics_are_scalar_tensors_and_count_forwards",)),
    Mutant("metrics read back to the host", altered(Backprop, synced), ("metrics_are_scalar_tensors_and_count_forwards",)),
    Mutant("a number in the state", altered(Backprop, counting_state), ("state_holds_tensors_only_under_stable_names",)),
    Mutant("the loss summed", altered(Backprop, summed_loss), ("loss_is_the_problems_own", "two_ranks_average_to_the_whole_batch")),
    Mutant("the loss attached to a graph", altered(Backprop, attached), ("nothing_returned_carries_a_graph",)),
    Mutant("a reverse graph kept", altered(Forward, graph_kept), ("keeps_no_reverse_graph",)),
    Mutant("NaN made a number", altered(Backprop, nan_hidden), ("a_batch_with_nan_is_reported_and_leaves_nothing_behind",)),
    Mutant("predict moves the weights", Predicts(), ("predictions_are_made_without_a_graph_or_a_trace",)),
    Mutant("ranks share their noise", rekeyed(Forward, lambda batch, key: (batch._replace(first=0), key)), ("two_ranks_average_to_the_whole_batch",)),
    Mutant("narrow gradients under autocast", altered(Backprop, narrow_under_autocast), ("autocast_changes_rounding_only",)),
    Mutant("frozen parameters touched", altered(Backprop, all_parameters), ("frozen_parameters_are_left_out",)),
    Mutant("batch size taken from len", altered(Backprop, by_length), ("inputs_may_be_a_tuple_or_a_dict",)),
    Mutant("running statistics moved twice", altered(Forward, statistics_twice), ("running_statistics_move_once_a_step_as_in_plain_pytorch",)),
    Mutant("a dropout mask a pass", Forward(memory="replay"), ("one_dropout_mask_serves_a_whole_estimate",), other_masks),
    Mutant("a dropout mask a chunk", Forward(**WEIGHTS, chunk=2), ("gradient_is_that_of_the_loss_under_the_dropout_mask",), other_masks),
    Mutant("wrong sign, exact", altered(Backprop, scaled(-1)), on("is_exact_on", *EVERYWHERE)),
    Mutant("wrong sign, unbiased", altered(Forward, scaled(-1)), on("is_unbiased_on", *EVERYWHERE)),
    Mutant("wrong sign, guided", altered(Forward, scaled(-1), **WEIGHTS, combine="orthogonal"), on("is_not_reversed_on", *EVERYWHERE)),
    Mutant("K not divided by", altered(Forward, scaled(8), **WEIGHTS), on("is_unbiased_on", *EVERYWHERE)),
    Mutant("updated along what was not probed", Forward(**WEIGHTS), on("is_unbiased_on", "quadratic", "network"), patched(Dense, "combine", other_directions)),
    Mutant(
        "another noise in the replay",
        Forward(memory="replay"),
        on("is_unbiased_on", "network", "convolution"),
        patched(ActivityTrace, "begin_replay", other_noise),
    ),
    Mutant("no 1/√r", Forward(**WEIGHTS, rank=2), on("is_unbiased_on", "network"), patched(LowRank, "factors", without_root)),
    Mutant("the bias's gradient in the weight", altered(Forward, bias_in_the_weight), on("is_unbiased_on", "network")),
    Mutant("kernels flipped", altered(Forward, flipped_kernels, tangents=128), on("is_unbiased_on", "convolution")),
    Mutant("orthogonal without the solve", Unsolved(**WEIGHTS, combine="orthogonal"), on("is_not_reversed_on", "network")),
    Mutant("rescaling forgotten", altered(Forward, scaled(0.2), **WEIGHTS, combine="orthogonal", rescale=True), on("is_unbiased_on", "network")),
    Mutant("a guide that is no unit vector", LongGuide(**WEIGHTS, guess="momentum"), on("is_unbiased_on", "network")),
    Mutant(
        "coefficients by example where examples mix",
        Forward(),
        on("is_unbiased_on", "batch_norm"),
        mixing_ignored,
    ),
    Mutant(
        "guides without signs where examples mix",
        Forward(guess="local"),
        on("is_unbiased_on", "batch_norm"),
        patched(ActivityTrace, "turned", lambda self, unit: unit),
    ),
    Mutant("later chunks not kept clear of the guides", Forward(guess="local", tangents=4, chunk=1), on("is_unbiased_on", "network"), unguided_later),
    Mutant("one noise for both uses of a tied weight", Forward(), on("is_unbiased_on", "tied_weights"), patched(ActivityTrace, "draw", one_site)),
    Mutant("weight tangents forgotten outside layers", Forward(), on("is_unbiased_on", "quadratic"), patched(ActivityTrace, "gradients", forgotten_weights)),
    Mutant("wrong sign, likelihood ratio", altered(LikelihoodRatio, scaled(-1)), on("is_not_reversed_on", *EVERYWHERE)),
    Mutant("sigma not divided out of a likelihood ratio", altered(LikelihoodRatio, scaled(0.1)), ("is_unbiased_for_the_smoothed_loss",)),
    Mutant(
        "a copy's noise with another copy's loss",
        LikelihoodRatio(),
        ("is_unbiased_for_the_smoothed_loss",),
        patched(baselines, "coefficients", of_another_copy),
    ),
    Mutant("one noise for all layers' outputs", LikelihoodRatio(), ("is_unbiased_for_the_smoothed_loss",), patched(draws, "tensor_id", lambda name: 0)),
    Mutant(
        "an example's noise with another's input",
        LikelihoodRatio(),
        ("is_unbiased_for_the_smoothed_loss",),
        patched(noisy_trace, "folded", inputs_of_another_example),
    ),
    Mutant(
        "another noise in the replay of a likelihood ratio",
        LikelihoodRatio(memory="replay"),
        ("is_unbiased_for_the_smoothed_loss",),
        patched(NoisyTrace, "noised", other_noise_in_the_replay),
    ),
    Mutant("minus halves at plus", Eggroll(**POPULATION), on("is_not_reversed_on", *EVERYWHERE), patched(Draws, "signed", both_plus)),
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
    Mutant("parts added without their share", Backprop(accumulation=3), on("is_exact_on", "network"), patched(backprop, "cut", unequal_parts)),
]
