"""Classic control: the tensors against the published equations written out one episode at a time in NumPy; starts, masks, vmap."""

import math

import matplotlib.axes
import numpy as np
import pytest
import torch
from torch import nn

from altgrad import report, tables, trainer
from altgrad.compare_row import Row
from altgrad.engine import Needs
from altgrad.errors import SettingError, ShapeError, UsageError
from altgrad.problem import Batch
from altgrad.problems.control import TASKS, Control, Pendulum, returns
from altgrad.rng import Key
from altgrad.training import TrainSettings
from altgrad.world import World
from tests.tolerances import tolerance


def cart_pole_step(state, push):
    """Barto, Sutton and Anderson's equations, Euler, with the constants of CartPole-v1: (state, whether it still stands)."""
    x, x_dot, theta, theta_dot = state
    total, pole, half = 1.0 + 0.1, 0.1, 0.5
    temp = (push + pole * half * theta_dot**2 * math.sin(theta)) / total
    theta_acc = (9.8 * math.sin(theta) - math.cos(theta) * temp) / (half * (4.0 / 3.0 - pole * math.cos(theta) ** 2 / total))
    x_acc = temp - pole * half * theta_acc * math.cos(theta) / total
    state = (x + 0.02 * x_dot, x_dot + 0.02 * x_acc, theta + 0.02 * theta_dot, theta_dot + 0.02 * theta_acc)
    return state, abs(state[0]) <= 2.4 and abs(state[2]) <= 12 * math.pi / 180


def cart_pole_return(state, policy):
    """Steps until it falls, 500 at most; the step in which it falls counts."""
    for done in range(1, 501):
        state, stands = cart_pole_step(state, 10.0 if policy(np.array(state)) > 0 else -10.0)
        if not stands:
            return done
    return 500


def pendulum_return(state, policy):
    """Pendulum-v1's equations and rewards over 200 steps."""
    theta, speed = state
    total = 0.0
    for _ in range(200):
        torque = 2 * math.tanh(policy(np.array([math.cos(theta), math.sin(theta), speed])))
        angle = (theta + math.pi) % (2 * math.pi) - math.pi
        total -= angle**2 + 0.1 * speed**2 + 0.001 * torque**2
        speed = min(8.0, max(-8.0, speed + (3 * 10.0 / 2 * math.sin(theta) + 3.0 * torque) * 0.05))
        theta += speed * 0.05
    return total


REFERENCES = {"cart-pole": cart_pole_return, "pendulum": pendulum_return}
LINEAR = {"cart-pole": [[0.1, 0.4, 6.0, 1.0], [0.0, 0.0, 1.0, 0.0], [1.0, -1.0, 0.5, 2.0]], "pendulum": [[0.5, -3.0, -0.7], [-1.0, 0.2, 0.4], [2.0, 1.0, 1.0]]}


def build(task="cart-pole", **settings):
    return Control(task=task, **settings).build(Key(0))


