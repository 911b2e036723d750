"""Planted bugs of forward gradients. A new one goes at the end of the list, its change above it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from mutants_form import EVERYWHERE, WEIGHTS, Mutant, altered, on, patched, rekeyed, scaled, without_root

from altgrad.engines import forward
from altgrad.engines.forward import Forward
from altgrad.forward_mode.activities import ActivityTrace
from altgrad.perturb import Dense, LowRank, Steered
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers


def global_noise(batch, key):
    return batch, Key(int(torch.randint(2**31, ())))


def graph_kept(found, problem, params, state, batch, *_):
    with torch.enable_grad():
        problem.loss(params, batch, problem.fresh_buffers())
    return found


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


def other_directions(self, coefficients):
    moved = Dense(self.key.fold("other"), "x", torch.empty(self.shape, dtype=self.dtype), self.members, self.law)
    return COMBINE(moved, coefficients)


def forgotten_weights(self):
    self.weights = {}
    return GRADIENTS(self)


DRAW = ActivityTrace.draw
COMBINE = Dense.combine
GRADIENTS = ActivityTrace.gradients


MUTANTS = [
    Mutant("no source is given", Anonymous(), ("traits_are_declared_and_settings_are_plain",)),
    Mutant("noise from the global generator", rekeyed(Forward, global_noise), ("same_key_gives_the_same_bits", "global_random_state_is_untouched")),
    Mutant(
        "the same noise at every step",
        rekeyed(Forward, lambda batch, key: (batch, key.at(0))),
        ("noise_changes_with_the_step", "one_dropout_mask_serves_a_whole_estimate"),
    ),
    Mutant("a reverse graph kept", altered(Forward, graph_kept), ("keeps_no_reverse_graph",)),
    Mutant("ranks share their noise", rekeyed(Forward, lambda batch, key: (batch._replace(first=0), key)), ("two_ranks_average_to_the_whole_batch",)),
    Mutant("running statistics moved twice", altered(Forward, statistics_twice), ("running_statistics_move_once_a_step_as_in_plain_pytorch",)),
    Mutant("a dropout mask a pass", Forward(memory="replay"), ("one_dropout_mask_serves_a_whole_estimate",), other_masks),
    Mutant("a dropout mask a chunk", Forward(**WEIGHTS, chunk=2), ("gradient_is_that_of_the_loss_under_the_dropout_mask",), other_masks),
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
]
