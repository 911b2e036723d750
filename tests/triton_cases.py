"""What the Triton kernels owe: collected by test_triton_kernels.py, in a process that has TRITON_INTERPRET=1 where there is no GPU.

Sizes are small because the interpreter runs each program in NumPy. It has no bfloat16 (products take its bits for integers, stores cut instead
of rounding), so the 16-bit type there is float16; a device runs both.
"""

import math

import pytest
import torch

from altgrad.kernels import _cuda, launch, noise, operators
from altgrad.kernels.lowrank_plain import plain_linear, plain_update
from altgrad.kernels.perturbations import factors, plain_axpy_
from altgrad.rng import Key

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float16]
TYPES = [torch.float32, *HALVES]
KEY, NAME = Key(0xDEADBEEFCAFEBABE, 0xFFFFFFF0), 0x89ABCDEF  # words whose top bits are set
IDS = [5, 2**32 - 1, 0, 9]
MEMBERS = len(IDS)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ids(count=MEMBERS):
    return torch.tensor(IDS[:count], device=DEVICE)


def address(law):
    return (*operators.words_of(KEY), NAME, law)


def filled(law, shape, start, dtype=torch.float32):
    out = torch.full((MEMBERS, *shape), 77, dtype=dtype, device=DEVICE)
    launch.addressed_fill_(out, ids(), *address(law), start)
    return out


def error(found, exact):
    return (found.double() - exact).square().mean().sqrt().item()


STARTS = [(0, (300,)), (3, (5, 7)), (1023, (2,)), (130, (1100,))]


@pytest.mark.parametrize(("start", "shape"), STARTS)
def test_integers_are_those_of_torch(start, shape):
    assert torch.equal(filled("integers", shape, start, torch.int64), noise.integers(KEY, NAME, IDS, shape, start=start, device=DEVICE))


def test_known_answer_of_random123():
    key, out = Key((0x299F31D0 << 32) | 0xA4093822, 0x03707344), torch.empty(1, 4, dtype=torch.int64, device=DEVICE)
    members = torch.tensor([0x13198A2E], device=DEVICE)
    launch.addressed_fill_(out, members, *operators.words_of(key), 0x85A308D3, "integers", 4 * 0x243F6A88)
    assert tuple(out[0].tolist()) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("law", ["sign", "uniform"])
@pytest.mark.parametrize(("start", "shape"), STARTS)
def test_signs_and_uniforms_are_those_of_torch_to_the_bit(law, start, shape):
    assert torch.equal(filled(law, shape, start), noise.draw(law, KEY, NAME, IDS, shape, start=start, device=DEVICE))


@pytest.mark.parametrize(("start", "shape"), STARTS)
def test_normals_are_those_of_torch_to_rounding(start, shape):
    assert (filled("normal", shape, start) - noise.draw("normal", KEY, NAME, IDS, shape, start=start, device=DEVICE)).abs().max() < 4 * 2**-22


LAYERS = [  # law, rank, outputs, inputs, rows a member: tiles that fill counters and tiles that do not
    ("normal", 1, 128, 96, 1),
    ("normal", 1, 21, 33, 3),
    ("normal", 3, 20, 33, 2),
    ("sign", 1, 128, 130, 1),
    ("sign", 4, 33, 24, 4),
    ("uniform", 2, 18, 40, 2),
]


def layer(law, rank, outputs, inputs, rows, dtype, *, shared, pairs, bias):
    count = MEMBERS // 2 if pairs else MEMBERS
    x = randn(*(() if shared else (MEMBERS,)), rows, inputs, dtype=dtype, seed=1)
    biases = {"none": None, "one": randn(outputs, dtype=dtype, seed=3), "each": randn(MEMBERS, outputs, dtype=dtype, seed=3)}
    a, b = factors(law, KEY, tensor=NAME, members=IDS[:count], rank=rank, shape=(outputs, inputs), dtype=dtype, device=torch.device(DEVICE))
    return x, randn(outputs, inputs, dtype=dtype, seed=2), biases[bias], a, b


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("form", ["own-library", "own-fused", "shared"])
@pytest.mark.parametrize(("law", "rank", "outputs", "inputs", "rows"), LAYERS)
def test_layer_error_is_at_most_twice_that_of_plain_torch(law, rank, outputs, inputs, rows, form, dtype, monkeypatch):
    if form != "shared":
        monkeypatch.setattr(launch, "PRODUCT", form.split("-")[1])
    shared, pairs = form == "shared", rows % 2 == 0
    bias = ("none", "one", "each")[(rank + rows) % 3]
    x, weight, bias, a, b = layer(law, rank, outputs, inputs, rows, dtype, shared=shared, pairs=pairs, bias=bias)
    how = (0.1, shared, pairs)
    exact = plain_linear(x.double(), weight.double(), None if bias is None else bias.double(), a.double(), b.double(), *how)
    allowed = 2 * error(plain_linear(x, weight, bias, a, b, *how), exact)
    made = launch.population_linear(x, weight, bias, a, b, *how)
    drawn = launch.addressed_linear(x, weight, bias, ids(len(a)), *address(law), rank, *how)
    assert made.shape == exact.shape
    assert error(made, exact) <= allowed
    assert error(drawn, exact) <= allowed


