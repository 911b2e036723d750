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
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from altgrad.errors import UsageError, near_miss, require
from altgrad.kernels import addresses, philox, scratch
from altgrad.kernels.addresses import Part, Piece
from altgrad.kernels.philox import MASK, TURN, UNIT
from altgrad.rng import LAWS, MULTIPLIERS, ROUNDS, WEYL, Key

LANES = 64  # blocks are padded to a multiple: whole vectors on every CPU, so no value is computed in a shorter tail
SMALL_BLOCK = 8192  # counters: 384 KiB of temporaries, and they stay in the second-level cache
MIDDLE_BLOCK, MIDDLE_DRAW = 16384, 2**16  # counters, and from how many on: fewer calls for a large draw
LARGE_BLOCK, LARGE_DRAW = 32768, 2**18  # once there is enough to share among threads or to fill a device
SIGN_PIECE = 256  # counters unpacked at once: 128 KiB of signs
EACH = {"normal": 4, "uniform": 4, "integers": 4, "sign": 128}  # elements a counter serves
SHORT = {"normal": SMALL_BLOCK, "uniform": SMALL_BLOCK, "sign": SIGN_PIECE}  # counters: drawn in one go, by kept addresses
SHORT_COMPILED = addresses.KEPT
COMPILED_BLOCKS = (1024, 8192, 32768)  # counters: small ones for the many short vectors of low-rank noise, a large one to pay a call's overhead once
NANOSECONDS_SAVED = 8.0  # a normal, compiled against eager (measured on one thread)
COMPILE_BUDGET = 30.0  # seconds both blocks may take on a cold cache

Block = Callable[..., Any]  # (counters, tensors, owners, seeds, four outputs)


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
    size, place, rows = torch.Size(shape), torch.device(device or "cpu"), len(members)
    count = size.numel()
    part = _part(law, tensor, members, start, count)
    _check_members(members)
    with _Quiet():
        _count(law, place, rows * count)
        build = _block_for(law, place, compiled) if rows * count else None
        if 0 < rows * part.width <= (SHORT[law] if build is None else SHORT_COMPILED):
            (out,) = _short(law, key, (part,), members, [(start - EACH[law] * part.first, count)], dtype, place, build)
        else:
            out = scratch.empty((rows, count), dtype, place)
            _fill(out, law, key, part, members, start, build)
        return out.view(rows, *size)


def draw_many(
    law: str,
    key: Key,
    tensors: Sequence[tuple[int, Sequence[int]]],
    members: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    compiled: bool | None = None,
) -> list[Tensor]:
    """Noise of several tensors, (id, shape of one member's noise) each -> [len(members), *shape] each, equal to `draw` one by one.

    Short tensors share one run of the generator, whose calls cost more than their numbers; long ones are drawn on their own.
    Arguments and errors as in `draw`.
    """
    if law not in LAWS:
        raise UsageError(near_miss("noise law", law, LAWS))
    _check_members(members)
    place, rows = torch.device(device or "cpu"), len(members)
    drawn: dict[int, Tensor] = {}
    build = _block_for(law, place, compiled)
    room = SHORT[law] if build is None else SHORT_COMPILED
    together = []  # (index, shape, part)
    for index, (tensor, shape) in enumerate(tensors):
        size = torch.Size(shape)
        part = _part(law, tensor, members, 0, size.numel())
        if 0 < rows * part.width <= room:
            room -= rows * part.width
            together.append((index, size, part))
        else:
            drawn[index] = draw(law, key, tensor, members, shape, dtype=dtype, device=device, compiled=compiled)
    if together:
        with _Quiet():
            _count(law, place, rows * sum(size.numel() for _, size, _ in together))
            spans = [(0, size.numel()) for _, size, _ in together]
            values = _short(law, key, tuple(part for _, _, part in together), members, spans, dtype, place, build)
        drawn.update({index: value.view(rows, *size) for (index, size, _), value in zip(together, values, strict=True)})
    return [drawn[index] for index in range(len(tensors))]


def _count(law: str, device: torch.device, normals: int) -> None:
    if law == "normal" and device.type == "cpu":
        _tally.normals += normals


def integers(key: Key, tensor: int, members: Sequence[int], shape: Sequence[int], *, start: int = 0, device: torch.device | str | None = None) -> Tensor:
    """The words themselves, uint32 values in int64 [len(members), *shape], bit-equal to rng.integers; arguments as in `draw`."""
    part = _part("integers", tensor, members, start, math.prod(shape))
    _check_members(members)
    with _Quiet():
        out = torch.empty(len(members), math.prod(shape), dtype=torch.int64, device=device or "cpu")
        _fill(out, "integers", key, part, members, start, None)
        return out.view(len(members), *shape)


# ---------------------------------------------------------------------------------------------------------------- blocks


class _Quiet:
    """Below torch.func's levels and function modes: no wrapper to pay for, and memory a compiled block can write to."""

    def __enter__(self) -> None:
        self.levels, self.functions = temporarily_clear_interpreter_stack(), torch._C.DisableTorchFunction()
        self.levels.__enter__()
        self.functions.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.functions.__exit__(*error)
        self.levels.__exit__(*error)


