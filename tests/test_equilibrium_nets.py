"""Nets that settle: convolutions with pooling, graphs swept by colours, read-outs outside the system; each against derivatives worked out another way."""

import re

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from test_equilibrium import KEY, Bowl, drawn, error, look
from tolerances import tolerance

from altgrad.cli import cli
from altgrad.engine import fit_check
from altgrad.engines.equilibrium import Equilibrium
from altgrad.equilibrium.adjoint import adjoint_gradient
from altgrad.equilibrium.conv_nets import POOLINGS, ConvHopfield, pool, spread
from altgrad.equilibrium.nets import GraphHopfield, GraphNet, LayeredHopfield, two_colours
from altgrad.equilibrium.relaxation import greatest, relax
from altgrad.equilibrium.settling import Settling, squared_error
from altgrad.errors import CapabilityError, DataError, SettingError
from altgrad.problem import Batch
from altgrad.problems.held import Held
from altgrad.problems.hopfield import HopfieldDigits
from altgrad.problems.images import cross_entropy_of_each
from altgrad.rng import Key
from altgrad.world import World

LABELS = torch.arange(4) % 3
HALVES = torch.arange(20)[:, None] // 10 != torch.arange(20) // 10  # every unit of one half joined with every unit of the other


def conv(loss=squared_error, **settings):
    """Two layers of convolutions over 9 x 8 pixels, of which pooling leaves some over."""
    net = ConvHopfield((2, 9, 8), [3, 4], 3, key=Key(3), **settings).double()
    return Settling(net, loss), Batch(drawn("x", 4, 2, 9, 8), LABELS)


def layered(loss=squared_error, **settings):
    return Settling(LayeredHopfield([12, 16, 10, 3], key=Key(3), **settings).double(), loss), Batch(drawn("x", 4, 12), LABELS)


def graph(edges=None, **settings):
    return Settling(GraphHopfield(12, 20, 3, key=Key(3), edges=edges, **settings).double(), squared_error), Batch(drawn("x", 4, 12), LABELS)


def settled(problem, batch, way="sweep"):
    params = problem.params()
    with torch.no_grad():
        found = relax(lambda s: getattr(problem, way)(params, s, batch.inputs), problem.rest(params, batch.inputs), steps=2000, tolerance=1e-15)
    return found.state


OUTSIDE = {"readout": "outside"}
BUILDS = {
    **{f"conv {pooling}": lambda pooling=pooling: conv(pooling=pooling) for pooling in POOLINGS},
    "conv, tanh": lambda: conv(hidden="tanh", output="sigmoid"),
    "conv, read outside": lambda: conv(cross_entropy_of_each, **OUTSIDE),
    "layers, read outside": lambda: layered(cross_entropy_of_each, **OUTSIDE),
    "layers, read outside, squared": lambda: layered(**OUTSIDE),
    "layers, cross-entropy inside": lambda: layered(cross_entropy_of_each),
    "graph": graph,
    "graph of two colours": lambda: graph(HALVES),
}


