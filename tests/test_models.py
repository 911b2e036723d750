"""The small models: shapes, addressed first weights, settings and their errors."""

import copy
import sys
import types

import pytest
import torch
from torch import nn

from altgrad import models, networks
from altgrad.errors import SettingError, UsageError
from altgrad.rng import Key

DIGITS, GREY, COLOUR = (64,), (1, 28, 28), (3, 32, 32)
KEY = Key(0)
IMAGE_MODELS = sorted(name for name, cls in models.TABLE.items() if getattr(cls, "reads", "images") == "images")
BUILT = sorted(name for name, cls in models.TABLE.items() if getattr(cls, "reads", "images") != "graph")  # from a shape alone


def make(name, settings=None, shape=DIGITS, key=KEY):
    return models.build(name, settings, input_shape=shape, classes=10, key=key)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def user_module(monkeypatch):
    """A module of the user's with a model that takes classes, one that takes nothing, and something that is no model."""
    module = types.ModuleType("someones_models")
    module.shaped = lambda input_shape, classes, width=4: nn.Sequential(nn.Linear(input_shape[0], width), nn.Linear(width, classes))
    module.deep = lambda depth: nn.Linear(depth, 2)
    module.plain = lambda: nn.Linear(64, 10)
    module.ready = nn.Linear(2, 2)
    module.number = 3
    module.wrong = lambda: 3
    monkeypatch.setitem(sys.modules, "someones_models", module)


@pytest.mark.parametrize("shape", [DIGITS, GREY, COLOUR], ids=["flat", "grey", "colour"])
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_every_model_reads_every_image_shape(name, shape):
    assert make(name, shape=shape)(torch.randn(3, *shape)).shape == (3, 10)


@pytest.mark.parametrize("name", BUILT)
def test_the_same_key_gives_the_same_weights(name):
    assert torch.equal(weights(make(name, key=Key(7))), weights(make(name, key=Key(7))))


@pytest.mark.parametrize("name", BUILT)
def test_another_key_gives_other_weights(name):
    assert not torch.equal(weights(make(name, key=Key(7))), weights(make(name, key=Key(8))))


@pytest.mark.parametrize("name", BUILT)
def test_building_leaves_the_global_generator_alone(name):
    before = torch.get_rng_state()
    make(name)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", BUILT)
