"""Small networks for images and for text, each a frozen dataclass of settings that builds a plain nn.Module (see models.py for names and first weights)."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from altgrad.errors import UsageError, require

Shape = tuple[int, ...]


class Sign(nn.Module):
    """sign(x): a hard step, whose derivative is 0 wherever it has one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sign(x)


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "sign": Sign}
NORMS = ("batch", "group")


def setting(default: Any, meaning: str) -> Any:
    """A field with its default and its meaning."""
    return field(default=default, metadata={"help": meaning})


def whole(name: str, value: Any) -> None:
    """Require an integer of at least 1."""
    require(isinstance(value, int) and not isinstance(value, bool) and value >= 1, name, value, "an integer of at least 1")


def widths(name: str, value: Any) -> list[int]:
    """ "128-64" -> [128, 64]."""
    parts = str(value).split("-")
    require(all(part.isdecimal() and int(part) >= 1 for part in parts), name, value, 'one width per layer, joined by "-", for instance 256-256')
    return [int(part) for part in parts]


@dataclass(frozen=True)
class MLP:
    """Fully connected layers with an activation between them."""

    hidden: str = setting("128-128", "widths of the hidden layers")
    activation: str = setting("relu", "relu, tanh, gelu or sign (a hard step: only rules without derivatives train what lies before it)")

    def build(self, input_shape: Shape, classes: int) -> nn.Module:
        require(self.activation in ACTIVATIONS, "activation", self.activation, f"one of {', '.join(ACTIVATIONS)}")
        layers: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
        width = math.prod(input_shape)
        for wider in widths("hidden", self.hidden):
            layers += [nn.Linear(width, wider), ACTIVATIONS[self.activation]()]
            width = wider
        return nn.Sequential(*layers, nn.Linear(width, classes))


@dataclass(frozen=True)
class CNN:
    """3x3 convolutions, ReLU, and 2x2 max pooling while the image is large enough; then one linear layer."""

    channels: str = setting("32-64", "channels of the convolutions")

    def build(self, input_shape: Shape, classes: int) -> nn.Module:
        layers, (depth, height, width) = image_first(input_shape)
        for deeper in widths("channels", self.channels):
            layers += [nn.Conv2d(depth, deeper, 3, padding=1), nn.ReLU()]
            depth = deeper
            if min(height, width) >= 4:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(depth * height * width, classes))


class Residual(nn.Module):
    r"""y = relu(x' + f(x)), f two 3x3 convolutions with norms; x' is x, or its 1x1 projection where the shape changes."""

    def __init__(self, depth: int, deeper: int, stride: int, norm: str):
        super().__init__()
        self.conv1 = nn.Conv2d(depth, deeper, 3, stride, 1, bias=False)
        self.norm1 = normalisation(norm, deeper)
        self.conv2 = nn.Conv2d(deeper, deeper, 3, 1, 1, bias=False)
        self.norm2 = normalisation(norm, deeper)
        same = stride == 1 and depth == deeper
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(depth, deeper, 1, stride, bias=False), normalisation(norm, deeper))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.skip(x) + self.norm2(self.conv2(inner)))


@dataclass(frozen=True)
class ResNet:
    """Three stages of residual blocks, each half the size and twice the channels of the one before; mean over positions; one linear layer."""

    width: int = setting(16, "channels of the first stage")
    blocks: int = setting(1, "residual blocks per stage (depth 6 · blocks + 2)")
    norm: str = setting("batch", "batch (examples mix in training) or group")

    def build(self, input_shape: Shape, classes: int) -> nn.Module:
        whole("width", self.width)
        whole("blocks", self.blocks)
        require(self.norm in NORMS, "norm", self.norm, f"one of {', '.join(NORMS)}")
        layers, (depth, _, _) = image_first(input_shape)
        layers += [nn.Conv2d(depth, self.width, 3, padding=1, bias=False), normalisation(self.norm, self.width), nn.ReLU()]
        depth = self.width
        for stage in range(3):
            for block in range(self.blocks):
                deeper = self.width * 2**stage
                layers.append(Residual(depth, deeper, 2 if stage and not block else 1, self.norm))
                depth = deeper
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(depth, classes))


