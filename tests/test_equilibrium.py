"""Equilibrium propagation against exact adjoints: orders of the error, corrections, energies, relaxations, and what is refused."""

import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from tolerances import tolerance
from torch import nn

from altgrad import testing
from altgrad.alignment import exact_gradient
from altgrad.cli import cli
from altgrad.engine import fit_check
from altgrad.engines.equilibrium import Equilibrium
from altgrad.equilibrium.adjoint import adjoint_gradient
from altgrad.equilibrium.homeostasis import homeostasis
from altgrad.equilibrium.nets import GraphNet, LayeredHopfield
from altgrad.equilibrium.nudges import nudges
from altgrad.equilibrium.relaxation import relax
from altgrad.equilibrium.settling import Settling, squared_error
from altgrad.errors import CapabilityError, DataError, NumericsError, SettingError
from altgrad.kernels import noise
from altgrad.problem import Batch, Problem
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key, tensor_id
from altgrad.world import World

KEY = Key(7, 3)


def drawn(name, *shape, dtype=torch.float64):
    return noise.draw("normal", Key(5), tensor_id(name), [0], shape)[0].to(dtype)


def recurrent(dtype=torch.float64, **settings):
    """40 units, weights of any sign and no symmetry, on a fixed batch."""
    problem = Settling(GraphNet(12, 40, 5, key=Key(3), **{"gain": 0.4, **settings}).to(dtype), squared_error)
    return problem, Batch(drawn("x", 6, 12, dtype=dtype), 0.3 * drawn("y", 6, 5, dtype=dtype))


def layered(dtype=torch.float64, **settings):
    problem = Settling(LayeredHopfield([12, 16, 10, 5], key=Key(3), **settings).to(dtype), squared_error)
    return problem, Batch(drawn("x", 6, 12, dtype=dtype), torch.arange(6) % 5)


def chain(dtype=torch.float64, *, middle=nn.Tanh, extra=()):
    """A plain feed-forward network of three layers."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.set_state(torch.Generator().get_state())
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), *extra, nn.Linear(30, 30), middle(), nn.Linear(30, 10))
    return Supervised(model.to(dtype), F.cross_entropy), Batch(drawn("x", 8, 20, dtype=dtype), torch.arange(8) % 10)


def look(engine, problem, batch, key=KEY):
    fit_check(engine, problem)
    return engine.estimate(problem, problem.params(), {}, batch, key, World())


def flat(grads, like):
    return torch.cat([grads[name].flatten() for name in like])


def error(grads, exact):
    """‖ĝ - g‖ / ‖g‖."""
    return float((flat(grads, exact) - flat(exact, exact)).norm() / flat(exact, exact).norm())


def reference(problem, batch):
    if isinstance(problem, Settling):
        return adjoint_gradient(problem, problem.params(), batch)
    return exact_gradient(problem, problem.params(), batch, KEY)[1]


# -- the order of the error (figure 1) ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [recurrent, layered, chain])
@pytest.mark.parametrize(("nudge", "power"), [("one-sided", 1), ("random-sign", 1), ("symmetric", 2)])
def test_the_error_falls_at_its_order_as_the_nudge_halves(build, nudge, power):
    problem, batch = build()
    exact = reference(problem, batch)
    errors = [error(look(Equilibrium(nudge=nudge, beta=beta), problem, batch).grads, exact) for beta in (0.02, 0.01)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(power, abs=0.1)


@pytest.mark.parametrize("build", [recurrent, layered, chain])
def test_two_more_points_make_the_holomorphic_error_ten_times_smaller(build):
    problem, batch = build()
    exact = reference(problem, batch)
    errors = [error(look(Equilibrium(nudge="holomorphic", points=points), problem, batch).grads, exact) for points in (2, 4, 6)]
    assert errors[1] <= max(errors[0] / 10, 1e-11)
    assert errors[2] <= max(errors[1] / 10, 1e-11)


# -- no symmetry needed (figure 2) ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-5)])
@pytest.mark.parametrize("build", [recurrent, chain])
def test_four_points_and_the_correction_give_the_exact_gradient(build, dtype, limit):
    exact = reference(*build())
    found = look(Equilibrium(nudge="holomorphic", points=4, beta=0.1), *build(dtype)).grads
    assert error({name: grad.double() for name, grad in found.items()}, exact) <= limit
    assert all(grad.dtype is dtype for grad in found.values())


def test_without_the_correction_nothing_comes_down_a_feed_forward_network():
    problem, batch = chain()
    exact, found = reference(problem, batch), look(Equilibrium(correction="none"), problem, batch).grads
    assert all(not bool(found[name].any()) for name in exact if not name.startswith("4."))
    assert error({name: found[name] for name in ("4.weight", "4.bias")}, {name: exact[name] for name in ("4.weight", "4.bias")}) < 1e-9


@pytest.mark.parametrize("points", [2, 4])
def test_without_the_correction_an_asymmetric_net_stays_wrong_whatever_the_points(points):
    problem, batch = recurrent()
    assert error(look(Equilibrium(nudge="holomorphic", points=points, correction="none"), problem, batch).grads, reference(problem, batch)) > 0.3


class Bowl(nn.Module):
    """½ ‖u‖² - ½ tanh(u)ᵀ W tanh(u) - uᵀ U x: an energy with no sweep of its own, and the field that goes down it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.15 * drawn("bowl", 8, 8))
        self.input = nn.Parameter(0.4 * drawn("bowl input", 8, 12))

    def rest(self, params, x):
        return (x.new_zeros(x.shape[0], 8),)

    def output(self, s):
        return s[0][:, -5:]

    def energy(self, params, s, x):
        u, r = s[0], torch.tanh(s[0])
        return (0.5 * u * u - 0.5 * r * (r @ (params["weight"] + params["weight"].T)) / 2 - u * (x @ params["input"].T)).sum(1)

    def step(self, params, s, x):
        r = torch.tanh(s[0])
        return ((1 - r * r) * (r @ (params["weight"] + params["weight"].T)) / 2 + x @ params["input"].T,)


