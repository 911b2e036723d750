"""Gradients through whole training runs by replay: equal to the full unroll, the same bits however states are kept, and dropout drawn again as it was."""

import math
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance

from altgrad.errors import CapabilityError, NumericsError, SettingError, ShapeError
from altgrad.hyper import Descent, descent, replay
from altgrad.hyper.descent import TESTED
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers

KIND = {"dtype": torch.float64}
STEPS = 9
MODES = ("all", "sqrt", "log", 4)
SETTINGS = {
    "SGD": {},
    "SGD with momentum": {"momentum": 0.9},
    "SGD with Nesterov's momentum": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    **{name: {} for name in TESTED if name != "SGD"},
    "Adam with amsgrad": {"amsgrad": True},
}
draws = torch.Generator().manual_seed(0)
X, Y = torch.randn(40, 5, generator=draws, **KIND), torch.randn(40, generator=draws, **KIND)
START = {"first": torch.randn(5, 4, generator=draws, **KIND) / 2, "second": torch.randn(4, generator=draws, **KIND) / 2}
META = torch.zeros(40, **KIND)


def loss(weights, t, meta):
    hidden = torch.tanh(X @ weights["first"])
    hidden = F.dropout(hidden, 0.3) if meta.get("drop") else hidden
    return (meta["logit"].sigmoid() * (hidden @ weights["second"] - Y) ** 2).mean()


def outer(weights):
    return ((torch.tanh(X @ weights["first"]) @ weights["second"] - Y) ** 2).mean()


def stepper(label="SGD with momentum"):
    return Descent(loss, label.split()[0], lr=0.05, settings=SETTINGS[label])


def value(step, logit, *, save="sqrt", drop=False, start=None):
    last = replay(step, step.start(start or START), {"logit": logit, "drop": drop}, steps=STEPS, save=save, key=Key(1))
    return outer(step.weights(last))


def replayed(step, **settings):
    logit = META.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(step, logit, **settings), logit)
    return found


def unrolled(step, *, drop=False):
    """The same by the graph of the whole run."""
    logit = META.clone().requires_grad_()
    state = step.start(START)
    for t in range(STEPS):
        with AddressedSamplers(Key(1).fold("replay").at(t)):
            state = step(state, t, {"logit": logit, "drop": drop})
    (found,) = torch.autograd.grad(outer(step.weights(state)), logit)
    return found


