"""Planted bugs of feedback alignment, direct and layer by layer."""

import torch
from mutants_form import EVERYWHERE, Mutant, altered, on, patched, rekeyed, scaled

from altgrad.engines import direct_feedback_alignment, feedback_alignment
from altgrad.engines.direct_feedback_alignment import DirectFeedbackAlignment
from altgrad.engines.feedback_alignment import FeedbackAlignment
from altgrad.local import detours
from altgrad.rng import Key

STAYS, LEARNS = "feedback_stays_as_it_was_drawn", "learning_turns_the_weights_towards_the_feedback"
LAYERED = tuple(probe for probe in EVERYWHERE if probe != "quadratic")


def another_run(batch, key):
    """A seed that moves with the step."""
    return batch, Key(key.seed + 1000 * key.step, key.step)


def one_sweep(blocks, params, inputs, buffers, objective, **_):
    """All graphs kept until the end."""
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    total = 0.0
    with torch.enable_grad():
        for position, block in enumerate(blocks):
            output = block.apply(leaves, inputs, buffers)
            total = total + objective(position, output, leaves, slice(0, len(output)))
            inputs = output.detach()
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def detoured(change):
    """Detours whose feedback goes through change(weight)."""

    class Changed(detours.Detours):
        def __init__(self, names, given):
            super().__init__(names, lambda name, weight: change(given(name, weight)))

    return Changed


MUTANTS = [
    Mutant("feedback drawn at every step", rekeyed(FeedbackAlignment, another_run), (STAYS, LEARNS)),
    Mutant("direct feedback drawn at every step", rekeyed(DirectFeedbackAlignment, another_run), (STAYS, LEARNS)),
    Mutant("wrong sign, aligned", altered(FeedbackAlignment, scaled(-1)), ("the_last_layers_gradient_is_backprops", LEARNS)),
    Mutant("error summed over the batch", altered(DirectFeedbackAlignment, scaled(6.0)), ("the_last_layers_gradient_is_backprops",)),
    Mutant(
        "graphs of all blocks kept", DirectFeedbackAlignment(), ("saved_bytes_do_not_grow_with_depth",), patched(direct_feedback_alignment, "stream", one_sweep)
    ),
    Mutant(
        "errors sent down with the wrong sign",
        FeedbackAlignment(feedback="weights"),
        on("is_exact_on", *LAYERED),
        patched(feedback_alignment, "Detours", detoured(torch.neg)),
    ),
    Mutant(
        "feedback of another unit",
        FeedbackAlignment(feedback="weights"),
        on("is_exact_on", "network"),
        patched(feedback_alignment, "Detours", detoured(lambda weight: weight.flip(0))),
    ),
]
