r"""The layer: every vector z_j of an input becomes its nearest code.

    k(j) = argmin_k |z_j - c_k|,   value = q_j = c_k(j) with a stand-in derivative A in z, and ν in q (synchronised commitment)
    loss_n = mean over the vectors and features of example n of   β (z - sg q)² + α (sg z - q)²

so that a loss's gradient g at the values reaches the encoder as Aᵀ g and the codebook as ν g. Codes follow by gradient (α), by moving averages, or by
inner steps before each of the encoder's (see moving.py); affine.py lets them move together.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level

from altgrad import rng
from altgrad.errors import SettingError, ShapeError, near_miss, require
from altgrad.rng import Key, tensor_id
from altgrad.vector import affine as affines
from altgrad.vector import moving, usage
from altgrad.vector.gradients import GRADIENTS
from altgrad.vector.kmeans import kmeans


class Quantised(NamedTuple):
    """What the layer gives."""

    values: Tensor  # [N, …, D] the codes, with the stand-in derivative
    indices: Tensor  # [N, …] which ones
    losses: Tensor  # [N] β (z - sg q)² + α (sg z - q)², for the problem to add to its own


class VectorQuantizer(nn.Module):
    r"""z [N, …, D] -> Quantised.

    In training mode, and outside torch.func's transforms, a pass writes its statistics to the buffers, as batch norm does; without `ema`, `revive`,
    `alternating` and affine="running" there are none. Within vmap (populations), grad and jvp it reads them only.

    Args:
        codes: K >= 1.
        dim: D >= 1, the length of a vector; the last axis of the input.
        gradient: "straight-through" or "rotation" (see gradients.py).
        commitment: β >= 0. 0.25 is van den Oord's.
        pull: α >= 0, the weight of the codebook's own loss; without effect where `ema` or `alternating` moves the codes.
        sync: ν >= 0; 0 for none. 0.2 is a start; beyond 1 codes run away from their vectors.
        affine: "none", "learned" or "running" (see affine.py).
        affine_rate: r > 0 of "learned"; 10 suits SGD, 1 suits Adam, whose steps do not shrink with the gradient.
        alternating: m >= 0 inner steps before each of the encoder's.
        alternating_rate: η of an inner step, in (0, 1].
        ema: the codes are moving averages, and no parameter.
        decay: γ of all running statistics, in [0, 1): at 0.95 a code that nothing chooses is dead after 45 updates.
        revive: every so many updates, codes whose running share is below `dead` / K are put on vectors of the batch; 0 for never. Where processes divide
            a batch, a code is put on the mean of their vectors.
        dead: in [0, 1].
        key: addresses the first codes, uniform on ±1/K, and which vectors dead codes are put on.

    Raises:
        SettingError: a setting out of its range, or two that exclude each other. ShapeError (when called): the last axis is not D.
    """

    usage: Tensor  # [K] the running share of every code
    total: Tensor  # [K, D] the running sum of its vectors, each over M
    moved: Tensor  # [K, D] by which codes were moved other than by a gradient
    mean: Tensor  # [D] running moments of the vectors
    square: Tensor
    updates: Tensor

    def __init__(
        self,
        codes: int,
        dim: int,
        *,
        gradient: str = "straight-through",
        commitment: float = 0.25,
        pull: float = 1.0,
        sync: float = 0.0,
        affine: str = "none",
        affine_rate: float = 1.0,
        alternating: int = 0,
        alternating_rate: float = 0.5,
        ema: bool = False,
        decay: float = 0.95,
        revive: int = 0,
        dead: float = 0.1,
        key: Key | None = None,
    ):
        super().__init__()
        for name, whole, least in (("codes", codes, 1), ("dim", dim, 1), ("alternating", alternating, 0), ("revive", revive, 0)):
            require(isinstance(whole, int) and not isinstance(whole, bool) and whole >= least, name, whole, f"a whole number >= {least}")
        for name, chosen, allowed in (("gradient", gradient, GRADIENTS), ("affine", affine, affines.AFFINES)):
            if chosen not in allowed:
                raise SettingError(near_miss(name, str(chosen), allowed))
        for name, weight in (("commitment", commitment), ("pull", pull), ("sync", sync)):
            require(0 <= weight < float("inf"), name, weight, "a number of at least 0")
        require(0 < affine_rate < float("inf"), "affine_rate", affine_rate, "a number above 0")
        require(0 < alternating_rate <= 1, "alternating_rate", alternating_rate, "in (0, 1]")
        require(0 <= decay < 1, "decay", decay, "in [0, 1)")
        require(0 <= dead <= 1, "dead", dead, "in [0, 1]")
        require(isinstance(ema, bool), "ema", ema, "true or false")
        for name, value, plain in (("sync", sync, 0.0), ("affine", affine, "none"), ("alternating", alternating, 0)):
            require(not ema or value == plain, name, value, f"{plain!r} with ema=true, whose codes are averages of their vectors and nothing else")
        self.codes, self.dim, self.gradient, self.commitment, self.sync = codes, dim, gradient, commitment, sync
        self.pull = 0.0 if ema or alternating else pull
        self.affine, self.affine_rate, self.alternating, self.alternating_rate = affine, affine_rate, alternating, alternating_rate
        self.ema, self.decay, self.revive, self.dead, self.key = ema, decay, revive, dead, key or Key(0)
        unit = rng.uniform(self.key.fold("codebook"), tensor_id("codebook"), [0], codes * dim)  # [1, elements] in (0, 1)
        first = (torch.from_numpy(unit).view(codes, dim) * 2 - 1) / codes
        if ema or revive:
            self.register_buffer("usage", torch.full((codes,), 1 / codes))
        if ema:
            self.register_buffer("total", first / codes)
        else:
            self.codebook = nn.Parameter(first)
        if (revive or alternating) and not ema:
            self.register_buffer("moved", torch.zeros(codes, dim))
        if affine == "learned":
            self.scale, self.shift = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        if affine == "running":
            self.register_buffer("mean", first.mean(0))
            self.register_buffer("square", first.square().mean(0))
        if revive:
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor) -> Quantised:
        self.check(z)
        points = z.detach().reshape(-1, self.dim)  # [M, D]
        scale, table = self.stretched()
        before = table.detach()
        if self.alternating and self.training:
            table = table + (moving.alternated(before, points, steps=self.alternating, rate=self.alternating_rate) - before)
        indices = moving.nearest(points, table.detach())
        codes = F.embedding(indices, table).reshape(z.shape)
        held = codes.detach()
        values = GRADIENTS[self.gradient](z, held)
        if self.sync:
            values = values + self.sync * (codes - held)
        losses = self.commitment * (z - held).square()
        if self.pull:
            losses = losses + self.pull * (z.detach() - codes).square()
        if self.training and maybe_current_level() is None:
            self.observe(points, indices, before, table.detach(), scale)
        return Quantised(values, indices.reshape(z.shape[:-1]), losses.flatten(1).mean(1))

    def table(self) -> Tensor:
        """The codes [K, D] as they act."""
        return self.stretched()[1]

    def stretched(self) -> tuple[Tensor | None, Tensor]:
        """(the scale of the affine map, the codes as they act)."""
        if self.ema:
            return None, self.total / self.usage[:, None]
        codes = self.codebook + self.moved if self.revive or self.alternating else self.codebook
        if self.affine == "none":
            return None, codes
        scale, shift = (
            affines.learned(self.scale, self.shift, rate=self.affine_rate) if self.affine == "learned" else affines.running(codes, self.mean, self.square)
        )
        return scale.detach(), scale * codes + shift

    @torch.no_grad()
    def observe(self, points: Tensor, indices: Tensor, before: Tensor, after: Tensor, scale: Tensor | None) -> None:
        """Write what this pass's vectors [M, D] and choices [M] say; the codes came as `before` and were used as `after`."""
        if self.affine == "running":
            self.mean.lerp_(points.mean(0).to(self.mean.dtype), 1 - self.decay)
            self.square.lerp_(points.square().mean(0).to(self.square.dtype), 1 - self.decay)
        moved = torch.zeros_like(self.usage, dtype=torch.bool) if self.revive else None
        if self.revive:
            self.updates += 1
            number = int(self.updates)
            if number % self.revive == 0:  # by the share as it was before this pass: all processes then agree which codes are dead
                after, moved = usage.revived(after, self.usage < self.dead / self.codes, points, key=self.key.at(number % 2**32))
        if self.ema or self.revive:
            old = (self.usage, self.total if self.ema else torch.zeros_like(before))
            share, total = moving.averaged(old, moving.gathered(points.to(self.usage.dtype), indices, self.codes), decay=self.decay)
            if moved is not None:  # a code that came back has the time of a fresh one
                share = torch.where(moved, 1 / self.codes, share)
                total = torch.where(moved[:, None], after / self.codes, total)
            self.usage.copy_(share)
            if self.ema:
                self.total.copy_(total)
        if (self.revive or self.alternating) and not self.ema:
            self.moved += (after - before) if scale is None else (after - before) / affines.away_from_zero(scale)

    @torch.no_grad()
    def start_from(self, points: Tensor, *, key: Key, sweeps: int = 10) -> None:
        """Put the codes on the k-means of vectors [M, D], in place; where they had been moved or mapped to before is forgotten.

        Raises:
            SettingError: more codes than vectors. ShapeError: vectors of another length.
        """
        self.check(points)
        points = points.detach().reshape(-1, self.dim)
        found = kmeans(points, self.codes, key=key, sweeps=sweeps)
        if self.ema:
            self.total.copy_(found * self.usage[:, None])
        else:
            self.codebook.copy_(found)
            for name in ("moved", "scale", "shift"):  # absent, or 0 before training
                if hasattr(self, name):
                    getattr(self, name).zero_()
        if self.affine == "running":  # from which the map starts as the identity
            self.mean.copy_(found.mean(0))
            self.square.copy_(found.square().mean(0))

    def check(self, z: Tensor) -> None:
        """Refuse what holds no vectors of D numbers."""
        if z.ndim < 2 or z.shape[-1] != self.dim or not z.is_floating_point():
            seen = f"{z.dtype} of shape {tuple(z.shape)}"
            hint = " Channels come last: z.movedim(1, -1)." if z.ndim > 2 and z.shape[1] == self.dim else ""
            raise ShapeError(f"vectors to quantise are {seen}; they must be floats [examples, ..., {self.dim}], since dim={self.dim}.{hint}")

    def extra_repr(self) -> str:
        return f"codes={self.codes}, dim={self.dim}, gradient={self.gradient}"
