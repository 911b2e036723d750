"""Planted bugs of the likelihood ratio. A new one goes at the end of the list, its change above it."""

from mutants_form import EVERYWHERE, Mutant, altered, on, patched, scaled

from altgrad.engines.likelihood_ratio import LikelihoodRatio
from altgrad.noisy import baselines, draws
from altgrad.noisy import trace as noisy_trace
from altgrad.noisy.trace import NoisyTrace


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


def of_what_is_not_touched(coefficients, mask):
    return TOUCHED(coefficients, None if mask is None else ~mask)


TOUCHED = noisy_trace.touched


MUTANTS = [
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
    Mutant(
        "a layer hears of what it does not touch",
        LikelihoodRatio(),
        ("is_unbiased_with_influence_maps",),
        patched(noisy_trace, "touched", of_what_is_not_touched),
    ),
]
