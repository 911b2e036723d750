"""The NumPy generator: Random123's known answers, and addresses that mean what they say."""

import numpy as np
import pytest

from altgrad import rng
from altgrad.rng import Key, tensor_id

# Random123's kat_vectors, philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
KEY = Key(2026, 3)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, words):
    assert tuple(rng.philox(np.array(counter, dtype=np.uint32), key).tolist()) == words


def test_counter_is_element_tensor_member_step_and_key_is_the_seed():
    key = Key((0x299F31D0 << 32) | 0xA4093822, 0x03707344)
    drawn = rng.integers(key, 0x85A308D3, [0x13198A2E], 4, start=4 * 0x243F6A88)
    assert tuple(drawn[0].tolist()) == KNOWN_ANSWERS[2][2]


@pytest.mark.parametrize("draw", [rng.integers, rng.uniform, rng.normal, rng.sign])
@pytest.mark.parametrize("start", [0, 1, 3, 127, 128, 130])
def test_a_slice_drawn_alone_equals_the_slice_of_the_whole(draw, start):
    whole = draw(KEY, 5, range(3), 400)
    assert np.array_equal(draw(KEY, 5, [1], 200, start=start)[0], whole[1, start : start + 200])


def test_tensor_ids_are_fixed_for_ever():
    assert [tensor_id(name) for name in ("", "layers.0.weight")] == [0x25CF7112, 0xE5174F0A]


def test_folded_keys_differ_by_label_and_keep_the_step():
    folded = [KEY.fold("dropout"), KEY.fold("shuffle"), KEY.fold("dropout", 1), KEY]
    assert len({key.seed for key in folded}) == 4
    assert {key.step for key in folded} == {3}


def test_a_step_beyond_32_bits_is_refused():
    with pytest.raises(ValueError, match="2\\^32"):
        Key(0, 2**32)


def test_uniforms_never_reach_zero_or_one():
    ends = rng.to_uniform(np.array([0, 2**32 - 1], dtype=np.uint32))
    assert (float(ends[0]), float(ends[1])) == (2.0**-24, 1 - 2.0**-24)


def test_permutation_holds_every_index_once():
    assert sorted(rng.permutation(KEY, "shuffle", 1000).tolist()) == list(range(1000))
