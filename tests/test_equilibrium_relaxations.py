"""Relaxations that take fewer sweeps: Anderson's combinations, and warm starts from the epoch before; and planted bugs of nets."""

import math
import re
import signal
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from test_equilibrium import KEY, drawn, error, look, recurrent
from test_equilibrium_nets import OUTSIDE, conv, layered, settled
from test_resume import contents, interrupt_after, rows
from tolerances import tolerance

from altgrad import errors, trainer
from altgrad.data import Dataset
from altgrad.engine import fit_check
from altgrad.engines.equilibrium import Equilibrium
from altgrad.equilibrium import conv_nets, settling, warm
from altgrad.equilibrium.adjoint import adjoint_gradient
from altgrad.equilibrium.nets import GraphNet, LayeredHopfield
from altgrad.equilibrium.relaxation import numbers, relax, shaped
from altgrad.equilibrium.settling import Settling, squared_error
from altgrad.errors import CapabilityError, SettingError
from altgrad.problem import Batch
from altgrad.problems.images import cross_entropy_of_each
from altgrad.rng import Key
from altgrad.world import World

# -- Anderson -------------------------------------------------------------------------------------------------------------------------


def slow():
    """Layers that mind one another so much that 400 sweeps pass before they rest."""
    net = LayeredHopfield([24, 32, 32, 32, 5], key=Key(3)).double()
    with torch.no_grad():
        for weight in net.weights:
            weight.mul_(1.5)
    return Settling(net, squared_error), Batch(drawn("x", 6, 24), torch.arange(6) % 5)


ACCELERATED = {
    "energy": (slow, {}, 5),
    "energy, complex": (slow, {"nudge": "holomorphic"}, 5),
    "field": (lambda: recurrent(gain=0.9), {}, 1.8),
    "field, complex": (lambda: recurrent(gain=0.9), {"nudge": "holomorphic", "correction": "none"}, 1.8),
    "convolutions": (conv, {}, 1.1),
}


@pytest.mark.parametrize(("build", "settings", "fewer"), ACCELERATED.values(), ids=ACCELERATED)
def test_anderson_comes_to_the_same_rest_in_fewer_sweeps(build, settings, fewer):
    problem, batch = build()
    plain, fast = (look(Equilibrium(acceleration=how, beta=0.02, steps=4000, **settings), problem, batch) for how in ("none", "anderson"))
    assert error(fast.grads, plain.grads) < tolerance("rounding64")
    assert float(plain.metrics["forwards"]) >= fewer * float(fast.metrics["forwards"])


def test_anderson_takes_examples_one_by_one():
    matrices = torch.stack([rate * torch.linalg.qr(drawn(f"turn {rate}", 4, 4))[0] for rate in (0.3, 0.8, 0.95)])

    def update(own):
        return lambda state: ((own @ state[0][..., None])[..., 0] + 1,)

    def run(own):
        return relax(update(own), (torch.zeros(len(own), 4, dtype=torch.float64),), steps=500, tolerance=1e-10, acceleration="anderson")

    whole = run(matrices)
    assert bool((whole.residual <= 1e-10).all())
    for row in range(3):
        alone = run(matrices[row : row + 1])
        assert alone.ran == int(whole.sweeps[row])
        torch.testing.assert_close(alone.state[0][0], whole.state[0][row], rtol=1e-9, atol=1e-9)


def test_anderson_settles_what_plain_sweeps_never_do():
    def update(state):
        return (1 - 1.5 * state[0],)

    start = (torch.zeros(1, 1, dtype=torch.float64),)
    assert float(relax(update, start, steps=50, tolerance=1e-9).residual) > 0.1
    assert float(relax(update, start, steps=50, tolerance=1e-9, acceleration="anderson").state[0]) == pytest.approx(0.4, abs=1e-8)


def test_a_state_is_numbers_and_back():
    state = (drawn("a", 3, 2, 4), torch.complex(drawn("b", 3, 5), drawn("c", 3, 5)))
    assert numbers(state).shape == (3, 18)
    for one, other in zip(shaped(numbers(state), state), state, strict=True):
        assert torch.equal(one, other)


def test_an_unknown_acceleration_is_refused():
    with pytest.raises(SettingError, match="Did you mean 'anderson'"):
        Equilibrium(acceleration="andersen")


# -- warm starts ----------------------------------------------------------------------------------------------------------------------


