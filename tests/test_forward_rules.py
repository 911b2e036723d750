"""Forward mode against autograd: every probe, the options of the decompositions, low-rank tangents, perturbed layer outputs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from derivatives import EXACT, along, backprop, build, directions, error, forward, generator, score
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

from altgrad.errors import ShapeError
from altgrad.forward_mode import Dual, Trace
from altgrad.forward_mode.custom import following_custom_functions
from altgrad.perturb import Dense, LowRank
from altgrad.probes import EXTRA, PROBES, Take, ready
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers

DIFFERENCED = 1e-6  # relative, where the function has no forward formula at all


def agrees(module: nn.Module, inputs: Any, tolerance: float = EXACT) -> bool:
    """Whether three directional derivatives equal autograd's."""
    moves = directions(module, 3)
    value, _, _ = forward(module, inputs, moves, 3)
    return error(value.tangent, along(backprop(module, inputs)[0], moves)) <= tolerance


TOKENS = torch.tensor([[1, 2, 2, 5], [3, 3, 0, 4], [0, 7, 8, 1]])
FLAT, OFFSETS = TOKENS.flatten(), torch.tensor([0, 3, 3, 9])  # the second bag is empty
SHARE = torch.linspace(0.5, 2, 12, dtype=torch.float64)
HIDE = torch.tensor([[False, False, True, True], [False, False, False, False], [False, True, False, False]])
ABOVE = torch.ones(4, 4).triu(1).bool()
BIAS = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, 4)


def self_attention(**kwargs: Any) -> Any:
    return lambda m, x: m(x, x, x, **kwargs)


def bag(mode: str, *args: Any, padding: int | None = None, last: bool = False, **kwargs: Any) -> Any:
    def make() -> nn.Module:
        return nn.EmbeddingBag(9, 4, mode=mode, padding_idx=padding, include_last_offset=last)

    return lambda: (ready(lambda: Take(make(), lambda m, x: m(*args, **kwargs)), generator(2)).double(), (torch.zeros(1),))


def case(make: Any, call: Any, *shape: int, train: bool = True) -> Any:
    return lambda: (ready(lambda: Take(make(), call), generator(2), train=train).double(), (torch.randn(shape, generator=generator(3), dtype=torch.float64),))


def plain(m: Any, x: Tensor) -> Any:
    return m(x)


def pack(m: Any, x: Tensor) -> Any:
    packed, *rest = m(pack_padded_sequence(x, torch.tensor([2, 5, 3, 5]), batch_first=True, enforce_sorted=False))
    return packed.data, rest


def given_state(m: Any, x: Tensor) -> Any:
    return m(x, (x.new_full((2, 3, 4), 0.3), x.new_full((2, 3, 4), -0.2)))


def fused(**kwargs: Any) -> Any:
    def run(linear: Any, x: Tensor) -> Tensor:
        heads = linear(x).unflatten(-1, (8, 4)).transpose(1, 2)  # [N, 8, L, 4]
        q, k, v = (heads[:, :4], heads[:, 4:6], heads[:, 6:]) if kwargs.get("enable_gqa") else (heads[:, :2], heads[:, 2:4], heads[:, 4:6])
        return F.scaled_dot_product_attention(q, k, v, **kwargs)

    return case(lambda: nn.Linear(8, 32), run, 3, 4, 8)


