"""Feedback alignment, direct and layer by layer: against formulas written out, against backprop, and what is refused."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance
from torch import nn

import altgrad
from altgrad import metrics
from altgrad.cli import cli
from altgrad.engine import Bias
from altgrad.engines import direct_feedback_alignment
from altgrad.engines.backprop import Backprop
from altgrad.engines.direct_feedback_alignment import DirectFeedbackAlignment
from altgrad.engines.feedback_alignment import KINDS, FeedbackAlignment
from altgrad.errors import CapabilityError, SettingError
from altgrad.kernels import noise
from altgrad.learner import Learner
from altgrad.problem import Batch
from altgrad.problems.quadratic import Quadratic
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key, tensor_id
from altgrad.world import World

KEY = Key(7, 3)
WEIGHTS = FeedbackAlignment(feedback="weights")
SIGNS = [kind for kind in KINDS if "sign" in kind]


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.set_state(torch.Generator().get_state())
        return build()


def mlp(*sizes, act=nn.ReLU):
    """Linear layers with `act` between them; the same weights for the same arguments."""

    def build():
        layers = [layer for inner, outer in itertools.pairwise(sizes[:-1]) for layer in (nn.Linear(inner, outer), act())]
        return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))

    return seeded(build)


def data(*shape, count=12, classes=3):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1)), torch.arange(count) % classes


def look(engine, model, batch, *, loss=F.cross_entropy, key=KEY):
    problem = Supervised(model, loss)
    altgrad.fit_check(engine, problem)
    return engine.estimate(problem, problem.params(), {}, Batch(*batch), key, World())


def matrix(name, *shape):
    """The feedback of KEY's run, from its address."""
    deviation = math.sqrt(2 / ((shape[0] + shape[1]) * math.prod(shape[2:])))
    return noise.draw("normal", KEY.fold("feedback").at(0), tensor_id(name), [0], shape)[0] * deviation


def forwards(model, x):
    """Activations of Linear-ReLU-Linear-ReLU-Linear, and the error at its outputs."""
    h1 = torch.relu(model[0](x))
    h2 = torch.relu(model[2](h1))
    return h1, h2, model[4](h2).detach().requires_grad_()


def error_of(outputs, y):
    """∂/∂outputs of the mean cross entropy, by the loss's own derivative."""
    return torch.autograd.grad(F.cross_entropy(outputs, y, reduction="none").mean(), outputs)[0]


def same(one, other):
    return torch.equal(one, other)


def written_out(model, x, y, deltas):
    """∂/∂W = δᵀ h, ∂/∂b = Σ δ of the three layers, δ₂ and δ₁ as `deltas(e, h₂, h₁)` gives them."""
    with torch.no_grad():
        h1, h2, outputs = forwards(model, x)
    e = error_of(outputs.requires_grad_(), y)
    d2, d1 = deltas(e, h2, h1)
    return {
        "0.weight": d1.T @ x,
        "0.bias": d1.sum(0),
        "2.weight": d2.T @ h1,
        "2.bias": d2.sum(0),
        "4.weight": e.T @ h2,
        "4.bias": e.sum(0),
    }


# -- the formulas -------------------------------------------------------------------------------------------------------------------


def test_direct_feedback_alignment_is_its_formula_bit_for_bit():
    model, (x, y) = mlp(5, 8, 6, 3), data(5)

    def deltas(e, h2, h1):
        return (e @ matrix("2", 6, 3).T) * (h2 > 0), (e @ matrix("0", 8, 3).T) * (h1 > 0)

    grads = look(DirectFeedbackAlignment(), model, (x, y)).grads
    assert all(same(grads[name], value) for name, value in written_out(model, x, y, deltas).items())


def test_feedback_alignment_is_its_formula_bit_for_bit():
    model, (x, y) = mlp(5, 8, 6, 3), data(5)

    def deltas(e, h2, h1):
        d2 = (e @ matrix("4.weight", 3, 6)) * (h2 > 0)
        return d2, (d2 @ matrix("2.weight", 6, 8)) * (h1 > 0)

    grads = look(FeedbackAlignment(), model, (x, y)).grads
    assert all(same(grads[name], value) for name, value in written_out(model, x, y, deltas).items())


def test_feedback_through_a_convolution_is_the_transposed_convolution_by_its_filters():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Flatten(), nn.Linear(6 * 9, 3)))
    x, y = data(1, 7, 7)
    with torch.no_grad():
        h = torch.relu(model[0](x))
        outputs = model[2:](h)
    d2 = (error_of(outputs.requires_grad_(), y) @ matrix("4.weight", 3, 54)).view(-1, 6, 3, 3)
    d1 = F.conv_transpose2d(d2, matrix("2.weight", 6, 2, 3, 3), stride=2, padding=1, groups=2) * (h > 0)
    weight = torch.nn.grad.conv2d_weight(x, (4, 1, 3, 3), d1)
    found = look(FeedbackAlignment(), model, (x, y)).grads["0.weight"]
    torch.testing.assert_close(found, weight, rtol=tolerance("rounding32"), atol=tolerance("rounding32"))


