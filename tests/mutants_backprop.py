"""Planted bugs of backprop, most of them against what every engine promises. A new one goes at the end of the list, its change above it."""

import torch
from mutants_form import EVERYWHERE, Mutant, altered, on, patched, scaled, summed_loss

from altgrad.engines import backprop
from altgrad.engines.backprop import Backprop


def shifts_the_weights(found, problem, params, *_):
    with torch.no_grad():
        for value in params.values():
            value.add_(0.3).sub_(0.3)  # "restored"
    return found


def wide(found, *_):
    return found._replace(grads={name: grad.double() for name, grad in found.grads.items()})


def uncounted(found, *_):
    return found._replace(metrics={name: value for name, value in found.metrics.items() if name != "forwards"})


def synced(found, *_):
    return found._replace(metrics={name: float(value) for name, value in found.metrics.items()})


def counting_state(found, problem, params, state, *_):
    return found._replace(state={"steps": 1.0})


def attached(found, problem, params, *_):
    return found._replace(loss=found.loss + 0 * sum(value.sum() for value in params.values()))


def nan_hidden(found, *_):
    return found._replace(loss=found.loss.nan_to_num())


def writes_grad(found, problem, params, *_):
    for value in params.values():
        value.grad = torch.zeros_like(value)
    return found


def narrow_under_autocast(found, *_):
    return wide_to(found, torch.bfloat16) if torch.is_autocast_enabled("cpu") else found


def wide_to(found, dtype):
    return found._replace(grads={name: grad.to(dtype) for name, grad in found.grads.items()})


def all_parameters(found, problem, *_):
    model = getattr(problem, "model", None)
    extra = {} if model is None else {name: torch.zeros_like(p) for name, p in model.named_parameters() if not p.requires_grad}
    return found._replace(grads={**found.grads, **extra})


def by_length(found, problem, params, state, batch, *_):
    factor = len(batch.inputs) / problem.batch_size_of(batch)  # a dict's length is no batch size
    return found._replace(grads={name: grad * factor for name, grad in found.grads.items()})


class Predicts(Backprop):
    def predict(self, problem, params, state, inputs):
        shifts_the_weights(None, problem, params)
        return super().predict(problem, params, state, inputs)


def unequal_parts(batch, parts, count):
    for part, _ in CUT(batch, parts, count):
        yield part, 1.0


CUT = backprop.cut


MUTANTS = [
    Mutant("weights moved and moved back", altered(Backprop, shifts_the_weights), ("parameters_buffers_and_state_are_left_as_they_were",)),
    Mutant("p.grad written by the engine", altered(Backprop, writes_grad), ("parameters_buffers_and_state_are_left_as_they_were",)),
    Mutant("gradients in another dtype", altered(Backprop, wide), ("gradients_have_the_parameters_shapes_and_dtypes",)),
    Mutant("forwards not counted", altered(Backprop, uncounted), ("metrics_are_scalar_tensors_and_count_forwards",)),
    Mutant("metrics read back to the host", altered(Backprop, synced), ("metrics_are_scalar_tensors_and_count_forwards",)),
    Mutant("a number in the state", altered(Backprop, counting_state), ("state_holds_tensors_only_under_stable_names",)),
    Mutant("the loss summed", altered(Backprop, summed_loss), ("loss_is_the_problems_own", "two_ranks_average_to_the_whole_batch")),
    Mutant("the loss attached to a graph", altered(Backprop, attached), ("nothing_returned_carries_a_graph",)),
    Mutant("NaN made a number", altered(Backprop, nan_hidden), ("a_batch_with_nan_is_reported_and_leaves_nothing_behind",)),
    Mutant("predict moves the weights", Predicts(), ("predictions_are_made_without_a_graph_or_a_trace",)),
    Mutant("narrow gradients under autocast", altered(Backprop, narrow_under_autocast), ("autocast_changes_rounding_only",)),
    Mutant("frozen parameters touched", altered(Backprop, all_parameters), ("frozen_parameters_are_left_out",)),
    Mutant("batch size taken from len", altered(Backprop, by_length), ("inputs_may_be_a_tuple_or_a_dict",)),
    Mutant("wrong sign, exact", altered(Backprop, scaled(-1)), on("is_exact_on", *EVERYWHERE)),
    Mutant("parts added without their share", Backprop(accumulation=3), on("is_exact_on", "network"), patched(backprop, "cut", unequal_parts)),
]