class Steady(Settling):
    """20 examples in batches of 4."""

    def __init__(self, net):
        data = Dataset("steady", drawn("inputs", 20, 12), torch.arange(20) % 3, drawn("tests", 4, 12), torch.arange(4) % 3, 3)
        super().__init__(net.double(), squared_error, dataset=data, batch_size=4, key=Key(2))


def nets():
    return {"energy": LayeredHopfield([12, 16, 10, 3], key=Key(3)), "field": GraphNet(12, 20, 3, key=Key(3))}


@pytest.mark.parametrize("kind", ["energy", "field"])
def test_the_second_epoch_takes_fewer_sweeps_to_the_same_gradients(kind):
    problem = Steady(nets()[kind])
    params = problem.params()
    engine, sweeps = Equilibrium(warm_start=True), [0.0, 0.0, 0.0]
    state = engine.init(problem, params, KEY)
    for step in range(10):
        batch = problem.batch(step, World())
        warm_one = engine.estimate(problem, params, state, batch, KEY.at(step), World())
        cold = Equilibrium().estimate(problem, params, {}, batch, KEY.at(step), World())
        assert error(dict(warm_one.grads), dict(cold.grads)) < tolerance("rounding64")
        sweeps[step // 5] += float(warm_one.metrics["forwards"])
        sweeps[2] += float(cold.metrics["forwards"]) / 2
        state = warm_one.state
    assert sweeps[0] == pytest.approx(sweeps[2], rel=0.02)  # nothing is known yet
    assert sweeps[1] < 0.75 * sweeps[0]  # nudged relaxations start from the free state anyhow


def test_what_is_kept_is_the_free_state_of_every_example_met():
    problem = Steady(nets()["energy"])
    params, engine = problem.params(), Equilibrium(warm_start=True)
    first = engine.init(problem, params, KEY)
    batch = problem.batch(0, World())
    after = engine.estimate(problem, params, first, batch, KEY, World()).state
    for number, leaf in enumerate(settled(problem, batch)):
        torch.testing.assert_close(after[f"warm.{number}"][batch.numbers], leaf, rtol=1e-9, atol=1e-9)
        others = torch.ones(20, dtype=torch.bool)
        others[batch.numbers] = False
        assert torch.equal(after[f"warm.{number}"][others], first[f"warm.{number}"][others])


def test_the_mean_over_ranks_of_what_they_keep_is_what_each_has_found():
    class Two(World):
        def shares(self, weight, *, device="cpu"):
            return [0.25, 0.75]

    state = {"warm.0": torch.full((6, 2), 0.5, dtype=torch.float64)}
    batches = [Batch(None, None, 0, torch.tensor([4])), Batch(None, None, 1, torch.tensor([0, 1, 5]))]
    founds = [(drawn(f"found {rank}", len(batch.numbers), 2),) for rank, batch in enumerate(batches)]
    parts = [warm.kept(state, batch, found, Two(rank=rank, size=2))["warm.0"] for rank, (batch, found) in enumerate(zip(batches, founds, strict=True))]
    mean = 0.25 * parts[0] + 0.75 * parts[1]
    for batch, found in zip(batches, founds, strict=True):
        torch.testing.assert_close(mean[batch.numbers], found[0])
    assert torch.equal(mean[[2, 3]], state["warm.0"][[2, 3]])


def test_a_state_that_is_not_finite_is_not_kept():
    state = {"warm.0": torch.full((2, 2), 0.5)}
    after = warm.kept(state, Batch(None, None, 0, torch.tensor([1])), (torch.tensor([[torch.nan, 1.0]]),), World())
    assert after["warm.0"].tolist() == [[0.5, 0.5], [0.5, 1.0]]


def test_a_run_with_warm_starts_is_resumed_bit_by_bit(tmp_path):
    def settings():
        return trainer.TrainSettings(
            problem="hopfield-digits",
            problem_settings={"hidden": "16", "batch_size": 400},
            engine="equilibrium",
            engine_settings={"warm_start": True, "tolerance": 1e-3},
            steps=8,
            log_every=1,
        )

    before = signal.getsignal(signal.SIGINT)
    trainer.fit(trainer.build(settings()), run_folder=tmp_path / "whole")
    with pytest.raises(errors.Interrupted):
        trainer.fit(trainer.build(settings()), run_folder=tmp_path / "broken", on_step=interrupt_after(5))
    assert signal.getsignal(signal.SIGINT) is before
    trainer.fit(trainer.resume(tmp_path / "broken"))
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_warm_starts_are_refused_where_no_example_is_met_again():
    with pytest.raises(CapabilityError, match="has no data of its own"):
        fit_check(Equilibrium(warm_start=True), layered()[0])
    problem = Steady(nets()["energy"])
    with (
        mock.patch.object(Steady, "batch", return_value=Batch(drawn("x", 4, 12), torch.arange(4) % 3)),
        pytest.raises(CapabilityError, match="augments"),
    ):
        fit_check(Equilibrium(warm_start=True), problem)
    with mock.patch.object(warm, "LIMIT", 1000), pytest.raises(CapabilityError, match=r"the free states of 20 examples are [\d.]+ GB"):
        fit_check(Equilibrium(warm_start=True), problem)
    fit_check(Equilibrium(warm_start=True), problem)


# -- planted bugs ---------------------------------------------------------------------------------------------------------------------

SPREAD, DIRECT = conv_nets.spread, settling.direct_gradient


def unweighted(kind, z, size, push):
    """Softmax pooling whose weights are held fixed."""
    parts = conv_nets.windows(z, size)
    return conv_nets.whole(push.unsqueeze(-1) * conv_nets.shares(parts), size, z)


def summed(problem, params, state, batch):
    """The read-out's gradient summed over the batch."""
    return {name: len(batch.targets) * grad for name, grad in DIRECT(problem, params, state, batch).items()}


BUGS = {
    "what comes back through a pool reversed": (conv, conv_nets, "spread", lambda *given: -SPREAD(*given)),
    "softmax pooling with its weights held": (conv, conv_nets, "spread", unweighted),
    "pooling's share undivided": (lambda: conv(pooling="mean"), conv_nets, "spread", lambda kind, z, size, push: size**2 * SPREAD(kind, z, size, push)),
    "the read-out's gradient summed": (lambda: layered(cross_entropy_of_each, **OUTSIDE), "engine", "direct_gradient", summed),
    "no gradient for the read-out": (lambda: layered(cross_entropy_of_each, **OUTSIDE), "engine", "direct_gradient", lambda *given: {}),
}


@pytest.mark.parametrize(("build", "owner", "name", "bug"), BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_told_by_the_gradient_or_by_the_energy(build, owner, name, bug):
    from altgrad.engines import equilibrium

    problem, batch = build()
    exact = adjoint_gradient(problem, problem.params(), batch)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(equilibrium if owner == "engine" else owner, name, bug))
        found = look(Equilibrium(beta=0.002, steps=2000), problem, batch).grads
        wrong = set(found) != set(exact) or error(dict(found), exact) > 1e-3
    assert wrong
    assert not re.search("nan", str([float(grad.sum()) for grad in found.values()]))


# -- how near to the exact gradient a finite nudge comes (figure 2, beyond the gain of its own test) -----------------------------------


@pytest.mark.parametrize("key", [3, 4, 5])
def test_four_points_are_exact_to_five_digits_at_a_gain_away_from_one(key):
    problem = Settling(GraphNet(12, 40, 5, key=Key(key), gain=0.6).double(), squared_error)
    batch = Batch(drawn("x", 6, 12), 0.3 * drawn("y", 6, 5))
    exact = adjoint_gradient(problem, problem.params(), batch)
    assert error(look(Equilibrium(nudge="holomorphic"), problem, batch).grads, exact) <= 1e-5


@pytest.mark.parametrize("settings", [{"points": 6, "beta": 0.1}, {"points": 4, "beta": 0.05}], ids=str)
@pytest.mark.parametrize("key", [0, 1, 2])
def test_more_points_or_half_the_nudge_are_exact_to_five_digits_at_a_gain_near_one(settings, key):
    problem = Settling(GraphNet(12, 40, 5, key=Key(key), gain=0.9).double(), squared_error)
    batch = Batch(drawn("x", 6, 12), 0.3 * drawn("y", 6, 5))
    exact = adjoint_gradient(problem, problem.params(), batch)
    assert error(look(Equilibrium(nudge="holomorphic", steps=2000, **settings), problem, batch).grads, exact) <= 1e-5


def test_halving_the_nudge_takes_four_points_error_to_a_sixteenth_at_a_gain_near_one():
    problem, batch = recurrent(gain=0.9)
    exact = adjoint_gradient(problem, problem.params(), batch)
    errors = [error(look(Equilibrium(nudge="holomorphic", beta=beta, steps=2000), problem, batch).grads, exact) for beta in (0.1, 0.05)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.1)
