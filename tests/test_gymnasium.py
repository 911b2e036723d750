"""The problem `gymnasium`: returns of black-box environments, here of a stand-in for the package that keeps its interface."""

import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_resume import contents

from altgrad import registry, trainer
from altgrad.errors import MissingExtraError, SettingError, ShapeError, UsageError
from altgrad.problems.gymnasium import Gymnasium, GymnasiumProblem, actions_of, outputs_for
from altgrad.rng import Key
from altgrad.trainer import TrainSettings
from altgrad.world import World

FACTORY = "altgrad.problems.gymnasium:Gymnasium"


def box(low, high):
    low, high = np.array(low, dtype=np.float32), np.array(high, dtype=np.float32)
    return SimpleNamespace(low=low, high=high, shape=low.shape, dtype=np.dtype(np.float32))


class Corridor:
    """A walker starts at a whole number that the seed decides, and is paid 1 for every step to the right; it falls off at ±10."""

    observation_space = box([-10.0, 0.0], [10.0, 1.0])
    action_space = SimpleNamespace(n=2, start=0)

    def reset(self, *, seed):
        self.place, self.taken = seed % 5, 0
        return self.seen(), {}

    def seen(self):
        return np.array([self.place, 1.0], dtype=np.float32)

    def step(self, action):
        assert action in (0, 1)
        self.place, self.taken = self.place + (1 if action else -1), self.taken + 1
        return self.seen(), float(action), abs(self.place) >= 10, self.taken >= 12, {}


@pytest.fixture
def package(monkeypatch):
    known = {"CartPole-v1": Corridor, "Corridor-v0": Corridor}

    def make(name):
        if name not in known:
            raise KeyError(f"Environment `{name}` doesn't exist.")
        return known[name]()

    monkeypatch.setitem(sys.modules, "gymnasium", SimpleNamespace(make=make))
    return known


@pytest.fixture
def problem(package):
    return Gymnasium(environment="Corridor-v0", batch_size=3).build(Key(0))


def always(action):
    return lambda seen: torch.eye(2)[action].expand(len(seen), 2)


@pytest.mark.parametrize(("seed", "action", "expected"), [(0, 1, 10.0), (4, 1, 6.0), (2, 0, 0.0)])
def test_a_return_is_the_sum_of_rewards_until_the_end(problem, seed, action, expected):
    assert problem.returns(always(action), torch.tensor([seed])).tolist() == [expected]


def test_episodes_end_where_the_environment_cuts_them_and_after_so_many_steps(package):
    turning = torch.tensor([0])

    def policy(seen):
        turning.add_(1)
        return always(int(turning) % 2)(seen)

    short = Gymnasium(steps=4).build(Key(0))
    assert short.returns(policy, torch.tensor([0])).item() == 2
    turning.zero_()
    assert Gymnasium().build(Key(0)).returns(policy, torch.tensor([0])).item() == 6


def test_episodes_run_together_as_they_do_alone(problem):
    def policy(seen):
        return torch.stack([seen[:, 0] - 2.5, torch.zeros(len(seen))], 1)

    seeds = torch.tensor([0, 1, 2, 3, 4])
    assert torch.equal(problem.returns(policy, seeds), torch.cat([problem.returns(policy, seed[None]) for seed in seeds]))


def test_losses_are_minus_the_returns_of_the_policy_that_forward_reads(problem):
    params, batch = problem.params(), problem.batch(0, World())
    losses = problem.losses(params, batch, {})
    assert torch.equal(losses, -problem.returns(lambda seen: problem.forward(params, seen, {}), batch.inputs))
    assert losses.shape == (3,)


def test_seeds_are_a_function_of_key_and_step_that_ranks_share(problem):
    whole = problem.batch(4, World()).inputs
    assert torch.equal(whole, problem.batch(4, World()).inputs)
    assert not torch.equal(whole, problem.batch(5, World()).inputs)
    assert torch.equal(torch.cat([problem.batch(4, World(rank, 2)).inputs for rank in range(2)]), whole)
    assert bool((whole >= 0).all())


