"""Every layer of a population is the layer at W + σE, member by member, to rounding in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from altgrad.errors import CapabilityError
from altgrad.kernels import noise
from altgrad.population import Draws, Notes, Perturbed, population
from altgrad.probes import Take, ready
from altgrad.rng import Key, tensor_id
from altgrad.samplers import AddressedSamplers

KEY, SIGMA, DIRECTIONS = Key(11, 2), 0.3, 3
EXACT = 1e-10  # relative, in float64: the figure that is claimed


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(law: str, name: str, direction: int, shape: Any) -> Tensor:
    """Noise of variance 1 straight from its address, one direction."""
    drawn = noise.draw(law, KEY, tensor_id(name), [direction], shape)[0]
    return (drawn - 0.5) * math.sqrt(12) if law == "uniform" else drawn


def explicit(params: dict[str, Tensor], direction: int, sign: int, *, rank: int | None, law: str, sigma: float = SIGMA) -> dict[str, Tensor]:
    """θ + σ s E written out, from the definition of E."""
    moved = {}
    for name, value in params.items():
        rows, columns = (value.shape[0], value.shape[1:].numel()) if value.ndim >= 2 else (0, 0)
        if rank is None or rank >= min(rows, columns):
            noise_of = unit(law, name, direction, value.shape)
        else:
            factors = unit(law, name, direction, (rows + columns, rank)).double()
            noise_of = (factors[:rows] @ factors[rows:].T / math.sqrt(rank)).reshape(value.shape)
        moved[name] = value + sigma * sign * noise_of.to(value.dtype)
    return moved


def members(antithetic: bool, count: int = DIRECTIONS) -> list[tuple[int, int]]:
    return [(d, sign) for sign in ((1, -1) if antithetic else (1,)) for d in range(count)]


def trainable(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.named_buffers()}


def samplers() -> AddressedSamplers:
    return AddressedSamplers(Key(5))


def drawn_for(module: nn.Module, *, rank: int | None = 1, law: str = "normal", antithetic: bool = True, chunk: int | None = None) -> Draws:
    return Draws(KEY, trainable(module), DIRECTIONS, sigma=SIGMA, rank=rank, law=law, antithetic=antithetic, chunk=chunk)


def together(module: nn.Module, inputs: tuple[Any, ...], notes: Notes | None = None, **how: Any) -> Any:
    """All members at once."""

    def call(values: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(module, {**values, **buffers_of(module)}, inputs)

    return population(call, drawn_for(module, **how), samplers=samplers, notes=notes)


def one_by_one(module: nn.Module, inputs: tuple[Any, ...], *, rank: int | None = 1, law: str = "normal", antithetic: bool = True) -> Any:
    """Each member by plain PyTorch with its weights written out."""
    found = []
    for direction, sign in members(antithetic):
        with torch.no_grad(), samplers():
            values = explicit(trainable(module), direction, sign, rank=rank, law=law)
            found.append(torch.func.functional_call(module, {**values, **buffers_of(module)}, inputs))
    return tree_map(lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *found)


def distance(found: Any, expected: Any) -> float:
    """The largest relative distance of any output."""
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    assert pairs
    worst = 0.0
    for a, b in pairs:
        if isinstance(b, Tensor):
            assert a.shape == b.shape
            worst = max(worst, float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)))
    return worst


def wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


Made = Callable[[], tuple[nn.Module, tuple[Any, ...]]]


def layer(make: Callable[[], nn.Module], *shapes: Any, call: Any = None, train: bool = True) -> Made:
    """A float64 module with weights from a generator, and normal inputs (a tensor stands for itself)."""

    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        module = ready((lambda: Take(make(), call)) if call else make, generator(2), train=train).double()
        drawn = generator(3)
        return module, tuple(wide(s) if isinstance(s, Tensor) else torch.randn(s, generator=drawn, dtype=torch.float64) for s in shapes)

    return build


class Gpt2Layer(nn.Module):
    """addmm on a weight [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Free(nn.Module):
    """A weight and a bias used by a function of one's own."""

    def __init__(self, use: Callable[..., Any], *shape: int):
        super().__init__()
        self.weight, self.bias, self.use = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape[0])), use

    def forward(self, *inputs: Any) -> Any:
        return self.use(self.weight, self.bias, *inputs)


