"""Layers of every kind that a population must evaluate as plain PyTorch would: name -> () -> (module, inputs), in float64."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from altgrad.probes import Take, ready


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