@pytest.mark.parametrize("settings", [{"form": "energy"}, {"form": "field", "correction": "none"}, {"form": "field"}], ids=str)
def test_a_symmetric_field_is_exact_in_every_form(settings):
    problem, batch = Settling(Bowl(), squared_error), recurrent()[1]
    found = look(Equilibrium(nudge="holomorphic", points=6, beta=0.05, **settings), problem, batch)
    assert error(found.grads, reference(problem, batch)) < 1e-6
    if settings["form"] == "field":
        assert float(found.metrics["asymmetry"]) < tolerance("rounding64")


# -- nudges ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [1, 2, 3, 4, 5, 8])
def test_points_on_the_circle_differentiate_an_analytic_function(points):
    made = nudges("holomorphic", 0.1, points, KEY)
    slope = sum((torch.tensor(nudge.weight, dtype=torch.complex128) * torch.exp(torch.tensor(nudge.beta, dtype=torch.complex128))).real for nudge in made)
    leading = 0.1**points / math.factorial(points + 1)  # Cauchy's sum keeps the coefficient of β^(N+1)
    assert float(slope) - 1 == pytest.approx(leading, rel=0.2, abs=1e-13)
    assert len(made) == max(2, points // 2 + 1)


def test_the_random_sign_is_a_steps_own_and_takes_both_values():
    signs = {nudges("random-sign", 0.1, 1, KEY.at(step))[0].beta for step in range(20)}
    assert signs == {0.1, -0.1}


# -- relaxations ----------------------------------------------------------------------------------------------------------------------


def test_examples_stop_one_by_one_and_do_not_depend_on_their_batch():
    rates = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    def update(own):
        return lambda state: (own[:, None] * state[0] + 1,)

    start = torch.zeros(3, 2, dtype=torch.float64)
    whole = relax(update(rates), (start,), steps=500, tolerance=1e-10)
    assert whole.sweeps.tolist() == sorted(set(whole.sweeps.tolist()))
    assert bool((whole.residual <= 1e-10).all())
    for row in range(3):
        alone = relax(update(rates[row : row + 1]), (start[:1],), steps=500, tolerance=1e-10)
        assert torch.equal(alone.state[0][0], whole.state[0][row])
        assert alone.ran == int(whole.sweeps[row])


def test_damping_settles_what_overshoots():
    def update(state):
        return (1 - 1.5 * state[0],)

    start = (torch.zeros(1, 1, dtype=torch.float64),)
    assert float(relax(update, start, steps=200, tolerance=1e-9).residual) > 0.1
    settled = relax(update, start, steps=200, tolerance=1e-9, damping=0.5)
    assert float(settled.state[0]) == pytest.approx(0.4, abs=1e-8)


def test_sweeps_of_every_second_layer_never_raise_the_energy():
    problem, batch = layered()
    params = problem.params()
    state, energies = problem.rest(params, batch.inputs), []
    with torch.no_grad():
        for _ in range(12):
            energies.append(problem.energy(params, state, batch.inputs))
            state = problem.sweep(params, state, batch.inputs)
    falls = torch.stack(energies).diff(dim=0)
    assert bool((falls <= 1e-12).all())
    assert bool((falls[0] < 0).all())


def test_alternating_sweeps_take_half_as_many_as_sweeps_of_all_layers_at_once():
    net = LayeredHopfield([24, 32, 32, 32, 5], key=Key(3)).double()
    with torch.no_grad():
        for weight in net.weights:
            weight.mul_(1.5)  # so that layers mind one another
    x, params = drawn("x", 6, 24), dict(net.named_parameters())
    with torch.no_grad():
        ran = [relax(lambda s, way=way: way(params, s, x), net.rest(params, x), steps=3000, tolerance=1e-9).ran for way in (net.step, net.sweep)]
    assert ran[0] >= 1.95 * ran[1] > 20  # λ² of one against ±λ of the other: twice, up to the first sweeps


def test_the_order_of_sweeps_is_a_setting_that_leaves_the_state_alone():
    problem, batch = layered()
    one, other = (look(Equilibrium(sweeps=sweeps), problem, batch) for sweeps in ("alternating", "together"))
    assert error(one.grads, other.grads) < tolerance("rounding64")
    assert float(one.metrics["forwards"]) < 0.6 * float(other.metrics["forwards"])


def test_noise_in_the_dynamics_is_a_steps_own_and_drowns_a_small_nudge_first():
    problem, batch = layered()
    exact = reference(problem, batch)

    def off(key=KEY, **settings):
        return error(look(Equilibrium(noise=0.02, steps=20, **settings), problem, batch, key).grads, exact)

    assert off(nudge="one-sided", beta=0.02) > 3 * off(nudge="holomorphic", beta=0.4)
    assert off() == off()
    assert off() != off(KEY.at(4))


def test_the_free_state_is_where_the_energy_is_flat():
    problem, batch = layered()
    params = problem.params()
    with torch.no_grad():
        state = relax(lambda s: problem.sweep(params, s, batch.inputs), problem.rest(params, batch.inputs), steps=500, tolerance=1e-15).state
    leaves = tuple(leaf.requires_grad_() for leaf in state)
    for slope in torch.autograd.grad(problem.energy(params, leaves, batch.inputs).sum(), leaves):
        assert float(slope.abs().max()) < tolerance("rounding64")


# -- models and batches ---------------------------------------------------------------------------------------------------------------


def test_dropout_and_batch_norm_see_what_backprop_sees():
    problem, batch = chain(extra=(nn.BatchNorm1d(30), nn.Dropout(0.5)))
    found = look(Equilibrium(beta=0.01), problem, batch)
    assert error(found.grads, reference(problem, batch)) < 1e-5
    assert int(found.buffers["2.num_batches_tracked"]) == 1


class Attending(nn.Module):
    """softmax(h hᵀ / √d) h over four tokens of each example, by PyTorch's fused kernel where there is one."""

    def forward(self, x):
        h = x.reshape(len(x), 1, 4, -1)
        return F.scaled_dot_product_attention(h, h, h).flatten(1)


def test_attention_which_fused_has_no_second_derivative_is_driven():
    problem, batch = chain()
    attending = Supervised(nn.Sequential(*problem.model[:2], nn.Linear(30, 32), Attending(), nn.Linear(32, 10)).double(), F.cross_entropy)
    assert error(look(Equilibrium(beta=0.01), attending, batch).grads, reference(attending, batch)) < 1e-4


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_two_ranks_average_to_the_whole_batch(noise):
    problem, batch = recurrent()
    engine = Equilibrium(noise=noise, steps=30 if noise else 200)
    whole = look(engine, problem, batch).grads
    parts = [look(engine, problem, Batch(batch.inputs[rows], batch.targets[rows], rows.start)).grads for rows in (slice(0, 3), slice(3, 6))]
    assert error({name: (parts[0][name] + parts[1][name]) / 2 for name in whole}, whole) < tolerance("rounding64")


@pytest.mark.parametrize("settings", [{}, {"nudge": "holomorphic"}, {"form": "field"}], ids=str)
def test_an_energy_keeps_the_claims_of_every_engine(settings):
    class Batched(Settling):
        def batch(self, step, world):
            share = world.share(6)
            return Batch(drawn("x", 6, 12, dtype=torch.float32)[share.start : share.stop], (torch.arange(6) % 5)[share.start : share.stop], share.start)

    def build():
        return Batched(LayeredHopfield([12, 9, 5], key=Key(3), sweeps=80), squared_error)

    anywhere = {name for name, claim in testing.CLAIMS.items() if claim.anywhere}
    results = [(name, testing.attempt(name, check)) for name, check in testing.checks(Equilibrium(**settings), build) if name in anywhere]
    assert len(results) > 10
    assert [result for _, result in results if not result.passed] == []


def test_prediction_is_the_free_state():
    problem, batch = layered(sweeps=200)
    found = Equilibrium().predict(problem, problem.params(), {}, batch.inputs)
    with torch.no_grad():
        torch.testing.assert_close(found, problem.forward(problem.params(), batch.inputs, {}), rtol=1e-9, atol=1e-9)


def test_backprop_through_the_sweeps_agrees_with_the_adjoint():
    problem, batch = layered(sweeps=200)
    assert error(exact_gradient(problem, problem.params(), batch, KEY)[1], reference(problem, batch)) < tolerance("rounding64")


# -- homeostasis ----------------------------------------------------------------------------------------------------------------------


def test_the_homeostatic_loss_is_half_the_squared_asymmetry_on_average():
    net = GraphNet(3, 10, 2, key=Key(3), gain=1.0).double()
    params, x = dict(net.named_parameters()), drawn("point", 1, 3)
    state = drawn("state", 1, 10)

    def step(s):
        return net.step(params, s, x)

    jacobian = torch.autograd.functional.jacobian(lambda s: step((s,))[0], state)[0, :, 0]
    with torch.no_grad():
        mean = homeostasis(step, (state.expand(100_000, -1),), (drawn("probes", 100_000, 10),)).mean()
    assert float(mean) == pytest.approx(float((jacobian - jacobian.T).square().sum() / 20), rel=0.02)


def test_homeostasis_makes_a_jacobian_symmetric():
    problem, batch = recurrent(torch.float32)
    engine = Equilibrium(correction="homeostasis", homeostasis=10.0)
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-2)
    seen = []
    for step in range(25):
        found = look(engine, problem, batch, KEY.at(step))
        seen.append(float(found.metrics["asymmetry"]))
        for name, parameter in problem.params().items():
            parameter.grad = found.grads[name]
        optimizer.step()
    assert seen[-1] < 0.6 * seen[0]


