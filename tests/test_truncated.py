"""Truncated sequences: PES and NRES on linear systems, whose losses are quadratic in the parameters, so that smoothing changes no gradient."""

import math
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_resume import contents, rows
from tolerances import tolerance
from torch import nn

from altgrad import Learner, registry, testing, trainer
from altgrad.alignment import exact_gradient
from altgrad.conformance.claim import same_tree
from altgrad.engine import Needs, fit_check
from altgrad.engines.evolution import ES, Eggroll
from altgrad.errors import CapabilityError, SettingError, ShapeError
from altgrad.kernels import noise
from altgrad.population import truncated
from altgrad.population.truncated import AGE, CARRY
from altgrad.problem import Batch, Problem
from altgrad.problems.recurrence import Recurrence
from altgrad.rng import Key
from altgrad.trainer import TrainSettings
from altgrad.world import World

EPISODES = 24
TRUNCATED = ("pes", "nres")


class Driven(Problem):
    """s ← A s + W x_t, L_t = ½ |s|²: a matrix and a vector drive three units, from fixed inputs."""

    horizon = 4

    def __init__(self, dtype=torch.float64):
        draw = lambda label, *shape: noise.draw("normal", Key(7), len(label), [0], shape, dtype=dtype)[0]  # noqa: E731
        self.weight, self.bias, self.inputs = draw("w", 3, 4), draw("bb", 3), draw("in ", self.horizon, 4)
        self.transition = 0.8 * draw("tran", 3, 3)

    def params(self):
        return {"weight": self.weight, "bias": self.bias}

    def batch(self, step, world):
        return Batch(self.inputs[step % self.horizon][None], torch.zeros(1))

    def forward(self, params, inputs, buffers):
        return F.linear(inputs, params["weight"], params["bias"])

    def start(self, batch):
        return {"s": torch.ones(3, dtype=self.weight.dtype)}

    def unroll(self, params, carry, batch, buffers):
        s = self.transition @ carry["s"] + self.forward(params, batch.inputs, buffers)[0]
        return 0.5 * s.square().sum(), {"s": s}

    def losses(self, params, batch, buffers):
        """The whole episode."""
        carry, total = self.start(batch), 0.0
        for step in range(self.horizon):
            loss, carry = self.unroll(params, carry, self.batch(step, World()), buffers)
            total = total + loss
        return total.reshape(1)


class FromClean(Problem):
    """Truncations that all members start from the unperturbed state: plain truncated estimates."""

    def __init__(self, base):
        self.base, self.horizon, self.params, self.batch = base, base.horizon, base.params, base.batch

    def start(self, batch):
        return self.base.start(batch)

    def unroll(self, params, carry, batch, buffers):
        return self.base.unroll(params, carry, batch, buffers)[0], self.base.unroll(self.params(), carry, batch, buffers)[1]


class Breaking(Driven):
    """Every member's state is lost in the first truncation of an episode, its loss is not."""

    def unroll(self, params, carry, batch, buffers):
        loss, moved = super().unroll(params, carry, batch, buffers)
        first = torch.equal(batch.inputs, self.inputs[:1])
        return loss, {"s": moved["s"] * (math.nan if first else 1.0)}


@dataclass
class Run:
    """An engine on a problem whose parameters rest."""

    engine: ES
    problem: Problem

    def __post_init__(self):
        self.key = Key(5)
        self.state = self.engine.init(self.problem, self.problem.params(), self.key)

    def step(self, step, *, world=None):
        found = self.engine.estimate(self.problem, self.problem.params(), self.state, self.problem.batch(step, World()), self.key.at(step), world or World())
        self.state = found.state
        return found._replace(grads=dict(found.grads))

    def episode(self, number):
        found = [self.step(number * self.problem.horizon + place).grads for place in range(self.problem.horizon)]
        return torch.cat([sum(grads[name] for grads in found).flatten() for name in self.problem.params()]).double()


def engine(truncation="pes", *, kind=ES, **settings):
    return kind(**{"population": 64, "sigma": 0.3, "shaping": "raw", "truncation": truncation, **settings})


def full(problem):
    exact = exact_gradient(problem, problem.params(), problem.batch(0, World()), Key(0))[1]
    return torch.cat([exact[name].flatten() for name in problem.params()]).double()


