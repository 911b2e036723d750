"""Straight-through training: one binary network under every engine, surrogates changed from outside, two stages, and what is refused."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from console import invoke, rows
from tolerances import tolerance
from torch import nn
from torch.nn.utils import parametrize

import altgrad
from altgrad import models, registry, surrogates
from altgrad.engines.straight_through import StraightThrough
from altgrad.errors import CapabilityError, SettingError, UsageError
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key
from altgrad.surrogates.modules import BinaryLinear, BinaryWeight, SignActivation, binary_weights
from altgrad.world import World

KEY = Key(3, 2)
EXACT = tolerance("closed_form64")


def data(count=12, features=8):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(1)), torch.arange(count) % 3


def binary(dtype=torch.float64, **settings):
    """8-6-6-3 with a binary layer in the middle."""
    return models.build("binary-mlp", {"hidden": "6-6", "exempt": "first-last", **settings}, input_shape=(8,), classes=3, key=Key(1)).to(dtype)


def bench(model=None, dtype=torch.float64):
    model = binary(dtype) if model is None else model
    x, y = data()
    problem, batch = Supervised(model, F.cross_entropy), Batch(x.to(dtype), y)
    problem.check_batch(batch)
    return problem, batch


def look(engine, problem, batch, key=KEY):
    if isinstance(engine, tuple):
        engine = registry.engine(*engine)
    altgrad.fit_check(engine, problem)
    params = problem.params()
    return engine.estimate(problem, params, engine.init(problem, params, key), batch, key, World())


def flat(grads):
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


# -- one network, every engine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", surrogates.names("pointwise", operation="sign"))
def test_the_jvp_of_a_binary_network_is_its_vjp(name):
    problem, batch = bench(binary(weights=name, activations=name))
    params = {key: value.detach() for key, value in problem.params().items()}
    tangents = {key: torch.randn(value.shape, generator=torch.Generator().manual_seed(2), dtype=value.dtype) for key, value in params.items()}

    def loss(values):
        return problem.loss(values, batch, problem.fresh_buffers())

    forward = torch.func.jvp(loss, (params,), (tangents,))[1]
    gradient = torch.func.grad(loss)(params)
    backward = sum((gradient[key] * tangents[key]).sum() for key in params)
    assert abs(float(forward)) > 1e-3
    assert abs(float(forward - backward)) <= EXACT * max(1.0, abs(float(forward)))


def test_forward_gradients_over_an_orthonormal_basis_are_backprops_gradient_of_a_binary_network():
    problem, batch = bench()
    size = sum(value.numel() for value in problem.params().values())
    exact = look(("backprop", {}), problem, batch).grads
    basis = look(("forward", {"space": "weights", "combine": "orthogonal", "tangents": size}), problem, batch).grads
    assert all((basis[name] - exact[name]).norm() <= tolerance("oracle64") * max(1.0, float(exact[name].norm())) for name in exact)


@pytest.mark.parametrize("space", ["weights", "activations"])
def test_forward_gradients_of_a_binary_network_are_unbiased(space):
    problem, batch = bench()
    engine, each = registry.engine("forward", {"space": space, "tangents": 64}), []
    exact = flat(look(("backprop", {}), problem, batch).grads)
    for step in range(40):
        each.append(flat(look(engine, problem, batch, KEY.at(step)).grads))
    along = torch.stack(each) @ exact / exact.square().sum()
    assert abs(float(along.mean()) - 1) <= tolerance("standard_errors") * float(along.std()) / math.sqrt(len(along))
    assert float(along.std()) / math.sqrt(len(along)) < 0.1


OTHERS = [
    ("forward", {"tangents": 4}, {"fallback_weight_tangents": 1}),
    ("forward", {"tangents": 4, "space": "weights"}, {}),
    ("eggroll", {"population": 8}, {"fallback_dense_weights": 2}),  # |w| for the scale, and the weight for its sign
    ("es", {"population": 8}, {}),
    ("spsa", {}, {}),
    ("likelihood-ratio", {"copies": 4}, {"fallback_weight_noise": 1, "fallback_copy_loop": 0}),
]


@pytest.mark.parametrize(("name", "settings", "counted"), OTHERS, ids=[f"{name}-{'-'.join(map(str, settings.values()))}" for name, settings, _ in OTHERS])
def test_a_binary_network_runs_unchanged_under(name, settings, counted):
    """What has no low-rank or layer rule is the binary weight, and it is counted; signs are no fallback (batch norm's decomposition is its own)."""
    problem, batch = bench(dtype=torch.float32)
    found = look((name, settings), problem, batch)
    fallbacks = {key: int(value) for key, value in found.metrics.items() if key.startswith("fallback") and key != "fallback_decomposition"}
    assert fallbacks == counted
    assert set(found.grads) == set(problem.params())
    assert all(torch.isfinite(value).all() and bool(value.any()) for key, value in found.grads.items() if "weight" in key)


def test_sign_activations_alone_need_no_fallback():
    model = nn.Sequential(nn.Linear(8, 6), SignActivation("reste"), nn.Linear(6, 3))
    for name, settings in (("forward", {"tangents": 4}), ("eggroll", {"population": 8}), ("likelihood-ratio", {"copies": 4})):
        found = look((name, settings), *bench(model, torch.float32))
        assert {key: int(value) for key, value in found.metrics.items() if key.startswith("fallback") and int(value)} == {}


def test_a_compiled_binary_network_gives_the_same_gradient():
    problem, batch = bench(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(problem.model, fullgraph=True, backend="eager")
    own, theirs = (
        torch.autograd.grad(F.cross_entropy(call(batch.inputs), batch.targets), list(problem.model.parameters())) for call in (problem.model, compiled)
    )
    assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))


