r"""Hopfield nets in layers: what they share, whatever couples the layers.

    E(s) = Σ_l [ Σ_i G(s_l,i) - s_l · up_l(s_{l-1}) ],   s_0 = x,   G' = ρ⁻¹
    ∂E/∂s_l = 0   ⇔   s_l = ρ(up_l(s_{l-1}) + down_l(s_l, s_{l+1})),   down_l = ∂/∂s_l [ s_{l+1} · up_{l+1}(s_l) ]

ρ(z) = σ(4z - 2), tanh(z) or z, all holomorphic about the real axis. A read-out outside the system is W s_L + b: it is not part of E, so that nothing comes
back from it but the nudge, and its weights get the loss's ordinary gradient.

Source: Hopfield 1984, PNAS 81; Scellier and Bengio 2017, arXiv 1602.05179; Laborieux et al. 2021, arXiv 2006.03824 (the read-out).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from altgrad.engine import Tree
from altgrad.equilibrium.relaxation import State
from altgrad.errors import SettingError, near_miss, require
from altgrad.kernels import noise
from altgrad.rng import Key, tensor_id

RANGES = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "linear": (-math.inf, math.inf)}
READOUTS = ("inside", "outside")


def activation(kind: str, value: Tensor) -> Tensor:
    """ρ(z)."""
    return torch.sigmoid(4 * value - 2) if kind == "sigmoid" else torch.tanh(value) if kind == "tanh" else value


def integral(kind: str, s: Tensor) -> Tensor:
    """G(s), the integral of ρ⁻¹, up to a constant."""
    least = torch.finfo(s.dtype).tiny  # 0 ln 0 = 0
    if kind == "sigmoid":
        return (s * torch.log(s + least) + (1 - s) * torch.log(1 - s + least)) / 4 + s / 2
    if kind == "tanh":
        return ((1 + s) * torch.log(1 + s + least) + (1 - s) * torch.log(1 - s + least)) / 2
    return s * s / 2


def check_activation(setting: str, kind: str) -> None:
    """Raise SettingError for an activation that there is not."""
    if kind not in RANGES:
        raise SettingError(near_miss(setting, kind, RANGES))


def first_weights(key: Key, name: str, shape: Sequence[int], gain: float) -> nn.Parameter:
    """Normal, standard deviation gain / √fan in."""
    return nn.Parameter(noise.draw("normal", key.fold("model"), tensor_id(name), [0], shape)[0] * (gain / math.sqrt(math.prod(shape[1:]))))


def beyond(old: State, new: State, relaxation: float) -> State:
    """old + relaxation · (new - old), leaf by leaf: successive over-relaxation where it is above 1."""
    return (
        new if relaxation == 1 else tuple(after if after is before else torch.lerp(before, after, relaxation) for before, after in zip(old, new, strict=True))
    )


class Driven(NamedTuple):
    """Inputs as sweeps take them: what they tell the first layer, the same at every sweep."""

    drive: Tensor


class Layered(nn.Module):
    """Layers whose neighbours act on one another; a subclass gives `up` and `down`.

    Args:
        shapes: of the layers' states, without the batch.
        kinds: their activations.
        key: addresses the first weights.
        sweeps: of the plain forward pass, from ρ(0).
        classes: outputs of a read-out outside the system; None: the last layer is the output.
    """

    relaxation = 1.1  # of sweeps, unless told otherwise

    def __init__(self, shapes: Sequence[Sequence[int]], kinds: Sequence[str], *, key: Key, sweeps: int, classes: int | None = None):
        super().__init__()
        require(isinstance(sweeps, int) and sweeps >= 1, "sweeps", sweeps, "a whole number >= 1")
        self.shapes, self.kinds, self.sweeps, self.classes = [tuple(shape) for shape in shapes], list(kinds), sweeps, classes
        if classes is not None:
            self.readout_weight = first_weights(key, "readout_weight", (classes, math.prod(self.shapes[-1])), 1.0)
            self.readout_bias = nn.Parameter(torch.zeros(classes))

    def up(self, params: Tree, number: int, below: Tensor) -> Tensor:
        """What layer `number` is told by the layer below it; layer 0 by the inputs."""
        raise NotImplementedError

    def down(self, params: Tree, number: int, own: Tensor, above: Tensor) -> Tensor:
        """What layer `number` is told by the layer above it."""
        raise NotImplementedError

    def told(self, params: Tree, x: Tensor | Driven) -> Tensor:
        """What layer 0 is told by the inputs."""
        return x.drive if isinstance(x, Driven) else self.up(params, 0, x)

    @property
    def range(self) -> tuple[float, float]:
        """Between what the outputs lie."""
        return RANGES["linear" if self.classes is not None else self.kinds[-1]]

    def rest(self, params: Tree, x: Tensor) -> State:
        """Where a relaxation begins: every layer [N, ...] at ρ(0)."""
        some = next(iter(params.values()))
        return tuple(activation(kind, some.new_zeros(x.shape[0], *shape)) for kind, shape in zip(self.kinds, self.shapes, strict=True))

    def output(self, s: State) -> Tensor:
        """The last layer."""
        return s[-1]

    def readout(self, params: Tree, s: State, x: object = None) -> Tensor:
        """What is read out: the last layer, or a linear map of it; `x` has no part in it."""
        return s[-1] if self.classes is None else s[-1].flatten(1) @ params["readout_weight"].T + params["readout_bias"]

    def prepared(self, params: Tree, x: Tensor) -> Driven:
        """What a relaxation needs of the inputs, worked out once."""
        return Driven(self.up(params, 0, x))

    def energy(self, params: Tree, s: State, x: Tensor | Driven) -> Tensor:
        """E [N]."""
        own = [integral(kind, leaf).flatten(1).sum(1) for kind, leaf in zip(self.kinds, s, strict=True)]
        return torch.stack(own).sum(0) + self.coupling(params, s, x)

    def coupling(self, params: Tree, s: State, x: Tensor | Driven) -> Tensor:
        """The part of E [N] that parameters enter, -Σ_l s_l · up_l(s_{l-1})."""
        told = [self.told(params, x), *(self.up(params, number + 1, below) for number, below in enumerate(s[:-1]))]
        return -torch.stack([(own * drive).flatten(1).sum(1) for own, drive in zip(s, told, strict=True)]).sum(0)

    def drive(self, params: Tree, s: State, x: Tensor | Driven) -> State:
        """What every layer is told by its neighbours: the slope of Σ_l s_l · up_l, so that its Jacobian is symmetric."""
        return tuple(self.told_by_all(params, s, x, number) for number in range(len(s)))

    def told_by_all(self, params: Tree, s: State, x: Tensor | Driven, number: int) -> Tensor:
        """What one layer is told."""
        told = self.told(params, x) if number == 0 else self.up(params, number, s[number - 1])
        return told + self.down(params, number, s[number], s[number + 1]) if number + 1 < len(s) else told

    def step(self, params: Tree, s: State, x: Tensor | Driven, force: State | None = None, layers: Sequence[int] | None = None) -> State:
        """ρ of what every layer is told by its neighbours and the force; of `layers` alone, where given."""
        found = list(s)
        for number in range(len(s)) if layers is None else layers:
            drive = self.told_by_all(params, s, x, number)
            found[number] = activation(self.kinds[number], drive if force is None else drive + force[number])
        return tuple(found)

    def sweep(self, params: Tree, s: State, x: Tensor | Driven, force: State | None = None, relaxation: float = 1.0) -> State:
        """Every second layer, then the others, each moved by `relaxation` times what would put it to rest.

        With 1, where layers are coupled linearly, each is put where E is least given its neighbours, so that E never rises. Max-pooling is convex in
        what it pools: while the layer above is not negative (sigmoid) a bound on E is made least, and E never rises either.
        """
        for first in range(2):
            s = beyond(s, self.step(params, s, x, force, range(first, len(s), 2)), relaxation)
        return s

    def forward(self, x: Tensor) -> Tensor:
        params: Tree = dict(self.named_parameters())
        s, given = self.rest(params, x), self.prepared(params, x)
        for _ in range(self.sweeps):
            s = self.sweep(params, s, given)
        return self.readout(params, s)


__all__ = ["RANGES", "READOUTS", "Driven", "Layered", "activation", "beyond", "check_activation", "first_weights", "integral"]