def apart(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("label", SETTINGS)
def test_replay_equals_the_full_unroll(label):
    assert apart(replayed(stepper(label)), unrolled(stepper(label))) <= 1e-10


@pytest.mark.parametrize("label", SETTINGS)
def test_the_derivative_of_every_optimizers_run_agrees_with_finite_differences(label):
    step, found, small = stepper(label), replayed(stepper(label)), 1e-5
    for place in (0, 7):
        move = torch.zeros_like(META)
        move[place] = small
        slope = (value(step, META + move) - value(step, META - move)) / (2 * small)
        assert abs(float(slope - found[place])) <= 1e-5 * float(found.abs().max())


def test_replay_equals_the_full_unroll_under_dropout():
    assert apart(replayed(stepper(), drop=True), unrolled(stepper(), drop=True)) <= 1e-10


@pytest.mark.parametrize("drop", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("label", ["SGD with momentum", "Adam"])
def test_save_modes_give_the_same_bits(label, drop):
    found = [replayed(stepper(label), save=save, drop=drop) for save in MODES]
    assert all(torch.equal(found[0], other) for other in found)


def test_dropout_is_drawn_anew_at_every_step_and_again_in_a_replay():
    seen = {}

    def step(state, t, meta):
        mask = F.dropout(torch.ones(64), 0.5)
        seen.setdefault(t, []).append(mask)
        return {"x": state["x"] * meta + mask.sum()}

    last = replay(step, {"x": torch.ones(())}, torch.tensor(0.5, requires_grad=True), steps=4, save="log")
    last["x"].backward()
    assert all(len(masks) > 1 and all(torch.equal(masks[0], mask) for mask in masks) for masks in seen.values())
    assert not torch.equal(seen[0][0], seen[1][0])


def test_the_first_weights_get_their_gradient():
    start = {name: tensor.clone().requires_grad_() for name, tensor in START.items()}
    found = torch.autograd.grad(value(stepper(), META, start=start), list(start.values()))
    state = stepper().start(start)
    for t in range(STEPS):
        state = stepper()(state, t, {"logit": META})
    wanted = torch.autograd.grad(outer(stepper().weights(state)), list(start.values()))
    assert max(apart(a, b) for a, b in zip(found, wanted, strict=True)) <= 1e-10


def test_the_run_itself_is_that_of_the_plain_optimizer():
    weights = {name: tensor.clone().requires_grad_() for name, tensor in START.items()}
    optimizer = torch.optim.SGD(list(weights.values()), lr=0.05, momentum=0.9)
    for t in range(STEPS):
        optimizer.zero_grad()
        loss(weights, t, {"logit": META}).backward()
        optimizer.step()
    found = stepper().weights(replay(stepper(), stepper().start(START), {"logit": META}, steps=STEPS))
    assert max(apart(found[name], weights[name].detach()) for name in weights) <= 1e-14


def counted(save, steps):
    """(runs of a step, most states alive at a time in the backward pass) of a run whose state is one number."""
    alive, runs, most = weakref.WeakSet(), [], []

    def step(state, t, meta):
        runs.append(t)
        alive.add(state["x"])
        most.append(len(alive))
        return {"x": torch.sin(state["x"]) * meta}

    last = replay(step, {"x": torch.ones((), **KIND)}, torch.tensor(0.9, requires_grad=True, **KIND), steps=steps, save=save)
    del most[:]
    last["x"].backward()
    return len(runs), max(most)


def test_every_step_runs_as_often_as_the_mode_says():
    steps = 64
    assert counted("all", steps)[0] == 2 * steps
    assert counted("sqrt", steps)[0] <= 3 * steps
    assert counted("log", steps)[0] <= 2 * steps + steps * math.log2(steps) / 2


def test_meta_that_no_step_uses_gets_no_gradient_and_integers_pass_through():
    used, unused = torch.tensor(0.5, requires_grad=True), torch.tensor(1.0, requires_grad=True)

    def step(state, t, meta):
        return {"x": state["x"] * meta[0], "count": state["count"] + 1}

    last = replay(step, {"x": torch.ones(()), "count": torch.zeros((), dtype=torch.int64)}, (used, unused), steps=3)
    assert torch.autograd.grad(last["x"], [used, unused], allow_unused=True) == (torch.tensor(0.75), None)
    assert int(last["count"]) == 3


# What is refused


def test_a_loss_with_attention_which_fused_has_no_second_derivative_is_followed():
    def attending(weights, t, meta):
        h = meta * weights["w"].view(1, 1, 3, 4)
        return F.scaled_dot_product_attention(h, h, h).square().sum()

    def moved(meta):
        step = Descent(attending)
        return step.weights(step(step.start({"w": torch.linspace(0.1, 1, 12, **KIND)}), 0, meta))["w"].sum()

    meta = torch.tensor(0.7, requires_grad=True, **KIND)
    (found,) = torch.autograd.grad(moved(meta), meta)
    shifted = [moved(meta.detach() + shift).detach() for shift in (1e-4, -1e-4)]
    assert float(found) == pytest.approx(float(shifted[0] - shifted[1]) / 2e-4, rel=tolerance("oracle64"))


def test_a_tensor_that_a_step_closes_over_is_refused():
    hidden = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(CapabilityError, match="no argument of it"):
        replay(lambda state, t, meta: {"x": state["x"] * hidden}, {"x": torch.ones(())}, None, steps=2)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 3, "save": "some"}, {"steps": 3, "save": 0}, {"steps": 3, "save": True}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingError):
        replay(lambda state, t, meta: state, {"x": torch.ones(())}, None, **settings)


def test_optimizers_without_a_differentiable_form_are_refused():
    with pytest.raises(CapabilityError, match="SGD, Adam"):
        Descent(loss, "LBFGS")


def test_dampening_is_refused():
    with pytest.raises(SettingError, match="dampening"):
        Descent(loss, "SGD", settings={"momentum": 0.9, "dampening": 0.5})


def test_a_loss_that_is_no_scalar_is_refused():
    step = Descent(lambda weights, t, meta: weights["second"])
    with pytest.raises(ShapeError, match="scalar"):
        replay(step, step.start(START), None, steps=1)


def test_a_gradient_that_is_not_finite_is_refused():
    step = Descent(lambda weights, t, meta: (weights["x"] * torch.tensor([1.0, 0.0], **KIND) * meta).sum() ** 2, "Adam", lr=0.1)
    meta = torch.tensor(1.0, requires_grad=True, **KIND)
    last = replay(step, step.start({"x": torch.tensor([1.0, 1.0], **KIND)}), meta, steps=3)
    with pytest.raises(NumericsError, match="second moment"):
        step.weights(last)["x"].sum().backward()


# Planted bugs


def test_a_first_momentum_buffer_outside_the_graph_is_seen(monkeypatch):
    """PyTorch's own first step, differentiable or not, detaches it."""
    step, small = stepper(), 1e-5
    move = torch.zeros_like(META)
    move[0] = small
    slope = (value(step, META + move) - value(step, META - move)) / (2 * small)
    monkeypatch.setattr(descent, "FIRST", {})
    found = replayed(step)
    assert abs(float(slope - found[0])) > 1e-3 * float(found.abs().max())


def test_draws_that_differ_in_the_replay_are_seen(monkeypatch):
    wanted, turns = unrolled(stepper(), drop=True), iter(range(1000))
    monkeypatch.setattr(sys.modules["altgrad.hyper.replay"], "AddressedSamplers", lambda key: AddressedSamplers(key.fold(next(turns))))
    assert apart(replayed(stepper(), drop=True), wanted) > 1e-3
