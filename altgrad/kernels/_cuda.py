r"""All Triton: Philox noise, the population's layer, the update and the dense axpy, with factors made in registers from their address.

    project     s_p = scale · x_p B_p                    [P, rows, r], float32; the sign of a pair's second half in it
    spread      base + s_p A_pᵀ                          then the library's product x Wᵀ is added into it, or
    fused       x Wᵀ with s_p A_pᵀ added in the epilogue of one kernel
    contract    Σ_p c_p A_p B_pᵀ                         both factors tile by tile, split over members, float32 sums

A noise tile is [members, rows, rank]. Where its elements fill whole counters (rank a power of two, tiles aligned) every counter is worked
out once; otherwise each element works out its own. One program writes each output and sums go in one order: nothing depends on timing.

Loops have constant bounds (a kernel is compiled for each width and population): what the compiler likes, and Triton 3.6's interpreter needs.
The calls are in launch.py. TRITON_INTERPRET=1 runs kernels on CPU tensors.
"""

import triton
import triton.language as tl

NORMAL, SIGN, UNIFORM, RAW, WORDS = range(5)  # laws; RAW is uniform on (0, 1), WORDS the integers
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
def fill_kernel(out, ids, count, begin, shift, k0, k1, step, name, LAW: tl.constexpr, BLOCK: tl.constexpr):
    """out[p, e] = element begin + shift + e: tiles start at whole counters, `shift` elements before what is asked for."""
    k0, k1, step, name = k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True), step.to(tl.uint32, bitcast=True), name.to(tl.uint32, bitcast=True)
    row = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1).to(tl.int64) * BLOCK
    member = tl.load(ids + row + tl.zeros([1], tl.int32)).to(tl.uint32)
    values = tl.reshape(_tile(begin + offset, member, k0, k1, step, name, LAW, BLOCK, 1), [BLOCK])
    place = offset - shift + tl.arange(0, BLOCK)
    tl.store(out + row * count + place, values.to(out.dtype.element_ty), mask=(place >= 0) & (place < count))


@triton.jit(do_not_specialize=SEEDS)
def axpy_kernel(out, coefficients, ids, people: tl.constexpr, count, k0, k1, step, name, LAW: tl.constexpr, BLOCK: tl.constexpr):
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
def project_kernel(
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
def spread_kernel(
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
def fused_kernel(
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
def contract_kernel(
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
