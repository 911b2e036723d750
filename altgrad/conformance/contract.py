"""Claims about form and purity, on any problem."""

import json
import random

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from altgrad import metrics
from altgrad.conformance.claim import KEY, Subject, claim, hold, same_bits, same_tree
from altgrad.engine import Bias, Engine, Needs
from altgrad.errors import NumericsError
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers
from altgrad.world import World

LOSS_ROUNDING = 1e-5  # relative: a loss may be added up in another order
SMOOTHING = 1e-2  # relative: the mean over perturbed members is the smoothed loss, σ²/2 · tr(Hessian) away, and sampled


def without_reverse(engine: Engine) -> bool:
    return Needs.REVERSE not in engine.needs


def keeps_its_feedback(engine: Engine) -> bool:
    """Whether what is random in an engine is the same at every step of a run."""
    return engine.bias is Bias.ALIGNED and not getattr(engine, "redraws", False)


@claim(anywhere=True)
def traits_are_declared_and_settings_are_plain(subject: Subject) -> None:
    engine = subject.engine
    hold(bool(engine.name) and bool(engine.source), f"name is {engine.name!r} and source {engine.source!r}; both must be stated.")
    hold(isinstance(engine.needs, Needs) and isinstance(engine.bias, Bias), f"needs is {engine.needs!r}, bias {engine.bias!r}; they must be Needs and Bias.")
    json.dumps(engine.settings())


@claim(anywhere=True)
def same_key_gives_the_same_bits(subject: Subject) -> None:
    bench = subject.bench().warm()
    first, second = bench.estimate(), bench.estimate()
    hold(same_bits(first.loss, second.loss), f"two looks with one key gave losses {float(first.loss)} and {float(second.loss)}.")
    hold(same_tree(dict(first.grads), dict(second.grads)), "two looks with one key gave different gradients; draw noise from the key alone.")
    hold(same_tree(first.state, second.state) and same_tree(first.buffers, second.buffers), "two looks with one key gave different states or buffers.")


@claim(anywhere=True)
def global_random_state_is_untouched(subject: Subject) -> None:
    bench = subject.bench()
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()  # type: ignore[index, union-attr]
    bench.estimate()
    hold(torch.equal(before[0], torch.get_rng_state()), "torch's global generator moved; draw noise from the key.")
    hold(before[1] == np.random.get_state()[1].tobytes() and before[2] == random.getstate(), "NumPy's or Python's global generator moved.")  # type: ignore[index, union-attr]


@claim(anywhere=True)
def parameters_buffers_and_state_are_left_as_they_were(subject: Subject) -> None:
    bench = subject.bench().warm()
    own = {
        **bench.params,
        **{f"buffer {name}": value for name, value in bench.problem.buffers().items()},
        **{f"state {name}": value for name, value in bench.state.items()},
    }
    before = {name: value.detach().clone() for name, value in own.items()}
    bench.estimate()
    for name, value in own.items():
        hold(
            same_bits(value, before[name]),
            f"{name} was changed by {float((value.detach().double() - before[name].double()).abs().max()):.2g}; estimates are pure.",
        )
        hold(value.grad is None, f"{name}.grad was written; only the learner or the trainer writes it.")


@claim(anywhere=True, applies=lambda engine: engine.bias is not Bias.EXACT and not keeps_its_feedback(engine))
def noise_changes_with_the_step(subject: Subject) -> None:
    bench = subject.bench().warm()
    here, other_seed, other_step = (bench.estimate(key).grads for key in (KEY, Key(KEY.seed + 1, KEY.step), KEY.at(KEY.step + 1)))
    random_at_all = not same_tree(dict(here), dict(other_seed))
    hold(not random_at_all or not same_tree(dict(here), dict(other_step)), "two steps saw the same noise; address it by key.step too.")


@claim(anywhere=True)
def gradients_have_the_parameters_shapes_and_dtypes(subject: Subject) -> None:
    bench = subject.bench()
    grads = bench.estimate().grads
    hold(bool(grads), "no gradient at all was given.")
    for name, grad in grads.items():
        hold(name in bench.params, f"there is a gradient for {name!r}, which is no parameter.")
        value = bench.params[name]
        hold(
            grad.shape == value.shape and grad.dtype == value.dtype,
            f"{name} is {tuple(value.shape)} {value.dtype}, its gradient {tuple(grad.shape)} {grad.dtype}.",
        )


@claim(anywhere=True)
def metrics_are_scalar_tensors_and_count_forwards(subject: Subject) -> None:
    found = subject.bench().estimate().metrics
    hold("forwards" in found, f"metrics has {', '.join(found) or 'nothing'}; 'forwards' is missing.")
    for name, value in found.items():
        hold(isinstance(value, Tensor) and value.ndim == 0, f"metric {name} is {type(value).__name__}; it must be a 0-d tensor (no sync in a step).")
    hold(float(found["forwards"]) >= 1, f"forwards is {float(found['forwards'])}; at least one pass was made.")


