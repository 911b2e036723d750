"""The laws of population noise: second moments and cosines of low-rank directions against their closed forms, and addresses that never meet.

Keys are fixed: a figure is computed once and for all.
"""

import itertools

import pytest
import torch
from tolerances import tolerance

from altgrad import perturb
from altgrad.errors import UsageError
from altgrad.kernels import noise
from altgrad.perturb import Dense, LowRank, kurtosis
from altgrad.rng import Key, tensor_id

KEY = Key(1989)
LAWS, RANKS = ("normal", "uniform", "sign"), (1, 2, 4)
ROWS, COLUMNS, DRAWS, CHUNK = 8, 6, 80_000, 20_000
ERRORS = tolerance("moment_errors")


def slope(rows, columns):
    """A fixed gradient of norm 1."""
    drawn = noise.draw("normal", KEY, tensor_id("slope"), [0], (rows, columns))[0].double()
    return drawn / drawn.norm()


def low_rank_law(law, rank, rows=ROWS, columns=COLUMNS):
    kappa = kurtosis(law)
    return ((rows - 1 + kappa) * (columns - 1 + kappa) + (rank - 1) * (rows * columns + 2)) / rank


def mean_and_error(values):
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def low_rank_moments(law, rank, draws=DRAWS):
    """‖E⟨G, E⟩‖² of every direction, from the factors: tr((AᵀA)(BᵀB)) · tr(AᵀGB)²."""
    gradient, found = slope(ROWS, COLUMNS), []
    for first in range(0, draws, CHUNK):
        a, b = (f.double() for f in LowRank(KEY, "weight", torch.empty(ROWS, COLUMNS), range(first, first + CHUNK), law, rank).factors())
        square = ((a.transpose(1, 2) @ a) * (b.transpose(1, 2) @ b)).sum((1, 2))
        found.append(square * (a * (gradient @ b)).sum((1, 2)).square())
    return torch.cat(found)


# -- second moment ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("law", LAWS)
def test_the_second_moment_of_one_low_rank_direction_is_its_closed_form(law, rank):
    mean, error = mean_and_error(low_rank_moments(law, rank))
    assert abs(mean - low_rank_law(law, rank)) <= ERRORS * error


@pytest.mark.parametrize("law", LAWS)
def test_the_second_moment_of_one_dense_direction_is_d_minus_1_plus_kurtosis(law):
    directions = Dense(KEY, "weight", torch.empty(ROWS, COLUMNS), range(DRAWS), law).dense().double().flatten(1)
    moments = directions.square().sum(1) * (directions @ slope(ROWS, COLUMNS).flatten()).square()
    mean, error = mean_and_error(moments)
    assert abs(mean - (ROWS * COLUMNS - 1 + kurtosis(law))) <= ERRORS * error


@pytest.mark.parametrize("law", LAWS)
def test_so_many_draws_tell_the_laws_apart(law):
    mean, error = mean_and_error(low_rank_moments(law, 1))
    assert all(abs(mean - low_rank_law(other, 1)) > 2 * ERRORS * error for other in LAWS if other != law)


def test_signs_of_rank_one_are_better_than_dense_normals():
    mean, error = mean_and_error(low_rank_moments("sign", 1))
    assert mean + ERRORS * error < ROWS * COLUMNS + 2


# -- cosine -----------------------------------------------------------------------------------------------------------------------

SIDE, BUDGET, PART = 32, 1 << 17, 1 << 14