# -- what is refused ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0.0}, "beta=0.0"),
        ({"points": 0}, "points=0"),
        ({"nudge": "symetric"}, "Did you mean 'symmetric'"),
        ({"correction": "antisymmetric"}, "Did you mean 'asymmetric'"),
        ({"damping": 1.0}, "damping=1.0"),
        ({"steps": 0}, "steps=0"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
        ({"noise": -0.1}, "noise=-0.1"),
        ({"sweeps": "odd"}, "unknown sweeps"),
        ({"form": "blocks"}, "unknown form"),
        ({"homeostasis": -1.0}, "homeostasis=-1.0"),
    ],
)
def test_a_wrong_setting_is_refused(settings, words):
    with pytest.raises(SettingError, match=words):
        Equilibrium(**settings)


def test_dynamics_that_do_not_settle_warn_once_with_the_residual_and_are_an_error_where_strict():
    problem, batch = recurrent(gain=4.0)
    with pytest.warns(UserWarning, match=r"still moves by [\d.e-]+, relative"):
        look(Equilibrium(steps=5), problem, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(Equilibrium(steps=5), problem, batch)
    with pytest.raises(NumericsError, match=r"still moves by"):
        look(Equilibrium(steps=5, strict=True), problem, batch)


@pytest.mark.parametrize(("layer", "instead"), [(nn.ReLU, "Tanh or Sigmoid"), (lambda: nn.LayerNorm(30), "no norm"), (nn.Softshrink, "not holomorphic")])
def test_layers_that_are_not_holomorphic_are_named_with_what_may_stand_there(layer, instead):
    problem, batch = chain(middle=layer)
    problem.example_inputs = batch.inputs
    with pytest.raises(CapabilityError, match=instead):
        fit_check(Equilibrium(nudge="holomorphic"), problem)
    look(Equilibrium(), problem, batch)  # real nudges pass them
    fit_check(Equilibrium(nudge="holomorphic", points=2), problem)


def test_smooth_layers_are_holomorphic_and_the_first_block_may_be_anything():
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 3))
    fit_check(Equilibrium(nudge="holomorphic"), Supervised(model, F.cross_entropy))