@claim(anywhere=True)
def state_holds_tensors_only_under_stable_names(subject: Subject) -> None:
    bench = subject.bench()
    after = bench.estimate().state
    for name, value in {**bench.state, **after}.items():
        hold(isinstance(value, Tensor), f"state {name} is {type(value).__name__}; a state holds tensors only, or it cannot be saved.")
    hold(set(after) == set(bench.state), f"the state's names went from {sorted(bench.state)} to {sorted(after)}; init must give all of them.")


@claim(anywhere=True)
def loss_is_the_problems_own(subject: Subject) -> None:
    bench = subject.bench()
    found = bench.estimate().loss
    with torch.no_grad(), AddressedSamplers(KEY.fold("samplers")):
        own = bench.problem.loss(bench.params, bench.batch, bench.problem.fresh_buffers())
    hold(found.ndim == 0, f"the loss has shape {tuple(found.shape)}; it must be a scalar.")
    limit = SMOOTHING if subject.engine.bias is Bias.SMOOTHED else LOSS_ROUNDING
    hold(
        abs(float(found - own)) <= limit * max(1.0, abs(float(own))),
        f"the estimate's loss is {float(found)}, the problem's own {float(own)}; they may differ by {limit}, relative.",
    )


@claim(anywhere=True)
def nothing_returned_carries_a_graph(subject: Subject) -> None:
    found = subject.bench().estimate()
    everything = {"loss": found.loss, **found.grads, **found.state, **found.metrics, **found.buffers}
    for name, value in everything.items():
        hold(not isinstance(value, Tensor) or not value.requires_grad, f"{name} requires grad; detach what is returned.")


@claim(anywhere=True, applies=without_reverse)
def keeps_no_reverse_graph(subject: Subject) -> None:
    bench = subject.bench().warm()
    with metrics.saved_bytes() as meter:
        bench.estimate()
    hold(meter.total == 0, f"{meter.total} bytes were saved for a backward sweep that never comes; run detached, or state REVERSE in needs.")


@claim(anywhere=True)
def a_batch_with_nan_is_reported_and_leaves_nothing_behind(subject: Subject) -> None:
    bench = subject.bench().warm()
    before = bench.estimate()
    poisoned = bench.batch._replace(inputs=tree_map(poison, bench.batch.inputs))
    try:
        loss = bench.estimate(batch=poisoned).loss
        hold(not bool(torch.isfinite(loss)), f"a batch of NaN gave the loss {float(loss)}; NaN must show, so that the step is refused.")
    except NumericsError:
        pass
    after = bench.estimate()
    hold(
        same_bits(before.loss, after.loss) and same_tree(dict(before.grads), dict(after.grads)),
        "after a batch of NaN the same estimate is another; keep nothing on the engine.",
    )


def poison(leaf: object) -> object:
    return torch.full_like(leaf, float("nan")) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@claim(anywhere=True)
def predictions_are_made_without_a_graph_or_a_trace(subject: Subject) -> None:
    bench = subject.bench()
    before = {name: value.detach().clone() for name, value in {**bench.params, **bench.problem.buffers()}.items()}
    with torch.no_grad():
        first, second = (bench.engine.predict(bench.problem, bench.params, bench.state, bench.batch.inputs) for _ in range(2))
    hold(type(first) is type(second), f"predict gave {type(first).__name__}, then {type(second).__name__}.")
    after = {**bench.params, **bench.problem.buffers()}
    hold(all(same_bits(after[name], value) for name, value in before.items()), "predict changed parameters or buffers.")


@claim(anywhere=True, applies=lambda engine: engine.split.value == "data" and engine.bias in {Bias.EXACT, Bias.UNBIASED, Bias.GUIDED, Bias.LOCAL, Bias.ALIGNED})
def two_ranks_average_to_the_whole_batch(subject: Subject) -> None:
    bench = subject.bench().warm()
    if bench.problem.batch_size_of(bench.batch) % 2:
        return
    whole = bench.estimate()
    parts = [bench.estimate(batch=bench.problem.batch(0, World(rank, 2)), world=World(rank, 2)) for rank in range(2)]
    loss = sum(float(part.loss) for part in parts) / 2
    hold(abs(loss - float(whole.loss)) <= LOSS_ROUNDING * max(1.0, abs(loss)), f"two ranks' mean loss is {loss}, the whole batch's {float(whole.loss)}.")
    exact = bench.exact()
    together = {name: (parts[0].grads[name] + parts[1].grads[name]) / 2 for name in whole.grads}
    apart = (bench.flat(together, exact) - bench.flat(dict(whole.grads), exact)).norm() / bench.flat(dict(whole.grads), exact).norm()
    hold(float(apart) <= 1e-3, f"the mean over two ranks is {float(apart):.2g} away from the whole batch's estimate; address noise by batch.first + n.")