def worst(rule, problem):
    """The largest distance of the mean of EPISODES episodes' estimates to Driven's full gradient, in standard errors of √(16 + 2 ln n) / 4."""
    run, target = Run(rule, problem), full(Driven())
    drawn = torch.stack([run.episode(number) for number in range(EPISODES)])
    errors = drawn.std(0) / math.sqrt(EPISODES)
    several = math.sqrt(16 + 2 * math.log(len(target))) / 4
    along = drawn @ target / target.square().sum()  # 1 on average
    off = abs(float(along.mean()) - 1) / (float(along.std()) / math.sqrt(EPISODES))
    return max(off, float(((drawn.mean(0) - target).abs() / errors).max()) / several)


# -- the estimates ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ES, Eggroll])
@pytest.mark.parametrize("truncation", TRUNCATED)
def test_estimates_of_an_episode_add_up_to_its_gradient(truncation, kind):
    assert worst(engine(truncation, kind=kind), Driven()) <= tolerance("standard_errors")


def test_truncations_from_a_common_state_miss_the_gradient():
    assert worst(engine("nres"), FromClean(Driven())) > 2 * tolerance("standard_errors")


def only_this_truncation(self, draws, weights):
    self.draws, self.weights = draws[:1], weights[:1]


def in_one_state(self, within):
    losses, carry = RUN(self, within)
    return losses, {name: value.mean(0, keepdim=True).expand_as(value) for name, value in carry.items()}


RUN = truncated.Unrolled.run


def test_the_figure_shows_noise_that_is_not_summed_along_an_episode():
    with mock.patch.object(truncated.Moves, "__init__", only_this_truncation):
        assert worst(engine("pes"), Driven()) > 2 * tolerance("standard_errors")


@pytest.mark.parametrize("truncation", TRUNCATED)
def test_the_figure_shows_a_state_that_members_share(truncation):
    with mock.patch.object(truncated.Unrolled, "run", in_one_state):
        assert worst(engine(truncation), Driven()) > 2 * tolerance("standard_errors")


@pytest.mark.parametrize("truncation", TRUNCATED)
@pytest.mark.parametrize("shaping", ["raw", "centred-rank", "baseline-pair"])
def test_an_episode_of_one_truncation_is_the_plain_estimate(truncation, shaping):
    problem = Recurrence(size=4, positive=1, length=5, horizon=1).build(Key(3))
    cut, plain = (Run(engine(kind, shaping=shaping, sigma_schedule="exponential", sigma_decay=0.9), problem).step(3) for kind in (truncation, "none"))
    assert torch.allclose(cut.grads["theta"], plain.grads["theta"], rtol=tolerance("rounding32"))
    assert torch.allclose(cut.loss.float(), plain.loss.float(), rtol=tolerance("rounding32"))


def test_persistent_noise_is_scaled_by_the_sigma_it_was_drawn_with():
    problem, rule = Driven(), engine("pes", sigma_schedule="exponential", sigma_decay=0.25, sigma_floor=0.01, population=512)
    assert worst(rule, problem) <= tolerance("standard_errors")


def test_noise_reuse_keeps_the_noise_of_an_episode_and_draws_another_for_the_next():
    run = Run(engine("nres"), Driven())
    with mock.patch.object(ES, "draws", autospec=True, side_effect=ES.draws) as spy:
        [run.step(step) for step in (4, 5, 8)]
    used = [call.args[3] for call in spy.call_args_list]
    assert [key.step for key in used] == [4, 4, 8]


@pytest.mark.parametrize("truncation", TRUNCATED)
def test_influence_balancing_turns_a_truncated_estimate_round(truncation):
    problem, rule = Recurrence(size=6, positive=2, horizon=16, batch_size=2).build(Key(3)), engine(truncation, population=128)
    exact, cut, whole = full(problem), Run(rule, FromClean(problem)).episode(0), Run(rule, problem).episode(0)
    assert float(cut @ exact) < 0 < float(whole @ exact)


# -- the members' states ---------------------------------------------------------------------------------------------------------


def test_every_member_runs_on_in_a_state_of_its_own():
    run = Run(engine(population=8), Driven())
    run.step(0)
    run.step(1)
    assert len(run.state[CARRY + "s"].unique(dim=0)) == 8