def free(use: Callable[..., Any], shape: tuple[int, ...], *inputs: Any) -> Made:
    return layer(lambda: Free(use, *shape), *inputs)


class Tied(nn.Module):
    """One weight read as an embedding and as the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(ids))))


class Cross(nn.Module):
    """Attention from a first input to a second."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.inner(x, y, y)


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    module[0].weight.requires_grad_(False)
    module[2].bias.requires_grad_(False)
    return module


TOKENS = torch.tensor([[1, 2, 2, 5], [3, 3, 0, 4], [0, 6, 5, 1]])
HIDE = torch.tensor([[False, False, True, True], [False, False, False, False], [False, True, False, False]])
CAUSAL = torch.ones(4, 4).triu(1).bool()
ADDED = torch.linspace(-1, 1, 16).reshape(4, 4)


def itself(**kwargs: Any) -> Any:
    return lambda m, x: m(x, x, x, **kwargs)


def packed(m: Any, x: Tensor) -> Any:
    output, state = m(pack_padded_sequence(x, torch.tensor([2, 5, 3, 5]), batch_first=True, enforce_sorted=False))
    return pad_packed_sequence(output, batch_first=True)[0], state


LINEAR = {
    "linear": layer(lambda: nn.Linear(5, 4), (6, 5)),
    "linear, one row": layer(lambda: nn.Linear(5, 4), (5,)),
    "linear, sequences": layer(lambda: nn.Linear(5, 4), (2, 3, 5)),
    "linear, four axes": layer(lambda: nn.Linear(5, 4), (2, 2, 3, 5)),
    "linear, no bias": layer(lambda: nn.Linear(5, 4, bias=False), (6, 5)),
    "linear, no rows": layer(lambda: nn.Linear(5, 4), (0, 5)),
    "linear, by keyword": free(lambda w, b, x: F.linear(input=x, weight=w, bias=b), (4, 5), (6, 5)),
    "two layers": layer(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), (6, 5)),
    "identity: no parameter": layer(lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), (4, 2, 3)),
    "addmm": layer(lambda: Gpt2Layer(5, 4), (2, 3, 5)),
    "addmm, scaled": free(lambda w, b, x: torch.addmm(b, x, w.t(), beta=0.5, alpha=2), (4, 5), (6, 5)),
    "addmm, weight first": free(lambda w, b, x: torch.addmm(b[:, None], w, x), (4, 5), (5, 6)),
    "x @ W": free(lambda w, b, x: x @ w, (5, 4), (6, 5)),
    "x @ W, sequences": free(lambda w, b, x: x @ w, (5, 4), (2, 3, 5)),
    "x @ W.T": free(lambda w, b, x: x @ w.T + b, (4, 5), (6, 5)),
    "x @ W.mT": free(lambda w, b, x: x @ w.mT, (4, 5), (6, 5)),
    "W @ x": free(lambda w, b, x: w @ x, (4, 5), (5, 6)),
    "W @ x, batched": free(lambda w, b, x: w @ x, (4, 5), (3, 5, 2)),
    "matmul": free(lambda w, b, x: torch.matmul(x, w.t()), (4, 5), (2, 6, 5)),
    "mm": free(lambda w, b, x: torch.mm(x, w.transpose(0, 1)), (4, 5), (6, 5)),
    "transpose by keyword": free(lambda w, b, x: x @ torch.transpose(w, dim0=-1, dim1=-2), (4, 5), (6, 5)),
    "swapaxes by keyword": free(lambda w, b, x: x @ torch.swapaxes(w, axis0=0, axis1=1), (4, 5), (6, 5)),
    "linear on rows": free(lambda w, b, x: F.linear(x, w[1:3], b[1:3]), (4, 5), (6, 5)),
    "linear on columns": free(lambda w, b, x: F.linear(x, w[:, 1:4], b), (4, 5), (6, 3)),
    "linear on rows and columns": free(lambda w, b, x: F.linear(x, w[2:, :3]), (4, 5), (6, 3)),
    "linear on the last rows": free(lambda w, b, x: F.linear(x, w[-2:]), (4, 5), (6, 5)),
    "linear on chunks": free(lambda w, b, x: [F.linear(x, part) for part in w.chunk(2)], (4, 5), (6, 5)),
    "linear on a split": free(lambda w, b, x: [F.linear(x, part) for part in torch.split(w, [1, 3])], (4, 5), (6, 5)),
    "linear on a split by keyword": free(lambda w, b, x: [F.linear(x, part) for part in w.split(split_size=2, dim=0)], (4, 5), (6, 5)),
    "bilinear": layer(lambda: nn.Bilinear(5, 4, 3), (6, 5), (6, 4)),
    "bilinear, no bias, sequences": layer(lambda: nn.Bilinear(5, 4, 3, bias=False), (2, 3, 5), (2, 3, 4)),
    "frozen weights": layer(frozen, (6, 5)),
    "tied weights": layer(Tied, TOKENS),
    "embedding": layer(lambda: nn.Embedding(7, 4), TOKENS),
    "embedding, padded": layer(lambda: nn.Embedding(7, 4, padding_idx=0), TOKENS),
    "embedding, one id": layer(lambda: nn.Embedding(7, 4), torch.tensor(3)),
}
CONVOLUTIONS = {
    "conv1d": layer(lambda: nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "conv1d, no batch": layer(lambda: nn.Conv1d(3, 4, 3), (3, 9)),
    "conv1d, grouped": layer(lambda: nn.Conv1d(4, 6, 3, groups=2, stride=2), (2, 4, 9)),
    "conv2d": layer(lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 8, 8)),
    "conv2d, no bias": layer(lambda: nn.Conv2d(3, 4, 3, bias=False), (2, 3, 6, 6)),
    "conv2d, grouped": layer(lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    "conv2d, depthwise": layer(lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "conv2d, same": layer(lambda: nn.Conv2d(3, 4, 3, dilation=2, padding="same"), (2, 3, 8, 8)),
    "conv2d, reflected": layer(lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 6)),
    "conv2d, no batch": layer(lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "conv2d, uneven": layer(lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (2, 3, 7, 6)),
    "conv3d": layer(lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "conv3d, grouped, strided": layer(lambda: nn.Conv3d(4, 4, 2, groups=2, stride=2), (2, 4, 4, 4, 4)),
    "convᵀ 1d": layer(lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 6)),
    "convᵀ 1d, no batch": layer(lambda: nn.ConvTranspose1d(3, 4, 3), (3, 6)),
    "convᵀ 2d": layer(lambda: nn.ConvTranspose2d(3, 4, 3, padding=1, bias=False), (2, 3, 5, 5)),
    "convᵀ 2d, grouped": layer(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 5, 5)),
    "convᵀ 2d, dilated": layer(lambda: nn.ConvTranspose2d(3, 4, 3, dilation=2), (2, 3, 4, 4)),
    "convᵀ 3d": layer(lambda: nn.ConvTranspose3d(2, 4, 2, groups=2), (2, 2, 3, 3, 3)),
}
ATTENTION = {
    "self": layer(lambda: nn.MultiheadAttention(8, 2, batch_first=True), (3, 4, 8), call=itself()),
    "self, without weights": layer(lambda: nn.MultiheadAttention(8, 2, batch_first=True), (3, 4, 8), call=itself(need_weights=False)),
    "self, eval": layer(lambda: nn.MultiheadAttention(8, 2, batch_first=True), (3, 4, 8), call=itself(need_weights=False), train=False),
    "self, weights per head": layer(lambda: nn.MultiheadAttention(8, 2, bias=False), (4, 3, 8), call=itself(average_attn_weights=False)),
    "self, no batch": layer(lambda: nn.MultiheadAttention(8, 2), (4, 8), call=itself()),
    "masked": layer(lambda: nn.MultiheadAttention(8, 2, batch_first=True), (3, 4, 8), call=itself(key_padding_mask=HIDE, attn_mask=CAUSAL)),
    "causal": layer(lambda: nn.MultiheadAttention(8, 2, batch_first=True), (3, 4, 8), call=itself(attn_mask=CAUSAL, is_causal=True, need_weights=False)),
    "added mask": layer(lambda: nn.MultiheadAttention(8, 2, batch_first=True), (3, 4, 8), call=itself(attn_mask=ADDED.double())),
    "bias_k, zeros": layer(lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True), (3, 4, 8), call=itself()),
    "cross": layer(Cross, (3, 4, 8), (3, 5, 8)),
    "kdim, vdim": layer(lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True), (3, 4, 8), (3, 5, 6), (3, 5, 5)),
    "encoder, train": layer(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), (3, 4, 8)),
    "encoder, eval": layer(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), (3, 4, 8), train=False),
    "encoder, norm first, gelu": layer(lambda: nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", norm_first=True), (4, 3, 8), train=False),
    "decoder": layer(lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), (3, 4, 8), (3, 5, 8), train=False),
}


