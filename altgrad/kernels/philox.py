"""Philox4x32-10 in plain torch, on int64 words, and what is made of its words: signs, uniforms, normals. In place, on 48 bytes a counter."""

import math

import torch
from torch import Tensor

from altgrad.rng import MULTIPLIERS, ROUNDS, WEYL, Key

MASK = 0xFFFFFFFF
UNIT = 2.0**-24
TURN = float(torch.tensor(2 * math.pi, dtype=torch.float32)) * UNIT  # exactly float32(2π) · 2^-24: the angle rounds once, as in rng.py


def constants(key: Key, device: torch.device) -> list[Tensor]:
    """0-d tensors (cheaper than Python scalars in a small operation): M0, M1, 32, the mask, then the keys [(k1, k0), 1] of every round."""
    low, high = key.seed & MASK, key.seed >> 32
    keys = [((high + i * WEYL[1]) & MASK, (low + i * WEYL[0]) & MASK) for i in range(ROUNDS)]
    words = torch.tensor([*MULTIPLIERS, 32, MASK, *(word for pair in keys for word in pair)], device=device)
    return [*words[:4].unbind(), *words[4:].view(ROUNDS, 2, 1).unbind()]


def rounds(state: Tensor, tensor: int | Tensor, step: int, numbers: list[Tensor]) -> None:
    """Ten rounds in place on `state` [3, 2, lanes] with rows (c0, c2) in state[0]; leaves rows (c2, c0), (c3, c1) in state[1:].

    One round: P = (c0 · M0, c2 · M1); (c2', c0') = high(P) ^ (c3, c1) ^ (k1, k0); (c3', c1') = low(P). Both rows go through every
    operation but the product together; only what is multiplied next must be cut to 32 bits.
    """
    m0, m1, half, mask, *keys = numbers
    even, odd, product = ((rows, *rows.unbind()) for rows in state.unbind())  # each: both rows, row 0, row 1
    odd[1].fill_(step)
    odd[2].copy_(tensor) if isinstance(tensor, Tensor) else odd[2].fill_(tensor)
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


def room(words: int, device: torch.device) -> Tensor:
    """Where signs are unpacked, int32 [1 + words, 32]; its first row is by how far each bit moves."""
    room = torch.empty(1 + words, 32, dtype=torch.int32, device=device)
    torch.arange(31, -1, -1, out=room[0])
    return room


def unpack(words: Tensor, room: Tensor) -> Tensor:
    """±1 from bits, float32 [32 · words] over `room` int32 [1 + words, 32]: bit i of a word is moved to the sign bit and flips -1.0."""
    bits = torch.bitwise_left_shift(words.to(torch.int32)[:, None], room[0], out=room[1 : 1 + len(words)])
    return bits.bitwise_and_(-(2**31)).bitwise_xor_(-0x40800000).view(torch.float32).view(-1)


FINISH = {"normal": _normals, "uniform": _uniforms, "sign": _words, "integers": _words}