class LastState(nn.Module):
    """A recurrent network read at its last step."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0][:, -1]  # [examples, hidden]


@dataclass(frozen=True)
class GRU:
    """A gated recurrent unit that reads the image row by row; one linear layer on its last state."""

    hidden: int = setting(128, "width of the state")
    layers: int = setting(1, "recurrent layers, one on the other")

    def build(self, input_shape: Shape, classes: int) -> nn.Module:
        return recurrent(nn.GRU, self.hidden, self.layers, input_shape, classes)


@dataclass(frozen=True)
class LSTM:
    """A long short-term memory that reads the image row by row; one linear layer on its last state."""

    hidden: int = setting(128, "width of the state")
    layers: int = setting(1, "recurrent layers, one on the other")

    def build(self, input_shape: Shape, classes: int) -> nn.Module:
        return recurrent(nn.LSTM, self.hidden, self.layers, input_shape, classes)


def recurrent(cell: Any, hidden: int, layers: int, input_shape: Shape, classes: int) -> nn.Module:
    """Rows -> `cell` -> the last state -> classes."""
    whole("hidden", hidden)
    whole("layers", layers)
    rows, (_, features) = rows_first(input_shape)
    return nn.Sequential(*rows, LastState(cell(features, hidden, layers, batch_first=True)), nn.Linear(hidden, classes))


class Positions(nn.Module):
    """Adds a trained vector per position."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class Attention(nn.Module):
    r"""softmax(QKᵀ/√d) V in several heads, then a linear layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in self.query_key_value(x).chunk(3, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(-3, -2).flatten(-2))  # [examples, tokens, width]


class Encoder(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class MeanOverTokens(nn.Module):
    """[examples, tokens, width] -> [examples, width]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=-2)


@dataclass(frozen=True)
class Transformer:
    """Rows of the image as tokens, pre-norm encoder layers, mean over tokens, one linear layer."""

    width: int = setting(64, "width of a token")
    heads: int = setting(4, "attention heads; divides width")
    layers: int = setting(2, "encoder layers")
    dropout: float = setting(0.0, "probability of dropping an element of what a layer adds, in [0, 1)")

    def build(self, input_shape: Shape, classes: int) -> nn.Module:
        for name in ("width", "heads", "layers"):
            whole(name, getattr(self, name))
        require(self.width % self.heads == 0, "heads", self.heads, f"a divisor of width={self.width}")
        require(isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        rows, (tokens, features) = rows_first(input_shape)
        encoders = [Encoder(self.width, self.heads, float(self.dropout)) for _ in range(self.layers)]
        ends = [nn.LayerNorm(self.width), MeanOverTokens(), nn.Linear(self.width, classes)]
        return nn.Sequential(*rows, nn.Linear(features, self.width), Positions(tokens, self.width), *encoders, *ends)


class Windows(nn.Module):
    """[examples, characters] -> [examples, characters, size · width]: the vectors of the last `size` characters at every place, side by side."""

    def __init__(self, vocabulary: int, width: int, size: int):
        super().__init__()
        self.embedding, self.size = nn.Embedding(vocabulary, width), size

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            raise UsageError(f"this model reads characters (int64 numbers), but was given {x.dtype}; use it with the problem char-lm.")
        vectors = self.embedding(nn.functional.pad(x, (self.size - 1, 0)))  # 0 is what comes before the beginning
        return vectors.unfold(-2, self.size, 1).flatten(-2)


class ClassesSecond(nn.Module):
    """[examples, places, classes] -> [examples, classes, places], as PyTorch's losses take them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(-1, -2)


@dataclass(frozen=True)
class Window:
    """Text: at every place the vectors of the last `size` characters side by side, an mlp on them, and a score for every next character."""

    size: int = setting(3, "characters that are looked at")
    width: int = setting(6, "length of a character's vector")
    hidden: str = setting("32", "widths of the hidden layers")
    activation: str = setting("tanh", "relu, tanh or gelu")

    reads: ClassVar[str] = "characters"

    def build(self, input_shape: Shape, classes: int) -> nn.Module:
        whole("size", self.size)
        whole("width", self.width)
        layers = MLP(self.hidden, self.activation).build((self.size * self.width,), classes)
        return nn.Sequential(Windows(classes, self.width, self.size), layers, ClassesSecond())


def image_shape(input_shape: Shape) -> tuple[int, int, int]:
    """(channels, height, width) of an input; a flat input of square length is taken for a grey square image."""
    if len(input_shape) == 3:
        return input_shape[0], input_shape[1], input_shape[2]
    side = math.isqrt(math.prod(input_shape))
    if len(input_shape) != 1 or side * side != input_shape[0]:
        raise UsageError(f"this model reads images; an input of shape {list(input_shape)} is none. Give [channels, height, width], or use the model mlp.")
    return 1, side, side


def image_first(input_shape: Shape) -> tuple[list[nn.Module], tuple[int, int, int]]:
    """The layers that make an image of the input, and the image's shape."""
    shape = image_shape(input_shape)
    return [nn.Unflatten(1, shape)] if len(input_shape) == 1 else [], shape


class Rows(nn.Module):
    """[examples, channels, height, width] or [examples, height · width] -> [examples, height, channels · width]."""

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.shape).transpose(1, 2).flatten(2)


def rows_first(input_shape: Shape) -> tuple[list[nn.Module], tuple[int, int]]:
    """The layer that makes a sequence of the image's rows; (rows, features per row)."""
    channels, height, width = image_shape(input_shape)
    return [Rows((channels, height, width))], (height, channels * width)


def normalisation(norm: str, channels: int) -> nn.Module:
    """Batch norm, or group norm with as many of 8 groups as divide the channels."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(math.gcd(8, channels), channels)
