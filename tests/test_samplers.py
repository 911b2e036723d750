"""Whatever a model draws comes from the Key: the same numbers again under the same key, others under another, the global generator untouched."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from altgrad import registry
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers
from altgrad.world import World

X = torch.linspace(-2, 2, 8 * 4 * 6 * 6).reshape(8, 4, 6, 6)
FLAT = X.reshape(8, -1)[:, :40]
CHANCES = torch.full((6, 5), 0.5)

ATTENTION = nn.MultiheadAttention(6, 2, dropout=0.5)
RECURRENT = {kind.__name__: kind(6, 5, 2, dropout=0.5) for kind in (nn.LSTM, nn.GRU, nn.RNN)}

DRAWS = {
    "dropout": lambda: F.dropout(X),
    "dropout in place": lambda: F.dropout(X.clone(), inplace=True),
    "dropout1d": lambda: F.dropout1d(X[:, :, 0]),
    "dropout2d": lambda: F.dropout2d(X),
    "dropout3d": lambda: F.dropout3d(X[:, :, None]),
    "alpha_dropout": lambda: F.alpha_dropout(X, training=True),
    "feature_alpha_dropout": lambda: F.feature_alpha_dropout(X, training=True),
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout()(X),
    "torch.feature_dropout": lambda: torch.feature_dropout(X, 0.5, True),
    "rrelu": lambda: F.rrelu(X, training=True),
    "RReLU": lambda: nn.RReLU()(X),
    "torch.rrelu": lambda: torch.rrelu(X, training=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(FLAT),
    "gumbel_softmax, hard": lambda: F.gumbel_softmax(FLAT, tau=0.5, hard=True),
    "fractional_max_pool2d": lambda: F.fractional_max_pool2d(X, 2, output_size=4),
    "fractional_max_pool2d with indices": lambda: F.fractional_max_pool2d(X, 2, output_ratio=(0.7, 0.7), return_indices=True)[1],
    "FractionalMaxPool2d": lambda: nn.FractionalMaxPool2d(2, output_size=4)(X),
    "fractional_max_pool3d": lambda: F.fractional_max_pool3d(X[:, None], 2, output_size=(2, 4, 4)),
    "fractional_max_pool3d with indices": lambda: F.fractional_max_pool3d(X[:, None], 2, output_size=(2, 4, 4), return_indices=True)[1],
    "rand": lambda: torch.rand(4, 5),
    "randn": lambda: torch.randn(4, 5),
    "rand_like": lambda: torch.rand_like(X),
    "randn_like": lambda: torch.randn_like(X),
    "randint": lambda: torch.randint(0, 1000, (6,)),
    "randint_like": lambda: torch.randint_like(X, 1000),
    "randperm": lambda: torch.randperm(50),
    "bernoulli": lambda: torch.bernoulli(CHANCES),
    "Tensor.bernoulli": lambda: CHANCES.bernoulli(),
    "Tensor.bernoulli_": lambda: torch.empty(40).bernoulli_(0.5),
    "Tensor.uniform_": lambda: torch.empty(40).uniform_(-1, 1),
    "Tensor.normal_": lambda: torch.empty(40).normal_(),
    "Tensor.exponential_": lambda: torch.empty(40).exponential_(),
    "Tensor.random_": lambda: torch.empty(40).random_(1000),
    "Tensor.log_normal_": lambda: torch.empty(40).log_normal_(),
    "Tensor.cauchy_": lambda: torch.empty(40).cauchy_(),
    "Tensor.geometric_": lambda: torch.empty(40).geometric_(0.1),
    "normal": lambda: torch.normal(0.0, 1.0, (40,)),
    "multinomial": lambda: torch.multinomial(CHANCES, 30, replacement=True),
    "Tensor.multinomial": lambda: CHANCES.multinomial(30, replacement=True),
    "poisson": lambda: torch.poisson(torch.full((40,), 9.0)),
    "binomial": lambda: torch.binomial(torch.full((40,), 90.0), torch.full((40,), 0.5)),
    "distributions.Normal": lambda: torch.distributions.Normal(0.0, 1.0).sample((40,)),
    "distributions.Categorical": lambda: torch.distributions.Categorical(CHANCES).sample((9,)),
    "distributions.Gamma": lambda: torch.distributions.Gamma(2.0, 1.0).rsample((40,)),
    "distributions.Dirichlet": lambda: torch.distributions.Dirichlet(torch.ones(5)).rsample((9,)),
    "distributions.Poisson": lambda: torch.distributions.Poisson(9.0).sample((40,)),
    "attention": lambda: F.scaled_dot_product_attention(X, X, X, dropout_p=0.5),
    "MultiheadAttention": lambda: ATTENTION(*3 * [X[:, 0]])[0],
    **{name: lambda layer=layer: layer(X[:, 0])[0] for name, layer in RECURRENT.items()},
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_repeats_with_its_key_and_leaves_the_global_generator_alone(name):
    def drawn(seed, calls=1):
        with torch.no_grad(), AddressedSamplers(Key(seed)):
            return [DRAWS[name]() for _ in range(calls)]

    before = torch.get_rng_state()
    first, second = drawn(3, calls=2)
    assert torch.equal(first, drawn(3)[0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, drawn(4)[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_outside_a_pass_is_pytorchs_own(name):
    before = torch.get_rng_state()
    DRAWS[name]()
    assert not torch.equal(torch.get_rng_state(), before)


def test_rrelu_has_its_slopes_between_the_bounds():
    with AddressedSamplers(Key(0)):
        y = F.rrelu(X, 0.2, 0.4, training=True)
    slopes = (y / X)[X < 0]
    assert torch.equal(y[X >= 0], X[X >= 0])
    assert 0.2 <= slopes.min() < 0.21
    assert 0.39 < slopes.max() <= 0.4
    assert slopes.mean().item() == pytest.approx(0.3, abs=4 * 0.2 / math.sqrt(12 * slopes.numel()))


def test_gumbel_softmax_chooses_with_the_softmax_chances():
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1])).expand(20_000, 3)
    with AddressedSamplers(Key(0)):
        chosen = F.gumbel_softmax(logits, hard=True)
    assert torch.equal(chosen.sum(1), torch.ones(20_000))
    for share, chance in zip(chosen.mean(0).tolist(), (0.7, 0.2, 0.1), strict=True):
        assert share == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 20_000))


def test_hard_gumbel_softmax_has_the_soft_ones_derivative():
    logits, weights = FLAT.clone().requires_grad_(), torch.arange(40.0)
    grads = []
    for hard in (False, True):
        with AddressedSamplers(Key(0)):
            grads.append(torch.autograd.grad((F.gumbel_softmax(logits, hard=hard) * weights).sum(), logits)[0])
    assert torch.equal(*grads)


def test_feature_alpha_dropout_drops_whole_channels_and_keeps_mean_and_variance():
    x = torch.from_numpy(torch.randn(400, 50, 8).numpy())
    with AddressedSamplers(Key(0)):
        y = F.feature_alpha_dropout(x, 0.4, training=True)
    dropped = (y == y[..., :1]).all(2)
    assert dropped.float().mean().item() == pytest.approx(0.4, abs=4 * math.sqrt(0.24 / 20_000))
    assert y.mean().item() == pytest.approx(0, abs=0.03)
    assert y.var().item() == pytest.approx(1, abs=0.05)


class Pooled(nn.Module):
    """A model in which everything draws."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.relu = nn.Conv2d(1, 4, 1), nn.FractionalMaxPool2d(2, output_size=4), nn.RReLU()
        self.drop, self.linear = nn.FeatureAlphaDropout(0.2), nn.Linear(64, 5)

    def forward(self, x):
        return F.gumbel_softmax(self.linear(self.drop(self.pool(self.relu(self.conv(x)))).flatten(1)), tau=2.0)