def test_no_weight_is_left_to_the_global_generator(name):
    first = make(name)
    torch.rand(3)  # moves the global generator on
    assert torch.equal(weights(first), weights(make(name)))


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_every_trained_tensor_gets_a_gradient(name):
    model = make(name)
    model(torch.randn(4, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", ["mlp", "cnn", "gru", "lstm"])
def test_first_weights_follow_pytorchs_own_law(name):
    ours = make(name, shape=GREY)
    theirs = copy.deepcopy(ours)
    generator = torch.random.fork_rng(devices=[])
    with generator:
        for module in theirs.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    for own, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        if own.numel() >= 1000:
            assert abs(own.abs().max() / reference.abs().max() - 1) < 0.02
            assert abs(own.std() / reference.std() - 1) < 5 / own.numel() ** 0.5  # 5 standard errors of a ratio of two such estimates


def test_the_default_mlp_is_64_128_128_10():
    assert [tuple(p.shape) for p in make("mlp").parameters() if p.ndim == 2] == [(128, 64), (128, 128), (10, 128)]


def test_mlp_takes_widths_and_activation_as_text():
    model = make("mlp", {"hidden": "32-16", "activation": "tanh"})
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [32, 16, 10]
    assert isinstance(model[1], nn.Tanh)


def test_a_hard_sign_gives_minus_one_or_one_and_no_derivative():
    x = torch.tensor([-2.0, 0.5], requires_grad=True)
    y = networks.ACTIVATIONS["sign"]()(x)
    y.sum().backward()
    assert y.tolist() == [-1, 1]
    assert x.grad.tolist() == [0, 0]


def test_a_wider_layer_leaves_the_other_layers_weights_alone():
    narrow, wide = make("mlp", {"hidden": "32-16"}), make("mlp", {"hidden": "32-24"})
    assert torch.equal(narrow[0].weight, wide[0].weight)


def test_layers_of_one_shape_start_from_different_weights():
    model = make("mlp", {"hidden": "32-32-32"})
    assert not torch.equal(model[2].weight, model[4].weight)


def test_group_norm_resnet_has_no_buffers_and_batch_norm_has():
    assert not list(make("resnet", {"norm": "group"}).buffers())
    assert list(make("resnet", {"norm": "batch"}).buffers())


def test_group_norm_works_for_a_width_that_eight_does_not_divide():
    assert make("resnet", {"norm": "group", "width": "6"})(torch.randn(2, 64)).shape == (2, 10)


def test_resnet_blocks_deepen_it():
    count = {blocks: sum(isinstance(m, nn.Conv2d) for m in make("resnet", {"blocks": blocks}).modules()) for blocks in (1, 2)}
    assert count[2] - count[1] == 6


def test_transformer_reads_positions():
    model, x = make("transformer", shape=GREY), torch.randn(1, 1, 28, 28)
    assert not torch.allclose(model(x), model(x.flip(2)), atol=1e-6)


def test_transformer_dropout_acts_in_training_only():
    model, x = make("transformer", {"dropout": "0.5"}), torch.randn(2, 64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("mlp", {"hiden": "32"}, "Did you mean 'hidden'"),
        ("mlp", {"hidden": "32-"}, "one width per layer"),
        ("mlp", {"hidden": "0"}, "one width per layer"),
        ("mlp", {"activation": "sine"}, "relu, tanh, gelu"),
        ("cnn", {"channels": "a"}, "one width per layer"),
        ("resnet", {"norm": "layer"}, "batch, group"),
        ("resnet", {"width": "0"}, "at least 1"),
        ("resnet", {"blocks": "1.5"}, "int"),
        ("gru", {"layers": 0}, "at least 1"),
        ("lstm", {"hidden": True}, "integer"),
        ("transformer", {"heads": "5"}, "divisor of width=64"),
        ("transformer", {"dropout": "1"}, r"\[0, 1\)"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_allowed(name, settings, said):
    with pytest.raises(SettingError, match=said):
        make(name, settings)


def test_an_unknown_model_suggests_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'resnet'"):
        make("resnett")


def test_an_input_that_is_no_image_is_refused_by_image_models():
    with pytest.raises(UsageError, match=r"\[50\]"):
        make("cnn", shape=(50,))


@pytest.mark.usefixtures("user_module")
def test_a_users_callable_gets_shape_classes_and_settings():
    model = make("someones_models:shaped", {"width": "6"})
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [(6, 64), (10, 6)]


@pytest.mark.usefixtures("user_module")
def test_a_users_callable_may_take_nothing():
    assert make("someones_models:plain").out_features == 10


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("attribute", "remedy"), [("shaped", "'input_shape', which has no value; give --input-shape"), ("deep", "--model-setting depth=VALUE")]
)
def test_what_a_users_callable_takes_and_nobody_gives_is_named(attribute, remedy):
    with pytest.raises(UsageError, match=remedy):
        models.build(f"someones_models:{attribute}", input_shape=None, classes=10, key=Key(0))


@pytest.mark.usefixtures("user_module")
def test_a_setting_comes_before_what_is_offered():
    assert make("someones_models:shaped", {"width": 6, "classes": 3})[-1].out_features == 3


def test_altgrads_own_models_want_a_shape():
    with pytest.raises(UsageError, match="give input_shape"):
        models.build("mlp", input_shape=None, classes=10, key=Key(0))


@pytest.mark.usefixtures("user_module")
def test_a_users_model_depends_on_the_key_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (weights(make("someones_models:plain", key=Key(seed))) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("user_module")
def test_a_module_object_is_taken_as_it_is():
    assert make("someones_models:ready") is sys.modules["someones_models"].ready


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(("attribute", "said"), [("number", "is a int"), ("wrong", "returned a int"), ("shape", "Did you mean 'shaped'")])
def test_what_is_no_model_is_refused(attribute, said):
    with pytest.raises(UsageError, match=said):
        make(f"someones_models:{attribute}")


@pytest.mark.usefixtures("user_module")
def test_a_setting_that_a_users_callable_lacks_is_refused():
    with pytest.raises(SettingError, match="Did you mean 'width'"):
        make("someones_models:shaped", {"widht": 3})


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="nowhere_at_all"):
        make("nowhere_at_all:model")


def test_the_listing_names_every_model_with_its_settings_and_their_meaning():
    rows = {row["name"]: row for row in models.listing()}
    assert set(rows) == set(models.TABLE)
    assert all(row["description"] and all(s["help"] for s in row["settings"]) for row in rows.values())
    assert {s["name"] for s in rows["transformer"]["settings"]} == {"width", "heads", "layers", "dropout"}
