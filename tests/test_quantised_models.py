"""Quantisers on models written in other ways: keyword arguments, weights that another module reads, attention, recurrence, coarse number types."""

from unittest import mock

import pytest
import torch
from console import elsewhere
from torch import nn

import altgrad
from altgrad.errors import AltgradError, CapabilityError
from altgrad.quantisation import inputs, layers, load_packed, quantisers, save_packed

__all__ = ["elsewhere"]
BOTH = {"weights": "sign:reste", "activations": "sign:bireal"}


class Net(nn.Module):
    """8-8-8-3, its middle written in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.rectifier, self.middle, self.last = how, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        if self.how == "keywords":
            return self.last(self.middle(input=self.rectifier(input=x)))
        if self.how == "weight":
            return self.last(torch.nn.functional.linear(x, self.middle.weight, self.middle.bias))
        return self.last(self.middle(self.rectifier(x)))


def net(how, seed=0):
    torch.manual_seed(seed)
    return Net(how)


def numbers(seed=1):
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


def test_keyword_arguments_are_quantised_as_positional_ones_are():
    x = numbers()
    by_name, by_place = (altgrad.quantize(net(how), example=x, **BOTH) for how in ("keywords", "place"))
    assert torch.equal(by_name(x), by_place(x))
    assert len(by_name.middle.input_quantiser(by_name.first(x)).unique()) == 2
    before = net("keywords")(x)
    assert torch.equal(altgrad.dequantize(by_name)(x), before)
    assert not by_name.middle._forward_pre_hooks_with_kwargs
    assert not by_name.rectifier._forward_hooks_with_kwargs


@pytest.mark.parametrize("activations", ["sign", "uniform", "uniform:lsq"])
def test_an_input_that_would_stay_as_it_is_is_refused_where_there_is_an_example(activations):
    model = net("weight")
    with pytest.raises(CapabilityError, match=r"'middle': not called on the example.*exempt='first-last,middle'"):
        altgrad.quantize(model, weights="sign", activations=activations, example=numbers())
    assert not layers.quantised(model)
    altgrad.quantize(model, weights="sign", example=numbers())  # weights alone need no call
    assert len(model.middle.weight.unique()) == 2


def test_attention_is_quantised_but_for_the_weight_that_it_reads_itself():
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(8, 3))
    x = torch.randn(5, 4, 8)
    with pytest.raises(CapabilityError, match=r"exempt='first-last,1.self_attn.out_proj'"):
        altgrad.quantize(model, weights="ternary", activations="uniform", example=x)
    altgrad.quantize(model, weights="ternary", activations="uniform", exempt="first-last,1.self_attn.out_proj", example=x)
    learner = altgrad.Learner(model, lambda out, y: out.mean(1).square().sum(), engine="straight-through", steps=3)
    learner.backward(x, x)
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
    assert sorted(layers.quantised(model)) == ["1.linear1", "1.linear2"]
    model.eval()  # nn.TransformerEncoderLayer has a fast path there that calls no layer; hooks keep it off
    with torch.no_grad():
        held = model(x)
    assert torch.allclose(held, model(x), atol=1e-6)


def coarse():
    """40-60-400-3 in bfloat16; rows of normal weights, whose greatest entries are many different numbers."""
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 400), nn.Tanh(), nn.Linear(400, 3))
    nn.init.normal_(model[2].weight, std=0.1)
    return model.bfloat16().eval()


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("affine", ["false", "true"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_bfloat16_stays_within_its_bits_and_is_packed(bits, affine, per_channel):
    torch.manual_seed(bits)
    text, x = f"uniform:round,bits={bits},affine={affine}", torch.randn(30, 40).bfloat16()
    model = altgrad.quantize(coarse(), weights=text, activations=text, per_channel=per_channel, example=x)
    w, part = model[2].parametrizations.weight.original.detach(), layers.own_part(model[2])
    step, least = part.grid(w)
    whole = ((w if least is None else w - least) / step).round()
    low = 0 if affine == "true" else 1 - 2 ** (bits - 1)
    assert low <= int(whole.min()) <= int(whole.max()) <= low + 2**bits - (1 if affine == "true" else 2)
    assert int(whole.max()) - int(whole.min()) >= 0.9 * 2**bits  # the range is used
    save_packed(model, "packed.safetensors")
    assert torch.equal(load_packed("packed.safetensors", coarse())(x), model(x))


PLANTED = [
    (
        "keywords that pass by the quantiser",
        (inputs, "quantise_input", lambda layer, given, named: ((layer.input_quantiser(given[0]),) if given else given, named)),
        test_keyword_arguments_are_quantised_as_positional_ones_are,
    ),
    (
        "a layer that is not called and not missed",
        (inputs, "quantised", lambda model: {}),
        lambda: test_an_input_that_would_stay_as_it_is_is_refused_where_there_is_an_example("uniform"),
    ),
    (
        "a step rounded down",
        (quantisers, "nonzero", lambda scale: (scale / (1 + torch.finfo(scale.dtype).eps)).clamp_min(1e-30)),
        lambda: test_bfloat16_stays_within_its_bits_and_is_packed(8, "false", True),
    ),
]


@pytest.mark.parametrize(("planted", "check"), [entry[1:] for entry in PLANTED], ids=[entry[0] for entry in PLANTED])
def test_a_planted_bug_is_caught(planted, check):
    with mock.patch.object(*planted), pytest.raises((AssertionError, AltgradError, pytest.fail.Exception)):
        check()
