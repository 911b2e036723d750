"""Models that differentiate within their own forward pass, as physics-informed networks do, under engines that only look forward."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from test_population_fitness import ROUNDING, data, evaluate, network
from test_population_fitness import distance as apart
from test_population_fitness import drawn as drawn_for
from test_population_fitness import one_by_one as losses_one_by_one
from test_population_layers import EXACT, distance, one_by_one, together
from torch import nn

from altgrad import Batch, Learner
from altgrad.errors import CapabilityError
from altgrad.population import Notes
from altgrad.probes import ready
from altgrad.problems.supervised import Supervised


class Derived(nn.Module):
    """A derivative of `inner` at every row of the input."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def total(self, x):
        return self.inner(x).sum()

    def forward(self, x):
        if self.how == "jvp":
            return torch.func.jvp(self.inner, (x,), (torch.ones_like(x),))[1]
        if self.how == "grad":
            return torch.func.grad(self.total)(x)
        if self.how == "autograd":
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                return torch.autograd.grad(self.total(leaf), leaf)[0]
        if self.how == "laplacian":
            return torch.func.jvp(torch.func.grad(self.total), (x,), (torch.ones_like(x),))[1]
        return torch.func.vmap(torch.func.jacrev(lambda row: self.inner(row[None])[0]))(x)


def inputs(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner(kind):
    build = {
        "linear": lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
        "convolutions": lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)),
        "norm": lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Softplus(), nn.Linear(6, 3)),
    }[kind]
    return ready(build, torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("how", ["jvp", "grad", "laplacian", "jacrev"])
@pytest.mark.parametrize("kind", ["linear", "convolutions", "norm"])
def test_members_derivatives_are_those_at_explicit_weights(kind, how, rank):
    module, x = Derived(inner(kind), how), inputs(4, 5)
    expected = one_by_one(module, (x,), rank=rank)
    assert float(expected.abs().max()) > 0.1
    assert distance(together(module, (x,), rank=rank), expected) <= EXACT


class Doubled(torch.autograd.Function):
    """The identity with twice its derivative, and no rule for vmap."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return Doubled.apply(self.inner(x))


@pytest.mark.parametrize("how", ["grad", "autograd"])
def test_a_function_with_a_derivative_of_its_own_keeps_it_in_every_member(how):
    model = Derived(Custom(), how)
    problem, notes, (x, _) = Supervised(model, lambda outputs, y: outputs.square().mean()), Notes(), data()
    assert torch.allclose(model(x), 2 * Derived(model.inner.inner, how)(x))
    found, expected = evaluate(problem, notes=notes), losses_one_by_one(problem, drawn_for(problem), Batch(*data()))
    assert apart(found, expected) <= ROUNDING
    assert "fallback_member_loop" in notes.metrics()


@pytest.mark.parametrize(("engine", "how"), [*product(["likelihood-ratio", "forward"], ["jvp", "grad", "jacrev"]), ("likelihood-ratio", "autograd")])
def test_rules_that_cannot_follow_such_a_derivative_say_so(engine, how):
    model, x = Derived(inner("linear"), how), inputs(4, 5)
    learner = Learner(model, F.mse_loss, engine=engine, example=x)
    with pytest.raises(CapabilityError, match=r"within its own forward pass .* Use es, eggroll"):
        learner.backward(x, torch.zeros_like(model(x)))


def test_eggroll_trains_a_network_on_its_derivative():
    model = Derived(nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)), "jvp")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in (model.inner[0], model.inner[2]):
            layer.reset_parameters()
    x = torch.linspace(-2, 2, 64)[:, None]
    learner = Learner(model, F.mse_loss, engine="eggroll", example=x, population=128, sigma=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(float(learner.backward(x, torch.cos(x)).loss))
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
