"""The small problems on which engines are looked at. Weights and data come from addresses; the global RNG is left alone."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_batchedtensor, maybe_get_bdim
from torch.utils._pytree import tree_map

from altgrad.kernels import noise
from altgrad.local.labels import at_first
from altgrad.problem import Batch, Problem
from altgrad.problems.quadratic import Quadratic
from altgrad.problems.supervised import Loss, Supervised
from altgrad.rng import Key, tensor_id
from altgrad.world import World

KEY = Key(1)
EXAMPLES = 6
CLASSES = 3


class Probe(Supervised):
    """A model on one fixed batch, which ranks divide among themselves."""

    def __init__(self, build: Callable[[], nn.Module], inputs: Any, *, loss: Loss = F.cross_entropy, dtype: torch.dtype = torch.float32, influence: Any = None):
        with torch.random.fork_rng(devices=[]):
            model = build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                drawn = noise.draw("normal", KEY, tensor_id(name), [0], parameter.shape)[0]
                parameter.copy_(drawn * max(1, parameter[0].numel()) ** -0.5 if parameter.ndim > 1 else 1 + 0.3 * drawn if "norm" in name else 0.3 * drawn)
        super().__init__(model.to(dtype), loss, name="probe", influence=influence)
        self.inputs = tree_map(lambda leaf: leaf.to(dtype), inputs)
        self.targets = torch.arange(EXAMPLES) % CLASSES

    def batch(self, step: int, world: World) -> Batch:
        share = world.share(EXAMPLES)
        return Batch(tree_map(lambda leaf: leaf[share.start : share.stop], self.inputs), self.targets[share.start : share.stop], share.start)

    def with_label(self, x: Any, y: Tensor) -> Any:
        """A pattern of the label's is added to the inputs, which are too small to be written over."""
        return at_first(x, lambda first: first + (y.to(first) @ data("label", *first.shape[1:]).to(first)[:CLASSES].flatten(1)).view(first.shape))


def data(label: str, *shape: int) -> Tensor:
    """Addressed inputs [EXAMPLES, *shape]."""
    return noise.draw("normal", KEY, tensor_id(label), [0], (EXAMPLES, *shape))[0]


class Tied(nn.Module):
    """One weight used by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))
        self.body[2].weight = self.body[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Parallel(nn.Module):
    """Two linear layers side by side, added."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - F.one_hot(targets, CLASSES)).square().sum(-1).mean()


def parallel(dtype: torch.dtype = torch.float32) -> "Probe":
    """A loss that is quadratic in its matrices and vectors."""
    return Probe(Parallel, data("parallel", 4), loss=squared_error, dtype=dtype)


class SpiedDropout(nn.Module):
    """Dropout with p = 1/2 that notes the masks it meets, a member's each; where `imposed` is set, it takes that mask instead."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.imposed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.imposed is not None:
            return x * (2 * self.imposed)
        y = F.dropout(x, 0.5, self.training)
        mask = (y != 0).to(y.dtype)
        axis = maybe_get_bdim(mask) if is_batchedtensor(mask) else -1
        self.seen.extend([mask] if axis < 0 else get_unwrapped(mask).unbind(axis))
        return y


def frozen_model() -> nn.Module:
    """Frozen: a whole layer, and the bias of another."""
    model = network_model()
    for parameter in (model[0].weight, model[0].bias, model[2].bias):
        parameter.requires_grad_(False)
    return model


def network_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES))


def network(dtype: torch.dtype = torch.float32) -> Probe:
    """3-5-4-3, tanh."""
    return Probe(network_model, data("network", 3), dtype=dtype)


def convolution(dtype: torch.dtype = torch.float32) -> Probe:
    """A convolution and two linear layers."""
    return Probe(
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES)),
        data("image", 1, 5, 5),
        dtype=dtype,
    )


class Normalised(nn.Module):
    """Batch norm between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Sequential())
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


def normalised(dtype: torch.dtype = torch.float32) -> Probe:
    """Batch norm in training mode, where examples mix."""
    return Probe(Normalised, data("normalised", 3), dtype=dtype)


def tied(dtype: torch.dtype = torch.float32) -> Probe:
    """One weight, two layers."""
    return Probe(Tied, data("tied", 4), dtype=dtype)


def frozen(dtype: torch.dtype = torch.float32) -> Probe:
    """Some parameters without requires_grad."""
    return Probe(frozen_model, data("network", 3), dtype=dtype)


def dropout(dtype: torch.dtype = torch.float32) -> Probe:
    """Dropout whose masks can be read and imposed: `model[1]`."""
    return Probe(
        lambda: nn.Sequential(nn.Linear(3, 6), SpiedDropout(), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, CLASSES)), data("dropout", 3), dtype=dtype
    )


def quadratic(dtype: torch.dtype = torch.float32) -> Problem:
    """½ (x - x*)ᵀ H (x - x*) in 6 dimensions: a problem with no layers."""
    problem = Quadratic(dimension=6, condition=10.0, batch_size=EXAMPLES).build(KEY)
    problem.x.data = problem.x.data.to(dtype)
    return problem


GRADIENT_PROBES: dict[str, Callable[[torch.dtype], Problem]] = {
    "quadratic": quadratic,
    "network": network,
    "convolution": convolution,
    "batch_norm": normalised,
    "tied_weights": tied,
    "frozen_parameters": frozen,
}
