r"""All Triton: Philox noise, the population's layer, the update and the dense axpy, with factors made in registers from their address.

    project     s_p = scale · x_p B_p                    [P, rows, r], float32; the sign of a pair's second half in it
    spread      base + s_p A_pᵀ                          then the library's product x Wᵀ is added into it, or
    fused       x Wᵀ with s_p A_pᵀ added in the epilogue of one kernel
    contract    Σ_p c_p A_p B_pᵀ                         both factors tile by tile, split over members, float32 sums

A noise tile is [members, rows, rank]. Where its elements fill whole counters (rank a power of two, tiles aligned) every counter is worked
out once; otherwise each element works out its own. One program writes each output and sums go in one order: nothing depends on timing.

Loops have constant bounds (a kernel is compiled for each width and population): what the compiler likes, and Triton 3.6's interpreter needs.
Functions have the names and arguments of operators.py. TRITON_INTERPRET=1 runs them on CPU tensors.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from altgrad.kernels.lowrank_plain import check

NORMAL, SIGN, UNIFORM, RAW, WORDS = range(5)
LAWS = {"normal": NORMAL, "sign": SIGN, "uniform": UNIFORM}  # of unit variance
FILLS = {"normal": NORMAL, "sign": SIGN, "uniform": RAW, "integers": WORDS}  # as noise.draw and noise.integers give them
PRODUCT = "library"  # or "fused": who makes x Wᵀ where members have rows of their own
FUSED_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
CONTRACT_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
PROGRAMS = 264  # fewer tiles than this are split over members: two for each multiprocessor of the largest devices
SEEDS = ["k0", "k1", "step", "name"]  # these change from call to call: kernels are compiled for their type, not their value

M0: tl.constexpr = tl.constexpr(0xD2511F53)
M1: tl.constexpr = tl.constexpr(0xCD9E8D57)
W0: tl.constexpr = tl.constexpr(0x9E3779B9)
W1: tl.constexpr = tl.constexpr(0xBB67AE85)
ROUNDS: tl.constexpr = tl.constexpr(10)
UNIT: tl.constexpr = tl.constexpr(2.0**-24)
TURN: tl.constexpr = tl.constexpr(6.2831854820251465)  # float32(2π)
SPREAD: tl.constexpr = tl.constexpr(3.4641016151377544)  # √12


# ---------------------------------------------------------------------------------------------------------------- noise


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Four words of the counters; all uint32."""
    for _ in tl.static_range(ROUNDS):
        low0, low1 = c0 * M0, c2 * M1
        high0, high1 = tl.umulhi(c0, M0), tl.umulhi(c2, M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += W0
        k1 += W1
    return c0, c1, c2, c3


@triton.jit
def _unit(word):
    """Uniform on (0, 1), exact: (2 · top 23 bits + 1) · 2^-24."""
    return ((word >> 8) | 1).to(tl.float32) * UNIT


@triton.jit
def _four(w0, w1, w2, w3, LAW: tl.constexpr):
    """The values of the four elements of a counter."""
    if LAW == 4:
        v0, v1, v2, v3 = w0.to(tl.int64), w1.to(tl.int64), w2.to(tl.int64), w3.to(tl.int64)
    else:
        v0, v1, v2, v3 = _unit(w0), _unit(w1), _unit(w2), _unit(w3)
        if LAW == 0:
            r0, r1 = tl.sqrt_rn(-2.0 * tl.log(v0)), tl.sqrt_rn(-2.0 * tl.log(v2))
            a0, a1 = v1 * TURN, v3 * TURN
            v0, v1, v2, v3 = r0 * tl.cos(a0), r0 * tl.sin(a0), r1 * tl.cos(a1), r1 * tl.sin(a1)
        elif LAW == 2:
            v0, v1, v2, v3 = (v0 - 0.5) * SPREAD, (v1 - 0.5) * SPREAD, (v2 - 0.5) * SPREAD, (v3 - 0.5) * SPREAD
    return v0, v1, v2, v3


@triton.jit
def _tile(first, members, k0, k1, step, name, LAW: tl.constexpr, COUNT: tl.constexpr, PEOPLE: tl.constexpr):
    """Elements first … first + COUNT - 1 of each member, [PEOPLE, COUNT]; `first` and COUNT fill whole counters."""
    zero = tl.zeros([PEOPLE, 1], tl.uint32)
    if LAW == 1:
        index = (first // 128).to(tl.uint32) + tl.arange(0, COUNT // 128).to(tl.uint32)[None, :]
        w0, w1, w2, w3 = _philox(index + zero, name + zero, members[:, None] + zero, step + zero, k0, k1)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [PEOPLE, COUNT // 32, 1])
        bits = (words >> tl.arange(0, 32).to(tl.uint32)[None, None, :]) & 1
        values = tl.reshape(bits, [PEOPLE, COUNT]).to(tl.float32) * 2.0 - 1.0
    else:
        index = (first // 4).to(tl.uint32) + tl.arange(0, COUNT // 4).to(tl.uint32)[None, :]
        w0, w1, w2, w3 = _philox(index + zero, name + zero, members[:, None] + zero, step + zero, k0, k1)
        v0, v1, v2, v3 = _four(w0, w1, w2, w3, LAW)
        values = tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), [PEOPLE, COUNT])
    return values


@triton.jit
def _single(element, members, k0, k1, step, name, LAW: tl.constexpr):
    """The noise of `element` (any, int32 or int64) of `members`, one counter each; both of one shape."""
    zero = (element * 0).to(tl.uint32)
    if LAW == 1:
        w0, w1, w2, w3 = _philox((element // 128).to(tl.uint32), name + zero, members + zero, step + zero, k0, k1)
        slot = (element % 128) // 32
        word = tl.where(slot == 0, w0, tl.where(slot == 1, w1, tl.where(slot == 2, w2, w3)))
        values = ((word >> (element % 32).to(tl.uint32)) & 1).to(tl.float32) * 2.0 - 1.0
    else:
        w0, w1, w2, w3 = _philox((element // 4).to(tl.uint32), name + zero, members + zero, step + zero, k0, k1)
        v0, v1, v2, v3 = _four(w0, w1, w2, w3, LAW)
        slot = element % 4
        values = tl.where(slot == 0, v0, tl.where(slot == 1, v1, tl.where(slot == 2, v2, v3)))
    return values


@triton.jit
def _factor(
    source, stride_p, stride_i, stride_j, people, inside, ids, first, limit, begin, k0, k1, step, name,
    LAW: tl.constexpr, MADE: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, COUNT: tl.constexpr, PEOPLE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows first … first + COUNT - 1 of a factor of some members, [PEOPLE, COUNT, R] in DTYPE and zero outside.

    people [PEOPLE] are positions, `inside` whether they exist; a factor has `limit` rows and starts at row `begin` of the block drawn.
    """
    rows, ranks = first + tl.arange(0, COUNT), tl.arange(0, R)
    mask = inside[:, None, None] & (rows < limit)[None, :, None] & (ranks < RANK)[None, None, :]
    if MADE:
        where = people.to(tl.int64)[:, None, None] * stride_p + rows.to(tl.int64)[None, :, None] * stride_i + ranks[None, None, :] * stride_j
        values = tl.load(source + where, mask=mask, other=0.0)
    else:
        members = tl.load(ids + people, mask=inside, other=0).to(tl.uint32)
        if ALIGNED:
            values = tl.reshape(_tile((begin + first) * RANK, members, k0, k1, step, name, LAW, COUNT * R, PEOPLE), [PEOPLE, COUNT, R])
        else:
            nothing = tl.zeros([PEOPLE, COUNT, R], tl.int32)
            element = (begin + rows)[None, :, None] * RANK + ranks[None, None, :] + nothing
            values = _single(element, members[:, None, None] + nothing.to(tl.uint32), k0, k1, step, name, LAW)
        values = tl.where(mask, values, 0.0)
    return values.to(DTYPE)


@triton.jit(do_not_specialize=SEEDS)
def _fill_kernel(out, ids, count, begin, shift, k0, k1, step, name, LAW: tl.constexpr, BLOCK: tl.constexpr):
    """out[p, e] = element begin + shift + e: tiles start at whole counters, `shift` elements before what is asked for."""
    k0, k1, step, name = k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True), step.to(tl.uint32, bitcast=True), name.to(tl.uint32, bitcast=True)
    row = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1).to(tl.int64) * BLOCK
    member = tl.load(ids + row + tl.zeros([1], tl.int32)).to(tl.uint32)
    values = tl.reshape(_tile(begin + offset, member, k0, k1, step, name, LAW, BLOCK, 1), [BLOCK])
    place = offset - shift + tl.arange(0, BLOCK)
    tl.store(out + row * count + place, values.to(out.dtype.element_ty), mask=(place >= 0) & (place < count))


@triton.jit(do_not_specialize=SEEDS)
def _axpy_kernel(out, coefficients, ids, people: tl.constexpr, count, k0, k1, step, name, LAW: tl.constexpr, BLOCK: tl.constexpr):
    """out[e] += Σ_p c_p noise_p[e] in float32, rounded once."""
    k0, k1, step, name = k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True), step.to(tl.uint32, bitcast=True), name.to(tl.uint32, bitcast=True)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = first + tl.arange(0, BLOCK)
    total = tl.load(out + place, mask=place < count, other=0.0).to(tl.float32)
    for p in range(people):
        member = tl.load(ids + p + tl.zeros([1], tl.int32)).to(tl.uint32)
        total += tl.load(coefficients + p) * tl.reshape(_tile(first, member, k0, k1, step, name, LAW, BLOCK, 1), [BLOCK])
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < count)


# ---------------------------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=SEEDS)
def _project_kernel(
    x, b, inner, ids, scale, pairs_count, tokens, inputs: tl.constexpr, outputs, x_member, x_row, x_column, b_p, b_i, b_j, k0, k1, step, name,
    LAW: tl.constexpr, MADE: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """inner[g, p, t, j] = ± scale Σ_k x[g, p, t, k] B_p[k, j]: the factor is made once for both members of a pair."""
    k0, k1, step, name = k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True), step.to(tl.uint32, bitcast=True), name.to(tl.uint32, bitcast=True)
    p = tl.program_id(0)
    people = p + tl.zeros([1], tl.int32)
    times, ranks = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, R)
    plus = tl.zeros([BLOCK_T, R], tl.float32)
    minus = tl.zeros([BLOCK_T, R], tl.float32)
    for first in range(0, inputs, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        values = _factor(b, b_p, b_i, b_j, people, people < pairs_count, ids, first, inputs, outputs, k0, k1, step, name,
                         LAW, MADE, ALIGNED, RANK, R, BLOCK_K, 1, DTYPE).to(tl.float32)  # fmt: skip
        mask = (times < tokens)[:, None] & (columns < inputs)[None, :]
        place = times.to(tl.int64)[:, None] * x_row + columns.to(tl.int64)[None, :] * x_column
        rows = tl.load(x + p.to(tl.int64) * x_member + place, mask=mask, other=0.0).to(tl.float32)
        plus += tl.sum(rows[:, :, None] * values, axis=1)
        if GROUPS == 2:
            rows = tl.load(x + (p + pairs_count).to(tl.int64) * x_member + place, mask=mask, other=0.0).to(tl.float32)
            minus += tl.sum(rows[:, :, None] * values, axis=1)
    mask = (times < tokens)[:, None] & (ranks < RANK)[None, :]
    place = times[:, None] * RANK + ranks[None, :]
    tl.store(inner + p.to(tl.int64) * tokens * RANK + place, plus * scale, mask=mask)
    if GROUPS == 2:
        tl.store(inner + (p + pairs_count).to(tl.int64) * tokens * RANK + place, minus * -scale, mask=mask)


@triton.jit(do_not_specialize=SEEDS)
def _spread_kernel(
    out, base, extra, a, inner, ids, pairs_count, tokens, outputs, base_member, base_row, a_p, a_i, a_j, k0, k1, step, name,
    LAW: tl.constexpr, MADE: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, BASE: tl.constexpr,
    EXTRA: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """out[g, p, t, :] = base + extra + inner[g, p, t] A_pᵀ; extra is one row a member."""
    k0, k1, step, name = k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True), step.to(tl.uint32, bitcast=True), name.to(tl.uint32, bitcast=True)
    p = tl.program_id(0)
    people = p + tl.zeros([1], tl.int32)
    times, ranks = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, R)
    first = tl.program_id(2) * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    values = _factor(a, a_p, a_i, a_j, people, people < pairs_count, ids, first, outputs, 0, k0, k1, step, name,
                     LAW, MADE, ALIGNED, RANK, R, BLOCK_N, 1, DTYPE)  # fmt: skip
    values = (values.to(tl.float32) * LEFT).to(DTYPE).to(tl.float32)
    mask = (times < tokens)[:, None] & (columns < outputs)[None, :]
    for group in tl.static_range(GROUPS):
        member = (p + group * pairs_count).to(tl.int64)
        rows = member * tokens + times
        left = tl.load(inner + rows[:, None] * RANK + ranks[None, :], mask=(times < tokens)[:, None] & (ranks < RANK)[None, :], other=0.0)
        total = tl.sum(left[:, None, :] * values, axis=2)
        if BASE:
            place = member * base_member + times.to(tl.int64)[:, None] * base_row + columns[None, :]
            total += tl.load(base + place, mask=mask, other=0.0).to(tl.float32)
        if EXTRA:
            total += tl.load(extra + member * outputs + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]
        tl.store(out + rows[:, None] * outputs + columns[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SEEDS)
def _fused_kernel(
    x, weight, bias, a, inner, out, ids, rows, pairs_count, tokens, inputs: tl.constexpr, outputs, x_row, x_column, w_row, w_column, bias_member,
    a_p, a_i, a_j,
    k0, k1, step, name,
    LAW: tl.constexpr, MADE: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr, SAME: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """out = x Wᵀ + bias + inner Aᵀ over all members' rows; SAME rows in a line belong to one member, and its factor is made for them once."""
    k0, k1, step, name = k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True), step.to(tl.uint32, bitcast=True), name.to(tl.uint32, bitcast=True)
    down, across = tl.num_programs(0), tl.num_programs(1)
    down, across = tl.swizzle2d(tl.program_id(0), tl.program_id(1), down, across, 8)
    lines, columns = down * BLOCK_M + tl.arange(0, BLOCK_M), across * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, inputs, BLOCK_K):
        depth = first + tl.arange(0, BLOCK_K)
        left = tl.load(x + lines.to(tl.int64)[:, None] * x_row + depth[None, :] * x_column,
                       mask=(lines < rows)[:, None] & (depth < inputs)[None, :], other=0.0)  # fmt: skip
        right = tl.load(weight + columns.to(tl.int64)[None, :] * w_row + depth[:, None] * w_column,
                        mask=(columns < outputs)[None, :] & (depth < inputs)[:, None], other=0.0)  # fmt: skip
        total = tl.dot(left, right, total, input_precision=PRECISION)
    starts = down * BLOCK_M + SAME * tl.arange(0, BLOCK_M // SAME)  # the first line of every run of SAME
    people = (starts // tokens) % pairs_count
    values = _factor(a, a_p, a_i, a_j, people, starts < rows, ids, across * BLOCK_N, outputs, 0, k0, k1, step, name,
                     LAW, MADE, ALIGNED, RANK, R, BLOCK_N, BLOCK_M // SAME, DTYPE)  # fmt: skip
    values = (values.to(tl.float32) * LEFT).to(DTYPE).to(tl.float32)
    ranks = tl.arange(0, R)
    thin = tl.load(inner + lines.to(tl.int64)[:, None] * RANK + ranks[None, :], mask=(lines < rows)[:, None] & (ranks < RANK)[None, :], other=0.0)
    thin = tl.reshape(thin, [BLOCK_M // SAME, SAME, 1, R])
    total += tl.reshape(tl.sum(thin * values[:, None, :, :], axis=3), [BLOCK_M, BLOCK_N])
    mask = (lines < rows)[:, None] & (columns < outputs)[None, :]
    if BIAS:
        place = (lines // tokens).to(tl.int64)[:, None] * bias_member + columns[None, :]
        total += tl.load(bias + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + lines.to(tl.int64)[:, None] * outputs + columns[None, :], total.to(out.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------- update


@triton.jit(do_not_specialize=SEEDS)
def _contract_kernel(
    out, coefficients, a, b, ids, people, share: tl.constexpr, height, width, a_p, a_i, a_j, b_p, b_i, b_j, k0, k1, step, name,
    LAW: tl.constexpr, MADE: tl.constexpr, ALIGNED_A: tl.constexpr, ALIGNED_B: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """out[split] = Σ c_p A_p B_pᵀ over `share` members, one tile."""
    k0, k1, step, name = k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True), step.to(tl.uint32, bitcast=True), name.to(tl.uint32, bitcast=True)
    top, side, split = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N, tl.program_id(2)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    end = tl.minimum(people, (split + 1) * share)
    for first in range(0, share, BLOCK_K):
        who = split * share + first + tl.arange(0, BLOCK_K)
        left = _factor(a, a_p, a_i, a_j, who, who < end, ids, top, height, 0, k0, k1, step, name,
                       LAW, MADE, ALIGNED_A, RANK, R, BLOCK_M, BLOCK_K, DTYPE)  # fmt: skip
        right = _factor(b, b_p, b_i, b_j, who, who < end, ids, side, width, height, k0, k1, step, name,
                        LAW, MADE, ALIGNED_B, RANK, R, BLOCK_N, BLOCK_K, DTYPE)  # fmt: skip
        weights = tl.load(coefficients + who, mask=who < end, other=0.0)
        left = ((left.to(tl.float32) * LEFT).to(DTYPE).to(tl.float32) * weights[:, None, None]).to(DTYPE)
        left = tl.reshape(tl.permute(left, (1, 0, 2)), [BLOCK_M, BLOCK_K * R])
        right = tl.reshape(tl.permute(right, (0, 2, 1)), [BLOCK_K * R, BLOCK_N])
        total = tl.dot(left, right, total, input_precision=PRECISION)
    rows, columns = top + tl.arange(0, BLOCK_M), side + tl.arange(0, BLOCK_N)
    place = (split.to(tl.int64) * height + rows[:, None]) * width + columns[None, :]
    tl.store(out + place, total, mask=(rows < height)[:, None] & (columns < width)[None, :])


# ---------------------------------------------------------------------------------------------------------------- calls


class Source:
    """Where the factors of a call come from: tensors made before, or an address."""

    def __init__(self, a: Tensor | None, b: Tensor | None, ids: Tensor, words: tuple[int, ...], law: str, rank: int, dtype: torch.dtype):
        self.a, self.b, self.ids, self.words, self.law, self.rank = a, b, ids, words, LAWS[law], rank
        self.dtype = getattr(tl, str(dtype).removeprefix("torch."))

    @classmethod
    def made(cls, a: Tensor, b: Tensor) -> "Source":
        return cls(a, b, a, (0, 0, 0, 0), "normal", a.shape[2], a.dtype)

    @property
    def left(self) -> float:
        """What a factor A is multiplied by: drawn ones lack their 1/√r."""
        return 1.0 if self.a is not None else self.rank**-0.5

    @property
    def padded(self) -> int:
        return triton.next_power_of_2(self.rank)

    def least(self) -> int:
        """Rows of a factor a tile must have to fill a counter."""
        return max(1, (128 if self.law == SIGN else 4) // self.padded)

    def aligned(self, begin: int) -> bool:
        """Whether tiles of a factor that starts at row `begin` fill whole counters."""
        return self.padded == self.rank and begin * self.rank % (128 if self.law == SIGN else 4) == 0

    def block(self, rows: int, begin: int, most: int) -> int:
        """Rows of a factor in one tile: all of them up to `most`, and whole counters where counters can be whole."""
        wanted = min(most, triton.next_power_of_2(rows))
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
    block_t = min(16, triton.next_power_of_2(tokens))
    block_k = source.block(inputs, outputs, max(16, 4096 // (block_t * source.padded)))
    _project_kernel[(count, triton.cdiv(tokens, block_t))](
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
    block_t = min(16, triton.next_power_of_2(tokens))
    block_n = source.block(outputs, 0, max(16, 4096 // (block_t * source.padded)))
    _spread_kernel[(count, triton.cdiv(tokens, block_t), triton.cdiv(outputs, block_n))](
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
    tile["BLOCK_M"] = min(tile["BLOCK_M"], max(16, triton.next_power_of_2(rows)))
    tile["BLOCK_N"] = source.block(outputs, 0, max(16, tile["BLOCK_N"] // source.padded))
    tile["BLOCK_N"] = max(16, tile["BLOCK_N"])
    tile["BLOCK_K"] = min(tile["BLOCK_K"], max(16, triton.next_power_of_2(inputs)))
    bias = None if bias is None else bias.contiguous()
    _fused_kernel[(triton.cdiv(rows, tile["BLOCK_M"]), triton.cdiv(outputs, tile["BLOCK_N"]))](
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
    tile["BLOCK_K"] = min(max(1, tile["BLOCK_K"] // source.padded), max(16, triton.next_power_of_2(people)))
    grid = triton.cdiv(height, tile["BLOCK_M"]), triton.cdiv(width, tile["BLOCK_N"])
    splits = max(1, min(PROGRAMS // (grid[0] * grid[1]), triton.cdiv(people, 4 * tile["BLOCK_K"])))
    share = triton.cdiv(people, splits)
    out = torch.empty(splits, height, width, dtype=torch.float32, device=device)
    constants = source.constants() | {"ALIGNED_A": source.aligned(0), "ALIGNED_B": source.aligned(height)}
    _contract_kernel[(*grid, splits)](
        out, coefficients.float() / peak, source.a, source.b, source.ids, people, share: tl.constexpr, height, width, *_strides(source.a), *_strides(source.b),
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
    _axpy_kernel[(triton.cdiv(len(flat), block),)](
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
        _fill_kernel[(len(members), triton.cdiv(count + shift, block))](
            target, members, count, start - shift, shift, *_words(seed, step, tensor), LAW=FILLS[law], BLOCK=block
        )
    if target is not out:
        out.copy_(target)
