r"""Addressed randomness in torch: the same integers as altgrad/rng.py, normals equal to rounding.

    draw(law, key, tensor, members, shape)[m] = law(philox4x32_10((element // 4, tensor, members[m], step), seed))

uint32 words live in int64 tensors: x · M wraps modulo 2^64, and bits 32-63 of the wrapped product are the right high half. All (member,
counter) pairs of a draw form one list, cut into blocks whose temporaries stay small (48 bytes a counter, allocated once a draw). Lanes never
mix and blocks are padded to whole vectors, so a value does not depend on what else is drawn with it, on the block or on the threads.

The compiled form computes a block of fixed size in one loop (dynamic shapes do not compile) and rounds log, sin and cos its own way:
eager and compiled normals agree to rounding, each is bit-exact with itself. So which of the two runs may never depend on history:
ALTGRAD_COMPILE=on|off decides for all, `auto` (the default) leaves it to `compiled=` and `with compiled(True)`, fed by `worth_compiling`.

Source: Salmon et al., SC 2011 (Philox); Box and Muller 1958.
"""

import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from altgrad.errors import UsageError, near_miss, require
from altgrad.kernels import scratch
from altgrad.rng import LAWS, MULTIPLIERS, ROUNDS, WEYL, Key

MASK = 0xFFFFFFFF
LANES = 64  # blocks are padded to a multiple: whole vectors on every CPU, so no value is computed in a shorter tail
SMALL_BLOCK = 8192  # counters: 384 KiB of temporaries, and they stay in the second-level cache
LARGE_BLOCK = 32768  # counters, once there is enough to share among threads or to fill a device
LARGE_DRAW = 2**18  # counters from which the large block is used
SIGN_PIECE = 256  # counters unpacked at once: 128 KiB of signs
COMPILED_BLOCKS = (1024, 8192, 32768)  # counters: small ones for the many short vectors of low-rank noise, a large one to pay a call's overhead once
NANOSECONDS_SAVED = 8.0  # a normal, compiled against eager (measured on one thread)
COMPILE_BUDGET = 30.0  # seconds both blocks may take on a cold cache
UNIT = 2.0**-24
TURN = float(torch.tensor(2 * math.pi, dtype=torch.float32)) * UNIT  # exactly float32(2π) · 2^-24: the angle rounds once, as in rng.py

Block = Callable[[Tensor, Tensor, Tensor], Tensor]


class Piece(NamedTuple):
    """Counters [low, high) of the members in rows [top, bottom), at `offset` of a block."""

    offset: int
    top: int
    bottom: int
    low: int
    high: int

    @property
    def size(self) -> int:
        return (self.bottom - self.top) * (self.high - self.low)


def draw(
    law: str,
    key: Key,
    tensor: int,
    members: Sequence[int],
    shape: Sequence[int],
    *,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    compiled: bool | None = None,
) -> Tensor:
    """Noise at an address -> [len(members), *shape]; never torch's global generator.

    Args:
        law: "normal", "sign" (±1) or "uniform" on (0, 1).
        key: seed and step.
        tensor: 32-bit id, rng.tensor_id(name).
        members: 32-bit ids of the population members, usually a range.
        shape: the shape of ONE member's noise; () is a scalar.
        start: the element offset of `shape` in the tensor, any integer >= 0: a slice drawn alone equals the slice of the whole.
        dtype: computed in float32, then cast.
        device: the CPU by default.
        compiled: run the compiled block; None follows `with compiled(...)`. Only normals on the CPU have one. ALTGRAD_COMPILE=on|off overrules it.

    Raises:
        UsageError, SettingError: an unknown law; an id, member or offset outside the 32-bit address.
    """
    if law not in LAWS:
        raise UsageError(near_miss("noise law", law, LAWS))
    count = math.prod(shape)
    with temporarily_clear_interpreter_stack():  # below torch.func's levels: no wrapper to pay for, and memory a compiled block can write to
        out = scratch.empty((len(members), count), dtype, torch.device(device or "cpu"))
        _fill(out, law, key, tensor, members, start, compiled)
        return out.view(len(members), *shape)


def integers(key: Key, tensor: int, members: Sequence[int], shape: Sequence[int], *, start: int = 0, device: torch.device | str | None = None) -> Tensor:
    """The words themselves, uint32 values in int64 [len(members), *shape], bit-equal to rng.integers; arguments as in `draw`."""
    with temporarily_clear_interpreter_stack():
        out = torch.empty(len(members), math.prod(shape), dtype=torch.int64, device=device)
        _fill(out, "integers", key, tensor, members, start, False)
        return out.view(len(members), *shape)


