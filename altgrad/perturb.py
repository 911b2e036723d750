r"""Directions in which a parameter moves: dense or low rank, drawn by address, made when asked for and never stored.

K directions V_1 … V_K of a tensor, each with E[v] = 0 and E[v vᵀ] = I:
    dense      v elementwise N(0, 1), ±1, or uniform on (-√3, √3);
    low rank   V = A Bᵀ / √r with A [m, r], B [n, r] elementwise of the same laws (a tensor of more axes is taken as [m, rest]).
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from altgrad.errors import UsageError, near_miss
from altgrad.kernels import noise
from altgrad.rng import Key, tensor_id

KURTOSIS = {"normal": 3.0, "sign": 1.0, "uniform": 1.8}
WIDTH = 12**0.5  # of the uniform law with variance 1
BLOCK = 1 << 20  # numbers drawn at once while directions are added up: they stay near the processor
SMALL = 1 << 14  # numbers: directions up to this size (biases, norms) are kept for the step, as drawing them twice costs more


def kurtosis(law: str) -> float:
    """κ = E v⁴ of a law with variance 1; ‖E⟨G, E⟩‖² of a rank-r direction has the mean ‖G‖² [(m-1+κ)(n-1+κ) + (r-1)(mn+2)] / r."""
    if law not in KURTOSIS:
        raise UsageError(near_miss("noise law", law, KURTOSIS))
    return KURTOSIS[law]


def draw(
    law: str,
    key: Key,
    tensor: int,
    members: Sequence[int],
    shape: Sequence[int],
    *,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Noise of mean 0 and variance 1 at an address, [len(members), *shape]: noise.draw, with uniforms u taken to √12 (u - ½)."""
    if law != "uniform":
        return noise.draw(law, key, tensor, members, shape, start=start, dtype=dtype, device=device)
    # u - ½ is exact in float32 and would not be in a shorter dtype.
    return noise.draw(law, key, tensor, members, shape, start=start, device=device).sub_(0.5).mul_(WIDTH).to(dtype)


def split(drawn: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """A/√r [K, m, r] and B [K, n, r] of blocks [K, m + n, r] drawn together, A's `rows` first."""
    a, b, rank = drawn[:, :rows], drawn[:, rows:], drawn.shape[2]
    return (a if rank == 1 else a * rank**-0.5), b


def factors(
    law: str,
    key: Key,
    *,
    tensor: int,
    members: Sequence[int],
    rank: int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """A/√r [K, m, r] and B [K, n, r] for a tensor of `shape` [m, ...], n being the product of the rest: one block a member (or pair)."""
    drawn = draw(law, key, tensor, members, (shape[0] + math.prod(shape[1:]), rank), dtype=dtype, device=device)
    return split(drawn, shape[0])


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
        drawn = draw(self.law, self.key, self.tensor, self.members, self.shape, dtype=self.dtype, device=self.device)
        if drawn.numel() <= SMALL:
            self.kept = drawn
        return drawn

    def combine(self, coefficients: Tensor) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        coefficients, size = coefficients.to(wide), self.shape.numel()
        if self.kept is not None or len(self.members) * size <= SMALL:
            drawn = self.dense().to(wide).reshape(len(self.members), size)
            return (coefficients @ drawn).reshape(self.shape).to(self.dtype)
        # Some members at a time and added in float32: the sum needs one block's memory, whatever K is.
        result = torch.zeros(size, dtype=wide, device=self.device)
        block = max(1, BLOCK // max(1, size))
        for start in range(0, len(self.members), block):
            members = self.members[start : start + block]
            drawn = draw(self.law, self.key, self.tensor, members, (size,), dtype=self.dtype, device=self.device)
            result.addmv_(drawn.to(wide).t(), coefficients[start : start + block])
        self.used = True
        return result.reshape(self.shape).to(self.dtype)

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
            self.cache = factors(
                self.law,
                self.key,
                tensor=tensor_id(self.name),
                members=self.members,
                rank=self.rank,
                shape=self.shape,
                dtype=self.dtype,
                device=self.device,
            )
        return self.cache

    def dense(self) -> Tensor:
        a, b = self.factors()
        return torch.matmul(a, b.transpose(1, 2)).reshape(len(self.members), *self.shape)

    def combine(self, coefficients: Tensor) -> Tensor:
        a, b = self.factors()
        wide = torch.promote_types(self.dtype, torch.float32)
        if self.rank == 1:  # the same product, with nothing copied but the short factor
            return ((a[:, :, 0] * coefficients.to(wide)[:, None]).T.to(wide) @ b[:, :, 0].to(wide)).reshape(self.shape).to(self.dtype)
        left = (a * coefficients.to(wide)[:, None, None]).permute(1, 0, 2).flatten(1).to(wide)  # [m, K·r]
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