def _part(law: str, tensor: int, members: Sequence[int], start: int, count: int) -> Part:
    """The counters that elements start … start + count - 1 need; refuses what is outside the address."""
    each = EACH[law]
    require(0 <= tensor <= MASK, "tensor", tensor, "a 32-bit id, see rng.tensor_id")
    require(start >= 0 and start + count <= each << 32, "start", start, f"in [0, {each} · 2^32 - {count}]")
    first = start // each
    return Part(tensor, first, -(-(start + count) // each) - first if count else 0)


def _check_members(members: Sequence[int]) -> None:
    if len(members):
        lowest, highest = (min(members[0], members[-1]), max(members[0], members[-1])) if isinstance(members, range) else (min(members), max(members))
        require(lowest >= 0 and highest <= MASK, "members", (lowest, highest), "in [0, 2^32)")


def _block_for(law: str, device: torch.device, compiled: bool | None) -> dict[int, Block] | None:
    return _blocks_for(device) if law == "normal" and _wanted(compiled) else None


def _short(
    law: str,
    key: Key,
    parts: tuple[Part, ...],
    members: Sequence[int],
    spans: list[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    build: dict[int, Block] | None,
) -> list[Tensor]:
    """All parts in one go by kept addresses -> [members, count] each; spans: (start within the first counter, count) of each part."""
    rows, each = len(members), EACH[law]
    total = rows * sum(part.width for part in parts)
    if build is not None:
        sizes = tuple(_block_sizes(total))
        values, at, seeds = torch.empty(4 * sum(sizes), dtype=torch.float32, device=device), 0, _seeds(key, 0, 0, 0)
        for lanes, table in zip(sizes, addresses.plan(parts, members, sizes, device), strict=True):
            counters, tensors, owners = table.unbind()
            build[lanes](counters, tensors, owners, seeds, *values[at : at + 4 * lanes].view(lanes, 4).unbind(1))
            at += 4 * lanes
    else:
        lanes = -(-total // LANES) * LANES
        (table,) = addresses.plan(parts, members, (lanes,), device)
        state = torch.empty(3, 2, lanes, dtype=torch.int64, device=device)
        torch.stack((table[0], table[2]), out=state[0])
        philox.rounds(state, table[1], key.step, philox.constants(key, device))
        values = philox.FINISH[law](state)
        values = philox.unpack(values, philox.room(len(values), device)) if law == "sign" else values
    drawn, at = [], 0
    for part, (shift, count) in zip(parts, spans, strict=True):
        end = at + each * rows * part.width
        piece = values[at:end].view(rows, -1)[:, shift : shift + count].to(dtype)
        # A copy of what is not whole, and of what is a small part of something larger that would live as long.
        drawn.append(piece if build is not None and piece.is_contiguous() else piece.clone(memory_format=torch.contiguous_format))
        at = end
    return drawn


def _fill(out: Tensor, law: str, key: Key, part: Part, members: Sequence[int], start: int, build: dict[int, Block] | None) -> None:
    """Write the elements start … start + count - 1 of every member into `out` [members, count], block by block."""
    (rows, count), each, (tensor, first, width) = out.shape, EACH[law], part
    if not rows or not count:
        return
    total, shift = rows * width, start - each * first
    if build is not None:
        _fill_compiled(out, build, key, part, shift, members)
        return
    capacity = LARGE_BLOCK if total >= LARGE_DRAW or out.device.type != "cpu" else MIDDLE_BLOCK if total >= MIDDLE_DRAW else SMALL_BLOCK
    capacity = -(-total // -(-total // capacity))  # blocks of equal size: none nearly empty
    lanes = -(-capacity // LANES) * LANES
    state, ids = torch.zeros(3, 2, lanes, dtype=torch.int64, device=out.device), addresses.names(members, out.device)
    constants = philox.constants(key, out.device)
    room = philox.room(4 * min(SIGN_PIECE, lanes), out.device) if law == "sign" else None
    for begin, end in addresses.blocks(total, capacity):
        pieces = addresses.pieces(rows, width, begin, end, SIGN_PIECE if room is not None else capacity)
        addresses.write(state[0, 0], state[0, 1], pieces, first, ids)
        philox.rounds(state, tensor, key.step, constants)
        values = philox.FINISH[law](state)
        for piece in pieces:
            drawn = values[4 * piece.offset : 4 * (piece.offset + piece.size)]
            _place(out, drawn if room is None else philox.unpack(drawn, room), piece, each, shift)


def _place(out: Tensor, drawn: Tensor, piece: Piece, each: int, shift: int) -> None:
    """Copy the elements of a piece to where they belong; at both ends they may stick out of [0, count)."""
    drawn = drawn.view(piece.bottom - piece.top, -1)
    low, high, count = each * piece.low - shift, each * piece.high - shift, out.shape[1]
    out[piece.top : piece.bottom, max(low, 0) : high] = drawn[:, max(-low, 0) : drawn.shape[1] - max(high - count, 0)]


def _fill_compiled(out: Tensor, build: dict[int, Block], key: Key, part: Part, shift: int, members: Sequence[int]) -> None:
    """As `_fill`, by compiled blocks, which write straight into `out` wherever its memory is the list of counters."""
    (rows, count), (tensor, first, width) = out.shape, part
    flat = out.view(-1) if out.dtype == torch.float32 and (rows == 1 or (shift == 0 and count % 4 == 0)) else None
    begin, total, space, ids = 0, rows * width, None, None
    offsets = zeros = torch.empty(0, device="cpu")
    for lanes in _block_sizes(total):
        end = min(begin + lanes, total)
        if lanes != len(zeros):
            offsets, zeros = addresses.base(lanes)
        (row, low), pieces = divmod(begin, width), []
        if low + lanes <= width:  # within one member: the addresses are those of any such block, moved
            counters, owners, seeds = offsets, zeros, _seeds(key, tensor, first + low, members[row])
        else:
            pieces = addresses.pieces(rows, width, begin, end, lanes)
            if space is None or ids is None:
                space, ids = torch.zeros(2, COMPILED_BLOCKS[-1], dtype=torch.int64, device="cpu"), addresses.names(members, out.device)
            counters, owners, seeds = space[0, :lanes], space[1, :lanes], _seeds(key, tensor, 0, 0)
            addresses.write(counters, owners, pieces, first, ids)
        place = 4 * begin - shift
        if flat is not None and place >= 0 and place + 4 * lanes <= flat.numel():
            build[lanes](counters, zeros, owners, seeds, *flat[place : place + 4 * lanes].view(lanes, 4).unbind(1))
        else:
            values = torch.empty(lanes, 4, dtype=torch.float32, device="cpu")
            build[lanes](counters, zeros, owners, seeds, *values.unbind(1))
            for piece in pieces or addresses.pieces(rows, width, begin, end, lanes):
                _place(out, values.view(-1)[4 * piece.offset : 4 * (piece.offset + piece.size)], piece, 4, shift)
        begin = end


def _seeds(key: Key, tensor: int, counter: int, member: int) -> Tensor:
    """What a compiled block adds to its addresses, and the key: int64 [6]."""
    return torch.tensor([tensor, key.step, key.seed & MASK, key.seed >> 32, counter, member], device="cpu")


def _block_sizes(counters: int) -> Iterator[int]:
    """The compiled blocks that serve so many counters: few calls (each costs what 2000 counters cost), and little of the last block wasted."""
    small, middle, large = COMPILED_BLOCKS
    while counters > 0:
        size = small if counters <= 3 * small else large if counters >= large // 2 else middle
        yield size
        counters -= size


# ---------------------------------------------------------------------------------------------------------------- compiled


def _expression(counters: Tensor, tensors: Tensor, owners: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of the counters (counters + seeds[4], tensors + seeds[0], owners + seeds[5], seeds[1]) under the key seeds[2:4], int64 [lanes] each."""
    c0, c1, c2, c3 = counters + seeds[4], tensors + seeds[0], owners + seeds[5], seeds[1]
    for i in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        k0, k1 = seeds[2] + i * WEYL[0], seeds[3] + i * WEYL[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & MASK, p1, ((p0 >> 32) ^ c3 ^ k1) & MASK, p0
    return c0, c1 & MASK, c2, c3 & MASK


def words_block(counters: Tensor, tensors: Tensor, owners: Tensor, seeds: Tensor, *out: Tensor) -> tuple[()]:
    """Words into four int64 [lanes]: what the compiled normals are made of, compiled on its own to be compared."""
    for place, word in zip(out, _expression(counters, tensors, owners, seeds), strict=True):
        place.copy_(word)
    return ()


def normals_block(counters: Tensor, tensors: Tensor, owners: Tensor, seeds: Tensor, *out: Tensor) -> tuple[()]:
    """Normals of the same counters into four float32 [lanes], every fourth element of the result each."""
    w0, w1, w2, w3 = (((word >> 8) | 1).to(torch.float32) for word in _expression(counters, tensors, owners, seeds))
    for (radius, angle), (first, second) in (((w0, w1), out[:2]), ((w2, w3), out[2:])):
        length, turn = torch.sqrt(torch.log(radius * UNIT) * -2), angle * TURN
        first.copy_(length * torch.cos(turn))
        second.copy_(length * torch.sin(turn))
    return ()


def build(function: Callable[..., tuple[()]], size: int, dtype: torch.dtype = torch.float32) -> Block:
    """`function` compiled for exactly `size` counters by Inductor; runs without guards, under any function or dispatch mode."""
    from torch._inductor import compile as inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    zeros = [torch.zeros(size, dtype=torch.int64, device="cpu") for _ in range(3)]
    # Memory of its own for each output, so that nothing is compiled for outputs that overlap.
    example: list[Any] = [*zeros, torch.arange(6, device="cpu"), *(torch.zeros(size, 4, dtype=dtype, device="cpu")[:, 0] for _ in range(4))]
    with torch.no_grad():
        return inductor(make_fx(function)(*example), example)  # type: ignore[return-value]


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
