"""random-subspace: θ = θ₀ + P z with orthonormal columns; the inner engine's estimate is of Pᵀ∇f, and nothing else moves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_resume import contents, rows
from test_truncated import Driven, full
from tolerances import tolerance
from torch import nn

from altgrad import Key, Learner, registry, trainer
from altgrad.alignment import exact_gradient
from altgrad.conformance import probes
from altgrad.engine import Bias, Needs, Split
from altgrad.engines.subspace import SEED, Projection, RandomSubspace, Z
from altgrad.errors import CapabilityError, SettingError, UsageError
from altgrad.trainer import TrainSettings
from altgrad.world import World

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def matrix(projection, params):
    """P [d, D], column by column."""
    units = torch.eye(projection.dimension, dtype=torch.float64)
    return torch.stack([torch.cat([projection.move(unit, name, value).flatten() for name, value in params.items()]) for unit in units], 1)


def params_of(problem):
    return {name: value.detach() for name, value in problem.params().items()}


def flat(tree, names):
    return torch.cat([tree[name].flatten().double() for name in names])


def begun(inner="backprop", settings="", *, dimension=7, problem=None):
    """An engine on a float64 network, ready to look: (engine, problem, params, state)."""
    problem = problem or probes.network(torch.float64)
    rule = RandomSubspace(dimension=dimension, inner=inner, inner_settings=settings)
    params = {**params_of(problem), **rule.aux(problem, Key(1))}
    params[Z] = 0.1 * torch.arange(1.0, dimension + 1, dtype=params[Z].dtype)
    return rule, problem, params, rule.init(problem, params, Key(1))


def estimate(rule, problem, params, state, step=0):
    return rule.estimate(problem, params, state, problem.batch(0, World()), Key(2, step), World())


# -- the projection --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [1, 7, 24, 59])
def test_columns_are_orthonormal(dimension):
    params = params_of(probes.network(torch.float64))
    made = matrix(Projection(5, params, dimension), params)
    assert torch.allclose(made.T @ made, torch.eye(dimension, dtype=torch.float64), atol=tolerance("rounding64"))


def test_every_coordinate_has_an_equal_share_of_the_parameters():
    params = {"a": torch.zeros(30, 2), "b": torch.zeros(43)}
    counts = (matrix(Projection(5, params, 10), params) != 0).sum(0)
    assert sorted(counts.tolist()) == [10] * 7 + [11] * 3


def test_another_key_is_another_subspace_and_the_same_key_the_same():
    params = params_of(probes.network())
    one, again, other = (matrix(Projection(seed, params, 7), params) for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_signs_and_coordinates_fall_evenly():
    params = {"a": torch.zeros(4000)}
    made = matrix(Projection(5, params, 2), params)
    assert abs(float((made > 0).sum()) / 4000 - 0.5) < 4 * 0.5 / 4000**0.5
    assert abs(float((made[:2000, 0] != 0).sum()) / 2000 - 0.5) < 4 * 0.5 / 2000**0.5


# -- the estimate ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["backprop", "forward"])
def test_the_gradient_of_an_exact_or_unbiased_inner_engine_is_the_projected_one(inner):
    settings = "" if inner == "backprop" else "space=weights,tangents=7,combine=orthogonal"  # as many directions as dimensions: exact
    rule, problem, params, state = begun(inner, settings)
    projection = rule.projection(problem, state, params_of(problem))
    there = projection.apply(params_of(problem), params[Z])
    exact = exact_gradient(problem, there, problem.batch(0, World()), Key(2))[1]
    found = estimate(rule, problem, params, state)
    assert list(found.grads) == [Z]
    expected = matrix(projection, params_of(problem)).T @ flat(exact, params_of(problem))
    assert torch.allclose(found.grads[Z], expected, rtol=tolerance("oracle64"))


@pytest.mark.parametrize("inner", ["es", "eggroll", "spsa"])
def test_a_populations_estimate_is_that_of_the_function_of_z(inner):
    rule, problem, params, state = begun(inner, "population=1000,sigma=0.001,shaping=raw", dimension=4)
    reference = RandomSubspace(dimension=4, inner="backprop")
    exact, found = (estimate(each, problem, params, state).grads[Z] for each in (reference, rule))
    assert float(F.cosine_similarity(found, exact, dim=0)) > 0.99
    assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.1)


def test_activation_space_tangents_reach_z():
    rule, problem, params, state = begun("forward", "tangents=4000", dimension=3)
    exact, found = (estimate(each, problem, params, state).grads[Z] for each in (RandomSubspace(dimension=3, inner="backprop"), rule))
    assert float(F.cosine_similarity(found, exact, dim=0)) > 0.99


def test_the_whole_space_is_a_subspace_of_as_many_dimensions():
    rule, problem, params, state = begun("backprop", dimension=59)
    params[Z].zero_()
    exact = exact_gradient(problem, params_of(problem), problem.batch(0, World()), Key(2))[1]
    assert torch.allclose(estimate(rule, problem, params, state).grads[Z].norm(), flat(exact, params_of(problem)).norm(), rtol=tolerance("rounding64"))


def test_needs_bias_and_split_are_the_inner_engines():
    assert (RandomSubspace(inner="backprop").needs, RandomSubspace(inner="backprop").bias) == (Needs.REVERSE, Bias.EXACT)
    assert (RandomSubspace().needs, RandomSubspace().bias, RandomSubspace().split) == (Needs.VALUE, Bias.SMOOTHED, Split.POPULATION)
    assert RandomSubspace(inner_settings="truncation=nres").needs == Needs.UNROLL


def test_truncated_episodes_can_be_searched_in_a_subspace():
    problem = Driven()
    rule, problem, params, state = begun("es", "truncation=nres,population=2000,shaping=raw,sigma=0.01", dimension=15, problem=problem)
    params[Z].zero_()
    total = torch.zeros(15, dtype=torch.float64)
    for step in range(4):
        found = rule.estimate(problem, params, state, problem.batch(step, World()), Key(2, step), World())
        total, state = total + found.grads[Z], found.state
    expected = matrix(rule.projection(problem, state, params_of(problem)), params_of(problem)).T @ full(problem)
    assert float(F.cosine_similarity(total, expected, dim=0)) > 0.95


# -- training --------------------------------------------------------------------------------------------------------------------


def settings(**changes):
    base = {
        "problem": "blobs:Blobs",
        "engine": "random-subspace",
        "engine_settings": {"dimension": 20, "inner": "eggroll", "inner_settings": "sigma=0.1,population=16"},
        "lr": 0.2,
        "steps": 13,
    }
    return TrainSettings(**{**base, **changes})


def test_more_dimensions_reach_a_lower_loss():
    def loss(dimension):
        training = trainer.build(settings(engine_settings={"dimension": dimension, "inner": "backprop"}, steps=60, log_every=60))
        trainer.fit(training)
        return training.problem.evaluate(training.predict, split="train")["loss"]

    losses = [loss(dimension) for dimension in (1, 6, 67)]
    assert losses[0] > losses[1] > losses[2]


def test_nothing_but_z_moves():
    training = trainer.build(settings(steps=3))
    before = {name: value.clone() for name, value in training.values().items()}
    trainer.fit(training)
    moved = [name for name, value in training.values().items() if not torch.equal(value, before[name])]
    assert moved == [Z]


def test_resume_is_bit_exact(tmp_path):
    trainer.fit(trainer.build(settings()), run_folder=tmp_path / "unbroken")
    trainer.fit(trainer.build(settings()), run_folder=tmp_path / "broken", on_step=lambda training, row: training.step == 7)
    trainer.fit(trainer.resume(tmp_path / "broken"))
    assert contents(tmp_path / "broken")[:2] == contents(tmp_path / "unbroken")[:2]
    assert rows(tmp_path / "broken")[-1]["test_loss"] == rows(tmp_path / "unbroken")[-1]["test_loss"]


def test_settings_survive_a_run_folder_as_text():
    chosen = RandomSubspace(inner="eggroll", inner_settings={"sigma": 0.5, "chunk": None, "antithetic": False})
    assert registry.engine("random-subspace", chosen.settings()) == chosen
    assert (chosen.rule.sigma, chosen.rule.chunk, chosen.rule.antithetic) == (0.5, None, False)


def test_learners_with_seeds_of_their_own_search_spaces_of_their_own():
    made = [Learner(net(), F.cross_entropy, engine="random-subspace", dimension=5, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(made[0].state[SEED], made[1].state[SEED])
    assert not torch.equal(made[0].state[SEED], made[2].state[SEED])


def test_a_learner_that_takes_up_another_ones_state_reads_out_as_that_one():
    model = net()
    one, other = (Learner(copy.deepcopy(model), F.cross_entropy, engine="random-subspace", dimension=5, seed=seed) for seed in (1, 2))
    with torch.no_grad():
        one.aux[Z].add_(1.0)
    other.predict(X)  # its own subspace has been made
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.predict(X), other.predict(X))


def test_moving_a_learner_to_another_dtype_keeps_its_subspace():
    learner = Learner(net(), F.cross_entropy, engine="random-subspace", dimension=5)
    seed = learner.state[SEED].clone()
    learner.to(torch.float64)
    assert torch.equal(learner.state[SEED], seed)
    assert learner.predict(X.double()).dtype == torch.float64


def test_a_baked_model_computes_what_the_learner_predicts_and_training_goes_on():
    learner = Learner(net(), F.cross_entropy, engine="random-subspace", dimension=20, inner="backprop")
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.5)
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        losses.append(float(learner.backward(X, Y).loss))
        optimizer.step()
        if step == 2:
            before = learner.predict(X)
            assert not torch.allclose(learner.model(X), before)
            learner.bake()
            assert torch.equal(learner.model(X), before)
            assert torch.equal(learner.predict(X), before)
    assert losses == sorted(losses, reverse=True)


def test_baking_a_rule_that_trains_the_model_itself_changes_nothing():
    learner = Learner(net(), F.cross_entropy, engine="backprop")
    before = [p.detach().clone() for p in learner.parameters()]
    learner.bake()
    assert all(torch.equal(p, old) for p, old in zip(learner.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_parameters_are_moved_in_float32(dtype):
    problem = probes.network(dtype)
    rule, problem, params, state = begun("es", "population=8", problem=problem)
    assert params[Z].dtype == torch.float32
    moved = rule.bake(problem, params, state)
    assert {value.dtype for name, value in moved.items() if name != Z} == {dtype}
    assert estimate(rule, problem, params, state).grads[Z].dtype == torch.float32


class Twins(World):
    """Two ranks that hold the same."""

    def gather(self, tensor):
        return [tensor, tensor]


def test_a_mean_over_ranks_of_unlike_shares_leaves_the_seed_of_the_subspace_as_it_is():
    state = begun()[3]
    state[SEED] = torch.tensor([2**32 - 1, 2**32 - 2])
    assert torch.equal(Twins(0, 2).mean(state[SEED], shares=[0.3, 0.7]), state[SEED])


# -- trouble ---------------------------------------------------------------------------------------------------------------------


def test_more_dimensions_than_parameters_are_refused():
    with pytest.raises(SettingError, match="dimension=60 is not allowed; it must be at most 59, the number of parameters"):
        RandomSubspace(dimension=60).aux(probes.network(), Key(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner_settings": "sgma=0.1"}, "engine es: unknown setting 'sgma'. Did you mean 'sigma'"),
        ({"inner_settings": "sigma"}, "'sigma' is not of the form name=value"),
        ({"inner_settings": "sigma=0"}, "sigma=0 is not allowed"),
        ({"inner": "egroll"}, "unknown engine 'egroll'. Did you mean 'eggroll'"),
        ({"inner": "random-subspace"}, "a subspace of a subspace"),
        ({"dimension": 0}, "dimension=0 is not allowed"),
        ({"inner": None}, "inner=None is not allowed; it must be the name of an engine"),
        ({"inner_settings": ["sigma=0.1"]}, r"inner_settings=\['sigma=0.1'\] is not allowed; it must be text as sigma=0.1,population=64, or a dict"),
        ({"inner": "blobs:Greedy"}, "inner='blobs:Greedy' needs ENERGY, which a function of z does not provide"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(UsageError, match=message):
        registry.engine("random-subspace", changes)


@pytest.mark.parametrize(
    ("inner", "given", "message"),
    [("toys:Noisy", "", r"inner='toys:Noisy' trains tensors of its own with these settings \(aux.scale\)"), ("forward", "guess=local", "use guess='random'")],
)
def test_an_inner_engine_with_tensors_of_its_own_is_refused(inner, given, message):
    with pytest.raises(CapabilityError, match=message):
        Learner(net(), F.cross_entropy, engine="random-subspace", dimension=5, inner=inner, inner_settings=given)


def test_the_command_lines_form_of_settings_is_understood():
    pairs = registry.split_pairs(["inner=eggroll", "dimension=20", "inner_settings=sigma=0.1;population=16"])
    chosen = registry.engine("random-subspace", pairs)
    assert (chosen.dimension, chosen.rule.name, chosen.rule.sigma, chosen.rule.population) == (20, "eggroll", 0.1, 16)
