"""backward(apply=…): parameters stepped one by one, in the memory of one tensor's gradient."""

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from altgrad import Learner
from altgrad.engine import Bias, Engine, Estimate, Needs
from altgrad.errors import NumericsError, UsageError

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
ENGINES = {"backprop": {}, "es": {"population": 8}, "eggroll": {"population": 8}, "forward": {"tangents": 2}}
OPTIMIZERS = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Adam": {"lr": 0.01}}


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def unchanged(model, before):
    return [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]


class Lazy(Mapping):
    """Ones for every parameter, made when asked for; remembers how many lived at once."""

    def __init__(self, params, bad=""):
        self.params, self.bad, self.alive, self.most = params, bad, 0, 0

    def __getitem__(self, name):
        grad = torch.ones_like(self.params[name])
        if name == self.bad:
            grad.view(-1)[0] = torch.inf
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(grad, self.freed)
        return grad

    def freed(self):
        self.alive -= 1

    def __iter__(self):
        return iter(self.params)

    def __len__(self):
        return len(self.params)


@dataclass(frozen=True)
class Ones(Engine):
    """Lazy gradients, of which one may be infinite; `weights`: what the mapping says it is a sum by."""

    bad: str = ""
    weights: float | None = None

    needs = Needs.VALUE
    bias = Bias.DISPLACEMENT
    source = "tests"
    given: ClassVar[list] = []

    def estimate(self, problem, params, state, batch, key, world):
        grads = Lazy({name: value.detach() for name, value in params.items()}, self.bad)
        if self.weights is not None:
            grads.weights = torch.tensor([1.0, self.weights])
        self.given.append(grads)
        return Estimate(torch.tensor(1.0), grads, state, {"forwards": torch.tensor(1)}, {})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_optimizer_a_parameter_is_one_optimizer_for_all(engine, optimizer):
    kind, settings, model = getattr(torch.optim, optimizer), OPTIMIZERS[optimizer], net()
    plain, handed = (Learner(copy.deepcopy(model), F.cross_entropy, engine=engine, seed=3, **ENGINES[engine]) for _ in range(2))
    whole, each = kind(plain.parameters(), **settings), {p: kind([p], **settings) for p in handed.parameters()}
    for _ in range(3):
        whole.zero_grad()
        plain.backward(X, Y)
        whole.step()
        handed.backward(X, Y, apply=each)
    assert all(torch.equal(one, other) for one, other in zip(plain.model.parameters(), handed.model.parameters(), strict=True))
    assert all(p.grad is None for p in handed.parameters())


def test_a_function_gets_every_parameter_with_its_gradient_alone():
    learner, seen = Learner(net(), F.cross_entropy, engine=Ones()), []

    def step(parameter):
        seen.append((parameter, [p.grad is not None for p in learner.model.parameters()]))

    learner.backward(X, Y, apply=step)
    assert all(parameter is p for (parameter, _), p in zip(seen, learner.model.parameters(), strict=True))
    assert all(filled == [p is parameter for p in learner.model.parameters()] for parameter, filled in seen)


@pytest.mark.parametrize("apply", ["mapping", "function", None])
def test_one_gradient_lives_at_a_time(apply):
    learner = Learner(net(), F.cross_entropy, engine=Ones())
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in learner.parameters()}
    learner.backward(X, Y, apply={"mapping": optimizers, "function": lambda p: optimizers[p].step(), None: None}[apply])
    assert Ones.given[-1].most == (4 if apply is None else 1)


def test_what_is_in_grad_already_takes_part():
    learner = Learner(net(), F.cross_entropy, engine=Ones())
    before = weights_of(learner.model)
    learner.backward(X, Y)
    learner.backward(X, Y, apply={p: torch.optim.SGD([p], lr=0.5) for p in learner.parameters()})
    assert all(torch.allclose(p, old - 1) for p, old in zip(learner.model.parameters(), before, strict=True))


def test_a_gradient_that_is_not_finite_stops_before_its_parameter_and_says_who_stepped():
    learner = Learner(net(), F.cross_entropy, engine=Ones("2.weight"))
    before = weights_of(learner.model)
    with pytest.raises(NumericsError, match=r"gradient of 2.weight is not finite.*0.weight, 0.bias made this step already, 2.weight and the rest did not"):
        learner.backward(X, Y, apply={p: torch.optim.SGD([p], lr=0.1) for p in learner.parameters()})
    assert unchanged(learner.model, before) == [False, False, True, True]
    assert all(p.grad is None for p in learner.parameters())
    assert learner.draws == 0


def test_weights_that_are_not_finite_stop_before_anything_is_touched():
    learner = Learner(net(), F.cross_entropy, engine=Ones("2.weight", weights=float("nan")))
    before = weights_of(learner.model)
    with pytest.raises(NumericsError, match="the gradient of every parameter is not finite"):
        learner.backward(X, Y, apply={p: torch.optim.SGD([p], lr=0.1) for p in learner.parameters()})
    assert all(unchanged(learner.model, before))


def test_gradients_that_are_all_there_are_all_checked_first():
    class Made(Ones):
        def estimate(self, *args):
            found = super().estimate(*args)
            return found._replace(grads=dict(found.grads))

    learner = Learner(net(), F.cross_entropy, engine=Made("2.bias"))
    before = weights_of(learner.model)
    with pytest.raises(NumericsError, match=r"gradient of 2.bias is not finite in made, step 0; lower"):
        learner.backward(X, Y, apply={p: torch.optim.SGD([p], lr=0.1) for p in learner.parameters()})
    assert all(unchanged(learner.model, before))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p: {p[0]: torch.optim.SGD([p[0]], lr=0.1)}, "apply has no optimizer for '0.bias'"),
        (lambda p: {each: torch.optim.SGD([p[0]], lr=0.1) for each in p}, "does not hold it"),
        (lambda p: {"0.weight": torch.optim.SGD(p, lr=0.1)}, "apply maps a str to a SGD; give every parameter its own"),
        (lambda p: {each: torch.optim.LBFGS([each]) for each in p}, "LBFGS evaluates the loss itself"),
    ],
)
def test_a_wrong_mapping_is_refused_before_anything_is_touched(wrong, message):
    learner = Learner(net(), F.cross_entropy, engine=Ones())
    before = weights_of(learner.model)
    with pytest.raises(UsageError, match=message):
        learner.backward(X, Y, apply=wrong(list(learner.parameters())))
    assert all(unchanged(learner.model, before))