MODEL = Pooled().double()


def estimate(engine, key, **settings):
    problem = Supervised(MODEL, nn.MSELoss())
    batch = Batch(X[:, :1].double(), torch.zeros(8, 5, dtype=torch.float64))
    return registry.engine(engine, settings).estimate(problem, problem.params(), {}, batch, key, World())


@pytest.mark.parametrize(("engine", "settings"), [("backprop", {}), ("forward", {"space": "weights"}), ("forward", {"memory": "replay"})])
def test_a_model_in_which_everything_draws_is_estimated_without_the_global_generator(engine, settings):
    before = torch.get_rng_state()
    first, again = (estimate(engine, Key(1), **settings) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.loss, again.loss)
    assert all(torch.equal(first.grads[name], again.grads[name]) for name in first.grads)


def test_forward_mode_follows_what_is_drawn():
    """(∇f·v) v over an orthonormal basis adds up to backprop's gradient, if primal and tangents see the same draws."""
    exact = estimate("backprop", Key(1)).grads
    size = sum(grad.numel() for grad in exact.values())
    found = estimate("forward", Key(1), space="weights", tangents=size, combine="orthogonal").grads
    for name, grad in exact.items():
        assert torch.allclose(found[name], grad, rtol=1e-6, atol=1e-9), name


def test_an_accumulated_batch_sees_the_masks_of_the_whole_one():
    whole, parts = (estimate("backprop", Key(1), accumulation=count).grads for count in (1, 4))
    assert all(torch.allclose(parts[name], grad, rtol=1e-9, atol=1e-12) for name, grad in whole.items())