# ---------------------------------------------------------------------------------------------------------------- blocks


def _fill(out: Tensor, law: str, key: Key, tensor: int, members: Sequence[int], start: int, compiled: bool | None) -> None:
    """Write the elements start … start + count - 1 of every member into `out` [members, count], block by block."""
    rows, count = out.shape
    each = 128 if law == "sign" else 4  # elements a counter serves
    require(0 <= tensor <= MASK, "tensor", tensor, "a 32-bit id, see rng.tensor_id")
    require(start >= 0 and start + count <= each << 32, "start", start, f"in [0, {each} · 2^32 - {count}]")
    if not rows or not count:
        return
    lowest, highest = (min(members[0], members[-1]), max(members[0], members[-1])) if isinstance(members, range) else (min(members), max(members))
    require(lowest >= 0 and highest <= MASK, "members", (lowest, highest), "in [0, 2^32)")
    first, last = start // each, -(-(start + count) // each)
    total = rows * (last - first)
    if law == "normal" and out.device.type == "cpu":
        _tally.normals += rows * count
    build = _blocks_for(out.device) if law == "normal" and _wanted(compiled) else None
    if build is not None:
        capacity = lanes = _block_size(total)
        space = torch.zeros(2, lanes, dtype=torch.int64)
        seeds = torch.tensor([tensor, key.step, key.seed & MASK, key.seed >> 32])
    else:
        capacity = LARGE_BLOCK if total >= LARGE_DRAW or out.device.type != "cpu" else SMALL_BLOCK
        capacity = -(-total // -(-total // capacity))  # blocks of equal size: none nearly empty
        lanes = -(-capacity // LANES) * LANES
        space = torch.zeros(6 * lanes, dtype=torch.int64, device=out.device)
        constants = _constants(key, out.device)
    names = _names(members, out.device)  # [members]
    if law == "sign":
        room = torch.empty(1 + 4 * min(SIGN_PIECE, lanes), 32, dtype=torch.int32, device=out.device)
        torch.arange(31, -1, -1, out=room[0])
    shift = start - each * first
    for pieces in _pieces(rows, last - first, capacity, SIGN_PIECE if law == "sign" else capacity):
        if build is not None:
            _address(space[0], space[1], pieces, first, names)
            values = build[lanes](space[0], space[1], seeds).view(-1)
        else:
            state = space.view(3, 2, lanes)
            _address(state[0, 0], state[0, 1], pieces, first, names)
            _philox(state, tensor, key.step, constants)
            values = FINISH[law](state)
        for piece in pieces:
            part = values[4 * piece.offset : 4 * (piece.offset + piece.size)]
            part = (_unpack(part, room) if law == "sign" else part).view(piece.bottom - piece.top, -1)
            low, high = each * piece.low - shift, each * piece.high - shift  # may stick out of [0, count) at both ends
            out[piece.top : piece.bottom, max(low, 0) : high] = part[:, max(-low, 0) : part.shape[1] - max(high - count, 0)]


def _block_size(counters: int) -> int:
    """The compiled block that serves so many counters: few calls, and little of the last block wasted."""
    small, middle, large = COMPILED_BLOCKS
    return small if counters <= small else large if counters >= large // 2 else middle


def _pieces(rows: int, width: int, capacity: int, limit: int) -> Iterator[list[Piece]]:
    """The list of rows · width counters in blocks of `capacity`, each block as rectangles of at most `limit` counters (or one row)."""
    for begin in range(0, rows * width, capacity):
        at, end, pieces = begin, min(begin + capacity, rows * width), []
        while at < end:
            row, low = divmod(at, width)
            whole = min(end - at, limit) // width
            if low == 0 and whole:
                pieces.append(Piece(at - begin, row, row + whole, 0, width))
            else:
                pieces.append(Piece(at - begin, row, row + 1, low, min(width, low + min(end - at, limit))))
            at += pieces[-1].size
        yield pieces


def _names(members: Sequence[int], device: torch.device) -> Tensor:
    if isinstance(members, range):
        return torch.arange(members.start, members.start + members.step * len(members), members.step, device=device)
    return torch.tensor(list(members), dtype=torch.int64, device=device)


def _address(counters: Tensor, owners: Tensor, pieces: list[Piece], first: int, names: Tensor) -> None:
    """Fill counter words 0 (element // each) and 2 (member) of a block."""
    for offset, top, bottom, low, high in pieces:
        end = offset + (bottom - top) * (high - low)
        torch.arange(first + low, first + high, out=counters[offset : offset + high - low])
        if bottom - top > 1:
            grid = counters[offset:end].view(bottom - top, -1)
            grid[1:].copy_(grid[0])
            owners[offset:end].view(bottom - top, -1).copy_(names[top:bottom, None])
        else:
            owners[offset:end].fill_(names[top])


# ---------------------------------------------------------------------------------------------------------------- eager


def _constants(key: Key, device: torch.device) -> list[Tensor]:
    """0-d tensors (cheaper than Python scalars in a small operation): M0, M1, 32, the mask, then the keys [(k1, k0), 1] of every round."""
    low, high = key.seed & MASK, key.seed >> 32
    keys = [((high + i * WEYL[1]) & MASK, (low + i * WEYL[0]) & MASK) for i in range(ROUNDS)]
    numbers = torch.tensor([*MULTIPLIERS, 32, MASK, *(word for pair in keys for word in pair)], device=device)
    return [*numbers[:4].unbind(), *numbers[4:].view(ROUNDS, 2, 1).unbind()]


def _philox(state: Tensor, tensor: int, step: int, constants: list[Tensor]) -> None:
    """Ten rounds in place on `state` [3, 2, lanes] with rows (c0, c2) in state[0]; leaves rows (c2, c0), (c3, c1) in state[1:].

    One round: P = (c0 · M0, c2 · M1); (c2', c0') = high(P) ^ (c3, c1) ^ (k1, k0); (c3', c1') = low(P). Both rows go through every
    operation but the product together; only what is multiplied next must be cut to 32 bits.
    """
    m0, m1, half, mask, *keys = constants
    even, odd, product = ((rows, *rows.unbind()) for rows in state.unbind())  # each: both rows, row 0, row 1
    odd[1].fill_(step)
    odd[2].fill_(tensor)
    first, second = even[1:]
    for both in keys:
        torch.mul(first, m0, out=product[1])
        torch.mul(second, m1, out=product[2])
        torch.bitwise_right_shift(product[0], half, out=even[0])
        odd[0].bitwise_xor_(even[0]).bitwise_xor_(both).bitwise_and_(mask)
        even, odd, product = odd, product, even
        second, first = even[1:]


def _words(state: Tensor) -> Tensor:
    """int64 [4 · lanes]: the words in address order."""
    return state[1:].flip(1).permute(2, 1, 0).reshape(-1).bitwise_and_(MASK)


def _unit(state: Tensor) -> Tensor:
    """float32 [2, 2, lanes] over state[0]: 2 · (top 23 bits) + 1 of every word, that is the uniform times 2^24, exactly."""
    state[1:].bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).bitwise_or_(1)
    return state[0].view(torch.float32).view(2, 2, -1).copy_(state[1:])


def _uniforms(state: Tensor) -> Tensor:
    return _unit(state).mul_(UNIT).flip(1).permute(2, 1, 0).reshape(-1)


def _normals(state: Tensor) -> Tensor:
    """Box-Muller within the memory of `state`: √(-2 ln u₀)·(cos 2πu₁, sin 2πu₁) -> float32 [4 · lanes]."""
    radius, angle = _unit(state).unbind()  # [pair, lanes] each, pair 1 first
    radius.mul_(UNIT).log_().mul_(-2).sqrt_()
    angle.mul_(TURN)
    circle = state[1].view(torch.float32).view(2, 2, -1)  # [cosine and sine, pair, lanes]
    torch.cos(angle, out=circle[0])
    torch.sin(angle, out=circle[1])
    normals = state[2].view(torch.float32).view(-1, 2, 2).permute(1, 2, 0)  # [pair, cosine and sine, lanes]
    torch.mul(circle[:, 1], radius[1], out=normals[0])
    torch.mul(circle[:, 0], radius[0], out=normals[1])
    return state[2].view(torch.float32).view(-1)


def _unpack(words: Tensor, room: Tensor) -> Tensor:
    """±1 from bits, float32 [32 · words] over `room` int32 [1 + words, 32]: bit i of a word is moved to the sign bit and flips -1.0."""
    bits = torch.bitwise_left_shift(words.to(torch.int32)[:, None], room[0], out=room[1 : 1 + len(words)])
    return bits.bitwise_and_(-(2**31)).bitwise_xor_(-0x40800000).view(torch.float32).view(-1)


FINISH = {"normal": _normals, "uniform": _uniforms, "sign": _words, "integers": _words}


# ---------------------------------------------------------------------------------------------------------------- compiled


def _expression(counters: Tensor, owners: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of the counters (counters, seeds[0], owners, seeds[1]) under the key seeds[2:], int64 [lanes] each."""
    c0, c1, c2, c3 = counters, seeds[0], owners, seeds[1]
    for i in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        k0, k1 = seeds[2] + i * WEYL[0], seeds[3] + i * WEYL[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & MASK, p1, ((p0 >> 32) ^ c3 ^ k1) & MASK, p0
    return c0, c1 & MASK, c2, c3 & MASK


def words_block(counters: Tensor, owners: Tensor, seeds: Tensor) -> Tensor:
    """Words int64 [lanes, 4]: what the compiled normals are made of, compiled on its own to be compared."""
    return torch.stack(_expression(counters, owners, seeds), dim=-1)


def normals_block(counters: Tensor, owners: Tensor, seeds: Tensor) -> Tensor:
    """Normals float32 [lanes, 4] of the same counters."""
    w0, w1, w2, w3 = (((word >> 8) | 1).to(torch.float32) for word in _expression(counters, owners, seeds))
    pairs = [(torch.sqrt(torch.log(w0 * UNIT) * -2), w1 * TURN), (torch.sqrt(torch.log(w2 * UNIT) * -2), w3 * TURN)]
    return torch.stack([part for radius, angle in pairs for part in (radius * torch.cos(angle), radius * torch.sin(angle))], dim=-1)


def build(function: Callable[[Tensor, Tensor, Tensor], Tensor], size: int) -> Block:
    """`function` compiled for exactly `size` counters by Inductor; runs without guards, under any function or dispatch mode."""
    from torch._inductor import compile as inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    example = (torch.arange(size), torch.zeros(size, dtype=torch.int64), torch.arange(4))
    with torch.no_grad():
        return inductor(make_fx(function)(*example), list(example))  # type: ignore[return-value]


class _Compiler:
    """What compiling has come to in this process: tried at most once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tried = False
        self.blocks: dict[int, Block] = {}
        self.failures = 0
        self.seconds = 0.0

    def __call__(self) -> dict[int, Block] | None:
        with self.lock:
            if not self.tried:
                self.tried, begin = True, time.perf_counter()
                try:
                    self.blocks = {size: build(normals_block, size) for size in COMPILED_BLOCKS}
                except Exception as error:  # no C++ compiler, a full disk, a changed Inductor: all have the same remedy
                    self.failures += 1
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    warnings.warn(f"compiling the noise failed, eager noise is used (same integers, slower): {reason}", RuntimeWarning, stacklevel=4)
                self.seconds = time.perf_counter() - begin
        return self.blocks or None


class _Tally(threading.local):
    """What a thread has drawn."""

    normals = 0


_compiler = _Compiler()
_tally = _Tally()
_context: ContextVar[bool] = ContextVar("altgrad_compiled_noise", default=False)


def _mode() -> str:
    mode = os.environ.get("ALTGRAD_COMPILE", "auto")
    require(mode in ("auto", "on", "off"), "ALTGRAD_COMPILE", mode, "auto, on or off")
    return mode


def _wanted(compiled: bool | None) -> bool:
    mode = _mode()
    return mode == "on" or (mode == "auto" and (_context.get() if compiled is None else compiled))


def _blocks_for(device: torch.device) -> dict[int, Block] | None:
    return _compiler() if device.type == "cpu" else None


@contextmanager
def compiled(wanted: bool) -> Iterator[None]:
    """Inside, normals on the CPU come from the compiled block, or do not; compiles on entry (seconds, once a process)."""
    token = _context.set(wanted)
    try:
        if wanted and _wanted(None):
            _compiler()
        yield
    finally:
        _context.reset(token)


def drawn() -> int:
    """Normals drawn on the CPU by this thread so far, the only ones that compiling can make cheaper."""
    return _tally.normals


def worth_compiling(normals_per_step: int, steps: int) -> bool:
    """Whether a run of this size should draw compiled noise: a function of its arguments and of ALTGRAD_COMPILE only, so a resumed run agrees."""
    mode = _mode()
    return mode == "on" or (mode == "auto" and normals_per_step * steps * NANOSECONDS_SAVED * 1e-9 > COMPILE_BUDGET)


def follows(wanted: bool) -> bool:
    """Whether ALTGRAD_COMPILE lets `with compiled(wanted)` have its way."""
    return _mode() in ("auto", "on" if wanted else "off")


def compile_failures() -> int:
    """How often compiling failed in this process and eager noise took its place."""
    return _compiler.failures


def compile_seconds() -> float:
    """Seconds spent compiling in this process."""
    return _compiler.seconds
