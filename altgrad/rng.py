r"""Addressed randomness: Philox4x32-10 in NumPy.

A random number is a function of its address and of nothing else:

    words = philox4x32_10(counter = (element // 4, tensor, member, step), key = (seed mod 2^32, seed div 2^32))

so noise is never stored: any chunk, rank, resumed run or backend draws it again. Four consecutive elements share one
counter; element e takes word e mod 4. Signs are drawn as bits: 128 elements share one counter (element // 128), element e takes bit
e mod 32 of word (e mod 128) // 32. The torch form, integer for integer the same, is in kernels/noise.py.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Random123).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LAWS = ("normal", "sign", "uniform")


@dataclass(frozen=True)
class Key:
    """The address of a stream: a 64-bit `seed` and a `step` (32 bits). Keys are values; deriving one never changes another."""

    seed: int
    step: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            object.__setattr__(self, "seed", self.seed % 2**64)
        if not 0 <= self.step < 2**32:
            raise ValueError(f"step={self.step} is not allowed; it must be in [0, 2^32).")

    def at(self, step: int) -> "Key":
        """The same stream at another step."""
        return replace(self, step=step)

    def fold(self, *labels: object) -> "Key":
        """An independent stream named by `labels` (for dropout, shuffling, initialisation …), at the same step."""
        digest = hashlib.blake2b(repr((self.seed, labels)).encode(), digest_size=8).digest()
        return replace(self, seed=int.from_bytes(digest, "little"))


def tensor_id(name: str) -> int:
    """32-bit id of a tensor: blake2b of its name (Python's `hash` differs per process)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of `counter` uint32 [..., 4] under `key` (two 32-bit words) -> uint32 [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    for _ in range(ROUNDS):
        p0 = c0 * np.uint64(MULTIPLIERS[0])
        p1 = c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def words(key: Key, tensor: int, members: Sequence[int], first: int, count: int) -> np.ndarray:
    """uint32 [members, 4 · count]: the words of counters first … first + count - 1."""
    counter = np.empty((len(members), count, 4), dtype=np.uint32)  # [members, counters, word]
    counter[..., 0] = np.arange(first, first + count, dtype=np.uint32)
    counter[..., 1] = tensor
    counter[..., 2] = np.asarray(members, dtype=np.uint32)[:, None]
    counter[..., 3] = key.step
    return philox(counter, (key.seed & 0xFFFFFFFF, key.seed >> 32)).reshape(len(members), 4 * count)


def to_uniform(bits: np.ndarray) -> np.ndarray:
    """float32 in (0, 1), exact on every backend: (top 23 bits + 1/2) · 2^-23."""
    return ((bits >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)


def integers(key: Key, tensor: int, members: Sequence[int], count: int, *, start: int = 0) -> np.ndarray:
    """uint32 [members, count]: elements start … start + count - 1."""
    first, last = start // 4, -(-(start + count) // 4)
    return words(key, tensor, members, first, last - first)[:, start - 4 * first :][:, :count]


def uniform(key: Key, tensor: int, members: Sequence[int], count: int, *, start: int = 0) -> np.ndarray:
    """float32 [members, count], uniform on (0, 1)."""
    return to_uniform(integers(key, tensor, members, count, start=start))


def normal(key: Key, tensor: int, members: Sequence[int], count: int, *, start: int = 0) -> np.ndarray:
    r"""float32 [members, count], standard normal by Box-Muller on word pairs: √(-2 ln u₀)·(cos 2πu₁, sin 2πu₁)."""
    first, last = start // 4, -(-(start + count) // 4)
    u = to_uniform(words(key, tensor, members, first, last - first)).reshape(len(members), -1, 2)
    radius, angle = np.sqrt(np.float32(-2) * np.log(u[..., 0])), np.float32(2 * np.pi) * u[..., 1]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(len(members), -1)[:, start - 4 * first :][:, :count]


def sign(key: Key, tensor: int, members: Sequence[int], count: int, *, start: int = 0) -> np.ndarray:
    """float32 [members, count], ±1 with equal probability, one bit each."""
    first, last = start // 128, -(-(start + count) // 128)
    bits = words(key, tensor, members, first, last - first)
    lanes = (bits[..., None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return (lanes.reshape(len(members), -1)[:, start - 128 * first :][:, :count]).astype(np.float32) * 2 - 1


def permutation(key: Key, name: str, count: int) -> np.ndarray:
    """A permutation of 0 … count - 1, by sorting addressed integers (ties broken by index)."""
    return np.argsort(integers(key, tensor_id(name), [0], count)[0], kind="stable")