def heads(**kwargs: Any) -> Made:
    """Scaled dot-product attention itself, behind a projection."""

    def run(linear: Any, x: Tensor) -> Tensor:
        parts = linear(x).unflatten(-1, (8, 4)).transpose(-3, -2)  # [N, 8, L, 4]
        q, k, v = parts.split([4, 2, 2], -3) if kwargs.get("enable_gqa") else parts[..., :6, :, :].split(2, -3)
        return F.scaled_dot_product_attention(q, k, v, **{name: part(parts) if callable(part) else part for name, part in kwargs.items()})

    return layer(lambda: nn.Linear(8, 32), kwargs.pop("shape", (3, 4, 8)), call=run)


PRODUCTS = {
    "plain": heads(),
    "causal": heads(is_causal=True),
    "no batch": heads(shape=(4, 8)),
    "no batch, masked": heads(shape=(4, 8), attn_mask=~CAUSAL),
    "masked": heads(attn_mask=~CAUSAL),
    "an example's mask": heads(attn_mask=~HIDE[:, None, None, :]),
    "an example's added mask": heads(attn_mask=ADDED.double().expand(3, 1, 4, 4) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[:, None, None, None]),
    "a member's mask": heads(attn_mask=lambda parts: parts[:, :1]),
    "scaled": heads(scale=0.3),
    "grouped queries": heads(enable_gqa=True),
    "dropout": heads(dropout_p=0.4),
}
RECURRENT = {
    "rnn": layer(lambda: nn.RNN(5, 4, batch_first=True), (3, 6, 5)),
    "rnn, relu": layer(lambda: nn.RNN(5, 4, nonlinearity="relu"), (6, 3, 5)),
    "gru": layer(lambda: nn.GRU(5, 4, bias=False), (6, 3, 5)),
    "gru, two layers, both ways": layer(lambda: nn.GRU(5, 4, num_layers=2, bidirectional=True), (4, 3, 5)),
    "lstm": layer(lambda: nn.LSTM(5, 4, batch_first=True), (3, 6, 5)),
    "lstm, no batch": layer(lambda: nn.LSTM(5, 4), (6, 5)),
    "lstm, two layers, dropout": layer(lambda: nn.LSTM(5, 4, num_layers=2, dropout=0.5), (4, 3, 5)),
    "lstm, projected": layer(lambda: nn.LSTM(5, 4, proj_size=3), (4, 3, 5)),
    "lstm, both ways": layer(lambda: nn.LSTM(5, 4, bidirectional=True), (4, 3, 5)),
    "lstm, packed": layer(lambda: nn.LSTM(5, 4, batch_first=True), (4, 5, 5), call=packed),
    "gru, packed, both ways": layer(lambda: nn.GRU(5, 4, batch_first=True, bidirectional=True), (4, 5, 5), call=packed),
    "rnn cell": layer(lambda: nn.RNNCell(5, 4), (6, 5)),
    "gru cell": layer(lambda: nn.GRUCell(5, 4), (6, 5)),
    "lstm cell": layer(lambda: nn.LSTMCell(5, 4), (6, 5)),
}
VECTORS = {
    "layer norm": layer(lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)), (4, 5)),
    "rms norm": layer(lambda: nn.Sequential(nn.Linear(5, 6), nn.RMSNorm(6)), (4, 5)),
    "group norm": layer(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), (3, 2, 5, 5)),
    "instance norm": layer(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True)), (3, 2, 5, 5)),
    "batch norm, train": layer(lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), (6, 5)),
    "batch norm, eval": layer(lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), (6, 5), train=False),
    "batch norm, no affine": layer(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False)), (3, 2, 5, 5)),
    "batch norm, no statistics": layer(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), (3, 2, 5, 5), train=False),
    "prelu": layer(lambda: nn.Sequential(nn.Linear(5, 4), nn.PReLU(4)), (6, 5)),
    "dropout": layer(lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)), (6, 5)),
    "channel dropout": layer(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Dropout2d(0.5)), (3, 2, 5, 5)),
}


