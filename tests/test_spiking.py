"""Spiking networks: the units against loops in NumPy, the surrogate against its formula, and what each kind of engine sees of a spike."""

import numpy as np
import pytest
import torch
from console import elsewhere, invoke, rows  # noqa: F401  (elsewhere is a fixture)
from tolerances import tolerance
from torch import nn

from altgrad import doctor, models, registry
from altgrad.conformance.gradients import hold_mean
from altgrad.errors import SettingError
from altgrad.kernels import noise
from altgrad.problem import Batch
from altgrad.problems.spiking import SpikingDigits
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key, tensor_id
from altgrad.spiking import SURROGATES, LeakyIntegrateAndFire, MeanOverSteps, SpikeCode, spike
from altgrad.world import World

KEY = Key(5, 1)
EXACT = {"rtol": 0, "atol": tolerance("rounding64")}
SMALL = {"hidden": "8-6", "steps": 3}


def drawn(label, *shape):
    return noise.draw("normal", Key(3), tensor_id(label), [0], shape)[0].double()


def by_hand(currents, decay, threshold, *, reset="subtract", late=0):
    """Potentials and spikes of one layer, [examples, steps, units], in a loop over everything."""
    potentials, spikes = np.zeros(currents.shape), np.zeros(currents.shape)
    for example, unit in np.ndindex(currents.shape[0], currents.shape[2]):
        potential, fired = 0.0, [0.0] * (1 + late)
        for step in range(currents.shape[1]):
            taken = fired[-1 - late] * {"subtract": threshold, "none": 0.0, "zero": decay * potential}[reset]
            potential = decay * potential + currents[example, step, unit] - taken
            fired.append(1.0 if potential >= threshold else 0.0)
            potentials[example, step, unit], spikes[example, step, unit] = potential, fired[-1]
    return potentials, spikes


def estimate(engine, problem, batch, key=KEY):
    params = problem.params()
    return engine.estimate(problem, params, engine.init(problem, params, key), batch, key, World())


def vector(grads):
    return torch.cat([grad.detach().flatten().double() for _, grad in sorted(grads.items())])


# -- units -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "threshold"), [(0.9, 1.0), (0.5, 0.7), (1.0, 1.3), (0.0, 0.4)])
def test_units_follow_the_loop_in_numpy(decay, threshold):
    currents = 2 * drawn("currents", 3, 9, 5)
    _, spikes = by_hand(currents.numpy(), decay, threshold)
    assert 0.1 < spikes.mean() < 0.9
    np.testing.assert_array_equal(LeakyIntegrateAndFire(decay, threshold)(currents).numpy(), spikes)


@pytest.mark.parametrize("wrong", [{"reset": "none"}, {"reset": "zero"}, {"late": 1}, {"decay": 1.0}, {"decay": 0.0}, {"threshold": 0.9}])
def test_the_loop_tells_other_dynamics_apart(wrong):
    currents = 2 * drawn("currents", 3, 9, 5)
    _, spikes = by_hand(currents.numpy(), **{"decay": 0.9, "threshold": 1.0, **wrong})
    assert (LeakyIntegrateAndFire(0.9, 1.0)(currents).numpy() != spikes).any()


def test_a_spike_takes_the_threshold_off_the_next_potential():
    half = torch.full((1, 6, 1), 0.5)
    assert LeakyIntegrateAndFire(1.0, 1.0)(half).flatten().tolist() == [0, 1, 0, 1, 0, 1]  # at the threshold it fires


def test_rate_code_spreads_its_spikes_evenly():
    spikes = SpikeCode(4, code="rate")(torch.tensor([[-1.0, 0.0, 1.0, 0.5]]))  # places 0, 1/2, 1, 3/4
    assert spikes[0].T.tolist() == [[0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]]


def test_latency_code_fires_once_and_the_stronger_the_earlier():
    spikes = SpikeCode(4, code="latency")(torch.tensor([[0.0, 6.0, 4.0, 2.0]]))
    assert spikes[0].T.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("code", ["rate", "latency"])
def test_an_example_without_contrast_is_silent(code):
    assert not SpikeCode(5, code=code)(torch.full((2, 3), 7.0)).any()


# -- surrogates ------------------------------------------------------------------------------------------------------------------