@pytest.mark.parametrize("truncation", TRUNCATED)
def test_a_state_is_what_the_members_own_parameters_made(truncation):
    run = Run(engine(truncation, population=4), Driven())
    carry = [run.problem.start(None)] * 4
    for step in range(3):
        address = run.key.at(step if truncation == "pes" else 0)
        moves = {name: run.engine.draws(run.problem.params(), {}, address).moves(name, 0, 2).dense() for name in run.problem.params()}
        run.step(step)
        for member in range(4):
            sign = 1 if member < 2 else -1
            values = {name: value + sign * run.engine.sigma * moves[name][member % 2] for name, value in run.problem.params().items()}
            carry[member] = run.problem.unroll(values, carry[member], run.problem.batch(step, World()), {})[1]
    assert torch.allclose(run.state[CARRY + "s"], torch.stack([each["s"] for each in carry]), rtol=tolerance("rounding64"))


@pytest.mark.parametrize("truncation", TRUNCATED)
def test_after_the_horizon_everything_begins_again(truncation):
    old, new = (Run(engine(truncation), Driven()) for _ in range(2))
    old.episode(0)
    first, second = old.step(4), new.step(4)
    assert same_tree(first.grads, second.grads)
    assert same_tree(first.state, second.state)


@pytest.mark.parametrize("truncation", TRUNCATED)
def test_a_chunk_changes_rounding_only(truncation):
    whole, parts = (Run(engine(truncation, kind=Eggroll, population=12, chunk=chunk), Driven()) for chunk in (None, 4))
    for step in range(6):
        one, other = whole.step(step), parts.step(step)
        for here, there in ((one.grads, other.grads), (one.state, other.state)):
            assert all(torch.allclose(here[name].double(), there[name].double(), rtol=tolerance("rounding64"), atol=1e-12) for name in here)


@dataclass(frozen=True)
class Taped(World):
    """A rank that hears what the others' tapes hold: run them all once to record, then again to compare."""

    tapes: tuple = ()

    def gather(self, tensor):
        own = self.tapes[self.rank]
        own.append(tensor.clone())
        place = len(own) - 1
        return [tape[place] if len(tape) > place else torch.zeros_like(tensor) for tape in self.tapes]


@pytest.mark.parametrize("truncation", TRUNCATED)
def test_ranks_that_divide_the_population_hold_the_whole_of_it(truncation):
    alone = Run(engine(truncation, population=10), Driven())
    ranks = [Run(engine(truncation, population=10), Driven()) for _ in range(2)]
    for step in range(3):
        expected = alone.step(step)
        tapes: tuple = ([], [])
        before = [run.state for run in ranks]
        for rank, run in enumerate(ranks):
            run.step(step, world=Taped(rank, 2, tapes))
            run.state = before[rank]
        recorded = tuple(list(tape) for tape in tapes)
        for rank, run in enumerate(ranks):
            heard = tuple([] if other == rank else recorded[other] for other in range(2))
            found = run.step(step, world=Taped(rank, 2, heard))
            assert all(torch.allclose(found.grads[name], expected.grads[name], rtol=tolerance("rounding64")) for name in expected.grads)
            assert all(torch.allclose(found.state[name], expected.state[name], rtol=tolerance("rounding64")) for name in expected.state)


@pytest.mark.parametrize("truncation", TRUNCATED)
def test_resuming_in_mid_episode_is_bit_exact(tmp_path, truncation):
    settings = TrainSettings(
        problem="recurrence",
        problem_settings={"size": 4, "positive": 1, "horizon": 5, "batch_size": 2},
        engine="eggroll",
        engine_settings={"truncation": truncation, "population": 8},
        steps=9,
    )
    trainer.fit(trainer.build(settings), run_folder=tmp_path / "unbroken")
    trainer.fit(trainer.build(settings), run_folder=tmp_path / "broken", on_step=lambda training, row: training.step == 7)
    trainer.fit(trainer.resume(tmp_path / "broken"))
    assert contents(tmp_path / "broken")[:2] == contents(tmp_path / "unbroken")[:2]
    assert [row for row in rows(tmp_path / "broken") if "fitness_deviation" in row] == [
        row for row in rows(tmp_path / "unbroken") if "fitness_deviation" in row
    ]


# -- trouble ---------------------------------------------------------------------------------------------------------------------


def test_a_state_that_is_lost_begins_again_with_noise_of_its_own_and_is_counted():
    broken, whole = Run(engine(population=8), Breaking()), Run(engine(population=8), Driven())
    assert int(broken.step(0).metrics["restarts"]) == 8
    assert broken.state[AGE].tolist() == [0] * 8
    found, expected = broken.step(1), whole.step(1)  # `whole` is in its first truncation too
    assert int(found.metrics["restarts"]) == 0
    assert same_tree(found.grads, expected.grads)
    assert same_tree(found.state, expected.state)


