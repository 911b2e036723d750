r"""Directions in which a parameter moves: dense or low rank, drawn by address, made when asked for and never stored.

K directions V_1 … V_K of a tensor, each with E[v] = 0 and E[v vᵀ] = I:
    dense      v ~ N(0, 1) or ±1 elementwise;
    low rank   V = A Bᵀ / √r with A [m, r], B [n, r] elementwise N(0, 1) or ±1 (a tensor of more axes is taken as [m, rest]).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from altgrad.kernels import noise
from altgrad.rng import Key, tensor_id

SMALL = 1 << 14  # numbers: directions up to this size (biases, norms) are kept for the step, as drawing them twice costs more


class Directions(Protocol):
    """K directions of one tensor of `shape`."""

    shape: torch.Size
    used: bool

    def dense(self) -> Tensor:
        """All of them, [K, *shape]."""
        ...

    def combine(self, coefficients: Tensor) -> Tensor:
        """Σ_k coefficients[k] · V_k, [*shape]."""
        ...

    def gram(self) -> Tensor:
        """The inner products ⟨V_i, V_j⟩ in float64, [K, K]."""
        ...


class Dense:
    """Directions with an independent number for every element."""

    def __init__(self, key: Key, name: str, like: Tensor, members: Sequence[int], law: str):
        self.key, self.tensor, self.members, self.law = key, tensor_id(name), members, law
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.used = False
        self.kept: Tensor | None = None

    def dense(self) -> Tensor:
        self.used = True
        if self.kept is not None:
            return self.kept
        drawn = noise.draw(self.law, self.key, self.tensor, self.members, self.shape, dtype=self.dtype, device=self.device)
        if drawn.numel() <= SMALL:
            self.kept = drawn
        return drawn

    def member(self, index: int) -> Tensor:
        """One direction, [*shape]."""
        self.used = True
        return noise.draw(self.law, self.key, self.tensor, [self.members[index]], self.shape, dtype=self.dtype, device=self.device)[0]

    def combine(self, coefficients: Tensor) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        if len(self.members) * self.shape.numel() <= SMALL:
            return torch.tensordot(coefficients.to(wide), self.dense().to(wide), 1).to(self.dtype)
        # One member at a time and added in float32: the sum needs one direction's memory, whatever K is.
        result = torch.zeros(self.shape, dtype=wide, device=self.device)
        for index in range(len(self.members)):
            result.addcmul_(self.member(index).to(wide), coefficients[index].to(wide))
        return result.to(self.dtype)

    def gram(self) -> Tensor:
        flat = self.dense().reshape(len(self.members), -1).double()
        return flat @ flat.T


class LowRank:
    """Directions A Bᵀ/√r, handed out as factors so that a linear layer's tangent costs two thin products."""

    def __init__(self, key: Key, name: str, like: Tensor, members: Sequence[int], law: str, rank: int):
        self.key, self.name, self.members, self.law, self.rank = key, name, members, law, rank
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.used = False
        self.cache: tuple[Tensor, Tensor] | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A/√r [K, m, r] and B [K, n, r]; small, so kept for the step."""
        self.used = True
        if self.cache is None:
            rows, columns = self.shape[0], self.shape[1:].numel()
            drawn = noise.draw(self.law, self.key, tensor_id(self.name), self.members, (rows + columns, self.rank), dtype=self.dtype, device=self.device)
            a = drawn[:, :rows]
            self.cache = (a if self.rank == 1 else a * self.rank**-0.5), drawn[:, rows:]
        return self.cache

    def dense(self) -> Tensor:
        a, b = self.factors()
        return torch.matmul(a, b.transpose(1, 2)).reshape(len(self.members), *self.shape)

    def combine(self, coefficients: Tensor) -> Tensor:
        a, b = self.factors()
        wide = torch.promote_types(self.dtype, torch.float32)
        if self.rank == 1:  # the same product, with nothing copied but the short factor
            return ((a[:, :, 0] * coefficients.to(a.dtype)[:, None]).T.to(wide) @ b[:, :, 0].to(wide)).reshape(self.shape).to(self.dtype)
        left = (a * coefficients.to(a.dtype)[:, None, None]).permute(1, 0, 2).flatten(1).to(wide)  # [m, K·r]
        right = b.permute(1, 0, 2).flatten(1).to(wide)  # [n, K·r]
        return (left @ right.T).reshape(self.shape).to(self.dtype)

    def gram(self) -> Tensor:
        a, b = (f.double() for f in self.factors())
        return torch.einsum("imr,jms,inr,jns->ij", a, a, b, b)


def directions(key: Key, name: str, like: Tensor, members: Sequence[int], *, law: str, rank: int | None) -> Dense | LowRank:
    """Low-rank directions where a rank is asked for and the tensor has two axes or more, dense ones otherwise."""
    if rank is None or like.ndim < 2 or rank >= min(like.shape[0], like.shape[1:].numel()):
        return Dense(key, name, like, members, law)
    return LowRank(key, name, like, members, law, rank)


class Steered:
    """Directions kept clear of a unit guide u: V_k - ⟨V_k, u⟩u; with `lead`, u itself comes first.

    The inner products ⟨V_k, u⟩ run over all parameters together, so they are handed in.
    """

    def __init__(self, base: Dense, guide: Tensor, overlap: Tensor, *, lead: bool):
        self.base, self.guide, self.overlap, self.lead = base, guide, overlap, lead  # overlap [K]
        self.shape, self.used = base.shape, False

    def dense(self) -> Tensor:
        self.used = True
        drawn = self.base.dense()
        rest = drawn - self.overlap.to(drawn.dtype).reshape(-1, *(1 for _ in self.shape)) * self.guide.to(drawn.dtype)
        return torch.cat([self.guide.to(drawn.dtype)[None], rest]) if self.lead else rest

    def combine(self, coefficients: Tensor) -> Tensor:
        drawn = coefficients[1:] if self.lead else coefficients
        along = -(drawn * self.overlap.to(drawn.dtype)).sum() + (coefficients[0] if self.lead else 0)
        return self.base.combine(drawn) + along.to(self.guide.dtype) * self.guide

    def gram(self) -> Tensor:
        flat = self.dense().flatten(1).double()
        return flat @ flat.T