class Cube(torch.autograd.Function):
    """x³, written for no vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return x**3


class NewCube(torch.autograd.Function):
    """x³ in the new style, still without a rule for vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)


class RuledCube(torch.autograd.Function):
    """x³ with a rule of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)


FUNCTIONS = {
    "function, old style": layer(lambda: nn.Linear(5, 4), (6, 5), call=lambda m, x: Cube.apply(m(x))),
    "function, new style": layer(lambda: nn.Linear(5, 4), (6, 5), call=lambda m, x: NewCube.apply(m(x))),
    "function, with a rule": layer(lambda: nn.Linear(5, 4), (6, 5), call=lambda m, x: RuledCube.apply(m(x))),
    "checkpoint": layer(lambda: nn.Linear(5, 4), (6, 5), call=lambda m, x: checkpoint(m, x, use_reentrant=False)),
    "checkpoint, reentrant": layer(lambda: nn.Linear(5, 4), (6, 5), call=lambda m, x: checkpoint(m, x, use_reentrant=True)),
}
LAYERS = {
    **FUNCTIONS,
    **LINEAR,
    **CONVOLUTIONS,
    **{f"attention, {n}": made for n, made in ATTENTION.items()},
    **{f"product, {n}": made for n, made in PRODUCTS.items()},
    **RECURRENT,
    **VECTORS,
}


# -- the claim, for every layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("name", LAYERS)
def test_the_population_is_the_layer_at_explicit_weights(name, rank):
    module, inputs = LAYERS[name]()
    assert distance(together(module, inputs, rank=rank), one_by_one(module, inputs, rank=rank)) <= EXACT


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_a_rule_never_writes_its_weight_out(name):
    notes = Notes()
    module, inputs = LAYERS[name]()
    together(module, inputs, notes)
    assert notes.metrics() == {}


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("law", ["normal", "sign", "uniform"])
def test_every_law_with_and_without_pairs(law, antithetic):
    module, inputs = LINEAR["two layers"]()
    how = {"law": law, "antithetic": antithetic, "rank": 2}
    assert distance(together(module, inputs, **how), one_by_one(module, inputs, **how)) <= EXACT


@pytest.mark.parametrize("name", ["two layers", "conv2d, grouped", "attention, self", "lstm", "batch norm, train", "dropout", "tied weights"])
@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("antithetic", [True, False])
def test_the_chunk_does_not_change_the_result(name, chunk, antithetic):
    module, inputs = LAYERS[name]()
    assert distance(together(module, inputs, chunk=chunk, antithetic=antithetic), together(module, inputs, antithetic=antithetic)) <= EXACT


def test_members_of_a_population_differ():
    module, inputs = LINEAR["two layers"]()
    flat = together(module, inputs).flatten(1)
    assert float(torch.pdist(flat).min()) > 0.1


# -- what has no rule -------------------------------------------------------------------------------------------------------------


class Smooth(nn.Module):
    """A parametrisation that reads the weight elementwise."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh()


