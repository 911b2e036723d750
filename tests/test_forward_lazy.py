"""Tangents that wait are those that would have been made at once, whatever happens to the tensors around them."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_noise import PeakBytes
from torch import Tensor, nn

from altgrad.forward_mode import Dual, Trace, lazy
from altgrad.forward_mode.lazy import Copied, Masked, Outer, multiply
from altgrad.kernels import scratch
from altgrad.learner import Learner
from altgrad.perturb import LowRank
from altgrad.rng import Key

MEMBERS, ROWS, WIDTH = 5, 6, 4
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # sums of at most 20 float32 products, in another order


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def waiting(rank: int = 1, *, shift: bool = True) -> Outer:
    return Outer(
        numbers(1, MEMBERS, ROWS, rank), numbers(2, MEMBERS, rank, WIDTH), numbers(3, MEMBERS, 1, WIDTH) if shift else None, torch.Size((MEMBERS, ROWS, WIDTH))
    )


@pytest.fixture(params=[1, 200, 1 << 20], ids=["single", "pairs", "all"])
def blocks(request, monkeypatch):
    """A member at a time, two, or all at once (a member is 96 bytes)."""
    monkeypatch.setattr(lazy, "BLOCK", request.param)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.usefixtures("blocks")
def test_an_outer_product_is_that_of_its_factors(rank, shift):
    move = waiting(rank, shift=shift)
    expected = move.inner @ move.left + (move.shift if shift else 0)
    torch.testing.assert_close(move.whole(), expected, **CLOSE)


@pytest.mark.usefixtures("blocks")
def test_a_mask_passes_what_relu_passed():
    value = torch.relu(numbers(4, ROWS, WIDTH))
    torch.testing.assert_close(Masked(waiting(), value).whole(), waiting().whole() * (value > 0), **CLOSE)


def test_a_mask_stops_infinite_tangents_of_dead_units():
    assert torch.equal(Masked(torch.full((2, 3), torch.inf), torch.zeros(3)).whole(), torch.zeros(2, 3))


@pytest.mark.parametrize("width", [3, 20])
@pytest.mark.parametrize("start", ["none", "tensor", "waiting"])
@pytest.mark.usefixtures("blocks")
def test_a_product_with_waiting_tangents_is_the_product(width, start):
    weight, first = numbers(5, width, WIDTH), numbers(6, MEMBERS, ROWS, width)
    begin = {"none": None, "tensor": first.clone(), "waiting": Copied(first)}[start]
    expected = waiting().whole() @ weight.T + (0 if start == "none" else first)
    torch.testing.assert_close(multiply(waiting(), weight, begin), expected, **CLOSE)


def test_a_copy_leaves_its_origin_alone():
    origin = numbers(7, MEMBERS, ROWS)
    Copied(origin).whole().zero_()
    assert origin.abs().min() > 0


class Program(nn.Module):
    def __init__(self, body: Any):
        super().__init__()
        self.first, self.second, self.body = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), body

    def forward(self, x: Tensor) -> Any:
        return self.body(self.first(x), self.second)


def written_before(y: Tensor, second: Any) -> Any:
    z = torch.relu(y)
    y.mul_(3)
    return second(z) * y


def written_by_relu(y: Tensor, second: Any) -> Any:
    z = torch.relu(y)
    F.relu(y, inplace=True)
    return second(z - y) + second(y)


def written_by_detached(y: Tensor, second: Any) -> Any:
    z = torch.relu(y)
    kept = z.detach()
    with torch.no_grad():
        kept.neg_()
    return second(y)


def read_twice(y: Tensor, second: Any) -> Any:
    z = torch.relu(y)
    return second(z) + second(second(torch.relu(z))) + z


def attributes(y: Tensor, second: Any) -> Any:
    z = torch.relu(y)
    return second(z) * z.shape[0] + z.ndim + z.size(0)


@pytest.mark.parametrize("body", [written_before, written_by_relu, written_by_detached, read_twice, attributes])
@pytest.mark.usefixtures("blocks")
def test_waiting_tangents_follow_programs_as_autograd_does(body):
    model, x = Program(body), numbers(8, ROWS, 3)
    for index, p in enumerate(model.parameters()):
        p.data = numbers(20 + index, *p.shape)
    params = {name: value.detach() for name, value in model.named_parameters()}
    trace = Trace(MEMBERS)
    moves = {name: LowRank(Key(0), name, p, range(MEMBERS), "normal", 1) if p.ndim == 2 else numbers(9, MEMBERS, *p.shape) for name, p in params.items()}
    duals = {name: Dual(p, None, trace, moves[name]) if isinstance(moves[name], LowRank) else Dual(p, moves[name], trace) for name, p in params.items()}
    result = torch.func.functional_call(model, duals, (x,))
    for k in range(MEMBERS):
        along = {name: move.dense()[k] if isinstance(move, LowRank) else move[k] for name, move in moves.items()}
        _, tangent = torch.func.jvp(lambda values: torch.func.functional_call(copy.deepcopy(model), values, (x,)), (params,), (along,))
        torch.testing.assert_close(result.tangent[k], tangent, rtol=1e-4, atol=1e-4)


def test_hidden_tangents_of_rank_one_are_never_all_there():
    members, rows, width = 16, 256, 128
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
    learner = Learner(model, F.cross_entropy, engine="forward", space="weights", rank=1, tangents=members)
    x, y = numbers(10, rows, 8), torch.zeros(rows, dtype=torch.int64)
    learner.backward(x, y)
    scratch.clear()
    with PeakBytes() as memory:
        learner.backward(x, y)
    hidden = members * rows * width * 4  # 2 MiB; a block of it is 1 MiB
    assert memory.peak < 0.9 * hidden