def test_an_operation_that_is_met_on_the_way_is_refused_in_the_engines_words():
    class Odd(Bowl):
        def step(self, params, s, x):
            return (F.relu(super().step(params, s, x)[0]),)

    problem, batch = Settling(Odd(), squared_error), recurrent()[1]
    with pytest.raises(CapabilityError, match="holomorphic"):
        look(Equilibrium(nudge="holomorphic", form="field"), problem, batch)


def test_targets_that_the_output_cannot_reach_are_refused():
    problem, batch = layered(output="sigmoid")
    with pytest.raises(DataError, match=r"targets run from -.* to .*, but the outputs lie between 0 and 1"):
        problem.check_batch(Batch(batch.inputs, drawn("y", 6, 5)))
    problem.check_batch(batch)


def test_half_precision_is_refused():
    problem, _ = chain(torch.bfloat16)
    with pytest.raises(CapabilityError, match="cannot tell a nudged state"):
        fit_check(Equilibrium(), problem)


def test_homeostasis_is_refused_where_nothing_goes_back():
    with pytest.raises(CapabilityError, match="nothing goes back"):
        fit_check(Equilibrium(correction="homeostasis"), chain()[0])


def test_a_problem_with_nothing_to_relax_is_told_what_to_implement():
    class Bare(Problem):
        def params(self):
            return {"x": torch.zeros(1)}

        def losses(self, params, batch, buffers):
            return params["x"] ** 2

    with pytest.raises(CapabilityError, match="needs ENERGY, FIXED_POINT or BLOCKS"):
        fit_check(Equilibrium(), Bare())