OPTIONS = {
    "bag sum": bag("sum", TOKENS),
    "bag sum weighted": bag("sum", FLAT, OFFSETS, per_sample_weights=SHARE),
    "bag mean padded, empty bag": bag("mean", FLAT, OFFSETS, padding=0),
    "bag max": bag("max", TOKENS, padding=2),
    "bag max, empty bag": bag("max", FLAT, OFFSETS),
    "bag last offset": bag("mean", FLAT, torch.tensor([0, 5, 12]), last=True),
    "embedding padded from the end": case(lambda: nn.Embedding(9, 4), lambda m, x: F.embedding(TOKENS, m.weight, padding_idx=-1), 1),
    "lstm projected": case(lambda: nn.LSTM(5, 4, 2, proj_size=3, bidirectional=True), plain, 4, 3, 5),
    "lstm without bias": case(lambda: nn.LSTM(5, 4, 2, bias=False), plain, 4, 3, 5),
    "lstm given state": case(lambda: nn.LSTM(5, 4, 2, batch_first=True), given_state, 3, 4, 5),
    "lstm with dropout": case(lambda: nn.LSTM(5, 4, 3, dropout=0.4), plain, 4, 3, 5),
    "lstm one example": case(lambda: nn.LSTM(5, 4), plain, 4, 5),
    "lstm packed with dropout": case(lambda: nn.LSTM(5, 4, 2, dropout=0.4, bidirectional=True, batch_first=True), pack, 4, 5, 5),
    "gru packed": case(lambda: nn.GRU(5, 4, 2, bidirectional=True, batch_first=True), pack, 4, 5, 5),
    "rnn relu": case(lambda: nn.RNN(5, 4, 2, nonlinearity="relu", bidirectional=True), plain, 4, 3, 5),
    "rnn cell relu": case(lambda: nn.RNNCell(5, 4, nonlinearity="relu"), plain, 3, 5),
    "attention masks": case(lambda: nn.MultiheadAttention(8, 2, batch_first=True), self_attention(attn_mask=ABOVE, key_padding_mask=HIDE), 3, 4, 8),
    "attention float mask": case(lambda: nn.MultiheadAttention(8, 2, batch_first=True), self_attention(attn_mask=BIAS), 3, 4, 8),
    "attention mask per head": case(lambda: nn.MultiheadAttention(8, 2), self_attention(attn_mask=BIAS.repeat(6, 1, 1)), 4, 3, 8),
    "attention causal": case(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True), self_attention(attn_mask=ABOVE, is_causal=True, need_weights=False), 3, 4, 8
    ),
    "attention weights per head": case(lambda: nn.MultiheadAttention(8, 2), self_attention(average_attn_weights=False), 4, 3, 8),
    "attention extra keys": case(
        lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True), self_attention(key_padding_mask=HIDE), 3, 4, 8
    ),
    "attention one example": case(lambda: nn.MultiheadAttention(8, 2), self_attention(), 4, 8),
    "attention across": case(lambda: nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True), lambda m, x: m(x[:, :2], x, x), 3, 4, 8),
    "attention other widths": case(lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True), lambda m, x: m(x, x[..., :5], x[..., 5:]), 3, 4, 8),
    "decoder layer": case(lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), lambda m, x: m(x[:, :2], x), 3, 4, 8),
    "decoder layer eval": case(
        lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), lambda m, x: m(x, x, tgt_is_causal=True, tgt_mask=ABOVE), 3, 4, 8, train=False
    ),
    "encoder eval, padded": case(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        lambda m, x: m(x, src_key_padding_mask=HIDE)[~HIDE],
        3,
        4,
        8,
        train=False,
    ),
    "transformer": case(lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), lambda m, x: m(x, x[:, :3]), 3, 4, 8),
    "sdpa": fused(),
    "sdpa bool mask": fused(attn_mask=~ABOVE),
    "sdpa float mask": fused(attn_mask=BIAS),
    "sdpa row without keys": fused(attn_mask=torch.ones(4, 4).tril(-1).bool()),
    "sdpa causal scaled": fused(is_causal=True, scale=0.3),
    "sdpa grouped queries": fused(enable_gqa=True),
    "sdpa dropout": fused(dropout_p=0.3),
    "batch norm flat": case(lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=None)), plain, 6, 5),
    "batch norm without parameters": case(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False, track_running_stats=False), nn.Tanh()), plain, 6, 5
    ),
    "instance norm with running statistics": case(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), plain, 3, 2, 5, 5
    ),
    "weight norm of all": case(lambda: parametrizations.weight_norm(nn.Linear(5, 4), dim=None), plain, 6, 5),
    "weight norm second axis": case(lambda: parametrizations.weight_norm(nn.ConvTranspose1d(3, 4, 3), dim=1), plain, 2, 3, 6),
    "spectral norm of a convolution": case(lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), plain, 2, 3, 6, 6),
    "orthogonal": case(lambda: parametrizations.orthogonal(nn.Linear(4, 4)), plain, 6, 4),
    "softmax": case(lambda: nn.Linear(5, 4), lambda m, x: (m(x).softmax(0), torch.softmax(m(x), -1), F.log_softmax(m(x), 1)), 6, 5),
    "stacked and joined": case(lambda: nn.Linear(5, 5), lambda m, x: torch.cat([torch.stack([m(x), x], -1), torch.stack((x, m(x)), dim=2)], dim=-2), 6, 5),
}


@pytest.mark.parametrize("one", [*PROBES, *EXTRA], ids=lambda p: p.name)
def test_directional_derivative_equals_autograds(one):
    module, inputs = build(one)
    assert agrees(module, inputs, DIFFERENCED if one.name == "autograd.Function without jvp" else EXACT)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_decompositions_equal_autograd(name):
    assert agrees(*OPTIONS[name]())


@pytest.mark.parametrize("one", PROBES, ids=lambda p: p.name)
def test_three_tangents_equal_three_single_ones(one):
    module, inputs = build(one)
    moves = directions(module, 3)
    together = forward(module, inputs, moves, 3)[0].tangent
    single = torch.cat([forward(module, inputs, {n: v[k : k + 1] for n, v in moves.items()}, 1)[0].tangent for k in range(3)])
    assert error(together, single) <= 1e-10


@pytest.mark.parametrize("name", [*(p.name for p in PROBES), "bag sum weighted", "bag max", "attention across", "attention other widths", "lstm projected"])
def test_low_rank_tangents_equal_the_dense_tangents_of_the_same_matrices(name):
    module, inputs = OPTIONS[name]() if name in OPTIONS else build(next(p for p in PROBES if p.name == name))
    sources = {n: LowRank(Key(9), n, p, range(3), "normal", 2) if p.ndim > 1 else Dense(Key(9), n, p, range(3), "normal") for n, p in module.named_parameters()}
    dense = {n: source.dense() for n, source in sources.items()}
    found, expected = forward(module, inputs, sources, 3)[0], forward(module, inputs, dense, 3)[0]
    assert error(found.tangent, expected.tangent) <= 1e-10