# -- the engine --------------------------------------------------------------------------------------------------------------------


def test_without_quantisers_it_is_backprop_and_says_that_it_met_none():
    problem, batch = bench(nn.Sequential(nn.Linear(8, 3)).double())
    own, exact = look(StraightThrough(estimator="reste"), problem, batch), look(("backprop", {}), problem, batch)
    assert all(torch.equal(own.grads[name], exact.grads[name]) for name in exact.grads)
    assert int(own.metrics["quantisers"]) == 0


def test_another_estimator_changes_the_gradient_and_not_the_loss():
    problem, batch = bench()
    own, other = look(StraightThrough(), problem, batch), look(StraightThrough(estimator="swish-sign"), problem, batch)
    assert float(own.loss) == float(other.loss)
    assert not torch.allclose(own.grads["0.weight"], other.grads["0.weight"])
    assert int(own.metrics["quantisers"]) == 3  # two activations, one weight


def test_an_estimator_from_outside_is_the_one_built_in():
    problem, batch = bench(binary(weights="erf", activations="erf"))
    other, _ = bench(binary(weights="clipped", activations="bireal"))
    own, replaced = look(StraightThrough(), problem, batch), look(StraightThrough(estimator="erf"), other, batch)
    assert all(torch.equal(own.grads[name], replaced.grads[name]) for name in own.grads)


@pytest.mark.parametrize(("done", "o"), [(0.0, 1.0), (0.5, 1.5857864376269049), (1.0, 3.0)])
def test_schedules_follow_the_run(done, o):
    problem, batch = bench(binary(weights="reste", activations="reste"))
    problem.progress = done
    fixed = look(StraightThrough(estimator=f"reste,o={o}", schedule="none"), problem, batch).grads
    moving = look(StraightThrough(), problem, batch).grads
    assert all((moving[name] - fixed[name]).abs().max() <= EXACT * 10 for name in moving)
    unmoved = look(StraightThrough(schedule="none"), problem, batch).grads
    assert torch.equal(unmoved["0.weight"], moving["0.weight"]) is (o == 3.0)


def test_in_a_training_loop_of_ones_own_the_share_is_counted_from_steps():
    model = nn.Sequential(nn.Linear(8, 6), SignActivation("ede"), nn.Linear(6, 3))
    learner = altgrad.Learner(model, F.cross_entropy, engine="straight-through", steps=4)
    assert [float(learner.backward(*data()).metrics["share"]) for _ in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_checkpointing_and_accumulation_keep_the_gradient():
    problem, batch = bench(nn.Sequential(nn.Linear(8, 6), SignActivation("clipped"), BinaryLinear(6, 6), SignActivation("clipped"), nn.Linear(6, 3)).double())
    problem.progress = 0.25
    plain = look(StraightThrough(estimator="reste", real_weights=0.5), problem, batch).grads
    for settings in ({"checkpointing": True}, {"accumulation": 3}):
        other = look(StraightThrough(estimator="reste", real_weights=0.5, **settings), problem, batch).grads
        assert all((other[name] - plain[name]).abs().max() <= tolerance("rounding64") for name in plain)


# -- two stages --------------------------------------------------------------------------------------------------------------------


def biper(omega=2.0):
    layer = nn.Linear(8, 3, bias=False).double()
    parametrize.register_parametrization(layer, "weight", BinaryWeight(f"biper,omega={omega}", scale="none"))
    return nn.Sequential(layer)


def test_the_first_stage_is_a_network_of_sines_and_the_second_one_of_square_waves():
    engine, (problem, batch) = StraightThrough(real_weights=0.5), bench(biper())
    latent = problem.params()["0.parametrizations.weight.original"].detach()
    for done, weight in ((0.49, torch.sin(2 * latent)), (0.5, torch.where(torch.sin(2 * latent) >= 0, 1.0, -1.0).double())):
        problem.progress = done
        wanted = batch.inputs @ weight.T
        assert float(look(engine, problem, batch).loss) == pytest.approx(float(F.cross_entropy(wanted, batch.targets)))
        assert (engine.predict(problem, problem.params(), {}, batch.inputs) - wanted).abs().max() <= EXACT


def test_the_gradient_of_the_first_stage_is_that_of_the_sines():
    problem, batch = bench(biper())
    problem.progress = 0.0
    latent = problem.params()["0.parametrizations.weight.original"].detach().requires_grad_()
    wanted = torch.autograd.grad(F.cross_entropy(batch.inputs @ torch.sin(2 * latent).T, batch.targets), latent)[0]
    found = look(StraightThrough(real_weights=0.5), problem, batch).grads["0.parametrizations.weight.original"]
    assert (found - wanted).abs().max() <= EXACT


def test_activations_are_binary_in_both_stages():
    seen = []
    model = nn.Sequential(nn.Linear(8, 6), SignActivation("bireal"), nn.Linear(6, 3)).double()
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    problem, batch = bench(model)
    problem.progress = 0.0
    look(StraightThrough(real_weights=1.0), problem, batch)
    assert set(torch.cat(seen).unique().tolist()) == {-1.0, 1.0}


# -- modules and the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "factor"), [("none", [[1.0], [1.0]]), ("tensor", [[2.5], [2.5]]), ("channel", [[1.5], [3.5]])])
def test_binary_weights_carry_their_scale(scale, factor):
    w = torch.tensor([[1.0, -2.0], [-3.0, 4.0]])
    assert torch.equal(BinaryWeight("identity", scale=scale)(w), torch.tensor(factor) * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))