def squared_cosine(law, rank, count):
    """The mean of cos²(ĝ, G) over seeds that together take BUDGET directions, ĝ = mean of E⟨G, E⟩."""
    gradient, found = slope(SIDE, SIDE).float(), []
    for step in range(BUDGET // PART):  # a part holds PART / count seeds, each of its own members
        a, b = LowRank(KEY.at(step), "weight", torch.empty(SIDE, SIDE), range(PART), law, rank).factors()
        slopes = (a * (gradient @ b)).sum((1, 2), keepdim=True)  # ⟨G, E⟩ [members, 1, 1]
        left, right = ((a * slopes).transpose(1, 2), b.transpose(1, 2))  # [members, r, side] each
        left, right = (f.reshape(PART // count, count * rank, SIDE) for f in (left, right))
        estimates = (left.transpose(1, 2) @ right).double()  # [seeds, side, side], times count
        found.append((estimates * gradient).sum((1, 2)).square() / estimates.square().sum((1, 2)))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("count", [64, 256, 1024, 4096])
@pytest.mark.parametrize("law", LAWS)
def test_the_squared_cosine_after_n_directions_is_n_over_n_plus_d(law, count):
    variance = low_rank_law(law, 1, SIDE, SIDE) - 1
    assert squared_cosine(law, 1, count) == pytest.approx(count / (count + variance), rel=tolerance("population_cosine"))


@pytest.mark.parametrize("rank", [2, 4])
def test_the_cosine_law_holds_at_higher_rank(rank):
    variance = low_rank_law("normal", rank, SIDE, SIDE) - 1
    assert squared_cosine("normal", rank, 1024) == pytest.approx(1024 / (1024 + variance), rel=tolerance("population_cosine"))


# -- the laws themselves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_every_law_has_mean_0_variance_1_and_its_kurtosis(law):
    values = perturb.draw(law, KEY, 1, [0], (1 << 20,))[0].double()
    for power, expected in ((1, 0.0), (2, 1.0), (4, kurtosis(law))):
        mean, error = mean_and_error(values**power)
        assert abs(mean - expected) <= tolerance("standard_errors") * error + 1e-6, power


def test_the_uniform_law_is_the_addressed_uniform_scaled():
    expected = 12**0.5 * (noise.draw("uniform", KEY, 7, range(3), (5, 2)).double() - 0.5)
    torch.testing.assert_close(perturb.draw("uniform", KEY, 7, range(3), (5, 2)).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_uniform_noise_is_computed_in_float32_then_cast(dtype):
    found, single = perturb.draw("uniform", KEY, 7, range(3), (50,), dtype=dtype), perturb.draw("uniform", KEY, 7, range(3), (50,))
    assert found.dtype == dtype
    assert torch.equal(found, single.to(dtype))


@pytest.mark.parametrize("law", LAWS)
def test_a_slice_of_noise_equals_the_slice_of_the_whole(law):
    assert torch.equal(perturb.draw(law, KEY, 7, [2], (30,), start=13)[0], perturb.draw(law, KEY, 7, range(4), (60,))[2, 13:43])


def test_an_unknown_law_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'normal'"):
        kurtosis("norml")
    with pytest.raises(UsageError, match="Did you mean 'uniform'"):
        perturb.draw("unifrom", KEY, 1, [0], (1,))


# -- addresses --------------------------------------------------------------------------------------------------------------------

MEMBERS = 1 << 20
STREAM, NAMES = 1 << 14, ("layers.0.weight", "layers.1.weight", "layers.2.weight", "layers.10.weight")


@pytest.mark.parametrize("half", [0, 1])
def test_no_two_of_a_million_members_share_half_a_counter_of_words(half):
    """A block has 128 bits; either half of it alone (64 bits) is different for every member, so the blocks are."""
    words = noise.integers(KEY, tensor_id("weight"), range(MEMBERS), (2,), start=2 * half)
    assert len(torch.unique((words[:, 0] << 32) | words[:, 1])) == MEMBERS


def correlations(streams):
    """|correlation| of every two rows of [streams, n]."""
    streams = streams - streams.mean(1, keepdim=True)
    streams = streams / streams.norm(dim=1, keepdim=True)
    return (streams @ streams.T).triu(1).abs()


@pytest.mark.parametrize("law", LAWS)
def test_layers_of_one_shape_and_members_are_uncorrelated(law):
    streams = [Dense(KEY, name, torch.empty(128, 128), range(4), law).dense().flatten(1).double() for name in NAMES]
    assert float(correlations(torch.cat(streams)).max()) < 4 / STREAM**0.5


@pytest.mark.parametrize("law", LAWS)
def test_low_rank_factors_are_uncorrelated_across_layers_members_and_sides(law):
    layers = [LowRank(KEY, name, torch.empty(STREAM, STREAM), range(3), law, 1).factors() for name in NAMES]
    streams = torch.cat([factor[:, :, 0].double() for factor in itertools.chain(*layers)])
    assert float(correlations(streams).max()) < 4 / STREAM**0.5


@pytest.mark.parametrize("law", LAWS)
def test_steps_are_uncorrelated(law):
    streams = [perturb.draw(law, KEY.at(step), tensor_id("weight"), [0], (STREAM,)).double() for step in range(8)]
    assert float(correlations(torch.cat(streams)).max()) < 4 / STREAM**0.5


def test_the_correlation_of_a_repeated_stream_is_seen():
    streams = perturb.draw("normal", KEY, 1, [0, 1, 0], (STREAM,)).double()
    assert float(correlations(streams).max()) > 0.99