def parametrised() -> nn.Module:
    module = nn.Linear(5, 4)
    nn.utils.parametrize.register_parametrization(module, "weight", Smooth())
    return module


RULELESS = {
    "einsum": (free(lambda w, b, x: torch.einsum("ni,oi->no", x, w), (4, 5), (6, 5)), "weight: einsum"),
    "elementwise": (free(lambda w, b, x: x @ (w * 2).T, (4, 5), (6, 5)), "weight: mul"),
    "parametrised": (layer(parametrised, (6, 5)), "parametrizations.weight.original: tanh"),
    "weight norm": (layer(lambda: parametrizations.weight_norm(nn.Linear(5, 4)), (6, 5)), "parametrizations.weight.original1: _weight_norm"),
    "spectral norm, eval": (layer(lambda: parametrizations.spectral_norm(nn.Linear(5, 4)), (6, 5), train=False), "parametrizations.weight.original"),
    "weight times weight": (free(lambda w, b, x: x @ (w @ w), (5, 5), (6, 5)), "weight: as an input"),
    "a vector's product": (free(lambda w, b, x: torch.mv(w, x), (4, 5), (5,)), "weight: mv"),
    "standardised": (free(lambda w, b, x: x @ ((w - w.mean(1, keepdim=True)) / w.norm()).T, (4, 5), (6, 5)), "weight: mean"),
    "stacked": (free(lambda w, b, x: F.linear(x, torch.cat([w, w])), (4, 5), (6, 5)), "weight: cat"),
    "one row": (free(lambda w, b, x: x + w[1], (4, 5), (6, 5)), "weight: __getitem__"),
    "unexpected keyword": (free(lambda w, b, x: torch.matmul(input=x, other=w), (5, 4), (6, 5)), ""),
    "renormalised embedding": (layer(lambda: nn.Embedding(7, 4, max_norm=None, scale_grad_by_freq=True), TOKENS), ""),
}


