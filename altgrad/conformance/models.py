"""Claims about models that carry more than weights: running statistics, dropout, frozen parameters, mixed precision."""

import copy

import torch
from torch import Tensor

from altgrad.conformance import probes
from altgrad.conformance.claim import KEY, Bench, Subject, claim, hold, same_tree
from altgrad.conformance.gradients import KEYS, ROUNDING, hold_mean
from altgrad.engine import Bias, Estimate
from altgrad.rng import Key

BFLOAT16_ROUNDING = 0.1  # relative: 8 bits a number, a few layers; the same noise in both precisions
DIFFERENCE_ROUNDING = 0.5  # relative, of estimates from differences of losses, which lose most of those bits: half of it must be left


@claim()
def running_statistics_move_once_a_step_as_in_plain_pytorch(subject: Subject) -> None:
    bench = subject.bench(probes.normalised())
    twin = copy.deepcopy(bench.problem.model).train()  # type: ignore[attr-defined]
    with torch.no_grad():
        twin(bench.batch.inputs)
    found = bench.estimate().buffers
    for name, value in twin.named_buffers():
        hold(name in found, f"buffer {name} is not in the estimate.")
        hold(
            torch.allclose(found[name], value, rtol=1e-5, atol=1e-6),
            f"buffer {name} is {found[name].tolist()} after a step; plain PyTorch has {value.tolist()}.",
        )


def look(bench: Bench, key: Key) -> tuple[Estimate, Tensor, bool]:
    """An estimate on the dropout probe, the mask it met first [N, units], and whether it met no other."""
    spy = bench.problem.model[1]  # type: ignore[attr-defined]
    spy.seen.clear()
    found = bench.estimate(key)
    passes, rows = [], []  # a pass over the batch may come in parts
    for mask in spy.seen:
        rows.append(mask)
        if sum(len(row) for row in rows) == probes.EXAMPLES:
            passes.append(torch.cat(rows))
            rows = []
    hold(bool(passes), "the model's dropout was not run over the whole batch.")
    return found, passes[0], not rows and all(torch.equal(passes[0], other) for other in passes[1:])


@claim()
def one_dropout_mask_serves_a_whole_estimate(subject: Subject) -> None:
    bench = subject.bench(probes.dropout())
    _, mask, alone = look(bench, KEY)
    hold(alone, "the passes of one estimate met different dropout masks.")
    _, again, _ = look(bench, KEY)
    hold(torch.equal(mask, again), "two looks with one key met different dropout masks.")
    _, later, _ = look(bench, KEY.at(KEY.step + 1))
    hold(not torch.equal(mask, later), "two steps met the same dropout mask.")


@claim(applies=lambda engine: engine.bias in {Bias.EXACT, Bias.UNBIASED})
def gradient_is_that_of_the_loss_under_the_dropout_mask(subject: Subject) -> None:
    bench = subject.bench(probes.dropout(torch.float64)).warm()
    spy = bench.problem.model[1]  # type: ignore[attr-defined]
    rows, targets = [], []
    exact_engine = subject.engine.bias is Bias.EXACT
    for step in range(3 if exact_engine else KEYS):
        found, spy.imposed, _ = look(bench, KEY.fold("dropout").at(step))
        exact = bench.exact()
        own = float(bench.problem.loss(bench.params, bench.batch, {}).detach())
        spy.imposed = None
        hold(abs(float(found.loss) - own) <= 1e-6 * max(1.0, abs(own)), f"the loss is {float(found.loss)}; under the mask it is {own}.")
        rows.append(bench.flat(dict(found.grads), exact))
        targets.append(bench.flat(exact, exact))
    drawn, masked = torch.stack(rows), torch.stack(targets)
    if exact_engine:
        hold(float((drawn - masked).norm() / masked.norm()) <= ROUNDING, "the gradient is not that of the loss under the mask.")
    else:
        along = (drawn * masked).sum(1, keepdim=True) / masked.square().sum(1, keepdim=True)
        hold_mean(along, torch.ones(1, dtype=along.dtype), "along the gradient under each key's own mask")


@claim()
def inputs_may_be_a_tuple_or_a_dict(subject: Subject) -> None:
    bench = subject.bench(probes.network()).warm()
    plain = bench.estimate()
    for kind, inputs in {"tuple": (bench.batch.inputs,), "dict": {"input": bench.batch.inputs}}.items():
        other = bench.estimate(batch=bench.batch._replace(inputs=inputs))
        hold(
            same_tree(dict(plain.grads), dict(other.grads)),
            f"the same batch as a {kind} of arguments gave another estimate; use problem.forward and batch_size_of.",
        )


@claim()
def frozen_parameters_are_left_out(subject: Subject) -> None:
    bench = subject.bench(probes.frozen())
    model = bench.problem.model  # type: ignore[attr-defined]
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.clone() for name, p in frozen.items()}
    grads = bench.estimate().grads
    for name, value in frozen.items():
        hold(name not in grads, f"{name} is frozen but got a gradient; leave it out.")
        hold(value.grad is None, f"{name} is frozen but its .grad was written.")
    hold(same_tree(before, {name: p.detach() for name, p in frozen.items()}), "a frozen parameter was changed.")


@claim()
def autocast_changes_rounding_only(subject: Subject) -> None:
    bench = subject.bench(probes.network()).warm()
    plain = bench.estimate()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = bench.estimate()
    for name, grad in mixed.grads.items():
        hold(grad.dtype == bench.params[name].dtype, f"under autocast the gradient of {name} is {grad.dtype}, the parameter {bench.params[name].dtype}.")
    hold(set(mixed.grads) == set(plain.grads), "under autocast other parameters got gradients.")
    exact = bench.exact()
    one, other = bench.flat(dict(plain.grads), exact), bench.flat(dict(mixed.grads), exact)
    distance = float((one - other).norm() / one.norm())
    limit = DIFFERENCE_ROUNDING if subject.engine.bias is Bias.SMOOTHED else BFLOAT16_ROUNDING
    hold(distance <= limit, f"under bfloat16 autocast the estimate is {distance:.2g} away, relative; {limit} is rounding.")