FORMULAS = {"fast-sigmoid": lambda x, k: 1 / (1 + k * np.abs(x)) ** 2, "arctan": lambda x, k: k / 2 / (1 + (np.pi / 2 * k * x) ** 2)}


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("slope", [1.0, 25.0])
@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_a_spikes_derivative_is_the_surrogates_formula(name, slope, mode):
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)

    def fire(value):
        return spike(value, SURROGATES[name](slope))

    derivative = torch.func.jvp(fire, (x,), (torch.ones_like(x),))[1] if mode == "forward" else torch.func.vjp(fire, x)[1](torch.ones_like(x))[0]
    torch.testing.assert_close(derivative, torch.from_numpy(FORMULAS[name](x.numpy(), slope)), **EXACT)


@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_backprop_through_the_steps_is_the_surrogates_recursion(name):
    """a_t = λ a_{t+1} + h'(u_t - θ) (g_t - θ a_{t+1}), a_t = ∂L/∂u_t = ∂L/∂I_t, for ∂L/∂s_t = g_t apart from the reset."""
    decay, threshold, slope = 0.8, 0.9, 3.0
    currents, onward = drawn("currents", 2, 6, 4).requires_grad_(), drawn("onward", 2, 6, 4)
    (LeakyIntegrateAndFire(decay, threshold, surrogate=name, slope=slope)(currents) * onward).sum().backward()
    potentials, _ = by_hand(currents.detach().numpy(), decay, threshold)
    later, expected = np.zeros((2, 4)), np.zeros((2, 6, 4))
    for step in reversed(range(6)):
        later = decay * later + FORMULAS[name](potentials[:, step] - threshold, slope) * (onward[:, step].numpy() - threshold * later)
        expected[:, step] = later
    torch.testing.assert_close(currents.grad, torch.from_numpy(expected), **EXACT)


def test_a_batch_of_networks_is_each_network_by_itself():
    layer, currents = LeakyIntegrateAndFire(), drawn("currents", 4, 3, 6, 2)
    assert torch.equal(torch.func.vmap(layer)(currents), torch.stack([layer(part) for part in currents]))


# -- engines ---------------------------------------------------------------------------------------------------------------------


def two_steps(sigma, decay=0.8, threshold=0.6):
    """One spiking unit over two steps with a linear read-out and half squares: a problem, a batch, and the smoothed loss as a function of parameters.

    E over the first step's ε is a quadrature on either side of its threshold, that over the second a normal probability, and that over the
    read-out's adds σ²/2: nothing is sampled and no step is differentiated.
    """
    model = nn.Sequential(nn.Linear(2, 1), LeakyIntegrateAndFire(decay, threshold), MeanOverSteps(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.5 * drawn(name, *parameter.shape) + 0.5)
    problem = Supervised(model, lambda outputs, targets: 0.5 * (outputs - targets).square().sum(-1))
    batch = Batch(drawn("inputs", 4, 2, 2), drawn("targets", 4, 1))
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(60))
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)

    def smoothed(params):
        currents = (batch.inputs @ params["0.weight"].T + params["0.bias"]).squeeze(-1)  # [examples, 2]
        cut = (threshold - currents[:, :1]) / sigma  # ε beyond which the first step fires
        total = 0.5 * sigma**2
        for first, (low, high) in enumerate([(-9 * torch.ones_like(cut), cut), (cut, 9 * torch.ones_like(cut))]):
            epsilon = (high + low) / 2 + (high - low) / 2 * nodes  # [examples, nodes]
            mass = (high - low) / 2 * weights * normal.log_prob(epsilon).exp()
            potential = decay * (currents[:, :1] + sigma * epsilon) + currents[:, 1:] - threshold * first
            chance = normal.cdf((potential - threshold) / sigma)  # that the second step fires
            for second, share in enumerate([1 - chance, chance]):
                output = params["3.weight"] * (first + second) / 2 + params["3.bias"]
                total = total + (mass * share * 0.5 * (output - batch.targets).square()).sum(1).mean()
        return total

    return problem, batch, smoothed


@pytest.mark.parametrize("settings", [{}, {"baseline": "loo"}, {"antithetic": True}], ids=str)
def test_the_likelihood_ratio_is_unbiased_for_the_loss_smoothed_at_every_step(settings):
    problem, batch, smoothed = two_steps(sigma=0.5)
    exact = vector(torch.func.grad(smoothed)({name: value.detach() for name, value in problem.params().items()}))
    engine = registry.engine("likelihood-ratio", {"copies": 1024, "sigma": 0.5, **settings})
    found = torch.stack([vector(estimate(engine, problem, batch, KEY.at(step)).grads) for step in range(120)])
    hold_mean(found, exact, str(settings))