@pytest.mark.parametrize("name", RULELESS)
def test_what_has_no_rule_runs_dense_and_is_counted_by_parameter_and_function(name):
    made, noted = RULELESS[name]
    module, inputs = made()
    notes = Notes()
    assert distance(together(module, inputs, notes, rank=2), one_by_one(module, inputs, rank=2)) <= EXACT
    if noted:
        assert any(place.startswith(noted) for place in notes.written_out), notes.written_out
        assert notes.metrics()["fallback_dense_weights"] == sum(notes.written_out.values()) >= 1


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda w, b, x: x @ w.mul_(0.5).T, "mul_ would change the parameter 'weight' in place"),
        (lambda w, b, x: x @ w.clamp_(-1, 1).T, "clamp_ would change the parameter 'weight' in place"),
        (lambda w, b, x: (w.__setitem__(0, 1.0), x @ w.T)[1], "__setitem__ would change the parameter 'weight' in place"),
        (lambda w, b, x: (torch.mul(w, 2, out=w), x @ w.T)[1], "mul would change the parameter 'weight' in place"),
        (lambda w, b, x: x @ F.relu(w, inplace=True).T, "relu would change the parameter 'weight' in place"),
        (lambda w, b, x: x @ nn.init.zeros_(w).T, "in place"),
    ],
    ids=["mul_", "clamp_", "setitem", "out", "inplace", "init"],
)
def test_a_parameter_changed_in_place_is_refused_by_name(use, said):
    module, inputs = free(use, (4, 5), (6, 5))()
    before = module.weight.detach().clone()
    with pytest.raises(CapabilityError, match=said):
        together(module, inputs)
    assert torch.equal(module.weight, before)


def test_a_detached_parameter_still_moves():
    module, inputs = free(lambda w, b, x: x @ w.detach().T, (4, 5), (6, 5))()
    assert distance(together(module, inputs), one_by_one(module, inputs)) <= EXACT


def test_shapes_and_dtypes_of_a_perturbed_parameter_are_its_own():
    seen = {}

    def look(w, b, x):
        seen.update(
            shape=w.shape, ndim=w.ndim, dtype=w.dtype, size=w.size(0), numel=w.numel(), floating=w.is_floating_point(), perturbed=isinstance(w, Perturbed)
        )
        return F.linear(x, w) + w.new_zeros(4)

    module, inputs = free(look, (4, 5), (6, 5))()
    together(module, inputs)
    assert seen == {"shape": (4, 5), "ndim": 2, "dtype": torch.float64, "size": 4, "numel": 20, "floating": True, "perturbed": True}