def test_direct_feedback_reaches_maps_by_a_full_matrix():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)))
    x, y = data(1, 8, 8)
    own = model[:4]  # flattened, the maps behind pooling
    h, outputs = own(x), model(x).detach().requires_grad_()
    (weight,) = torch.autograd.grad(h, own[0].weight, error_of(outputs, y) @ matrix("0", 36, 3).T)
    assert same(look(DirectFeedbackAlignment(), model, (x, y)).grads["0.weight"], weight)


def test_outputs_with_positions_share_one_small_matrix():
    model = seeded(lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 9)))
    x = torch.arange(12).view(3, 4) % 9
    y = x.roll(1, 1)

    def loss(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    outputs = model(x).detach().requires_grad_()
    e = torch.autograd.grad(loss(outputs, y), outputs)[0]  # [3, 4, 9]
    (weight,) = torch.autograd.grad(model[:3](x), model[1].weight, torch.einsum("fk,npk->npf", matrix("1", 6, 9), e))
    found = look(DirectFeedbackAlignment(), model, (x, y), loss=loss).grads["1.weight"]
    torch.testing.assert_close(found, weight, rtol=tolerance("rounding32"), atol=tolerance("rounding32"))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("uniform-sign", lambda w, name: w.sign() * math.sqrt(2 / (w.shape[0] + w.shape[1]))),
        ("fixed-magnitude-sign", lambda w, name: w.sign() * matrix(name, *w.shape).abs()),
    ],
)
def test_sign_symmetric_feedback_has_the_signs_of_the_present_weights(kind, expected):
    model, (x, y) = mlp(5, 8, 6, 3), data(5)

    def deltas(e, h2, h1):
        d2 = (e @ expected(model[4].weight.detach(), "4.weight")) * (h2 > 0)
        return d2, (d2 @ expected(model[2].weight.detach(), "2.weight")) * (h1 > 0)

    grads = look(FeedbackAlignment(feedback=kind), model, (x, y)).grads
    for name, value in written_out(model, x, y, deltas).items():
        torch.testing.assert_close(grads[name], value, rtol=tolerance("rounding32"), atol=tolerance("rounding32"))


@pytest.mark.parametrize("kind", SIGNS)
def test_sign_symmetric_feedback_points_the_gradients_way_from_the_start(kind):
    model, batch = mlp(20, 64, 64, 3), data(20)
    grads, exact = (look(engine, model, batch).grads["0.weight"].flatten() for engine in (FeedbackAlignment(feedback=kind), Backprop()))
    # Through two matrices of uniform weights (√3/2)² = 0.75 is expected, with normal magnitudes (√3/2 · √(2/π))² = 0.48; random feedback has 0 ± 0.03.
    assert float(F.cosine_similarity(grads, exact, dim=0)) > 0.3


def test_random_magnitudes_are_others_at_every_step_and_fixed_ones_are_not():
    model, batch = mlp(5, 8, 6, 3), data(5)
    for kind, moves in (("random-magnitude-sign", True), ("fixed-magnitude-sign", False), ("random", False)):
        here, later = (look(FeedbackAlignment(feedback=kind), model, batch, key=KEY.at(step)).grads["0.weight"] for step in (3, 4))
        assert same(here, later) is not moves


@pytest.mark.parametrize("engine", [FeedbackAlignment(), DirectFeedbackAlignment()], ids=lambda engine: engine.name)
def test_another_seed_draws_other_feedback(engine):
    model, batch = mlp(5, 8, 6, 3), data(5)
    problem = Supervised(model, F.cross_entropy)
    first, other, again = (engine.estimate(problem, problem.params(), {}, Batch(*batch), Key(seed, 3), World()).grads["0.weight"] for seed in (7, 8, 7))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("engine", [FeedbackAlignment, DirectFeedbackAlignment])
def test_scale_multiplies_what_the_layers_below_are_given(engine):
    model, batch = mlp(5, 8, 3), data(5)
    one, four = (look(engine(scale=scale), model, batch).grads for scale in (1.0, 4.0))
    torch.testing.assert_close(four["0.weight"], 4 * one["0.weight"])
    assert same(four["2.weight"], one["2.weight"])


# -- backprop, where the feedback is the weights' own ---------------------------------------------------------------------------------


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, stride=2, output_padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, dilation=2, padding="same"),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