# -- what a net says of itself --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_sweeps_come_to_rest_where_the_energy_is_flat(build):
    problem, batch = build()
    leaves = tuple(leaf.requires_grad_() for leaf in settled(problem, batch))
    for slope in torch.autograd.grad(problem.energy(problem.params(), leaves, batch.inputs).sum(), leaves):
        assert float(slope.abs().max()) < tolerance("rounding64")


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_sweeps_and_steps_of_all_at_once_come_to_the_same_rest(build):
    problem, batch = build()
    for one, other in zip(settled(problem, batch), settled(problem, batch, "together"), strict=True):
        assert float((one - other).abs().max()) < tolerance("rounding64")


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_what_is_worked_out_once_changes_no_sweep(build):
    problem, batch = build()
    params, state = problem.params(), settled(problem, batch)
    given = problem.prepared(params, batch.inputs)
    for way in (problem.step, problem.sweep):
        for one, other in zip(way(params, state, given), way(params, state, batch.inputs), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_push_through_a_pool_is_autograds(kind, size):
    z, push = drawn("z", 2, 3, 7, 8).requires_grad_(), drawn("push", 2, 3, 7 // size, 8 // size)
    wanted = torch.autograd.grad(pool(kind, z, size), z, push)[0]
    torch.testing.assert_close(spread(kind, z.detach(), size, push), wanted, rtol=1e-12, atol=1e-12)


def test_max_and_mean_pools_are_pytorchs():
    z = drawn("z", 2, 3, 7, 8)
    assert torch.equal(pool("max", z, 2), F.max_pool2d(z, 2))
    torch.testing.assert_close(pool("mean", z, 2), F.avg_pool2d(z, 2), rtol=1e-12, atol=1e-12)


def test_a_softmax_pool_lies_between_mean_and_max_and_does_not_overflow():
    z = drawn("z", 2, 3, 8, 8)
    found = pool("softmax", z, 2)
    assert bool(((found > pool("mean", z, 2)) & (found < pool("max", z, 2))).all())
    torch.testing.assert_close(pool("softmax", 1000 * z, 2), pool("max", 1000 * z, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("build", [lambda: conv(pooling="mean"), lambda: conv(pooling="max", output="sigmoid"), lambda: graph(HALVES)])
def test_sweeps_of_every_second_layer_or_of_a_colour_never_raise_the_energy(build):
    problem, batch = build()
    params = problem.params()
    state, energies = problem.rest(params, batch.inputs), []
    with torch.no_grad():
        for _ in range(8):
            energies.append(problem.energy(params, state, batch.inputs))
            state = problem.sweep(params, state, batch.inputs)
    falls = torch.stack(energies).diff(dim=0)
    assert bool((falls <= 1e-12).all())
    assert bool((falls[0] < 0).all())


def test_a_graph_has_two_colours_or_has_not():
    assert two_colours(HALVES).tolist() == [False] * 10 + [True] * 10
    ring = torch.zeros(5, 5, dtype=torch.bool)
    ring[torch.arange(5), (torch.arange(5) + 1) % 5] = True
    assert two_colours(ring) is None  # five units round: odd
    ring[4, 0] = False
    assert two_colours(ring | torch.eye(5, dtype=torch.bool)).tolist() == [False, True, False, True, False]  # opened; to itself does not count
    assert GraphHopfield(3, 20, 2, key=Key(0), edges=HALVES).two_coloured
    assert not GraphHopfield(3, 20, 2, key=Key(0)).two_coloured


# -- gradients ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"form": "field"}], ids=str)
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_every_parameter_gets_the_gradient_of_the_adjoint(build, settings):
    problem, batch = build()
    exact = adjoint_gradient(problem, problem.params(), batch)
    assert set(exact) == set(problem.params())
    found = look(Equilibrium(beta=0.002, steps=2000, **settings), problem, batch).grads
    for name in exact:
        assert error({name: found[name]}, {name: exact[name]}) < 1e-4


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_the_drives_of_an_energy_have_a_symmetric_jacobian_and_nothing_to_correct(build):
    problem, batch = build()
    found = look(Equilibrium(form="field", correction="none", beta=0.002, steps=2000), problem, batch)
    assert float(found.metrics["asymmetry"]) < tolerance("rounding64")
    assert error(dict(found.grads), adjoint_gradient(problem, problem.params(), batch)) < 1e-4


@pytest.mark.parametrize("name", ["conv softmax", "conv mean", "conv, read outside", "layers, read outside", "graph"])
def test_two_more_points_make_the_holomorphic_error_ten_times_smaller(name):
    problem, batch = BUILDS[name]()
    exact = adjoint_gradient(problem, problem.params(), batch)
    errors = [error(look(Equilibrium(nudge="holomorphic", points=points, beta=0.05, steps=2000), problem, batch).grads, exact) for points in (2, 4)]
    assert errors[1] <= errors[0] / 10


def test_the_gradient_of_a_convolutional_net_is_that_of_finite_differences():
    problem, batch = conv()
    found = look(Equilibrium(nudge="holomorphic", points=6, beta=0.05), problem, batch).grads

    def loss(name, index, shift):
        params = {key: value.detach().clone() for key, value in problem.params().items()}
        params[name].view(-1)[index] += shift
        with torch.no_grad():
            state = relax(lambda s: problem.sweep(params, s, batch.inputs), problem.rest(params, batch.inputs), steps=500, tolerance=1e-15).state
            return float(problem.score(problem.readout(params, state, batch.inputs), batch.targets).mean())

    for name, index in (("weights.0", 7), ("weights.1", 50), ("weights.2", 3), ("biases.0", 1), ("biases.1", 2)):
        slope = (loss(name, index, 1e-5) - loss(name, index, -1e-5)) / 2e-5
        assert float(found[name].view(-1)[index]) == pytest.approx(slope, rel=1e-5, abs=1e-10)


def test_the_read_outs_own_gradient_is_the_losss_with_the_state_held():
    problem, batch = layered(cross_entropy_of_each, **OUTSIDE)
    state = settled(problem, batch)[-1]
    leaves = {name: problem.params()[name].detach().requires_grad_() for name in ("readout_weight", "readout_bias")}
    loss = F.cross_entropy(state @ leaves["readout_weight"].T + leaves["readout_bias"], batch.targets)
    wanted = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    found = look(Equilibrium(), problem, batch)
    assert float(found.loss) == pytest.approx(loss.item(), rel=1e-9)
    assert error(dict(found.grads), wanted) < tolerance("rounding64")


@pytest.mark.parametrize("build", [lambda: conv(cross_entropy_of_each, **OUTSIDE), lambda: layered(cross_entropy_of_each, **OUTSIDE), conv])
def test_prediction_is_the_read_out_of_the_free_state(build):
    problem, batch = build()
    problem.model.sweeps = 200
    found = Equilibrium().predict(problem, problem.params(), {}, batch.inputs)
    assert found.shape == (4, 3)
    with torch.no_grad():
        torch.testing.assert_close(found, problem.forward(problem.params(), batch.inputs, {}), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"nudge": "holomorphic"}], ids=str)
def test_a_share_of_the_parameters_gets_the_gradient_that_it_has_in_the_whole(settings):
    problem, batch = layered(cross_entropy_of_each, **OUTSIDE)
    values = problem.params()
    held = Held(problem, ["weights.0", "readout_bias"], values)
    found = Equilibrium(**settings).estimate(held, held.params(), {}, batch, KEY, World()).grads
    whole = look(Equilibrium(**settings), problem, batch).grads
    assert set(found) == {"weights.0", "readout_bias"}
    assert error(dict(found), {name: whole[name] for name in found}) < tolerance("rounding64")


# -- sweeps (figure 5) ----------------------------------------------------------------------------------------------------------------


def sweeps_to(residual, net, x, way):
    """Sweeps, evens and odds together one, until one and the same yardstick, max |step(s) - s| / (1 + max |s|), is met: of every example."""
    params = dict(net.named_parameters())
    taken, moving = torch.zeros(len(x)), torch.ones(len(x), dtype=torch.bool)
    with torch.no_grad():
        state, given = net.rest(params, x), net.prepared(params, x)
        for _ in range(3000):
            moving &= greatest([a - b for a, b in zip(net.step(params, state, given), state, strict=True)]) / (1 + greatest(state)) > residual
            if not bool(moving.any()):
                return taken
            taken, state = taken + moving, way(params, state, given)
    raise AssertionError("not at rest")


def minding(net, scale, *shape):
    """`net` with weights so large that its layers mind one another, and inputs."""
    with torch.no_grad():
        for weight in net.double().weights:
            weight.mul_(scale)
    return Settling(net, squared_error), Batch(drawn("inputs", 8, *shape), torch.arange(8))


ALTERNATING = {  # of benchmarks/equilibrium_sweeps.py
    "784-512-10": lambda: minding(LayeredHopfield([784, 512, 10], key=Key(3)), 2, 784),
    "conv": lambda: minding(ConvHopfield((1, 12, 12), [8, 16], 10, key=Key(3)), 1.5, 1, 12, 12),
    "conv max": lambda: minding(ConvHopfield((1, 12, 12), [8, 16], 10, key=Key(3), pooling="max"), 1.2, 1, 12, 12),
    "two colours": lambda: graph(HALVES, gain=1.5),
}


@pytest.mark.parametrize("residual", [1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize("build", ALTERNATING.values(), ids=ALTERNATING)
def test_alternating_sweeps_as_the_engine_takes_them_are_half_as_many_at_the_same_residual(build, residual):
    problem, batch = build()
    net, engine = problem.model, Equilibrium()
    assert float(sweeps_to(residual, net, batch.inputs, net.step).sum()) >= 2 * float(sweeps_to(residual, net, batch.inputs, engine.sweep(problem)).sum())


def test_where_no_order_leaves_units_apart_sweeps_are_fewer_all_the_same():
    problem, batch = graph()
    net = problem.model
    assert net.relaxation == 1
    assert float(sweeps_to(1e-8, net, batch.inputs, net.step).sum()) >= 1.1 * float(sweeps_to(1e-8, net, batch.inputs, net.sweep).sum())


@pytest.mark.parametrize("relaxation", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("nudge", ["symmetric", "holomorphic"])
@pytest.mark.parametrize("name", ["conv softmax", "layers, cross-entropy inside", "graph of two colours"])
def test_relaxation_leaves_the_rest_alone(name, nudge, relaxation):
    problem, batch = BUILDS[name]()
    one, other = (look(Equilibrium(nudge=nudge, steps=2000, relaxation=given), problem, batch) for given in (None, relaxation))
    assert float(one.metrics["forwards"]) != float(other.metrics["forwards"])
    assert error(dict(other.grads), dict(one.grads)) < tolerance("rounding64")


def test_an_over_relaxed_sweep_moves_every_layer_beyond_its_rest():
    problem, batch = layered()
    params, net = problem.params(), problem.model
    state = tuple(drawn(f"state {number}", 4, *shape) for number, shape in enumerate(net.shapes))
    with torch.no_grad():
        even = net.step(params, state, batch.inputs, None, [0, 2])
        even = tuple(old + 1.3 * (new - old) for old, new in zip(state, even, strict=True))
        odd = net.step(params, even, batch.inputs, None, [1])
        wanted = tuple(old + 1.3 * (new - old) for old, new in zip(even, odd, strict=True))
        for one, other in zip(net.sweep(params, state, batch.inputs, None, 1.3), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_field_rests_where_its_groups_bring_it():
    problem = Settling(GraphNet(12, 40, 5, key=Key(3), gain=0.8).double(), squared_error)
    batch = Batch(drawn("x", 6, 12), 0.3 * drawn("y", 6, 5))
    one, other = (look(Equilibrium(sweeps=sweeps), problem, batch) for sweeps in ("alternating", "together"))
    assert error(one.grads, other.grads) < tolerance("rounding64")
    assert float(one.metrics["forwards"]) < float(other.metrics["forwards"])


# -- what is refused ------------------------------------------------------------------------------------------------------------------


def test_relaxation_is_refused_where_no_sweep_takes_it():
    with pytest.raises(SettingError, match=r"relaxation=2.0 is not allowed; it must be None or in \(0, 2\)"):
        Equilibrium(relaxation=2.0)
    for engine, problem in ((Equilibrium(relaxation=1.2, sweeps="together"), layered()[0]), (Equilibrium(relaxation=1.2), Settling(Bowl(), squared_error))):
        with pytest.raises(CapabilityError, match="only alternating sweeps"):
            fit_check(engine, problem)
    look(Equilibrium(), Settling(Bowl(), squared_error), Batch(drawn("x", 6, 12), torch.arange(6) % 5))


@pytest.mark.parametrize("form", ["energy", "field"])
def test_max_pooling_is_refused_under_complex_nudges_with_its_replacement(form):
    problem, batch = conv(pooling="max")
    with pytest.raises(CapabilityError, match=r"ConvHopfield is not holomorphic: pooling='max' \(use pooling='softmax' or 'mean'\), or nudge='symmetric'"):
        fit_check(Equilibrium(nudge="holomorphic", form=form), problem)
    for settings in ({}, {"nudge": "holomorphic", "points": 2}):
        look(Equilibrium(form=form, **settings), problem, batch)


def test_targets_that_a_convolutional_net_cannot_reach_are_refused_and_a_read_out_reaches_all():
    problem, batch = conv(output="sigmoid")
    far = Batch(batch.inputs, drawn("y", 4, 3))
    with pytest.raises(DataError, match="the outputs lie between 0 and 1"):
        problem.check_batch(far)
    conv(**OUTSIDE)[0].check_batch(far)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"net": "cnn"}, "unknown net"),
        ({"pooling": "maximum"}, "unknown pooling 'maximum'"),
        ({"loss": "mse"}, "unknown loss"),
        ({"readout": "out"}, "Did you mean 'outside'"),
        ({"hidden": "64,64"}, "whole numbers >= 1 with - between"),
        ({"channels": "0"}, "whole numbers >= 1 with - between"),
        ({"readout": "outside", "output": "sigmoid"}, "'linear' with readout='outside'"),
        ({"loss": "cross-entropy", "output": "tanh"}, "'linear' with loss='cross-entropy'"),
    ],
)
def test_a_wrong_setting_of_a_problem_is_refused(settings, words):
    with pytest.raises(SettingError, match=words):
        HopfieldDigits(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernel": 4}, "an odd whole number"),
        ({"channels": [2, 2, 2, 2]}, "windows of 2 leave nothing of 9x8 after 3 layers"),
        ({"shape": (8, 8)}, r"\(channels, height, width\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(SettingError, match=words):
        ConvHopfield(**{"shape": (2, 9, 8), "channels": [3], "outputs": 3, "key": Key(0), **settings})


def test_edges_of_another_size_are_refused():
    with pytest.raises(SettingError, match=r"edges=\(3, 3\)"):
        GraphNet(2, 4, 1, key=Key(0), edges=torch.ones(3, 3, dtype=torch.bool))


# -- the command line -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        ("net=conv", "channels=8", "batch_size=32"),
        ("net=conv", "channels=8", "pooling=max", "batch_size=32"),
        ("hidden=64-32", "readout=outside", "loss=cross-entropy", "batch_size=32"),
    ],
    ids=str,
)
def test_the_command_line_trains_every_kind_of_net(tmp_path, settings):
    given = [part for setting in settings for part in ("--problem-setting", setting)]
    command = ["train", "--problem", "hopfield-digits", "--engine", "equilibrium", "-s", "tolerance=1e-3", "--epochs", "2", "--lr", "1e-2", *given]
    result = CliRunner().invoke(cli, [*command, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert float(re.search(r"test accuracy ([\d.]+) %", result.output.splitlines()[-1])[1]) > 70  # chance is 10
