"""Quantisers on unmodified models: what they make of weights and inputs, which layers they leave alone, every engine through them, and off again."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import altgrad
from altgrad import registry
from altgrad.errors import AltgradError, CapabilityError, SettingError, UsageError
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.quantisation import applying, inputs, layers, quantisers, specs
from altgrad.quantisation.specs import parsed
from altgrad.rng import Key
from altgrad.world import World

EXACT, KEY = tolerance("closed_form64"), Key(3)
WEIGHTS = (
    "sign:reste",
    "square-wave",
    "ternary",
    "uniform",
    "uniform:round,bits=3,affine=true",
    "uniform:lsq,bits=4",
    "uniform:lsq-plus,bits=2",
    "uniform:dsq,bits=3",
)
ACTIVATIONS = ("sign", "ternary", "uniform", "uniform:round,bits=1,affine=true", "uniform:lsq", "uniform:lsq-plus,bits=3", "uniform:dsq,bits=2")


def plain(dtype=torch.float64):
    """5-8-9-7-3 with batch norm and rectifiers."""
    model = nn.Sequential(
        *(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.Linear(8, 9), nn.BatchNorm1d(9), nn.ReLU(inplace=True)),
        *(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)),
    )
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=draw))
    return model.to(dtype)


def data(count=12, dtype=torch.float64):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1), dtype=dtype), torch.arange(count) % 3


def quantized(dtype=torch.float64, **settings):
    return altgrad.quantize(plain(dtype), example=data(dtype=dtype)[0], **settings)


def bench(model, dtype=torch.float64):
    x, y = data(dtype=dtype)
    problem, batch = Supervised(model, F.cross_entropy), Batch(x, y)
    problem.check_batch(batch)
    return problem, batch


def look(name, settings, problem, batch, key=KEY):
    engine = registry.engine(name, settings)
    altgrad.fit_check(engine, problem)
    params = problem.params()
    return engine.estimate(problem, params, engine.init(problem, params, key), batch, key, World())


def weight(spec, *, per_channel=False, w=None):
    """(w, its quantised value)."""
    layer = nn.Linear(6, 4).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64) if w is None else w)
    before = layer.weight.detach().clone()
    altgrad.quantize(layer, weights=spec, per_channel=per_channel, exempt="none")
    return before, layer.weight.detach()


# -- what they make of a weight ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 1])
def test_a_binary_weight_is_its_sign_times_the_mean_size(axis):
    w, q = weight("sign:reste", per_channel=axis is not None)
    scale = w.abs().mean() if axis is None else w.abs().mean(axis, keepdim=True)
    assert torch.equal(q, torch.where(w >= 0, 1.0, -1.0).double() * scale)


def test_a_ternary_weight_has_the_mean_size_of_the_kept_ones_as_its_level():
    w, q = weight("ternary:ternary,threshold=0.3")
    kept = w.abs() > 0.3 * w.abs().max()
    assert 0 < int(kept.sum()) < w.numel()
    assert torch.allclose(q, torch.sign(w) * kept * w.abs()[kept].mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("affine", ["false", "true"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_uniform_weight_is_within_half_a_step_and_has_so_many_levels(bits, affine, per_channel):
    w, q = weight(f"uniform:round,bits={bits},affine={affine}", per_channel=per_channel)
    rows = w if per_channel else w.reshape(1, -1)
    spans = rows.amax(1) - rows.amin(1) if affine == "true" else rows.abs().amax(1)
    steps = spans / (2**bits - 1 if affine == "true" else 2 ** (bits - 1) - 1)
    assert bool(((rows - q.reshape(rows.shape)).abs() <= steps[:, None] * (0.5 + 1e-12)).all())
    assert all(len(row.unique()) <= 2**bits for row in q.reshape(rows.shape))
    assert torch.allclose(q.flatten()[w.abs().argmax()], w.flatten()[w.abs().argmax()])  # the greatest is a level


def test_the_gradient_of_the_greatest_weight_is_not_lost_to_rounding():
    layer = nn.Linear(50, 7).double()
    altgrad.quantize(layer, weights="uniform:round,bits=4", exempt="none")
    layer.weight.sum().backward()
    assert bool((layer.parametrizations.weight.original.grad != 0).all())


def test_a_learned_step_is_trained_with_the_weights():
    model = quantized(weights="uniform:lsq,bits=3", activations="uniform:lsq-plus,bits=3")
    steps = [name for name, _ in model.named_parameters() if name.endswith(("step", "offset"))]
    assert steps == [
        "3.parametrizations.weight.0.step",
        "3.input_quantiser.step",
        "3.input_quantiser.offset",
        *(name.replace("3.", "6.", 1) for name in ["3.parametrizations.weight.0.step", "3.input_quantiser.step", "3.input_quantiser.offset"]),
    ]
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    assert all(float(dict(model.named_parameters())[name].grad.abs()) > 0 for name in steps if name.endswith("step"))


def test_an_examples_input_levels_do_not_depend_on_the_other_examples():
    model = quantized(activations="uniform:round,bits=3").eval()
    x = data()[0]
    assert torch.equal(model(x)[:1], model(torch.cat([x[:1], 100 * x[1:]]))[:1])


def test_learned_steps_of_inputs_start_from_the_example():
    own = quantized(activations="uniform:lsq,bits=4")
    seen = []
    handle = own[3].input_quantiser.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    own(data()[0])
    handle.remove()
    assert float(own[3].input_quantiser.step.detach()) == pytest.approx(2 * float(seen[0].detach().abs().mean()) / 7**0.5)


def test_calibrating_leaves_running_statistics_alone():
    before = {name: value.clone() for name, value in plain().named_buffers()}
    assert all(torch.equal(value, before[name]) for name, value in quantized(activations="uniform:lsq").named_buffers())


# -- which layers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({}, ["3", "6"]),
        ({"exempt": "none"}, ["0", "3", "6", "8"]),
        ({"exempt": "first"}, ["3", "6", "8"]),
        ({"exempt": ["last", "3"]}, ["0", "6"]),
        ({"layers": "6,8", "exempt": "none"}, ["6", "8"]),
    ],
)
def test_the_first_and_the_last_layer_are_exempt_unless_told_otherwise(given, left):
    assert list(layers.quantised(altgrad.quantize(plain(), weights="sign", **given))) == left


def test_rectifiers_in_front_of_a_sign_are_passed_over_and_others_stay():
    model = quantized(activations="sign")
    assert [inputs.is_silent(model[place]) for place in (2, 5, 7)] == [True, True, False]
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(model[2](x), x)
    assert torch.equal(model[5](x), x)
    assert torch.equal(x, torch.tensor([-1.0, 2.0]))
    assert not any(inputs.is_silent(module) for module in quantized(activations="uniform").modules())


def test_a_convolution_is_quantised_too():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    altgrad.quantize(model, weights="sign", activations="sign", per_channel=True, example=torch.randn(5, 1, 6, 6))
    assert len(model[2].weight.abs().unique()) == 4


# -- the model is still a model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [*WEIGHTS, "none"])
@pytest.mark.parametrize("activations", [*ACTIVATIONS, "none"])
def test_forward_mode_is_reverse_mode_and_members_are_models(weights, activations):
    if weights == activations == "none":
        return
    model = quantized(weights=weights, activations=activations, per_channel=weights != "none").eval()
    x, params = data()[0], dict(model.named_parameters())
    draw = torch.Generator().manual_seed(7)
    tangents = {name: torch.randn(value.shape, generator=draw, dtype=value.dtype) for name, value in params.items()}

    def f(values):
        return functional_call(model, values, (x,)).square().sum()

    forward, gradient = jvp(f, (params,), (tangents,))[1], grad(f)(params)
    backward = sum((gradient[name] * tangents[name]).sum() for name in params)
    assert abs(float(forward)) > 1e-3
    assert abs(float(forward - backward)) <= 10 * EXACT * max(1.0, sum(float((gradient[name] * tangents[name]).abs().sum()) for name in params))
    moved = {name: value + 0.01 * tangents[name] for name, value in params.items()}
    both = vmap(lambda values: functional_call(model, values, (x,)))({name: torch.stack([params[name], moved[name]]) for name in params})
    assert torch.allclose(both[1], functional_call(model, moved, (x,)))


def test_a_state_dict_goes_into_another_quantised_model():
    one, other = quantized(weights="sign:reste", activations="uniform:lsq"), quantized(weights="sign:reste", activations="uniform:lsq")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.7).add_(0.1)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(data()[0]), other(data()[0]))


def test_it_compiles():
    torch._dynamo.reset()
    model = quantized(torch.float32, weights="sign", activations="sign").eval()
    x = data(dtype=torch.float32)[0]
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_dequantising_gives_the_model_back_with_its_own_tensors_in_their_order():
    model = plain()
    params, output = list(model.named_parameters()), model.eval()(data()[0])
    altgrad.quantize(model, weights="uniform:lsq", activations="sign:bireal")
    assert not torch.equal(model(data()[0]), output)
    assert altgrad.dequantize(model) is model
    assert [(name, id(value)) for name, value in model.named_parameters()] == [(name, id(value)) for name, value in params]
    assert torch.equal(model(data()[0]), output)
    assert model[5].inplace


def test_dequantising_a_copy_leaves_the_original_quantised():
    model = quantized(weights="sign", activations="sign").eval()
    output, other = model(data()[0]), copy.deepcopy(model)
    assert torch.equal(other(data()[0]), output)
    altgrad.dequantize(other)
    assert torch.equal(model(data()[0]), output)
    assert not torch.equal(other(data()[0]), output)


# -- every engine ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["sign:reste", "ternary", "uniform:round,bits=4"])
def test_forward_gradients_over_an_orthonormal_basis_are_the_straight_through_gradient(weights):
    problem, batch = bench(quantized(weights=weights, activations="sign:bireal"))
    size = sum(value.numel() for value in problem.params().values())
    exact = look("straight-through", {"schedule": "none"}, problem, batch).grads
    basis = look("forward", {"space": "weights", "combine": "orthogonal", "tangents": size}, problem, batch).grads
    assert all((basis[name] - exact[name]).norm() <= tolerance("oracle64") * max(1.0, float(exact[name].norm())) for name in exact)


ENGINES = [
    ("straight-through", {}),
    ("backprop", {}),
    ("forward", {"tangents": 4}),
    ("eggroll", {"population": 8}),
    ("es", {"population": 8}),
    ("likelihood-ratio", {"copies": 4}),
]


@pytest.mark.parametrize(("name", "settings"), ENGINES, ids=[name for name, _ in ENGINES])
@pytest.mark.parametrize(("weights", "activations"), [("sign:reste", "sign:bireal"), ("uniform:lsq,bits=4", "uniform:lsq-plus,bits=4"), ("ternary", "uniform")])
def test_two_steps_under_every_engine(name, settings, weights, activations):
    model = quantized(torch.float32, weights=weights, activations=activations)
    learner = altgrad.Learner(model, F.cross_entropy, engine=name, **settings)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        assert torch.isfinite(learner.backward(*data(dtype=torch.float32)).loss)
        optimizer.step()
    assert all(bool((value != before[key]).any()) for key, value in model.named_parameters() if key.endswith(("original", "8.weight", "step")))


@pytest.mark.parametrize(("name", "settings"), ENGINES, ids=[name for name, _ in ENGINES])
@pytest.mark.parametrize("middle", [nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 3, padding=1)], ids=["depthwise", "whole"])
def test_quantised_convolutions_learn_under_every_engine(name, settings, middle):
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), copy.deepcopy(middle), nn.Flatten(), nn.Linear(32, 3))
    altgrad.quantize(model, weights="sign:reste", activations="sign:bireal")
    x, y = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
    found = altgrad.Learner(model, F.cross_entropy, engine=name, **settings).backward(x, y)
    grads = {key: value.grad for key, value in model.named_parameters() if value.ndim > 1}
    assert torch.isfinite(found.loss)
    assert all(grad is not None and torch.isfinite(grad).all() and bool(grad.any()) for grad in grads.values())


def test_another_surrogate_from_outside_reaches_the_quantisers_of_its_operation():
    problem, batch = bench(quantized(weights="sign:clipped", activations="sign:clipped"))
    other, _ = bench(quantized(weights="sign:erf", activations="sign:erf"))
    replaced, own = look("straight-through", {"estimator": "erf"}, problem, batch), look("backprop", {}, other, batch)
    assert all(torch.equal(replaced.grads[name], own.grads[name]) for name in own.grads)


# -- what is refused ---------------------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.three(torch.relu(self.two(torch.relu(self.one(x)))))


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"weights": "uniform", "bits": 9}, SettingError, "bits=9 is not allowed; it must be a whole number from 1 to 8"),
        ({"weights": "uniform:lsq,bits=0"}, SettingError, "from 1 to 8"),
        ({"weights": "uniform", "bits": 1}, SettingError, "affine=true, or the operation sign"),
        ({"weights": "sign", "bits": 4}, SettingError, "only the operation uniform"),
        ({"weights": "sing:reste"}, UsageError, "Did you mean 'sign'"),
        ({"weights": "sign:rest"}, UsageError, "Did you mean 'reste'"),
        ({"weights": "sign:lsq"}, UsageError, "'lsq' is not for sign; those that fit: identity, clipped"),
        ({"activations": "uniform:reste"}, UsageError, "those that fit: round, dsq, lsq, lsq-plus"),
        ({"activations": "square-wave:biper"}, UsageError, "is for weights"),
        ({"weights": "sign:dsq,bits=2"}, UsageError, "not for sign but for levels"),
        ({"weights": "uniform:round,low=2"}, SettingError, "unknown setting 'low'"),
        ({"weights": "sign:reste,o=0"}, SettingError, "o=0 is not allowed"),
        ({"weights": ""}, UsageError, "write it as"),
        ({}, SettingError, "nothing to quantise"),
        ({"activations": "sign", "per_channel": True}, SettingError, "the scales are the weights'"),
        ({"weights": "sign", "layers": "7"}, CapabilityError, "'7' is ReLU, which has no weight to quantise. Those that have: 0, 3, 6, 8"),
        ({"weights": "sign", "layers": "nope"}, UsageError, "unknown module 'nope'"),
        ({"weights": "sign", "exempt": "9"}, UsageError, "unknown module '9'"),
        ({"weights": "sign", "exempt": ["first-last", "3", "6"]}, CapabilityError, "nothing of Sequential is left"),
    ],
)
def test_a_wrong_setting_is_refused_and_the_model_stays_as_it_was(settings, error, said):
    model = plain()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(error) as caught:
        altgrad.quantize(model, **settings)
    assert said in str(caught.value)
    assert [name for name, _ in model.named_parameters()] == names


def test_a_model_without_layers_is_refused():
    with pytest.raises(CapabilityError, match="no layer with a weight that can be quantised; there must be one of Linear"):
        altgrad.quantize(nn.Sequential(nn.ReLU()), weights="sign")


def test_a_model_that_is_quantised_is_refused_and_so_is_one_that_is_not():
    with pytest.raises(UsageError, match=r"quantised already \(layers '3', '6'\)"):
        altgrad.quantize(quantized(weights="sign"), activations="sign")
    with pytest.raises(UsageError, match="is not quantised"):
        altgrad.dequantize(plain())


def test_a_weight_with_another_parametrisation_is_refused():
    model = plain()
    nn.utils.parametrizations.orthogonal(model[3])
    with pytest.raises(CapabilityError, match="layer '3' has another parametrisation"):
        altgrad.quantize(model, weights="sign")


def test_the_sign_of_what_is_never_negative_is_refused_where_there_is_an_example():
    model = Functional()
    with pytest.raises(CapabilityError, match="layer 'two' is never negative"):
        altgrad.quantize(model, activations="sign", example=data(dtype=torch.float32)[0])
    assert not layers.quantised(model)


def test_a_spec_is_its_own_text():
    for text in (*WEIGHTS, "sign:ede,t=3", "uniform:lsq,signed=false,bits=5"):
        spec = parsed(text, "weight")
        assert parsed(str(spec), "weight") == spec


# -- teeth -------------------------------------------------------------------------------------------------------------------------


def not_exempt(model, *, layers, exempt):
    return globals()["layers"].named(model)


def never_silent(module):
    return None


def shared_range(axes):
    return (-2, -1)


PLANTED = [
    ("the first layer quantised", (layers, "selected", not_exempt), lambda: test_the_first_and_the_last_layer_are_exempt_unless_told_otherwise({}, ["3", "6"])),
    ("rectifiers left in front of a sign", (inputs, "silence", never_silent), test_rectifiers_in_front_of_a_sign_are_passed_over_and_others_stay),
    ("a range over the whole batch", (quantisers, "trailing", shared_range), test_an_examples_input_levels_do_not_depend_on_the_other_examples),
    (
        "a hook that is not taken off",
        (inputs, "unhook", lambda hooks, with_kwargs, hook: None),
        test_dequantising_gives_the_model_back_with_its_own_tensors_in_their_order,
    ),
    (
        "torch's own removal",
        (applying, "bare", lambda layer: applying.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)),
        test_dequantising_a_copy_leaves_the_original_quantised,
    ),
    (
        "steps that never see the example",
        (quantisers.Learned, "calibrate", lambda self, like: self.step.data.fill_(1.0)),
        test_learned_steps_of_inputs_start_from_the_example,
    ),
    (
        "bits that nobody looks at",
        (specs, "require", lambda *given: None),
        lambda: test_a_wrong_setting_is_refused_and_the_model_stays_as_it_was({"weights": "uniform", "bits": 9}, SettingError, "from 1 to 8"),
    ),
]


@pytest.mark.parametrize(("planted", "check"), [entry[1:] for entry in PLANTED], ids=[entry[0] for entry in PLANTED])
def test_a_planted_bug_is_caught(planted, check):
    caught = (AssertionError, AltgradError, AttributeError, pytest.fail.Exception)
    with mock.patch.object(*planted), pytest.raises(caught):
        check()