def parameters(problem, seed, dtype=torch.float32):
    """Large weights without biases: policies that differ, and push to either side."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(p.shape, generator=generator) if p.ndim > 1 else torch.zeros(p.shape)).to(dtype) for name, p in problem.params().items()}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_returns_are_those_of_the_published_equations(task):
    starts = build(task, batch_size=5).batch(3, World()).inputs.double()
    for weights in LINEAR[task]:
        row = torch.tensor(weights, dtype=torch.float64)
        simulated = returns(TASKS[task], lambda states, row=row: TASKS[task].observe(states) @ row, starts)
        expected = [REFERENCES[task](tuple(start.tolist()), lambda seen, weights=weights: float(np.dot(seen, weights))) for start in starts]
        np.testing.assert_allclose(simulated.numpy(), expected, rtol=tolerance("rounding64"))


def test_one_step_of_the_cart_pole_is_that_of_the_published_equations():
    states = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (20, 4)))
    moved, reward, stands = TASKS["cart-pole"].advance(states, torch.linspace(-1, 1, 20))
    for i, state in enumerate(states):
        expected, upright = cart_pole_step(tuple(state.tolist()), 10.0 if i >= 10 else -10.0)
        np.testing.assert_allclose(moved[i].numpy(), expected, rtol=tolerance("rounding64"))
        assert (float(reward[i]), bool(stands[i])) == (1.0, upright)


@pytest.mark.parametrize(("place", "limit"), [(0, 2.4), (2, 12 * math.pi / 180)])
def test_the_cart_pole_ends_beyond_its_limits_and_not_at_them(place, limit):
    states = torch.zeros(4, 4, dtype=torch.float64)
    states[:, place] = torch.tensor([limit, -limit, limit + 1e-6, -limit - 1e-6], dtype=torch.float64)
    assert TASKS["cart-pole"].advance(states, torch.zeros(4))[2].tolist() == [True, True, False, False]


def test_the_references_tell_policies_apart():
    found = {round(cart_pole_return((0.01, 0.02, 0.03, 0.04), lambda seen, w=w: float(np.dot(seen, w)))) for w in LINEAR["cart-pole"]}
    assert len(found) == 3
    assert 500 in found


def test_a_cart_pole_that_has_fallen_earns_nothing_more_and_stays_finite():
    problem = build()
    losses = problem.losses({name: torch.full_like(p, 3.0) for name, p in problem.params().items()}, problem.batch(0, World()), {})
    assert ((losses > -20) & (losses < -5)).all()  # pushed one way it falls in about ten steps


def test_a_policy_that_gives_nan_loses_the_pole_and_gets_nan_on_the_pendulum():
    broken = {task: build(task).losses({n: p * float("nan") for n, p in build(task).params().items()}, build(task).batch(0, World()), {}) for task in TASKS}
    assert broken["pendulum"].isnan().all()
    assert (broken["cart-pole"] > -20).all()


def test_a_pendulum_at_rest_and_upright_costs_nothing():
    assert returns(Pendulum(), lambda states: torch.zeros(len(states)), torch.zeros(2, 2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_losses_under_vmap_are_those_of_a_loop(task):
    problem = build(task, batch_size=3)
    batch, members = problem.batch(0, World()), [parameters(problem, seed, torch.float64) for seed in (0, 7, 11)]
    batch = batch._replace(inputs=batch.inputs.double())  # in float32 a push could change sides with the last digit of a sum
    stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}
    together = torch.func.vmap(lambda params: problem.losses(params, batch, {}))(stacked)
    apart = torch.stack([problem.losses(member, batch, {}) for member in members])
    assert together.shape == (3, 3)
    assert len(apart.flatten().unique()) > 3
    assert torch.allclose(together, apart, rtol=tolerance("rounding64"))


@pytest.mark.parametrize("task", sorted(TASKS))
def test_losses_are_minus_the_returns_of_the_policy_that_forward_reads(task):
    problem = build(task)
    params, batch = parameters(problem, 1), problem.batch(0, World())
    read = returns(problem.task, lambda states: problem.forward(params, states, {}).squeeze(1), batch.inputs)
    assert torch.equal(problem.losses(params, batch, {}), -read)


def test_no_graph_is_kept_of_detached_parameters():
    problem = build()
    assert not problem.losses(parameters(problem, 0), problem.batch(0, World()), {}).requires_grad


@pytest.mark.parametrize("task", sorted(TASKS))
def test_start_states_are_a_function_of_key_and_step(task):
    first, again, later = build(task).batch(4, World()), build(task).batch(4, World()), build(task).batch(5, World())
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, later.inputs)
    assert not torch.equal(first.inputs, Control(task=task).build(Key(1)).batch(4, World()).inputs)


def test_ranks_share_the_episodes_of_one_process():
    problem = build(batch_size=7)
    parts = [problem.batch(2, World(rank=rank, size=3)) for rank in range(3)]
    assert torch.equal(torch.cat([part.inputs for part in parts]), problem.batch(2, World()).inputs)
    assert [part.first for part in parts] == [0, 2, 4]


@pytest.mark.parametrize(("task", "width"), [("cart-pole", [0.05] * 4), ("pendulum", [math.pi, 1.0])])
def test_start_states_fill_the_published_box(task, width):
    states = build(task, batch_size=2000).batch(0, World()).inputs
    assert (states.abs() < torch.tensor(width)).all()
    spread = states.std(0) / torch.tensor(width) * math.sqrt(3)  # 1 for a uniform law
    assert torch.allclose(spread, torch.ones(len(width)), atol=0.05)  # its standard error over 2,000 draws is 1 %


def test_evaluation_is_the_mean_return_of_the_same_hundred_episodes_whatever_the_seed():
    first, second = build(), Control().build(Key(9))
    params = parameters(first, 2)
    found = first.evaluate(lambda states: first.forward(params, states, {}))
    assert found == second.evaluate(lambda states: second.forward(params, states, {}))
    assert found["return"] == -found["loss"]
    starts = first.starts(Key(0).fold("control", "test"), range(100))
    assert math.isclose(found["return"], float(-first.losses(params, Batch(starts, None), {}).mean()), rel_tol=tolerance("rounding32"))


def test_the_test_episodes_are_not_those_of_another_split():
    problem = build("pendulum")
    params = parameters(problem, 2)
    test, valid = (problem.evaluate(lambda states: problem.forward(params, states, {}), split=split) for split in ("test", "validation"))
    assert test["return"] != valid["return"]


def test_control_provides_values_and_no_gradient():
    assert build().provides == Needs.VALUE


def test_the_default_policy_has_97_parameters():
    assert sum(p.numel() for p in build().params().values()) == 97


def test_a_policy_in_bfloat16_runs_on_a_simulator_in_float32():
    problem = build()
    losses = problem.losses({name: p.detach().bfloat16() for name, p in problem.params().items()}, problem.batch(0, World()), {})
    assert losses.dtype == torch.float32
    assert torch.equal(losses, losses.round())


def test_a_policy_with_two_outputs_is_refused_before_training():
    problem = build()
    problem.model = nn.Linear(4, 2)
    with pytest.raises(ShapeError, match=r"\(8, 2\) for 8 episodes; a policy must return \[8, 1\]"):
        problem.check_batch(problem.batch(0, World()))


def test_a_policy_that_reads_something_else_is_refused_before_training():
    problem = build()
    problem.model = nn.Linear(3, 1)
    with pytest.raises(ShapeError, match=r"observations of shape \(8, 4\)"):
        problem.check_batch(problem.batch(0, World()))


def test_the_default_policy_passes_the_check():
    for task in TASKS:
        build(task).check_batch(build(task).batch(0, World()))


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'cart-pole'"):
        Control(task="cartpole")


def test_no_episodes_are_refused():
    with pytest.raises(SettingError, match="batch_size=0"):
        Control(batch_size=0)


def test_more_processes_than_episodes_are_refused():
    with pytest.raises(SettingError, match="number of processes, 3"):
        build(batch_size=2).batch(0, World(rank=0, size=3))


def test_an_evolution_strategy_learns_to_balance_the_pole():
    problem, sigma = build(), 0.3
    params = {name: p.detach().clone() for name, p in problem.params().items()}
    generator = torch.Generator().manual_seed(0)
    run = torch.func.vmap(lambda moved, states: problem.losses(moved, Batch(states, None), {}).mean(), in_dims=(0, None))
    for step in range(8):
        noise = {name: torch.randn(32, *p.shape, generator=generator) for name, p in params.items()}
        pairs = {name: torch.cat([p + sigma * noise[name], p - sigma * noise[name]]) for name, p in params.items()}
        ranks = run(pairs, problem.batch(step, World()).inputs).argsort().argsort().float() / 63 - 0.5
        weights = (ranks[:32] - ranks[32:]) / 32
        params = {name: p - 0.5 * torch.tensordot(weights, noise[name], 1) for name, p in params.items()}
    before = problem.evaluate(lambda states: problem.forward(problem.params(), states, {}))["return"]
    assert problem.evaluate(lambda states: problem.forward(params, states, {}))["return"] > 3 * before


# -- shown -----------------------------------------------------------------------------------------------------------------------


def test_a_run_trains_is_evaluated_and_is_plotted_as_a_return(tmp_path, monkeypatch):
    seen = []
    plain = matplotlib.axes.Axes.set
    monkeypatch.setattr(matplotlib.axes.Axes, "set", lambda self, **given: seen.append(given) or plain(self, **given))
    settings = TrainSettings(problem="altgrad.problems.control:Control", engine="es", engine_settings={"population": 2, "sigma": 0.5}, steps=2)
    result = trainer.fit(trainer.build(settings), run_folder=tmp_path / "run")
    assert -500 <= result.test_loss <= -1
    assert report.plot_run(tmp_path / "run").read_bytes().startswith(b"\x89PNG")
    assert [(given["title"].split(" on ")[0], given.get("yscale")) for given in seen] == [("Training loss", "linear"), ("Test return", None)]


def row(*ends):
    """A row of a comparison whose seeds ended in these figures."""
    plain = dict.fromkeys(("steps", "forwards", "backwards", "seconds", "lr"), 0.0)
    losses = [end["test_loss"] for end in ends]
    return Row(
        label="es",
        engine="es",
        settings={},
        baseline=False,
        accuracy=None,
        accuracy_spread=None,
        accuracies=[],
        loss=losses[0],
        loss_spread=None,
        losses=losses,
        peak_memory_bytes=0,
        saved_bytes=0,
        cosine=None,
        tuning={},
        diverged=0,
        curves=[[{"step": 1, "forwards": 1, "backwards": 0, "seconds": 0.0, **end}] for end in ends],
        **plain,
    )


def test_a_table_shows_the_mean_return_and_its_spread():
    found = row({"test_return": 480.0, "test_loss": -480.0}, {"test_return": 500.0, "test_loss": -500.0})
    assert tables.cells(found)[1] == "490.0 ± 14.1"
    assert tables.headings([found])[1] == "test return"


def test_a_table_without_returns_shows_the_loss_as_before():
    found = row({"test_loss": 0.25})
    assert tables.cells(found)[1] == "0.25"
    assert tables.headings([found])[1] == "test loss"
