"""A recurrent network on rows of digits, and its gradient by likelihood ratio: noise at every step, and no way back through time."""

import pytest
import torch
from console import elsewhere, invoke, rows  # noqa: F401  (elsewhere is a fixture)
from tolerances import tolerance
from torch import nn

from altgrad.conformance.gradients import chance, hold_mean
from altgrad.engines.likelihood_ratio import LikelihoodRatio
from altgrad.errors import SettingError, UsageError
from altgrad.kernels import noise
from altgrad.metrics import saved_bytes
from altgrad.problem import Batch
from altgrad.problems.images import Digits
from altgrad.problems.row_digits import RowDigits
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key, tensor_id
from altgrad.world import World

KEY = Key(5)
EXAMPLES, STEPS, FEATURES, HIDDEN = 5, 4, 2, 3


@pytest.fixture(scope="module")
def problem():
    return RowDigits(batch_size=16).build(Key(0))


def drawn(label, *shape):
    return noise.draw("normal", Key(3), tensor_id(label), [0], shape)[0].double()


class Tiny(nn.Module):
    """A GRU whose states are read at the last step, or, `cut`, one that passes no gradient from a step to the one before."""

    def __init__(self, *, cut=False):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.cell, self.cut = nn.GRU(FEATURES, HIDDEN, batch_first=True).double(), cut
        with torch.no_grad():
            for name, parameter in self.cell.named_parameters():
                parameter.copy_(0.7 * drawn(name, *parameter.shape))

    def forward(self, x):
        if not self.cut:
            return self.cell(x)[0][:, -1]
        state = None
        for step in x.unbind(1):
            state = self.cell(step[:, None], None if state is None else state.detach())[1]
        return state[0]


def square_loss(outputs, targets):
    return (outputs - targets).square().sum(-1)


@pytest.fixture(scope="module")
def batch():
    return Batch(drawn("sequences", EXAMPLES, STEPS, FEATURES), drawn("states", EXAMPLES, HIDDEN))


def backward(model, batch):
    grads = torch.autograd.grad(square_loss(model(batch.inputs), batch.targets).mean(), list(model.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


@pytest.fixture(scope="module")
def estimates(batch):
    """Likelihood ratio at a small sigma, [keys, d]."""
    problem = Supervised(Tiny(), square_loss)
    params, engine = problem.params(), LikelihoodRatio(copies=128, sigma=1e-3, antithetic=True)
    found = [engine.estimate(problem, params, {}, batch, KEY.at(step), World()).grads for step in range(48)]
    return torch.stack([torch.cat([grads[name].flatten() for name in params]) for grads in found])


def test_noise_at_every_step_gives_the_gradient_through_time(estimates, batch):
    model = Tiny()
    hold_mean(estimates, backward(model, batch), "gru", [parameter.numel() for parameter in model.parameters()])


def test_the_estimate_is_told_from_a_gradient_cut_at_every_step(estimates, batch):
    """Otherwise the test above could not tell whether credit reaches the early steps."""
    cut = backward(Tiny(cut=True), batch)
    error = estimates.std(0) / len(estimates) ** 0.5
    assert float(((estimates.mean(0) - cut).abs() / error).max()) > 2 * chance(cut.numel())


def test_each_steps_noise_meets_that_steps_input(batch):
    """One copy against Σ_t c δ_t x_tᵀ, with the noise looked up at each step's address."""
    problem = Supervised(Tiny(), square_loss)
    engine = LikelihoodRatio(copies=1, sigma=1e-3, layers="cell.weight_ih_l0")
    found = engine.estimate(problem, problem.params(), {}, batch, KEY, World()).grads["cell.weight_ih_l0"]
    key = KEY.fold("likelihood ratio")
    epsilon = [noise.draw("normal", key, tensor_id(f"cell.weight_ih_l0@{t}"), [0], (EXAMPLES, 3 * HIDDEN), dtype=torch.float64)[0] for t in range(STEPS)]

    def states(size):
        model, state = Tiny(), torch.zeros(EXAMPLES, HIDDEN, dtype=torch.float64)
        w, u, b, c = model.cell.parameters()
        for x, e in zip(batch.inputs.unbind(1), epsilon, strict=True):
            inner, outer = (x @ w.T + b + size * e).chunk(3, 1), (state @ u.T + c).chunk(3, 1)
            r, z = torch.sigmoid(inner[0] + outer[0]), torch.sigmoid(inner[1] + outer[1])
            n = torch.tanh(inner[2] + r * outer[2])
            state = n + z * (state - n)
        return square_loss(state, batch.targets).detach()

    coefficient = (states(1e-3) - states(0.0)) / (1e-3 * EXAMPLES)
    expected = sum((coefficient[:, None] * e).T @ x for e, x in zip(epsilon, batch.inputs.unbind(1), strict=True))
    torch.testing.assert_close(found, expected, rtol=tolerance("oracle64"), atol=tolerance("oracle64"))


def test_nothing_is_saved_for_a_sweep_through_time(problem):
    batch, params = problem.batch(0, World()), problem.params()
    with saved_bytes() as meter:
        LikelihoodRatio(copies=2).estimate(problem, params, {}, batch, KEY, World())
    with saved_bytes() as swept:
        problem.losses(params, batch, {})
    assert meter.total == 0
    assert swept.total > 0  # backpropagation through time keeps every step


def test_every_example_keeps_its_own_coefficient(problem):
    found = LikelihoodRatio(copies=2).estimate(problem, problem.params(), {}, problem.batch(0, World()), KEY, World())
    assert int(found.metrics["coefficient_per_batch"]) == 0
    assert int(found.metrics["fallback_weight_noise"]) == 0


def test_the_network_reads_one_row_of_eight_pixels_a_step(problem):
    images = problem.batch(0, World()).inputs
    last = problem.model[1].cell(images.unflatten(1, (8, 8)))[0][:, -1]
    assert torch.equal(problem.model(images), problem.model[2](last))


def test_images_and_their_order_are_those_of_digits(problem):
    plain = Digits(batch_size=16).build(Key(0))
    for step in (0, 5):
        assert torch.equal(problem.batch(step, World()).inputs, plain.batch(step, World()).inputs)
    assert problem.name == "row-digits"


def test_another_recurrent_network_can_be_chosen():
    lstm = RowDigits(model="lstm").build(Key(0), model_settings={"hidden": 4})
    assert isinstance(lstm.model[1].cell, nn.LSTM)
    assert lstm.params()["1.cell.weight_hh_l0"].shape == (16, 4)


def test_an_empty_batch_and_an_unknown_model_are_refused():
    with pytest.raises(SettingError, match="batch_size=0"):
        RowDigits(batch_size=0).build(Key(0))
    with pytest.raises(UsageError, match="Did you mean 'gru'"):
        RowDigits(model="gruu").build(Key(0))


def test_the_command_line_trains_it_without_a_way_back_through_time():
    chosen = ("--engine", "likelihood-ratio", "-s", "copies=16", "--lr", "2e-2", "--steps", "40")
    done = invoke("train", "--problem", "row-digits", *chosen, "--quiet", "--out", "run")
    assert done.exit_code == 0, done.output
    seen = [row["loss"] for row in rows("run") if "loss" in row]
    assert sum(seen[-5:]) < 0.95 * sum(seen[:5])