@pytest.mark.parametrize("name", ["batch norm flat", "instance norm with running statistics", "BatchNorm2d train", "spectral norm of a convolution"])
def test_buffers_after_the_pass_equal_pytorchs_own(name):
    module, inputs = OPTIONS[name]() if name in OPTIONS else build(next(p for p in PROBES if p.name == name))
    _, found, _ = forward(module, inputs, directions(module, 2), 2)
    expected = backprop(module, inputs)[1]
    before = dict(module.named_buffers())
    assert all(torch.allclose(found[n], expected[n], rtol=1e-12, atol=0) for n in expected)
    assert any(not torch.equal(found[n], before[n]) for n in expected)


def test_batch_statistics_are_noted_on_the_trace():
    module, inputs = build(next(p for p in PROBES if p.name == "BatchNorm2d train"))
    assert forward(module, inputs, directions(module, 1), 1)[2].mixes_examples == ["batch_norm"]
    assert forward(module.eval(), inputs, directions(module, 1), 1)[2].mixes_examples == []


def test_batch_norm_of_one_value_a_channel_is_refused_with_the_shape():
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
    with pytest.raises(ShapeError, match=r"\(1, 4\)"):
        forward(module, (torch.ones(1, 5, dtype=torch.float64),), directions(module, 1), 1)


def test_dropout_between_recurrent_layers_is_addressed_in_passes_without_tangents():
    module, inputs = OPTIONS["lstm with dropout"]()
    outputs = []
    for seed in (3, 3, 4):
        with AddressedSamplers(Key(seed)):
            outputs.append(module(*inputs)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


# -- perturbed layer outputs ------------------------------------------------------------------------------------------------------


class Asked(Exception):
    """A parameter was used outside any layer rule."""


class Site:
    is_site, used = True, False

    def __init__(self, name: str):
        self.name = name

    def dense(self) -> Tensor:
        raise Asked(self.name)


class Graph(Trace):
    """Keeps every site's output in autograd's graph, so that its exact gradient can be handed to the layer's local rule."""

    def __init__(self) -> None:
        super().__init__(1)
        self.sites: list[Any] = []

    def site(self, weight, bias, output, tangent, local, *, channel, drawn=None, included=False):
        output.requires_grad_() if output.is_leaf else output.retain_grad()
        self.sites.append(([getattr(getattr(p, "source", None), "name", None) for p in (weight, bias)], local, output))
        return None


def through_sites(module: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Σ over layer calls of local(∂f/∂y)."""
    trace = Graph()
    duals = {n: Dual(p.detach().clone(), None, trace, Site(n)) for n, p in module.named_parameters()}
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    with AddressedSamplers(Key(3)), following_custom_functions():
        score(torch.func.functional_call(module, {**duals, **buffers}, inputs)).backward()
    grads = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
    for owners, local, output in trace.sites:
        for owner, grad in zip(owners, local(torch.zeros_like(output) if output.grad is None else output.grad), strict=False):
            if owner is not None:
                grads[owner] += grad.detach()
    return grads


# Parameters that act outside a layer: products of their own making, shared biases of three projections, keys appended to a sequence.
NO_SITE = {"Bilinear", "PReLU", "weight_norm", "spectral_norm", "attention extra keys", "attention other widths"}
NO_SITE |= {"weight norm of all", "weight norm second axis", "spectral norm of a convolution", "orthogonal"}


@pytest.mark.parametrize("name", [*(p.name for p in [*PROBES, *EXTRA]), *OPTIONS])
def test_local_rules_turn_output_gradients_into_parameter_gradients(name):
    module, inputs = OPTIONS[name]() if name in OPTIONS else build(next(p for p in [*PROBES, *EXTRA] if p.name == name))
    if name in NO_SITE:
        with pytest.raises(Asked):
            through_sites(module, inputs)
        return
    found, expected = through_sites(module, inputs), backprop(module, inputs)[0]
    assert all(float((found[n] - g).detach().abs().max()) <= 1e-10 * (1 + float(g.abs().max())) for n, g in expected.items())


@pytest.mark.parametrize("name", ["LSTM", "GRU", "MultiheadAttention", "TransformerEncoderLayer train", "attention across"])
def test_layers_of_sequences_are_perturbed_with_the_batch_as_first_axis(name):
    module, inputs = OPTIONS[name]() if name in OPTIONS else build(next(p for p in PROBES if p.name == name))
    trace = Graph()
    duals = {n: Dual(p.detach().clone(), None, trace, Site(n)) for n, p in module.named_parameters()}
    torch.func.functional_call(module, duals, inputs)
    assert {output.shape[0] for _, _, output in trace.sites} == {3}


def test_packed_sequences_are_not_taken_for_the_batchs_examples():
    module, inputs = OPTIONS["gru packed"]()
    trace = Graph()
    duals = {n: Dual(p.detach().clone(), None, trace, Site(n)) for n, p in module.named_parameters()}
    torch.func.functional_call(module, duals, inputs)
    assert {output.shape[0] for _, _, output in trace.sites} == {1}