def test_a_loss_that_is_not_finite_is_the_worst_and_does_not_reach_the_mean():
    class Half(Driven):
        def unroll(self, params, carry, batch, buffers):
            loss, moved = super().unroll(params, carry, batch, buffers)
            return loss.where(params["bias"][0] > self.bias[0], math.inf), moved

    found = Run(engine(population=8), Half()).step(0)
    assert int(found.metrics["members_not_finite"]) == int(found.metrics["restarts"]) == 4
    assert bool(found.loss.isfinite())
    assert all(bool(grad.isfinite().all()) for grad in found.grads.values())


def test_a_loss_that_no_vmap_can_batch_is_taken_member_by_member_and_counted():
    class Unbatched(Driven):
        def unroll(self, params, carry, batch, buffers):
            loss, moved = super().unroll(params, carry, batch, buffers)
            return torch.tensor(loss.item(), dtype=torch.float64), moved

    looped, batched = Run(engine(population=6, chunk=2), Unbatched()), Run(engine(population=6, chunk=2), Driven())
    for step in range(3):
        found, expected = looped.step(step), batched.step(step)
        assert int(found.metrics["fallback_member_loop"]) == 6
        assert all(torch.allclose(found.grads[name], expected.grads[name], rtol=tolerance("rounding64")) for name in expected.grads)


def test_a_problem_without_unroll_is_refused_with_what_to_do():
    with pytest.raises(CapabilityError, match=r"needs UNROLL, which Supervised does not provide.*Implement start\(batch\) and unroll\(params, carry"):
        Learner(nn.Linear(2, 2), F.cross_entropy, engine="es", truncation="pes")


@pytest.mark.parametrize("truncation", TRUNCATED)
def test_a_problem_without_a_loss_of_the_whole_can_be_unrolled(truncation):
    class Cut(Driven):
        losses = Problem.losses

    assert Cut().provides == Needs.UNROLL
    fit_check(engine(truncation), Cut())
    with pytest.raises(CapabilityError, match="needs VALUE"):
        fit_check(engine("none"), Cut())


def test_without_a_horizon_nothing_can_be_unrolled():
    class Endless(Driven):
        horizon = None
        __init__ = Problem.__init__

    assert Needs.UNROLL not in Endless().provides


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truncation": "npes"}, "unknown truncation 'npes'. Did you mean"),
        ({"truncation": "pes", "antithetic": False}, "antithetic=False is not allowed"),
        ({"truncation": "pes", "adapt": "nes", "shaping": "nes"}, "sigma_schedule"),
        ({"truncation": "nres", "noise_reuse": 4}, "noise_reuse=4 is not allowed"),
        ({"truncation": "nres", "groups": 2}, "groups=2 is not allowed"),
    ],
)
def test_settings_that_do_not_go_with_truncations_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        registry.engine("es", settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": lambda self, batch: torch.ones(3)}, "start returned Tensor; it must return a dict of tensors"),
        ({"unroll": lambda self, params, carry, batch, buffers: (params["bias"].sum(), {"t": carry["s"]})}, "names, shapes and dtypes must stay"),
        ({"unroll": lambda self, params, carry, batch, buffers: (params["bias"], carry)}, "a loss of shape .3,.; it must be a scalar"),
    ],
)
def test_a_wrong_view_is_named(change, message):
    problem = type("Wrong", (Driven,), change)()
    with pytest.raises(ShapeError, match=message):
        Run(engine(population=4), problem).step(0)


# -- the whole -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", TRUNCATED)
def test_training_in_truncations_comes_down_on_influence_balancing(truncation):
    settings = TrainSettings(
        problem="recurrence",
        problem_settings={"size": 4, "positive": 1, "horizon": 8, "batch_size": 2},
        engine="es",
        engine_settings={"truncation": truncation, "population": 16, "sigma": 0.1, "shaping": "raw"},
        lr=0.03,
        steps=80,
        log_every=80,
    )
    training = trainer.build(settings)
    before = trainer.evaluate(training)["test_loss"]
    assert trainer.fit(training).test_loss < 0.25 * before


@pytest.mark.parametrize("truncation", TRUNCATED)
def test_truncated_engines_keep_the_claims_that_are_made_of_any(truncation):
    results = {result.name: result for result in testing.run(engine(truncation), Driven)}
    assert "same_key_gives_the_same_bits" in results
    assert [name for name, result in results.items() if not result.passed] == ["loss_is_the_problems_own"]  # it is a truncation's, not an episode's