def test_a_net_that_does_not_say_where_it_begins_is_refused():
    with pytest.raises(CapabilityError, match="has no rest and no output and no step"):
        Settling(nn.Linear(3, 2), squared_error)


# -- the command line -----------------------------------------------------------------------------------------------------------------


def trained(folder, *arguments):
    result = CliRunner().invoke(cli, ["train", "--engine", "equilibrium", "--out", str(folder), *arguments])
    assert result.exit_code == 0, result.output
    return float(re.search(r"test accuracy ([\d.]+) %", result.output.splitlines()[-1])[1])


def test_the_command_line_trains_a_hopfield_net(tmp_path):
    assert trained(tmp_path / "run", "--problem", "hopfield-digits", "--problem-setting", "hidden=32", "--epochs", "1", "--lr", "1e-2") > 70  # chance is 10


def test_the_command_line_trains_a_plain_network_with_complex_nudges(tmp_path):
    settings = ["-s", "nudge=holomorphic", "-s", "tolerance=1e-4", "--model-setting", "hidden=32-32", "--model-setting", "activation=tanh", "-s", "points=3"]
    assert trained(tmp_path / "run", "--problem", "digits", *settings, "--epochs", "1", "--lr", "1e-2") > 60


def test_a_net_of_its_own_takes_no_other_model():
    result = CliRunner().invoke(cli, ["train", "--problem", "hopfield-digits", "--engine", "equilibrium", "--model", "mlp", "--steps", "1"])
    assert result.exit_code == 2
    assert "has a net of its own" in result.output