def test_discrete_actions_are_the_greatest_output_counted_from_the_start():
    space = SimpleNamespace(n=3, start=5)
    assert outputs_for(space) == 3
    assert actions_of(space, torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])) == [6, 5]


def test_actions_in_a_box_fill_its_bounds_and_are_free_where_there_are_none():
    space = box([[-2.0, 0.0, -np.inf]], [[2.0, 1.0, np.inf]])
    assert outputs_for(space) == 3
    actions = actions_of(space, torch.tensor([[0.0, 0.0, 7.0], [100.0, -100.0, -7.0]]))
    assert np.allclose(actions, [[[0.0, 0.5, 7.0]], [[2.0, 0.0, -7.0]]])
    assert actions[0].dtype == np.float32


@pytest.mark.parametrize("engine", ["eggroll", "spsa", "ask-tell"])
def test_resume_is_bit_exact(engine, package, tmp_path):
    settings = TrainSettings(problem=FACTORY, engine=engine, engine_settings={"population": 8, "sigma": 0.5}, steps=4)
    trainer.fit(trainer.build(settings), run_folder=tmp_path / "unbroken")
    trainer.fit(trainer.build(settings), run_folder=tmp_path / "broken", on_step=lambda training, row: training.step == 2)
    trainer.fit(trainer.resume(tmp_path / "broken"))
    assert contents(tmp_path / "broken")[:2] == contents(tmp_path / "unbroken")[:2]


def test_an_evolution_strategy_learns_to_walk_right(problem):
    rule = registry.engine("eggroll", {"population": 64, "sigma": 0.3})
    params = {name: value.detach().clone() for name, value in problem.params().items()}
    optimizer = torch.optim.Adam(params.values(), lr=0.1)
    for step in range(15):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # once every member walks right, none can be told apart
            found = rule.estimate(problem, params, {}, problem.batch(step, World()), Key(1, step), World())
        for name, value in params.items():
            value.grad = found.grads[name]
        optimizer.step()
    assert problem.evaluate(lambda seen: problem.forward(params, seen, {}))["return"] > 7
    assert int(found.metrics["fallback_member_loop"]) == 64


def test_evaluation_is_that_of_the_same_episodes_whatever_the_seed(package):
    one, other = (Gymnasium().build(Key(seed)).evaluate(always(1)) for seed in (0, 1))
    assert one == other
    assert one["loss"] == -one["return"]


def test_a_policy_with_the_wrong_outputs_is_refused_before_training(package):
    problem = GymnasiumProblem(Corridor, torch.nn.Linear(2, 3), episodes=2, steps=9, key=Key(0))
    with pytest.raises(ShapeError, match=r"the model returned shape \(2, 3\) for 2 observations; actions of .* need \[2, 2\]"):
        problem.check_batch(problem.batch(0, World()))


def test_the_default_policy_passes_the_check(problem):
    problem.check_batch(problem.batch(0, World()))


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'altgrad\[gymnasium\]'"):
        Gymnasium().build(Key(0))


def test_an_unknown_environment_is_refused_by_name(package):
    with pytest.raises(UsageError, match=r"gymnasium cannot make environment='Nope-v0': .*doesn't exist"):
        Gymnasium(environment="Nope-v0").build(Key(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation_space": SimpleNamespace(n=4, shape=())}, "observations of .* are not understood"),
        ({"action_space": SimpleNamespace(nvec=[2, 2], shape=(2,))}, "actions of .* are not understood; they must be Discrete or Box"),
    ],
    ids=["observations", "actions"],
)
def test_spaces_that_are_not_understood_are_refused(package, change, message):
    package["Odd-v0"] = type("Odd", (Corridor,), change)
    with pytest.raises(UsageError, match=message):
        Gymnasium(environment="Odd-v0").build(Key(0))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"steps": 0}, {"steps": 2.5}])
def test_a_setting_out_of_range_is_refused(wrong):
    with pytest.raises(SettingError, match="is not allowed; it must be an integer of at least 1"):
        Gymnasium(**wrong)