class Sequence(nn.Module):
    """Attention, then an LSTM, then a product with a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 5, batch_first=True)
        self.last = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        h = self.attention(torch.tanh(self.first(x)))
        h = self.cross(h, h.flip(1), h * 2)[0]
        return self.lstm(h)[0][:, -1] @ self.last


@pytest.mark.parametrize(("build", "shape"), [(lambda: mlp(5, 8, 6, 3), (5,)), (lambda: mlp(5, 8, 6, 3), (4, 5)), (cnn, (2, 9, 8))])
def test_with_the_weights_for_feedback_it_is_backprop_bit_for_bit(build, shape):
    model, (x, y) = seeded(build), data(*shape)

    def loss(outputs, targets):
        return F.cross_entropy(outputs if outputs.ndim == 2 else outputs.mean(1), targets)

    exact, found = look(Backprop(), copy.deepcopy(model), (x, y), loss=loss), look(WEIGHTS, model, (x, y), loss=loss)
    assert set(found.grads) == set(exact.grads)
    assert all(same(found.grads[name], grad) for name, grad in exact.grads.items())
    assert all(same(found.buffers[name], value) for name, value in exact.buffers.items())
    assert WEIGHTS.bias is Bias.EXACT


def test_attention_and_recurrent_layers_have_feedback_too():
    model, (x, y) = seeded(Sequence).double(), data(4, 6)
    exact, found, fed = (look(engine, model, (x.double(), y)) for engine in (Backprop(), WEIGHTS, FeedbackAlignment()))
    for name, grad in exact.grads.items():
        torch.testing.assert_close(found.grads[name], grad, rtol=tolerance("rounding64"), atol=tolerance("rounding64"))
    assert int(fed.metrics["transported"]) == 0
    assert not torch.allclose(fed.grads["first.weight"], exact.grads["first.weight"], rtol=0.1)


def test_in_a_linear_network_the_product_of_the_weights_for_direct_feedback_is_backprop(monkeypatch):
    model, (x, y) = mlp(5, 8, 6, 3, act=nn.Identity).double(), data(5)
    products = {"2": model[4].weight.detach().T, "0": (model[4].weight @ model[2].weight).detach().T}
    monkeypatch.setattr(direct_feedback_alignment.matrices, "fixed", lambda problem, key, name, shape, scale, like: products[name])
    found, exact = (look(engine, model, (x.double(), y)).grads for engine in (DirectFeedbackAlignment(), Backprop()))
    for name, grad in exact.items():
        torch.testing.assert_close(found[name], grad, rtol=tolerance("rounding64"), atol=1e-15)


# -- models ---------------------------------------------------------------------------------------------------------------------------


def test_a_weight_used_in_another_way_is_counted_as_transported():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(5, 6), nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(torch.einsum("ni,oi->no", self.first(x), self.middle))

    assert int(look(FeedbackAlignment(), seeded(Own), data(5)).metrics["transported"]) == 1
    assert int(look(FeedbackAlignment(), mlp(5, 8, 3), data(5)).metrics["transported"]) == 0


def test_errors_pass_a_frozen_layer_through_feedback():
    model, batch = mlp(5, 8, 6, 3), data(5)
    free = look(FeedbackAlignment(), model, batch).grads
    model[2].requires_grad_(False)
    held = look(FeedbackAlignment(), model, batch).grads
    assert set(held) == {"0.weight", "0.bias", "4.weight", "4.bias"}
    assert same(held["0.weight"], free["0.weight"])


def test_a_weight_of_two_blocks_gets_the_sum_of_what_both_ask_for():
    apart = mlp(5, 6, 6, 6, 3)
    apart[4].load_state_dict(apart[2].state_dict())
    tied = copy.deepcopy(apart)
    tied[4].weight = tied[2].weight
    one, other = (look(DirectFeedbackAlignment(), model, data(5)).grads for model in (apart, tied))
    torch.testing.assert_close(other["2.weight"], one["2.weight"] + one["4.weight"])


@pytest.mark.parametrize("engine", [FeedbackAlignment(), DirectFeedbackAlignment()], ids=lambda engine: engine.name)
def test_regression_needs_no_labels(engine):
    x, _ = data(5)
    found = look(engine, mlp(5, 8, 1), (x, x.sum(1)), loss=lambda outputs, targets: F.mse_loss(outputs.squeeze(1), targets))
    assert all(bool(grad.abs().sum() > 0) for grad in found.grads.values())


def test_blocks_may_run_some_rows_at_a_time():
    def build():
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))

    model, batch = seeded(build), data(5)
    whole, parts = (look(DirectFeedbackAlignment(rows=rows), copy.deepcopy(model), batch) for rows in (1024, 5))
    for name, grad in whole.grads.items():
        torch.testing.assert_close(parts.grads[name], grad)
    assert all(same(parts.buffers[name], value) for name, value in whole.buffers.items())


def test_a_mix_may_hold_feedback_alignment():
    engine = altgrad.registry.engine("mixed", {"rest": "feedback-alignment", "parts": "4=backprop"})
    model, batch = mlp(5, 8, 6, 3), data(5)
    exact = look(Backprop(), model, batch).grads
    found = look(engine, model, batch).grads
    assert set(found) == set(exact)
    assert same(found["4.weight"], exact["4.weight"])


# -- memory ---------------------------------------------------------------------------------------------------------------------------


def saved(engine, depth):
    model = mlp(*(16 for _ in range(depth)), 3)
    problem = Supervised(model, F.cross_entropy)
    x, y = data(16, count=64)
    engine.estimate(problem, problem.params(), {}, Batch(x, y), KEY, World())
    with metrics.saved_bytes(exclude=model.parameters()) as meter:
        engine.estimate(problem, problem.params(), {}, Batch(x, y), KEY, World())
    return meter.peak


def test_what_direct_feedback_alignment_saves_is_the_same_at_any_depth():
    assert saved(DirectFeedbackAlignment(), 4) == saved(DirectFeedbackAlignment(), 16)


def test_feedback_alignment_saves_no_more_than_backprop():
    assert saved(FeedbackAlignment(), 16) <= saved(Backprop(), 16)


# -- use ------------------------------------------------------------------------------------------------------------------------------


def loss_on_exclusive_or(engine, *, frozen=False):
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = mlp(2, 16, 16, 2, act=nn.Tanh)
    model[:-1].requires_grad_(not frozen)
    learner = Learner(model, F.cross_entropy, engine=engine)
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-2)
    for _ in range(80):
        optimizer.zero_grad()
        report = learner.backward(x, y)
        optimizer.step()
    return float(report.loss)


@pytest.mark.parametrize("engine", ["feedback-alignment", "direct-feedback-alignment"])
def test_layers_below_learn_what_the_last_one_alone_cannot(engine):
    assert loss_on_exclusive_or(engine) < 0.5 * loss_on_exclusive_or("backprop", frozen=True)


@pytest.mark.parametrize("engine", ["feedback-alignment", "direct-feedback-alignment"])
def test_the_command_line_trains_with_it(engine, tmp_path):
    from click.testing import CliRunner

    result = CliRunner().invoke(cli, ["train", "--engine", engine, "--steps", "3", "--out", str(tmp_path / "run"), "-s", "scale=2"])
    assert result.exit_code == 0, result.output


# -- what is refused ------------------------------------------------------------------------------------------------------------------


def test_a_model_of_one_block_is_refused_by_direct_feedback_alignment():
    with pytest.raises(CapabilityError, match=r"two blocks or more.*feedback-alignment, backprop"):
        look(DirectFeedbackAlignment(), mlp(5, 3), data(5))


def test_a_model_of_one_layer_is_refused_by_feedback_alignment():
    with pytest.raises(CapabilityError, match=r"behind another trained one.*Use backprop"):
        look(FeedbackAlignment(), mlp(5, 3), data(5))


def test_a_problem_without_layers_is_refused():
    problem = Quadratic(dimension=4).build(KEY)
    with pytest.raises(CapabilityError, match="needs a model"):
        FeedbackAlignment().estimate(problem, problem.params(), {}, problem.batch(0, World()), KEY, World())
    with pytest.raises(CapabilityError, match="BLOCKS"):
        altgrad.fit_check(DirectFeedbackAlignment(), problem)


def test_feedback_that_would_not_fit_is_refused_with_its_size(monkeypatch):
    monkeypatch.setattr(direct_feedback_alignment, "LARGEST", 20)
    with pytest.raises(CapabilityError, match=r"'0' has 8 features and the model 3 outputs.*24 elements, and 20 are allowed"):
        look(DirectFeedbackAlignment(), mlp(5, 8, 3), data(5))


def test_several_outputs_are_refused_by_direct_feedback_alignment():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            found = self.last(torch.relu(self.first(x)))
            return found, found * 2

    with pytest.raises(CapabilityError, match=r"one tensor \[12, …\], but the model gives tuple"):
        look(DirectFeedbackAlignment(), seeded(Two), data(5), loss=lambda outputs, targets: F.cross_entropy(outputs[0], targets))


@pytest.mark.parametrize(
    ("engine", "settings", "message"),
    [
        (FeedbackAlignment, {"feedback": "unifrom-sign"}, "uniform-sign"),
        (FeedbackAlignment, {"scale": 0.0}, "scale"),
        (DirectFeedbackAlignment, {"scale": -1.0}, "scale"),
        (DirectFeedbackAlignment, {"rows": 0}, "rows"),
    ],
)
def test_settings_out_of_range_are_refused(engine, settings, message):
    with pytest.raises(SettingError, match=message):
        engine(**settings)
