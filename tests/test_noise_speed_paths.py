"""Short draws share addresses and calls, long ones are written in place: neither changes what is drawn."""

import pytest
import torch
from test_noise import HAS_COMPILER, KEY, PeakBytes
from torch._subclasses.fake_tensor import FakeTensorMode

from altgrad.errors import SettingError, UsageError
from altgrad.kernels import addresses, noise

MODES = [False, True]
TENSORS = [(3, (7,)), (4, ()), (2**32 - 1, (64, 7)), (5, (0,)), (6, (300, 200)), (7, (128,))]  # short, scalar, not whole counters, empty, long


@pytest.fixture(autouse=True)
def _automatic(monkeypatch):
    monkeypatch.setenv("ALTGRAD_COMPILE", "auto")


@pytest.mark.parametrize("compiled", MODES)
@pytest.mark.parametrize("law", ["normal", "sign", "uniform"])
@pytest.mark.parametrize("members", [range(5), [2**32 - 1, 0, 9]])
def test_tensors_drawn_together_equal_tensors_drawn_alone(law, members, compiled):
    for (tensor, shape), drawn in zip(TENSORS, noise.draw_many(law, KEY, TENSORS, members, compiled=compiled), strict=True):
        assert torch.equal(drawn, noise.draw(law, KEY, tensor, members, shape, compiled=compiled))
        assert drawn.is_contiguous()


def test_tensors_drawn_together_are_cast_like_tensors_drawn_alone():
    (drawn,) = noise.draw_many("normal", KEY, [(3, (9,))], range(2), dtype=torch.bfloat16)
    assert torch.equal(drawn, noise.draw("normal", KEY, 3, range(2), (9,), dtype=torch.bfloat16))


def test_normals_drawn_together_are_counted():
    before = noise.drawn()
    noise.draw_many("normal", KEY, [(3, (9,)), (4, (40, 1000))], range(2))
    assert noise.drawn() - before == 2 * (9 + 40_000)


def test_tensors_drawn_together_need_known_laws_and_addresses():
    with pytest.raises(UsageError, match="Did you mean 'sign'"):
        noise.draw_many("sing", KEY, [(3, (9,))], range(2))
    with pytest.raises(SettingError, match="tensor=4294967296"):
        noise.draw_many("sign", KEY, [(2**32, (9,))], range(2))


@pytest.mark.parametrize("compiled", MODES)
def test_kept_addresses_are_not_used_up(compiled):
    first = noise.draw("normal", KEY, 3, range(3), (50,), compiled=compiled)
    first.zero_()
    drawn = [noise.draw("normal", KEY.at(step), 3, range(3), (50,), compiled=compiled) for step in (KEY.step, KEY.step + 1, KEY.step)]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert drawn[0].abs().min() > 0


def test_addresses_made_under_a_dispatch_mode_are_not_kept():
    with FakeTensorMode():
        noise.draw("sign", KEY, 77, range(3), (51,))
    assert type(noise.draw("sign", KEY, 77, range(3), (51,))) is torch.Tensor


def test_a_default_device_does_not_move_the_noise():
    expected = noise.draw("normal", KEY, 3, range(3), (50,), compiled=True)
    with torch.device("meta"):
        assert torch.equal(noise.draw("normal", KEY, 3, range(3), (50,), compiled=True), expected)


def test_compiled_normals_are_written_where_they_belong():
    if not HAS_COMPILER:
        assert noise.compile_failures() == 1
        return
    noise.draw("normal", KEY, 1, [0], (4,), compiled=True)
    with PeakBytes() as memory:
        drawn = noise.draw("normal", KEY, 1, [0], (4 * 2 * noise.COMPILED_BLOCKS[-1],), compiled=True)
    assert memory.peak - drawn.nbytes < 20 * noise.COMPILED_BLOCKS[-1]  # two int64 of addresses a counter, and no block of normals beside them


@pytest.mark.parametrize(("counters", "sizes"), [(1, [1024]), (3072, [1024] * 3), (3073, [8192]), (9360, [8192, 1024, 1024]), (40_000, [32768, 8192])])
def test_blocks_fit_the_counters(counters, sizes):
    assert list(noise._block_sizes(counters)) == sizes


def test_pieces_cover_the_list_once_in_order():
    for begin, end in addresses.blocks(7 * 30, 64):
        covered = []
        for piece in addresses.pieces(7, 30, begin, end, 50):
            assert piece.offset == len(covered)
            covered += [row * 30 + column for row in range(piece.top, piece.bottom) for column in range(piece.low, piece.high)]
        assert covered == list(range(begin, end))
