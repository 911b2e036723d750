r"""Cells of deep equilibrium layers, z = cell(z, u), by what is known of their fixed point before it is looked for.

    Plain            ρ(W z + u), or with a layer norm inside: a fixed point may be missing, or not be the only one
    Contracting      ρ(κ W z / max(1, b(W)) + u),  b(W) = √(‖W‖₁ ‖W‖_∞) ≥ ‖W‖₂,  κ < 1,  ρ 1-Lipschitz: one fixed point, at rate κ
    Subhomogeneous   φ(A z + softplus(u)),  A > 0,  φ > 0 with |y φ'(y)| ≤ μ φ(y), μ < 1: one fixed point z > 0, at rate μ in the Thompson metric

The last needs no small weights: A z + a is non-expansive in d(x, y) = max |log x - log y| for any A ≥ 0, a > 0, and φ shrinks d by μ.

Source: Sittoni and Tudisco 2024, arXiv 2403.00720 (subhomogeneous); Winston and Kolter 2020, arXiv 2006.08591, for the norm-bounded one as their baseline.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad.errors import SettingError, ShapeError, near_miss, require

LIPSCHITZ = {"tanh": torch.tanh, "relu": torch.relu}  # slopes in [0, 1]
SHAPES = ("power", "tanh")


def alike(z: Tensor, u: Tensor) -> None:
    """Raise ShapeError unless state and injection have one shape."""
    if z.shape != u.shape:
        raise ShapeError(f"the state is {tuple(z.shape)} and the injection {tuple(u.shape)}; they must be alike.")


def norm_bound(weight: Tensor) -> Tensor:
    """√(‖W‖₁ ‖W‖_∞), at least ‖W‖₂ and differentiable without a decomposition."""
    size = weight.abs()
    return (size.sum(0).max() * size.sum(1).max()).sqrt()


def bounded(weight: Tensor, limit: float) -> Tensor:
    """limit · W / max(1, b(W)), whose 2-norm is at most `limit`."""
    return weight * (limit / norm_bound(weight).clamp_min(1.0))


class Plain(nn.Module):
    """ρ(W z + u).

    Args:
        width: of z and u.
        activation: of z, a module.
        norm: layer normalisation of W z + u.
    """

    def __init__(self, width: int, activation: nn.Module, *, norm: bool = False):
        super().__init__()
        self.linear, self.activation = nn.Linear(width, width, bias=False), activation
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        alike(z, u)
        return self.activation(self.norm(self.linear(z) + u))  # type: ignore[no-any-return]


class Contracting(nn.Module):
    """ρ(W_c z + u) with ‖W_c‖ ≤ κ.

    Args:
        width: of z and u.
        activation: "tanh" or "relu".
        kappa: κ, in (0, 1).
    """

    def __init__(self, width: int, activation: str = "tanh", *, kappa: float = 0.9):
        super().__init__()
        require(0 < kappa < 1, "kappa", kappa, "in (0, 1)")
        if activation not in LIPSCHITZ:
            raise SettingError(near_miss("activation", activation, LIPSCHITZ))
        self.linear, self.activation, self.kappa = nn.Linear(width, width, bias=False), activation, kappa

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        alike(z, u)
        return LIPSCHITZ[self.activation](F.linear(z, bounded(self.linear.weight, self.kappa)) + u)


class Subhomogeneous(nn.Module):
    """φ(A z + softplus(u)), A = softplus(V) / width; φ(y) = y^μ, or tanh(y) + shift.

    Args:
        width: of z and u.
        form: "power" or "tanh".
        mu: of the power, in (0, 1).
        shift: of tanh, above 0; the larger, the smaller μ.
    """

    def __init__(self, width: int, form: str = "power", *, mu: float = 0.5, shift: float = 1.0):
        super().__init__()
        if form not in SHAPES:
            raise SettingError(near_miss("form", form, SHAPES))
        require(0 < mu < 1, "mu", mu, "in (0, 1): from 1 on the fixed point need not exist")
        require(shift > 0, "shift", shift, "above 0: without it μ is 1")
        self.linear, self.form, self.mu, self.shift = nn.Linear(width, width, bias=False), form, mu, shift

    @property
    def rate(self) -> float:
        """μ: the factor by which a step shrinks Thompson distances, at most."""
        if self.form == "power":
            return self.mu
        y = torch.linspace(0, 8, 80_001, dtype=torch.float64)  # beyond, y / cosh² y is below 4e-6
        return float((y / y.cosh().square() / (y.tanh() + self.shift)).max()) * (1 + 1e-6)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        alike(z, u)
        y = F.linear(z, F.softplus(self.linear.weight) / self.linear.in_features) + F.softplus(u)
        return y**self.mu if self.form == "power" else torch.tanh(y) + self.shift


def thompson(x: Tensor, y: Tensor) -> Tensor:
    """max |log x - log y| over the last axis, for x, y > 0."""
    return (x.log() - y.log()).abs().amax(-1)