def test_the_gradient_passes_through_the_scale():
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    BinaryWeight("identity")(w).sum().backward()
    assert w.grad.tolist() == [1.5, 1.5]  # α · 1 + sign(w) / 2 · (1 - 1)
    w.grad = None
    (BinaryWeight("identity")(w) * torch.tensor([1.0, 0.0])).sum().backward()
    assert w.grad.tolist() == [2.0, -0.5]


def test_trained_weights_stay_in_the_state_dict_and_can_be_copied_and_loaded():
    model = binary()
    assert "3.parametrizations.weight.original" in model.state_dict()
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    x = data()[0].double()
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert [len(value.abs().unique()) for value in binary_weights(model).values()] == [1]


def test_which_layers_stay_real():
    count = {exempt: len(binary_weights(binary(exempt=exempt))) for exempt in ("first-last", "first", "none")}
    assert count == {"first-last": 1, "first": 2, "none": 3}
    assert binary_weights(binary(weights="real")) == {}
    assert any(isinstance(module, nn.Hardtanh) for module in binary(activations="real").modules())


def test_train_learns_digits_with_a_binary_network(tmp_path):
    line = "train --problem digits --model binary-mlp --engine straight-through -s estimator=reste --lr 3e-3 --epochs 1 -q --out"
    result = invoke(*line.split(), tmp_path / "run")
    assert result.exit_code == 0, result.output
    found = rows(tmp_path / "run")
    assert found[0]["quantisers"] == 5  # three activations, two layers' weights
    assert found[-1]["test_accuracy"] > 0.7


# -- mistakes ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"estimator": "restee"}, UsageError, "Did you mean 'reste'"),
        ({"estimator": "lsq"}, UsageError, "'lsq' is learned"),
        ({"estimator": "reste,o=0"}, SettingError, "o=0"),
        ({"schedule": "cosine"}, SettingError, "schedule"),
        ({"real_weights": 1.5}, SettingError, "real_weights"),
        ({"steps": 0}, SettingError, "steps"),
        ({"accumulation": 0}, SettingError, "accumulation"),
    ],
)
def test_wrong_settings_are_refused(settings, error, says):
    with pytest.raises(error, match=says):
        registry.engine("straight-through", settings)


def test_an_estimator_of_another_operation_is_refused():
    problem, batch = bench()
    with pytest.raises(CapabilityError, match=r"operation 'round', but the model's quantisers are 'sign'; take estimator='own', or one of: identity, clipped"):
        look(StraightThrough(estimator="round"), problem, batch)


def test_a_first_stage_of_unknown_length_is_refused():
    with pytest.raises(CapabilityError, match="set steps"):
        look(StraightThrough(real_weights=0.5), *bench())


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"weights": "restee"}, UsageError, "Did you mean 'reste'"),
        ({"activations": "relax"}, UsageError, "'relax' is stochastic"),
        ({"weights": "round"}, UsageError, "'round' is for round, which has no place here"),
        ({"weights": "dsq,bits=2"}, UsageError, "'dsq,bits=2' is for levels"),
        ({"activations": "ternary"}, UsageError, "'ternary' is for ternary"),
        ({"activations": "biper"}, UsageError, "'biper' is for square-wave"),
        ({"scale": "row"}, SettingError, "scale"),
        ({"exempt": "last"}, SettingError, "exempt"),
        ({"hidden": "0"}, SettingError, "hidden"),
    ],
)
def test_wrong_settings_of_the_model_are_refused(settings, error, says):
    with pytest.raises(error, match=says):
        binary(**settings)
