"""Calls of the Triton kernels of _cuda.py: grids, tiles and strides, under the names and arguments of operators.py."""

import math
from typing import Any

import torch
from torch import Tensor

from altgrad.kernels import _cuda
from altgrad.kernels.lowrank_plain import check

LAWS = {"normal": _cuda.NORMAL, "sign": _cuda.SIGN, "uniform": _cuda.UNIFORM}  # of unit variance
FILLS = {"normal": _cuda.NORMAL, "sign": _cuda.SIGN, "uniform": _cuda.RAW, "integers": _cuda.WORDS}  # as noise.draw and noise.integers give them
PRODUCT = "library"  # or "fused": who makes x Wᵀ where members have rows of their own
FUSED_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
CONTRACT_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
PROGRAMS = 264  # fewer tiles than this are split over members: two for each multiprocessor of the largest devices


def _tiles(length: int, tile: int) -> int:
    return -(-length // tile)


def _power(number: int) -> int:
    """The power of two at or above."""
    return 1 << max(0, number - 1).bit_length()


class Source:
    """Where the factors of a call come from: tensors made before, or an address."""

    def __init__(self, a: Tensor | None, b: Tensor | None, ids: Tensor, words: tuple[int, ...], law: str, rank: int, dtype: torch.dtype):
        self.a, self.b, self.ids, self.words, self.law, self.rank = a, b, ids, words, LAWS[law], rank
        self.dtype = getattr(_cuda.tl, str(dtype).removeprefix("torch."))

    @classmethod
    def made(cls, a: Tensor, b: Tensor) -> "Source":
        return cls(a, b, a, (0, 0, 0, 0), "normal", a.shape[2], a.dtype)

    @property
    def left(self) -> float:
        """What a factor A is multiplied by: drawn ones lack their 1/√r."""
        return 1.0 if self.a is not None else self.rank**-0.5

    @property
    def padded(self) -> int:
        return _power(self.rank)

    def least(self) -> int:
        """Rows of a factor a tile must have to fill a counter."""
        return max(1, (128 if self.law == _cuda.SIGN else 4) // self.padded)

    def aligned(self, begin: int) -> bool:
        """Whether tiles of a factor that starts at row `begin` fill whole counters."""
        return self.padded == self.rank and begin * self.rank % (128 if self.law == _cuda.SIGN else 4) == 0

    def block(self, rows: int, begin: int, most: int) -> int:
        """Rows of a factor in one tile: all of them up to `most`, and whole counters where counters can be whole."""
        wanted = min(most, _power(rows))
        return max(wanted, self.least()) if self.aligned(begin) else wanted

    def constants(self, begin: int | None = None) -> dict[str, Any]:
        shared = {"LAW": self.law, "MADE": self.a is not None, "RANK": self.rank, "R": self.padded, "DTYPE": self.dtype}
        return shared if begin is None else shared | {"ALIGNED": self.aligned(begin)}


def _words(seed: int, step: int, tensor: int) -> tuple[int, int, int, int]:
    """Key and counter words as int32 in two's complement: every call hands kernels the same types."""
    parts = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, step, tensor)
    return tuple(part - 2**32 if part >= 2**31 else part for part in parts)  # type: ignore[return-value]


def _strides(factor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if factor is None else factor.stride()


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, source: Source, count: int, scale: float, shared: bool, pairs: bool) -> Tensor:
    outputs, inputs = weight.shape
    groups, rank = 2 if pairs else 1, source.rank
    members = groups * count
    flat = x.reshape(-1, inputs)
    tokens = len(flat) if shared else len(flat) // max(1, members)
    shape = (members, *(x.shape[:-1] if shared else x.shape[1:-1]), outputs)
    out = torch.empty(members * tokens, outputs, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out.view(shape)
    inner = torch.empty(members, tokens, rank, dtype=torch.float32, device=x.device)  # [P, rows, r]
    block_t = min(16, _power(tokens))
    block_k = source.block(inputs, outputs, max(16, 4096 // (block_t * source.padded)))
    _cuda.project_kernel[(count, _tiles(tokens, block_t))](
        flat, source.b, inner, source.ids, scale, count, tokens, inputs, outputs,
        0 if shared else tokens * flat.stride(0), flat.stride(0), flat.stride(1), *_strides(source.b), *source.words,
        GROUPS=groups, BLOCK_T=block_t, BLOCK_K=block_k, **source.constants(outputs),
    )  # fmt: skip
    if not shared and PRODUCT == "fused":
        _fused(flat, weight, bias, inner, out, source, count, tokens)
        return out.view(shape)
    # Shared rows: their product once, then every member's term on top. Own rows: bias and term first, then the product of all rows into it.
    base = torch.nn.functional.linear(flat, weight) if shared else bias
    each = bias is not None and bias.ndim == 2
    strides = (0, outputs) if shared else (outputs if each else 0, 0)
    extra = bias.expand(members, outputs).contiguous() if shared and bias is not None else None
    block_t = min(16, _power(tokens))
    block_n = source.block(outputs, 0, max(16, 4096 // (block_t * source.padded)))
    _cuda.spread_kernel[(count, _tiles(tokens, block_t), _tiles(outputs, block_n))](
        out, None if base is None else base.contiguous(), extra, source.a, inner, source.ids, count, tokens, outputs, *strides,
        *_strides(source.a), *source.words,
        GROUPS=groups, BASE=base is not None, EXTRA=extra is not None, BLOCK_T=block_t, BLOCK_N=block_n, LEFT=source.left, **source.constants(0),
    )  # fmt: skip
    if not shared:
        out.addmm_(flat, weight.t())
    return out.view(shape)


def _fused(flat: Tensor, weight: Tensor, bias: Tensor | None, inner: Tensor, out: Tensor, source: Source, count: int, tokens: int) -> None:
    (outputs, inputs), rows = weight.shape, len(flat)
    tile = dict(FUSED_TILE)
    tile["BLOCK_M"] = min(tile["BLOCK_M"], max(16, _power(rows)))
    tile["BLOCK_N"] = source.block(outputs, 0, max(16, tile["BLOCK_N"] // source.padded))
    tile["BLOCK_N"] = max(16, tile["BLOCK_N"])
    tile["BLOCK_K"] = min(tile["BLOCK_K"], max(16, _power(inputs)))
    bias = None if bias is None else bias.contiguous()
    _cuda.fused_kernel[(_tiles(rows, tile["BLOCK_M"]), _tiles(outputs, tile["BLOCK_N"]))](
        flat, weight, bias, source.a, inner, out, source.ids, rows, count, tokens, inputs, outputs, *flat.stride(), *weight.stride(),
        outputs if bias is not None and bias.ndim == 2 else 0, *_strides(source.a), *source.words,
        BIAS=bias is not None, SAME=math.gcd(tokens, tile["BLOCK_M"]), PRECISION=_precision(), LEFT=source.left, **source.constants(0), **tile,
    )  # fmt: skip


def _contract(coefficients: Tensor, source: Source, height: int, width: int) -> Tensor:
    people, device = len(coefficients), coefficients.device
    if not people:
        return torch.zeros(height, width, dtype=torch.float32, device=device)
    peak = coefficients.detach().abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny)  # keeps 16-bit products in range
    tile = dict(CONTRACT_TILE)
    tile["BLOCK_M"] = max(16, source.block(height, 0, tile["BLOCK_M"]))
    tile["BLOCK_N"] = max(16, source.block(width, height, tile["BLOCK_N"]))
    tile["BLOCK_K"] = min(max(1, tile["BLOCK_K"] // source.padded), max(16, _power(people)))
    grid = _tiles(height, tile["BLOCK_M"]), _tiles(width, tile["BLOCK_N"])
    splits = max(1, min(PROGRAMS // (grid[0] * grid[1]), _tiles(people, 4 * tile["BLOCK_K"])))
    share = _tiles(people, splits)
    out = torch.empty(splits, height, width, dtype=torch.float32, device=device)
    constants = source.constants() | {"ALIGNED_A": source.aligned(0), "ALIGNED_B": source.aligned(height)}
    _cuda.contract_kernel[(*grid, splits)](
        out, coefficients.float() / peak, source.a, source.b, source.ids, people, share, height, width, *_strides(source.a), *_strides(source.b),
        *source.words, PRECISION=_precision(), LEFT=source.left, **constants, **tile,
    )  # fmt: skip
    return (out[0] if splits == 1 else out.sum(0)).mul_(peak)


# ---------------------------------------------------------------------------------------------------------------- operators


def population_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, shared: bool, pairs: bool) -> Tensor:
    check(x, weight, bias, a, b, shared, pairs)
    return _linear(x, weight, bias, Source.made(a, b), len(a), scale, shared, pairs)


def member_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return population_linear(x[None], weight, bias, a[None], b[None], scale, False, False)[0]


def addressed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, members: Tensor, seed: int, step: int, tensor: int, law: str,
    rank: int, scale: float, shared: bool, pairs: bool,
) -> Tensor:  # fmt: skip
    source = Source(None, None, members, _words(seed, step, tensor), law, rank, x.dtype)
    return _linear(x, weight, bias, source, len(members), scale, shared, pairs)


def lowrank_update(coefficients: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _contract(coefficients, Source.made(a, b), a.shape[1], b.shape[1])


def addressed_update(
    coefficients: Tensor, members: Tensor, seed: int, step: int, tensor: int, law: str,
    rank: int, rows: int, width: int, chunk: int | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return _contract(coefficients, Source(None, None, members, _words(seed, step, tensor), law, rank, dtype), rows, width)


def addressed_axpy_(out: Tensor, coefficients: Tensor, members: Tensor, seed: int, step: int, tensor: int, law: str, chunk: int | None) -> None:
    flat, block = out.reshape(-1), 1024
    _cuda.axpy_kernel[(_tiles(len(flat), block),)](
        flat, coefficients.float(), members, len(members), len(flat), *_words(seed, step, tensor), LAW=LAWS[law], BLOCK=block
    )
    if not out.is_contiguous():
        out.copy_(flat.view(out.shape))


def addressed_fill_(out: Tensor, members: Tensor, seed: int, step: int, tensor: int, law: str, start: int) -> None:
    each, block = 128 if law == "sign" else 4, 1024
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    count = math.prod(out.shape[1:])
    shift = start % each
    if target.numel():
        _cuda.fill_kernel[(len(members), _tiles(count + shift, block))](
            target, members, count, start - shift, shift, *_words(seed, step, tensor), LAW=FILLS[law], BLOCK=block
        )
    if target is not out:
        out.copy_(target)
