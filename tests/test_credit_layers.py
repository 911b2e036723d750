"""Credit in likelihood-ratio: each layer's, or each unit's, coefficient against closed forms."""

import pytest
import torch
from test_credit import IN, KEY, OUT, ROUNDING, N, drawn, look, squares
from torch import nn

from altgrad import Influence
from altgrad.engines.likelihood_ratio import LikelihoodRatio
from altgrad.errors import CapabilityError
from altgrad.kernels import noise
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.rng import tensor_id


class Layer(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(drawn("weight", OUT, IN) if kind == "linear" else drawn("weight", OUT, IN).T.clone())
        self.bias = nn.Parameter(drawn("bias", OUT), requires_grad=kind == "linear")

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) if self.kind == "linear" else x @ self.weight + self.bias


def units(engine, shape, site="weight@0"):
    return noise.draw("normal", KEY.fold("likelihood ratio"), tensor_id(site), range(engine.copies), shape, dtype=torch.float64)


@pytest.mark.parametrize("memory", ["store", "replay"])
def test_each_unit_of_a_linear_layer_hears_of_its_own_losses(memory):
    engine = LikelihoodRatio(copies=5, sigma=0.3, memory=memory)
    eye = torch.eye(OUT, dtype=torch.bool)
    problem, given = Supervised(Layer("linear"), squares, influence={"weight": eye, "bias": eye}), Batch(drawn("x", N, IN), drawn("y", N, OUT))
    epsilon = units(engine, (N, OUT))
    residual = (problem.model(given.inputs) - given.targets).detach()
    change = 0.6 * residual * epsilon + 0.09 * epsilon.square()  # ℓ(ε) - ℓ(0), unit by unit
    delta = (change * epsilon).mean(0) / (0.3 * N * OUT)
    found = look(engine, problem, given=given).grads
    torch.testing.assert_close(found["weight"], delta.T @ given.inputs, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found["bias"], delta.sum(0), rtol=0, atol=ROUNDING)


def test_a_weight_and_a_bias_may_have_maps_of_their_own():
    engine, eye = LikelihoodRatio(copies=5, sigma=0.3), torch.eye(OUT, dtype=torch.bool)
    given = Batch(drawn("x", N, IN), drawn("y", N, OUT))
    none, both, one = (
        look(engine, Supervised(Layer("linear"), squares, influence=maps), given=given).grads for maps in ({}, {"weight": eye, "bias": eye}, {"weight": eye})
    )
    torch.testing.assert_close(one["weight"], both["weight"], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(one["bias"], none["bias"], rtol=0, atol=ROUNDING)


def test_units_are_found_through_a_transposed_weight():
    engine = LikelihoodRatio(copies=5, sigma=0.3)
    given = Batch(drawn("x", N, IN), drawn("y", N, OUT))
    eye = torch.eye(OUT, dtype=torch.bool)
    columns = Influence.grouped(torch.arange(OUT).expand(IN, OUT), eye)
    straight = look(engine, Supervised(Layer("linear"), squares, influence={"weight": eye}), given=given)
    turned = look(engine, Supervised(Layer("turned"), squares, influence={"weight": columns}), given=given)
    torch.testing.assert_close(turned.grads["weight"].T, straight.grads["weight"], rtol=0, atol=ROUNDING)


def test_each_channel_of_a_convolution_hears_of_its_own_losses():
    engine, eye = LikelihoodRatio(copies=5, sigma=0.3), torch.eye(OUT, dtype=torch.bool)
    convolution = nn.Conv1d(1, OUT, 2).double()

    def loss(outputs, targets):
        return squares(outputs, targets).mean(2)

    problem = Supervised(convolution, loss, influence={"weight": eye, "bias": eye})
    given = Batch(drawn("x", N, 1, 5), drawn("y", N, OUT, 4))
    epsilon = units(engine, (N, OUT, 4))
    residual = (convolution(given.inputs) - given.targets).detach()
    change = (0.6 * residual * epsilon + 0.09 * epsilon.square()).mean(-1, keepdim=True)
    delta = (change * epsilon).mean(0) / (0.3 * N * OUT)
    torch.testing.assert_close(look(engine, problem, given=given).grads["bias"], delta.sum((0, 2)), rtol=0, atol=ROUNDING)


FINER = {
    "elements": Influence.grouped(torch.arange(OUT * IN).reshape(OUT, IN), torch.ones(OUT * IN, OUT, dtype=torch.bool)),
    "inputs": Influence.grouped(torch.arange(IN).expand(OUT, IN), torch.ones(IN, OUT, dtype=torch.bool)),
    "pairs": Influence.pairs(torch.zeros(OUT, IN, dtype=torch.int64), torch.tensor([0]), torch.tensor([1])),
}


@pytest.mark.parametrize("kind", FINER)
def test_likelihood_ratio_refuses_maps_finer_than_its_noise(kind):
    problem = Supervised(Layer("linear"), squares, influence={"weight": FINER[kind]})
    with pytest.raises(CapabilityError, match=r"'weight'.*output units.*es or spsa"):
        look(LikelihoodRatio(copies=2), problem, given=Batch(drawn("x", N, IN), drawn("y", N, OUT)))