def test_the_surrogate_is_what_backprop_sees_and_the_likelihood_ratio_does_not():
    found = {}
    for slope in (1.0, 25.0):
        problem = SpikingDigits(batch_size=8).build(Key(0), model_settings={**SMALL, "slope": slope})
        batch = problem.batch(0, World())
        for name in ("backprop", "likelihood-ratio"):
            found[name, slope] = vector(estimate(registry.engine(name, {}), problem, batch).grads)
    assert torch.equal(found["likelihood-ratio", 1.0], found["likelihood-ratio", 25.0])
    assert not torch.allclose(found["backprop", 1.0], found["backprop", 25.0], rtol=0.1)


def test_forward_mode_over_all_directions_is_backprop_with_the_same_surrogate():
    problem, batch, _ = two_steps(sigma=0.5)
    forward = registry.engine("forward", {"space": "weights", "combine": "orthogonal", "tangents": 5})
    exact = vector(estimate(registry.engine("backprop", {}), problem, batch).grads)
    assert exact.norm() > 0.01
    torch.testing.assert_close(vector(estimate(forward, problem, batch).grads), exact, rtol=0, atol=tolerance("oracle64"))


@pytest.mark.parametrize("code", ["direct", "rate", "latency"])
@pytest.mark.parametrize("name", ["backprop", "likelihood-ratio", "es", "eggroll", "spsa", "forward"])
def test_every_parameter_gets_a_gradient_and_nothing_falls_back(name, code):
    problem = SpikingDigits(batch_size=16).build(Key(0), model_settings={**SMALL, "threshold": 0.3, "code": code})
    found = estimate(registry.engine(name, {}), problem, problem.batch(0, World()))
    assert {label for label, grad in found.grads.items() if grad.isfinite().all() and grad.any()} == set(problem.params())
    assert not any(value for label, value in found.metrics.items() if label.startswith(("fallback", "coefficient")))


def test_copies_under_vmap_are_the_copies_one_by_one():
    problem = SpikingDigits(batch_size=8).build(Key(0), model_settings=SMALL)
    batch = problem.batch(0, World())
    together, apart = (estimate(registry.engine("likelihood-ratio", {"copies": 4, "sigma": 0.5, "chunk": chunk}), problem, batch) for chunk in (None, 1))
    torch.testing.assert_close(vector(together.grads), vector(apart.grads), rtol=0, atol=tolerance("rounding32"))


def test_the_doctor_finds_forward_mode_and_backprop_agreed_and_no_differences():
    report = doctor.examine(models.build("spiking", SMALL, input_shape=(5,), classes=3, key=KEY), drawn("x", 4, 5).float())
    assert report.driven
    assert report.agrees
    assert not [row for row in report.rows if row.rung == "difference"]


# -- use -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decay": 1.1}, r"decay.*1\.1.*in \[0, 1\]"),
        ({"threshold": 0.0}, "threshold.*above 0"),
        ({"slope": -1.0}, "slope.*above 0"),
        ({"surrogate": "arctn"}, "Did you mean 'arctan'"),
        ({"code": "latancy"}, "Did you mean 'latency'"),
        ({"steps": 0}, "steps.*at least 1"),
        ({"hidden": "8,8"}, "one width per layer"),
        ({"leak": 0.5}, "setting"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(SettingError, match=said):
        models.build("spiking", settings, input_shape=(64,), classes=10, key=KEY)


def test_the_command_trains_it_without_a_derivative():
    result = invoke("train", "--problem", "spiking-digits", "--engine", "likelihood-ratio", "-s", "copies=4", "--steps", "3", "--out", "run", "--quiet")
    assert result.exit_code == 0, result.output
    last = rows("run")[-1]
    assert np.isfinite(last["test_loss"])
    assert last["backwards"] == 0


def test_a_bad_setting_on_the_command_line_is_a_usage_error():
    result = invoke("train", "--problem", "spiking-digits", "--model-setting", "surrogate=sigmoid", "--steps", "1")
    assert result.exit_code == 2
    assert "fast-sigmoid" in result.output
