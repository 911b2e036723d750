"""The module kinds that `altgrad doctor --probes` drives: 27 that PyTorch's forward mode knows, 7 that it fails on, and some more."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

Made = tuple[nn.Module, tuple[Any, ...]]


class Probe(NamedTuple):
    """A module kind; `build(generator)` -> (module, inputs), all values from the generator."""

    name: str
    build: Callable[[Generator], Made]


def probe(name: str, make: Callable[[], nn.Module], *shape: int, train: bool = True) -> Probe:
    """A module of one float input."""

    def build(generator: Generator) -> Made:
        return ready(make, generator, train=train), (torch.randn(shape, generator=generator),)

    return Probe(name, build)


def ready(make: Callable[[], nn.Module], generator: Generator, *, train: bool = True) -> nn.Module:
    """A module whose parameters and running statistics come from `generator`; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            elif buffer.is_floating_point():
                drawn = torch.randn(buffer.shape, generator=generator)
                buffer.copy_(drawn / drawn.norm().clamp_min(1e-6))
    return module.train(train)


class Front(nn.Module):
    """A convolution, so that a module without parameters has something to be differentiated by."""

    def __init__(self, tail: nn.Module, *, after: bool = False):
        super().__init__()
        self.conv, self.tail = nn.Conv2d(2, 4, 3, padding=1), tail
        self.after = nn.Conv2d(4, 2, 1) if after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.tail(self.conv(x)))


class Take(nn.Module):
    """A module called with its input several times or with fixed further arguments."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Any], Any]):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: Any) -> Any:
        return self.call(self.inner, x)


class Entropy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.loss = nn.Linear(5, 4), nn.CrossEntropyLoss(reduction="none")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.linear(x), y)


class Fused(nn.Module):
    """scaled_dot_product_attention with the backend PyTorch picks."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Cube(torch.autograd.Function):
    """x³ in the old style: no setup_context, no jvp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def cubed() -> nn.Module:
    return Take(nn.Linear(5, 4), lambda linear, x: Cube.apply(linear(x)))


def indices(make: Callable[[], nn.Module], high: int, *shape: int) -> Callable[[Generator], Made]:
    return lambda generator: (ready(make, generator), (torch.randint(0, high, shape, generator=generator),))


def with_classes(generator: Generator) -> Made:
    return ready(Entropy, generator), (torch.randn(6, 5, generator=generator), torch.randint(0, 4, (6,), generator=generator))


def two_inputs(generator: Generator) -> Made:
    return ready(lambda: nn.Bilinear(5, 4, 3), generator), (torch.randn(6, 5, generator=generator), torch.randn(6, 4, generator=generator))


def packed(lstm: nn.Module, x: Tensor) -> Tensor:
    lengths = torch.tensor([3, 5, 2, 4])
    return lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0].data


def attention() -> nn.Module:
    return Take(nn.MultiheadAttention(8, 2, batch_first=True), lambda inner, x: inner(x, x, x))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)


NATIVE = [
    probe("Linear", lambda: nn.Linear(5, 4), 6, 5),
    Probe("Bilinear", two_inputs),
    probe("Conv1d", lambda: nn.Conv1d(3, 4, 3), 2, 3, 9),
    probe("Conv2d", lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), 2, 3, 8, 8),
    probe("Conv3d", lambda: nn.Conv3d(2, 3, 2), 2, 2, 4, 4, 4),
    probe("Conv2d grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), 2, 4, 7, 7),
    probe("Conv2d dilated", lambda: nn.Conv2d(3, 4, 3, dilation=2, padding="same"), 2, 3, 8, 8),
    probe("ConvTranspose1d", lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), 2, 3, 6),
    probe("ConvTranspose2d", lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), 2, 4, 5, 5),
    probe("LayerNorm", lambda: nn.LayerNorm(6), 4, 3, 6),
    probe("RMSNorm", lambda: nn.RMSNorm(6), 4, 3, 6),
    probe("GroupNorm", lambda: nn.GroupNorm(2, 4), 3, 4, 5, 5),
    probe("InstanceNorm2d", lambda: Front(nn.InstanceNorm2d(4, affine=True)), 3, 2, 5, 5),
    probe("BatchNorm2d eval", lambda: Front(nn.BatchNorm2d(4)), 3, 2, 5, 5, train=False),
    probe("MaxPool2d", lambda: Front(nn.MaxPool2d(2)), 3, 2, 6, 6),
    probe("AvgPool2d", lambda: Front(nn.AvgPool2d(2)), 3, 2, 6, 6),
    probe("AdaptiveAvgPool2d", lambda: Front(nn.AdaptiveAvgPool2d(2), after=True), 3, 2, 6, 6),
    probe("AdaptiveMaxPool2d", lambda: Front(nn.AdaptiveMaxPool2d(2)), 3, 2, 6, 6),
    Probe("Embedding", indices(lambda: nn.Embedding(9, 4, padding_idx=0), 9, 3, 5)),
    probe("RNN tanh", lambda: nn.RNN(5, 4, num_layers=2, batch_first=True), 3, 4, 5),
    probe("GRU", lambda: nn.GRU(5, 4, num_layers=2, batch_first=True), 3, 4, 5),
    probe("LSTMCell", lambda: nn.LSTMCell(5, 4), 3, 5),
    probe("GRUCell", lambda: nn.GRUCell(5, 4), 3, 5),
    probe("MultiheadAttention", attention, 3, 4, 8),
    probe("PReLU", lambda: Front(nn.PReLU(4)), 3, 2, 5, 5),
    probe("Upsample", lambda: Front(nn.Upsample(scale_factor=2, mode="bilinear"), after=True), 3, 2, 4, 4),
    Probe("CrossEntropyLoss", with_classes),
]

FAILING = [  # by torch.func.jvp as of PyTorch 2.13
    probe("BatchNorm2d train", lambda: Front(nn.BatchNorm2d(4), after=True), 3, 2, 5, 5),
    Probe("EmbeddingBag", indices(lambda: nn.EmbeddingBag(9, 4, mode="mean"), 9, 3, 5)),
    probe("LSTM", lambda: nn.LSTM(5, 4, num_layers=2, batch_first=True), 3, 4, 5),
    probe("TransformerEncoderLayer train", encoder, 3, 4, 8),
    probe("TransformerEncoderLayer eval", encoder, 3, 4, 8, train=False),
    probe("weight_norm", lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), 2, 3, 6, 6),
    probe("spectral_norm", lambda: parametrizations.spectral_norm(nn.Linear(5, 4)), 6, 5),
]

PROBES = [*NATIVE, *FAILING]

EXTRA = [
    probe("scaled_dot_product_attention", Fused, 3, 4, 8),
    probe("autograd.Function without jvp", cubed, 6, 5),
    probe("LSTM packed", lambda: Take(nn.LSTM(5, 4, bidirectional=True, batch_first=True), packed), 4, 5, 5),
    probe("GRU bidirectional", lambda: nn.GRU(5, 4, num_layers=2, dropout=0.3, bidirectional=True, batch_first=True), 3, 4, 5),
    probe("Dropout", lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 4)), 6, 5),
]
