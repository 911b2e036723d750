"""Packed files: so many bits a weight, the same predictions bit for bit, and nothing foreign or damaged is read."""

import pickle
from unittest import mock

import pytest
import torch
from console import elsewhere, invoke
from test_quantisation import WEIGHTS, data, plain, quantized
from torch import nn

import altgrad
from altgrad import compare, models, trainer, training
from altgrad.compare_settings import choice_of
from altgrad.errors import AltgradError, CheckpointError, UsageError
from altgrad.quantisation import load_packed, pack, packing, save_packed, unpack
from altgrad.rng import Key

__all__ = ["elsewhere"]
BITS = {"sign:reste": 1, "square-wave": 1, "ternary": 2, "uniform": 8, "uniform:lsq,bits=4": 4, "uniform:round,bits=3,affine=true": 3}


def other():
    """The architecture, with numbers of its own."""
    model = plain(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-2).add_(1)
    return model


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("activations", ["sign:reste,o=2", "uniform:lsq-plus,bits=3", "none"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_what_is_loaded_predicts_bit_for_bit_what_was_packed(weights, activations, per_channel):
    model = quantized(torch.float32, weights=weights, activations=activations, per_channel=per_channel).eval()
    x = data(40, torch.float32)[0]
    save_packed(model, "packed.safetensors")
    loaded = load_packed("packed.safetensors", other()).eval()
    assert torch.equal(loaded(x), model(x))
    assert all(type(module) is nn.Linear for module in loaded if isinstance(module, nn.Linear))


@pytest.mark.parametrize(("weights", "bits"), BITS.items())
def test_a_file_has_so_many_bits_a_weight(weights, bits):
    model = altgrad.quantize(nn.Sequential(nn.Linear(100, 333, bias=False)), weights=weights, exempt="none")
    size = save_packed(model, "packed.safetensors")
    with open("packed.safetensors", "rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    scales = sum(tensor.nbytes for name, tensor in pack(model).tensors.items() if name.startswith("constants/"))
    assert scales <= 8
    assert size == header + -(-33300 * bits // 8) + scales
    assert header < 800


def test_every_code_of_every_width_comes_back():
    for bits in range(1, 9):
        codes = (torch.arange(37) * 5 % 2**bits).to(torch.uint8)
        packed = packing.to_bits(codes, bits)
        assert len(packed) == -(-37 * bits // 8)
        assert torch.equal(packing.from_bits(packed, bits, (37,)), codes.long())


def test_the_unpacked_state_is_that_of_the_plain_model():
    model = quantized(torch.float32, weights="sign:reste")
    save_packed(model, "packed.safetensors")
    state = unpack("packed.safetensors")
    assert set(state) == set(plain().state_dict())
    assert torch.equal(state["3.weight"], model[3].weight)


def test_a_quantised_model_takes_a_packed_one_too():
    model = quantized(torch.float32, weights="sign:reste", activations="sign").eval()
    save_packed(model, "packed.safetensors")
    loaded = load_packed("packed.safetensors", quantized(torch.float32, weights="uniform:lsq", activations="uniform:lsq")).eval()
    assert torch.equal(loaded(data(dtype=torch.float32)[0]), model(data(dtype=torch.float32)[0]))


def test_the_binary_mlp_is_packed_as_well():
    build = lambda key: models.build("binary-mlp", {"hidden": "32-32-32", "scale": "channel"}, input_shape=(5,), classes=3, key=key).eval()  # noqa: E731
    model = build(Key(0))
    save_packed(model, "packed.safetensors")
    assert torch.equal(load_packed("packed.safetensors", build(Key(1)))(data(dtype=torch.float32)[0]), model(data(dtype=torch.float32)[0]))


# -- what is refused ---------------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_noticed():
    model = altgrad.quantize(nn.Sequential(nn.Linear(8, 8)), weights="sign", exempt="none")
    raw = pack(model).content()
    for place in range(0, len(raw), 7):
        with open("packed.safetensors", "wb") as file:
            file.write(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        with pytest.raises(CheckpointError):
            unpack("packed.safetensors")


def test_what_is_no_packed_file_is_refused_and_a_pickle_is_not_opened(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"is a pickle .* it was not opened"):
        unpack("a.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        unpack("nothing-here")
    (tmp_path / "b.safetensors").write_bytes(packing.import_safetensors().save({"a": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="holds no packed model"):
        unpack("b.safetensors")


def test_a_file_of_a_newer_format_says_upgrade():
    with mock.patch.object(packing, "VERSION", 7):
        save_packed(quantized(weights="sign"), "packed.safetensors")
    with pytest.raises(CheckpointError, match=r"format version 7.*Upgrade"):
        unpack("packed.safetensors")


def test_a_file_of_another_model_is_refused_and_the_model_stays():
    save_packed(quantized(weights="sign"), "packed.safetensors")
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"is of another model than Sequential: '1\.bias'"):
        load_packed("packed.safetensors", model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_quantised_weights_is_refused():
    with pytest.raises(UsageError, match="has no quantised weights to pack"):
        pack(quantized(activations="sign"))


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(AltgradError, match="could not be written"):
        save_packed(quantized(weights="sign"), "no/where.safetensors")


# -- the command line --------------------------------------------------------------------------------------------------------------

BINARY = ("--quantize", "weights=sign:reste", "--quantize", "activations=sign:bireal")


def test_a_run_is_quantised_read_back_and_packed_as_it_predicts():
    done = invoke(
        "train", "--model-setting", "hidden=32-32", "--engine", "straight-through", *BINARY, "--steps", "4", "--save-every", "2", "--out", "run", "-q"
    )
    assert done.exit_code == 0, done.output
    exported = invoke("export", "run", "--packed", "--json")
    assert exported.exit_code == 0, exported.output
    opened = training.opened("run")
    assert opened.problem.model[2].weight.abs().unique().numel() == 1
    x = torch.rand(9, 64, generator=torch.Generator().manual_seed(3))
    model = load_packed("run/model.safetensors", models.build("mlp", {"hidden": "32-32"}, input_shape=(64,), classes=10, key=Key(9))).eval()
    assert torch.equal(model(x), opened.engine.predict(opened.problem, opened.params, opened.state, x))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "--quantize", "weight=sign"), "Did you mean 'weights'"),
        (("train", "--quantize", "weights=uniform", "--quantize", "bits=9"), "from 1 to 8"),
        (("train", "--problem", "quadratic", "--quantize", "weights=sign"), "has no model whose layers could be quantised"),
        (("train", "--model-setting", "hidden=8", "--quantize", "weights=sign"), "nothing of Sequential is left"),
        (("compare", "--quantize", "weights=sign:lsq", "--quiet"), "is not for sign"),
    ],
)
def test_a_wrong_quantiser_is_a_usage_error(arguments, said):
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())


def test_compare_measures_the_quantised_model_and_says_what_the_rule_does():
    settings = compare.CompareSettings(model_settings={"hidden": "8-8"}, quantize={"weights": "sign:reste"})
    choice = choice_of("straight-through:diagnose=1:diagnose_pairs=2")
    found = compare.measure(trainer.build(settings.train_settings(choice, seed=0, lr=0.1))).metrics
    assert {"estimating-error/2.weight", "flips", "dead", "cosine", "quantisers"} <= set(found)
    assert found["quantisers"] == 1


def test_doctor_looks_at_the_quantised_model():
    examined = invoke("doctor", "mlp", "--model-setting", "hidden=8-8", *BINARY, "--input-shape", "5")
    assert examined.exit_code == 0, examined.output
    assert "straight-through" in examined.output


# -- teeth -------------------------------------------------------------------------------------------------------------------------


def fixed_scale(form, codes, constants, numbers):
    return 2.0 * codes - 1


PLANTED = [
    ("bits from the wrong end", "from_bits", lambda packed, bits, shape: packing_of_reversed(packed, bits, shape), test_every_code_of_every_width_comes_back),
    ("a digest that nobody compares", "digest", lambda tensors, text: "", test_every_flipped_byte_is_noticed),
    ("a scale that is lost", "value", fixed_scale, test_the_unpacked_state_is_that_of_the_plain_model),
]


def packing_of_reversed(packed, bits, shape):
    return REAL(packed.flip(0), bits, shape)


REAL = packing.from_bits


@pytest.mark.parametrize(("name", "bug", "check"), [entry[1:] for entry in PLANTED], ids=[entry[0] for entry in PLANTED])
def test_a_planted_bug_is_caught(name, bug, check):
    with mock.patch.object(packing, name, bug), pytest.raises((AssertionError, AltgradError, ValueError, pytest.fail.Exception)):
        check()