def test_one_member_is_a_population_of_one():
    x, weight, bias, a, b = layer("normal", 2, 17, 20, 3, torch.float32, shared=False, pairs=False, bias="one")
    found = launch.member_linear(x[0], weight, bias, a[0], b[0], 0.1)
    assert (found - plain_linear(x[:1], weight, bias, a[:1], b[:1], 0.1, False, False)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("law", "rank", "height", "width"), [("normal", 1, 128, 64), ("normal", 3, 17, 20), ("sign", 4, 32, 64), ("uniform", 2, 20, 33)])
def test_update_error_is_at_most_twice_that_of_a_plain_product_in_its_type(law, rank, height, width, dtype):
    a, b = factors(law, KEY, tensor=NAME, members=IDS, rank=rank, shape=(height, width), dtype=dtype, device=torch.device(DEVICE))
    weights = randn(MEMBERS)
    exact = plain_update(weights.double(), a.double(), b.double())
    left = (a * weights.to(dtype)[:, None, None]).permute(1, 0, 2).flatten(1)
    allowed = 2 * error(left @ b.permute(1, 0, 2).flatten(1).T, exact)
    assert error(launch.lowrank_update(weights, a, b), exact) <= allowed
    assert error(launch.addressed_update(weights, ids(), *address(law), rank, height, width, None, dtype), exact) <= allowed


def test_update_split_over_members_is_the_same_sum(monkeypatch):
    monkeypatch.setattr(launch, "CONTRACT_TILE", {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2})
    people, (height, width) = 150, (16, 8)
    block, weights = randn(people, height + width, 1), randn(people, seed=1) * 1e-6
    a, b = block[:, :height], block[:, height:]
    exact = plain_update(weights.double(), a.double(), b.double())
    assert error(launch.lowrank_update(weights, a, b), exact) <= 2 * error(plain_update(weights, a, b), exact)


def test_update_of_no_effect_is_zero():
    a, b = randn(MEMBERS, 16, 1), randn(MEMBERS, 16, 1)
    assert not launch.lowrank_update(torch.zeros(MEMBERS, device=DEVICE), a, b).any()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("law", ["normal", "sign", "uniform"])
def test_axpy_error_is_at_most_twice_that_of_plain_torch(law, dtype):
    start, weights = randn(7, 200, dtype=dtype), randn(MEMBERS, seed=1)
    exact = plain_axpy_(start.double(), weights.double(), KEY, tensor=NAME, members=IDS, law=law, chunk=None)
    plain = plain_axpy_(start.clone(), weights, KEY, tensor=NAME, members=IDS, law=law, chunk=None)
    found = start.clone()
    launch.addressed_axpy_(found, weights, ids(), *address(law), None)
    assert error(found, exact) <= 2 * error(plain, exact)


def test_axpy_and_fill_write_through_strides():
    whole = torch.zeros(9, 5, device=DEVICE)
    launch.addressed_axpy_(whole.T[1:], torch.ones(1, device=DEVICE), ids(1), *address("sign"), None)
    assert torch.equal(whole.T[1:], noise.draw("sign", KEY, NAME, IDS[:1], (4, 9), device=DEVICE)[0])
    launch.addressed_fill_(whole.T[1:], ids(), *address("uniform"), 0)
    assert torch.equal(whole.T[1:], noise.draw("uniform", KEY, NAME, IDS, (9,), device=DEVICE))
    assert not whole[:, 0].any()


@pytest.mark.skipif(DEVICE == "cpu", reason="an operator takes its kernel for CUDA tensors only")
def test_cuda_tensors_take_the_kernels():
    x, weight, bias, a, b = layer("normal", 1, 64, 96, 2, torch.bfloat16, shared=False, pairs=False, bias="one")
    found = torch.ops.altgrad.population_linear(x, weight, bias, a, b, 0.1, False, False)
    assert torch.equal(found, launch.population_linear(x, weight, bias, a, b, 0.1, False, False))
    torch.library.opcheck(torch.ops.altgrad.population_linear.default, (x, weight, bias, a, b, 0.1, False, False))


def test_words_keep_their_bits():
    assert launch._words(*operators.words_of(KEY), NAME) == tuple(
        word - 2**32 if word >= 2**31 else word for word in (KEY.seed & 0xFFFFFFFF, KEY.seed >> 32, KEY.step, NAME)
    )
    assert math.isclose(_cuda.SPREAD.value**2, 12)