# -- inputs of their own ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("antithetic", [True, False])
def test_members_may_see_inputs_of_their_own(antithetic, chunk):
    module, _ = LINEAR["two layers"]()
    own = torch.randn(len(members(antithetic)), 6, 5, generator=generator(4), dtype=torch.float64)
    draws = drawn_for(module, antithetic=antithetic, chunk=chunk)
    found = population(lambda values, x: torch.func.functional_call(module, values, (x,)), draws, inputs=own)
    for place, (direction, sign) in enumerate(members(antithetic)):
        expected = torch.func.functional_call(module, explicit(trainable(module), direction, sign, rank=1, law="normal"), (own[place],))
        assert distance(found[place], expected) <= EXACT


def test_inputs_of_their_own_may_be_a_tree():
    module, _ = LINEAR["bilinear"]()
    drawn = generator(4)
    own = {"a": torch.randn(6, 2, 5, generator=drawn, dtype=torch.float64), "b": torch.randn(6, 2, 4, generator=drawn, dtype=torch.float64)}
    found = population(lambda values, x: torch.func.functional_call(module, values, (x["a"], x["b"])), drawn_for(module), inputs=own)
    direction, sign = members(True)[4]
    expected = torch.func.functional_call(module, explicit(trainable(module), direction, sign, rank=1, law="normal"), (own["a"][4], own["b"][4]))
    assert distance(found[4], expected) <= EXACT


# -- samplers and statistics ------------------------------------------------------------------------------------------------------


def test_all_members_meet_one_dropout_mask():
    masks = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(torch.ones_like(x), 0.5, self.training) * (x * 0 + 1)

    module, inputs = layer(lambda: nn.Sequential(nn.Linear(5, 8), Spy()), (6, 5))()
    masks = together(module, inputs)
    assert all(torch.equal(masks[0], other) for other in masks[1:])
    assert 0 < float((masks[0] == 0).double().mean()) < 1


@pytest.mark.parametrize("rank", [1, None])
def test_members_write_no_running_statistics(rank):
    module, inputs = VECTORS["batch norm, train"]()
    own = {name: value for name, value in buffers_of(module).items() if "running" in name}
    before = {name: value.clone() for name, value in own.items()}
    draws = drawn_for(module, rank=rank)
    population(lambda values: torch.func.functional_call(module, {**values, **own}, inputs), draws, samplers=samplers)
    assert all(torch.equal(own[name], value) for name, value in before.items())


# -- precision --------------------------------------------------------------------------------------------------------------------

SHORT = {
    "two layers": 4,
    "conv2d, grouped": 4,
    "convᵀ 2d, grouped": 4,
    "embedding": 2,
    "addmm": 4,
    "attention, self": 12,
    "layer norm": 8,
    "batch norm, train": 24,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHORT)
def test_short_floats_keep_their_dtype_and_lose_no_more_than_plain_pytorch_loses(name, dtype):
    module, inputs = LAYERS[name]()
    exact = one_by_one(module, inputs)
    short, given = module.to(dtype), tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    found, plain = together(short, given), one_by_one(short, given)
    assert [leaf.dtype for leaf in tree_leaves(found)] == [leaf.dtype for leaf in tree_leaves(plain)]
    assert distance(found, exact) <= max(2 * distance(plain, exact), SHORT[name] * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", [*(name for name in SHORT if name != "layer norm"), "bilinear", "x @ W", "lstm", "gru cell", "linear on rows"])
def test_under_autocast_outputs_have_plain_pytorchs_dtype_and_precision(name):
    module, inputs = LAYERS[name]()
    exact = one_by_one(module, inputs)
    module, given = module.float(), tuple(x.float() if x.is_floating_point() else x for x in inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, plain = together(module, given), one_by_one(module, given)
    assert [leaf.dtype for leaf in tree_leaves(found)] == [leaf.dtype for leaf in tree_leaves(plain)]
    assert distance(found, exact) <= max(2 * distance(plain, exact), SHORT.get(name, 8) * torch.finfo(torch.bfloat16).eps)
