"""Vector quantisation: derivatives against their closed forms, moving codebooks against updates written by hand, usage, revival, bad input."""

import math

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, jvp, vjp, vmap

from altgrad.errors import SettingError, ShapeError
from altgrad.rng import Key, normal
from altgrad.vector import GRADIENTS, VectorQuantizer, kmeans, perplexity, shares, used
from altgrad.vector.gradients import rotation, straight_through

EPS = np.finfo(np.float64).eps
TRAINED = ({}, {"gradient": "rotation"}, {"sync": 0.3}, {"affine": "learned"}, {"affine": "running"}, {"alternating": 2}, {"gradient": "rotation", "sync": 0.2})
STATEFUL = ({"ema": True}, {"revive": 1, "dead": 1.0}, {"alternating": 1}, {"affine": "running"}, {"ema": True, "revive": 2, "dead": 1.0})


def drawn(name, *shape):
    """Normal numbers [*shape] of float64's full length."""
    return torch.from_numpy(normal(Key(7).fold(name), 0, [0], math.prod(shape))[0].astype(np.float64)).view(shape) * math.pi / 3


def layer(codes=6, dim=4, **settings):
    """A float64 layer whose codes are spread as wide as standard normal vectors."""
    found = VectorQuantizer(codes, dim, **settings).double()
    found.start_from(drawn("codes", codes, dim), key=Key(0), sweeps=0)
    return found


def pulled(function, e, g):
    """ē for g at the values."""
    return vjp(function, e)[1](g)[0]


def lengths(vectors):
    return torch.linalg.vector_norm(vectors, dim=-1)


def cosine(a, b):
    return (a * b).sum(-1) / (lengths(a) * lengths(b))


# -- derivatives -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(GRADIENTS))
def test_the_value_is_the_code_to_the_last_bit(name):
    e, q = drawn("e", 50, 8), drawn("q", 50, 8)
    assert torch.equal(GRADIENTS[name](e, q), q)


def test_straight_through_hands_the_gradient_on():
    g = drawn("g", 5, 3)
    assert torch.equal(pulled(lambda e: straight_through(e, drawn("q", 5, 3)), drawn("e", 5, 3), g), g)


def test_rotation_scales_the_gradient_by_the_ratio_of_the_lengths():
    e, q, g = drawn("e", 200, 16), drawn("q", 200, 16), drawn("g", 200, 16)
    ratio = lengths(pulled(lambda e: rotation(e, q), e, g)) / lengths(g)
    assert (ratio / (lengths(q) / lengths(e)) - 1).abs().max() <= 8 * EPS


def test_rotation_keeps_the_angle_between_gradient_and_code_for_the_encoders_output():
    e, q, g = drawn("e", 200, 16), drawn("q", 200, 16), drawn("g", 200, 16)
    assert (cosine(pulled(lambda e: rotation(e, q), e, g), e) - cosine(g, q)).abs().max() <= 8 * EPS


def test_rotation_is_the_papers_matrix():
    e, q, g = drawn("e", 5), drawn("q", 5), drawn("g", 5)
    before, after = e / e.norm(), q / q.norm()
    r = (before + after) / (before + after).norm()
    matrix = torch.eye(5).double() - 2 * torch.outer(r, r) + 2 * torch.outer(after, before)
    expected = q.norm() / e.norm() * matrix.T @ g
    assert torch.allclose(pulled(lambda e: rotation(e, q), e, g), expected, rtol=0, atol=1e-14)
    assert torch.allclose(q.norm() / e.norm() * matrix @ e, q, rtol=0, atol=1e-14)


@pytest.mark.parametrize("off", [0.0, 1e-300, 1e-17, 1e-12, 1e-8, 1e-4])
def test_rotation_of_an_opposite_code_is_finite_and_keeps_the_length(off):
    e, g = drawn("e", 20, 8), drawn("g", 20, 8)
    q = -2 * e + off * drawn("off", 20, 8)
    found = pulled(lambda e: rotation(e, q), e, g)
    assert (lengths(found) / lengths(g) / (lengths(q) / lengths(e)) - 1).abs().max() <= 16 * EPS


@pytest.mark.parametrize(("e", "q"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1e-200, 1.0), (1.0, 1e-200)])
def test_rotation_is_finite_where_a_length_is_zero_or_nearly(e, q):
    starts = torch.full((1, 3), e, dtype=torch.float64)
    found = pulled(lambda start: rotation(start, torch.full_like(starts, q)), starts, drawn("g", 1, 3))
    assert bool(torch.isfinite(found).all())


def test_rotation_at_zero_hands_the_gradient_on():
    g = drawn("g", 1, 3)
    assert torch.equal(pulled(lambda e: rotation(e, torch.ones(1, 3).double()), torch.zeros(1, 3).double(), g), g)


@pytest.mark.parametrize("gradient", sorted(GRADIENTS))
def test_synchronised_commitment_gives_codes_nu_times_the_gradient(gradient):
    quantizer, z, g = layer(sync=0.3, gradient=gradient), drawn("z", 10, 4), drawn("g", 10, 4)
    values, indices, _ = quantizer(z)
    (found,) = torch.autograd.grad(values, quantizer.codebook, g)
    assert torch.allclose(found, torch.zeros(6, 4).double().index_add(0, indices, 0.3 * g), rtol=0, atol=1e-15)


def test_synchronised_commitment_leaves_value_and_encoder_as_they_are():
    z, g, quantizer = drawn("z", 10, 4), drawn("g", 10, 4), layer(sync=0.3)
    assert torch.equal(quantizer(z).values, layer()(z).values)
    assert torch.equal(pulled(lambda z: quantizer(z).values, z, g), g)


def test_without_sync_the_values_tell_the_codebook_nothing():
    quantizer = layer()
    assert torch.autograd.grad(quantizer(drawn("z", 10, 4).requires_grad_()).values.sum(), quantizer.codebook, allow_unused=True) == (None,)


def test_the_losses_are_commitment_and_pull():
    quantizer, z = layer(commitment=0.25, pull=2.0), drawn("z", 3, 5, 4).requires_grad_()
    values, indices, losses = quantizer(z)
    difference = (z - values).detach()
    assert torch.allclose(losses, 2.25 * difference.square().mean((1, 2)), rtol=0, atol=1e-14)
    to_z, to_codes = torch.autograd.grad(losses.sum(), (z, quantizer.codebook))
    assert torch.allclose(to_z, 0.5 * difference / 20, rtol=0, atol=1e-15)
    expected = torch.zeros(6, 4).double().index_add(0, indices.flatten(), -4.0 * difference.flatten(0, 1) / 20)
    assert torch.allclose(to_codes, expected, rtol=0, atol=1e-14)


# -- transforms --------------------------------------------------------------------------------------------------------------------


def called(quantizer, z, weights):
    """A scalar that reads values and losses, as a function of z and the parameters."""

    def function(z, values):
        fresh = {name: value.clone() for name, value in quantizer.named_buffers()}
        found = functional_call(quantizer, {**values, **fresh}, (z,))
        return (found.values * weights).sum() + found.losses.sum()

    return function, z, {name: value.detach() for name, value in quantizer.named_parameters()}


@pytest.mark.parametrize("settings", TRAINED, ids=str)
def test_func_grad_is_autograds(settings):
    quantizer, weights = layer(**settings), drawn("weights", 7, 4)
    z = drawn("z", 7, 4).requires_grad_()
    function, _, values = called(quantizer, z, weights)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    expected = torch.autograd.grad(function(z, leaves), [z, *leaves.values()], allow_unused=True, materialize_grads=True)
    found_z, found = grad(function, argnums=(0, 1))(z.detach(), values)
    for mine, theirs in zip([found_z, *found.values()], expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("settings", TRAINED, ids=str)
def test_forward_mode_is_the_transpose_of_reverse_mode(settings):
    function, z, values = called(layer(**settings), drawn("z", 7, 4), drawn("weights", 7, 4))
    moves = (drawn("move", 7, 4), {name: drawn(f"move {name}", *value.shape) for name, value in values.items()})
    forward = jvp(function, (z, values), moves)[1]
    to_z, to_values = grad(function, argnums=(0, 1))(z, values)
    backward = (to_z * moves[0]).sum() + sum((to_values[name] * moves[1][name]).sum() for name in values)
    assert forward == pytest.approx(float(backward), rel=1e-12)


@pytest.mark.parametrize("settings", TRAINED, ids=str)
def test_vmap_over_parameters_and_inputs_is_a_loop(settings):
    quantizer = layer(**settings)
    weights, zs = drawn("weights", 7, 4), drawn("zs", 3, 7, 4)
    function, _, values = called(quantizer, zs[0], weights)
    many = {name: value + 0.1 * drawn(f"member {name}", 3, *value.shape) for name, value in values.items()}
    found = vmap(function)(zs, many)
    slopes = vmap(grad(function))(zs, many)
    for member in range(3):
        own = {name: value[member] for name, value in many.items()}
        assert float(found[member]) == pytest.approx(float(function(zs[member], own)), rel=1e-12)
        assert torch.allclose(slopes[member], grad(function)(zs[member], own), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("settings", STATEFUL, ids=str)
def test_a_transformed_pass_writes_no_buffer(settings):
    quantizer = layer(**settings)
    before = {name: value.clone() for name, value in quantizer.named_buffers()}
    grad(lambda z: quantizer(z).losses.sum())(drawn("z", 7, 4))
    vmap(lambda z: quantizer(z).losses)(drawn("zs", 2, 7, 4))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.named_buffers())


@pytest.mark.parametrize("settings", STATEFUL, ids=str)
def test_an_evaluation_writes_no_buffer_and_a_training_pass_does(settings):
    quantizer = layer(**settings)
    before = {name: value.clone() for name, value in quantizer.named_buffers()}
    quantizer.eval()(drawn("z", 7, 4))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.named_buffers())
    quantizer.train()(drawn("z", 7, 4))
    assert not all(torch.equal(value, before[name]) for name, value in quantizer.named_buffers())


# -- affine ------------------------------------------------------------------------------------------------------------------------


def test_a_learned_map_acts_on_all_codes():
    quantizer = layer(affine="learned", affine_rate=10.0)
    with torch.no_grad():
        quantizer.scale.copy_(drawn("u", 4))
        quantizer.shift.copy_(drawn("v", 4))
    expected = quantizer.codebook * (1 + 10 * drawn("u", 4)) + 10 * drawn("v", 4)
    assert torch.allclose(quantizer.table(), expected, rtol=1e-14, atol=0)


def test_codes_that_nothing_chose_move_with_the_shift():
    quantizer = layer(affine="learned")
    z = quantizer.table().detach()[:1] + 0.01
    quantizer(z).losses.sum().backward()
    assert not bool(quantizer.codebook.grad[1:].any())
    assert bool((quantizer.shift.grad != 0).all())


def test_a_running_map_gives_codes_the_vectors_mean_and_variance():
    quantizer, z = layer(affine="running", decay=0.0), 3 * drawn("z", 50, 4) + 5
    quantizer(z)
    table = quantizer.table()
    assert torch.allclose(table.mean(0), z.mean(0), rtol=1e-12)
    assert torch.allclose(table.var(0, correction=0), z.var(0, correction=0), rtol=1e-9)


def test_a_running_map_begins_as_the_identity():
    quantizer = layer(affine="running")
    assert torch.allclose(quantizer.table(), quantizer.codebook, rtol=1e-12, atol=1e-14)


def test_a_running_map_of_one_code_moves_it_to_the_mean():
    quantizer = layer(codes=1, affine="running", decay=0.0)
    quantizer(drawn("z", 9, 4))
    assert torch.allclose(quantizer.table()[0], drawn("z", 9, 4).mean(0), rtol=1e-12)


# -- codebooks that move without a gradient ----------------------------------------------------------------------------------------


def test_a_moving_average_codebook_is_the_update_written_by_hand():
    quantizer = layer(codes=5, dim=3, ema=True, decay=0.9)
    weight, total = [0.2] * 5, (quantizer.table() * 0.2).tolist()
    for number in range(4):
        z = drawn(f"z{number}", 12, 3)
        codes = torch.tensor(total) / torch.tensor(weight)[:, None]
        choice = [min(range(5), key=lambda k, row=row: float((row - codes[k]).square().sum())) for row in z]
        assert quantizer(z).indices.tolist() == choice
        for k in range(5):
            own = [row for row, chosen in zip(z.tolist(), choice, strict=True) if chosen == k]
            weight[k] = 0.9 * weight[k] + 0.1 * len(own) / 12
            total[k] = [0.9 * old + 0.1 * sum(row[axis] for row in own) / 12 for axis, old in enumerate(total[k])]
    assert torch.allclose(quantizer.table(), torch.tensor(total).double() / torch.tensor(weight).double()[:, None], rtol=1e-6)


def test_a_moving_average_codebook_has_no_parameter_and_no_loss_of_its_own():
    quantizer, z = layer(ema=True, commitment=0.5), drawn("z", 3, 4)
    assert list(quantizer.parameters()) == []
    values, _, losses = quantizer(z)
    assert torch.allclose(losses, 0.5 * (z - values).square().mean(1), rtol=1e-12)


@pytest.mark.parametrize(("decay", "passes"), [(0.0, 3), (0.1, 400)])
def test_a_code_that_nothing_chooses_stays_where_it_is_for_ever(decay, passes):
    quantizer = layer(codes=2, dim=1, ema=True, decay=decay)
    quantizer.start_from(torch.tensor([[0.0], [100.0]]).double(), key=Key(0), sweeps=0)
    for _ in range(passes):
        quantizer(torch.full((4, 1), 0.1, dtype=torch.float64))
    assert sorted(quantizer.table().flatten().tolist()) == pytest.approx([0.1, 100.0], rel=1e-9)


def test_an_inner_step_of_rate_one_puts_codes_on_the_means_of_their_vectors():
    quantizer, z = layer(codes=3, alternating=1, alternating_rate=1.0), drawn("z", 20, 4)
    choice = layer(codes=3)(z).indices
    quantizer(z)
    for k in set(choice.tolist()):
        assert torch.allclose(quantizer.table()[k], z[choice == k].mean(0), rtol=1e-12)


def test_the_encoder_meets_the_codes_after_their_inner_steps():
    quantizer, z = layer(alternating=3), drawn("z", 20, 4)
    values, indices, _ = quantizer(z)
    assert torch.allclose(values, quantizer.table()[indices], rtol=1e-12)


def test_inner_steps_bring_codes_nearer_to_their_vectors():
    z = drawn("z", 50, 4)
    errors = [float((layer(alternating=steps, alternating_rate=1.0)(z).values - z).square().mean()) for steps in (0, 1, 2, 5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < errors[0]


def test_inner_steps_leave_the_parameter_alone():
    quantizer = layer(alternating=2)
    before = quantizer.codebook.detach().clone()
    quantizer(drawn("z", 20, 4))
    assert torch.equal(quantizer.codebook, before)


def test_two_halves_average_to_the_whole_batch():
    z = drawn("z", 20, 4)
    parts = []
    for rows in (z[:10], z[10:], z):
        quantizer = layer(ema=True)
        quantizer(rows)
        parts.append({name: value.clone() for name, value in quantizer.named_buffers()})
    first, second, whole = parts
    assert all(torch.allclose((first[name] + second[name]) / 2, whole[name], rtol=1e-12, atol=1e-15) for name in whole)


# -- usage -------------------------------------------------------------------------------------------------------------------------


def test_usage_and_perplexity_of_a_case_worked_by_hand():
    share = shares(torch.tensor([[0, 0], [1, 3]]), 5)
    assert share.tolist() == [0.5, 0.25, 0.0, 0.25, 0.0]
    assert float(used(share)) == 0.6
    assert float(perplexity(share)) == pytest.approx(2**1.5, rel=1e-12)  # entropy 1.5 bits


@pytest.mark.parametrize(("counts", "expected"), [([7, 0, 0], 1.0), ([2, 2, 2], 3.0)])
def test_perplexity_runs_from_one_code_to_all(counts, expected):
    indices = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    assert float(perplexity(shares(indices, 3))) == pytest.approx(expected, rel=1e-12)


def far(**settings):
    """Four codes, two of which are too far off for any vector."""
    quantizer = VectorQuantizer(4, 2, revive=2, dead=0.9, decay=0.5, **settings).double()
    quantizer.start_from(torch.tensor([[0.0, 0.0], [1.0, 1.0], [90.0, 90.0], [99.0, 99.0]]).double(), key=Key(0), sweeps=0)
    return quantizer


@pytest.mark.parametrize("settings", [{}, {"ema": True}, {"affine": "learned"}, {"alternating": 1}], ids=str)
def test_dead_codes_come_back_on_different_vectors_of_the_batch(settings):
    quantizer, z = far(**settings), drawn("z", 10, 2).abs()
    for _ in range(2):
        quantizer(z)
    table = quantizer.table().detach()
    assert float(table.max()) < 10
    own = [tuple(row.tolist()) for row in table if (z - row).abs().sum(1).min() < 1e-12]
    assert len(set(own)) >= 2


def test_codes_in_use_stay_when_dead_ones_come_back():
    quantizer, z = far(), drawn("z", 10, 2).abs()
    before = quantizer.table().detach().clone()
    used_ones = sorted(set(quantizer(z).indices.tolist()))
    quantizer(z)
    assert len(used_ones) == 2
    assert torch.equal(quantizer.table()[used_ones], before[used_ones])


def test_nothing_comes_back_before_its_update():
    quantizer = far()
    quantizer(drawn("z", 10, 2).abs())
    assert float(quantizer.table().detach().max()) > 10


def test_a_code_that_came_back_has_the_share_of_a_fresh_one():
    quantizer, z = far(), drawn("z", 10, 2).abs()
    for _ in range(2):
        quantizer(z)
    assert quantizer.usage.tolist().count(0.25) >= 2


def test_the_choice_of_vectors_is_the_keys():
    tables = []
    for seed in (0, 0, 1):
        quantizer = far(key=Key(seed))
        for _ in range(2):
            quantizer(drawn("z", 10, 2).abs())
        tables.append(quantizer.table().detach())
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_fewer_vectors_than_dead_codes_bring_back_as_many_as_there_are():
    quantizer = VectorQuantizer(6, 2, revive=1, dead=1.0, decay=0.0).double()
    quantizer.start_from(torch.arange(12.0).double().view(6, 2) + 50, key=Key(0), sweeps=0)
    z = drawn("z", 2, 2)
    for _ in range(2):
        quantizer(z)
    assert int((quantizer.table() < 10).all(1).sum()) == 2


# -- k-means -----------------------------------------------------------------------------------------------------------------------


def test_kmeans_finds_separated_clusters():
    centres = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]]).double()
    points = torch.cat([centres + 0.1 * drawn(f"n{i}", 3, 2) for i in range(5)])
    best = min((kmeans(points, 3, key=Key(seed)) for seed in range(8)), key=lambda codes: torch.cdist(points, codes).min(1).values.sum())
    assert torch.cdist(centres, best).min(1).values.max() < 0.3


def test_kmeans_of_as_many_codes_as_points_gives_the_points():
    points = drawn("points", 5, 2)
    assert torch.cdist(points, kmeans(points, 5, key=Key(0))).min(1).values.max() < 1e-6


def test_start_from_puts_the_codes_on_the_means():
    points = drawn("points", 30, 4)
    for settings in ({}, {"ema": True}, {"affine": "running"}, {"affine": "learned", "alternating": 2}):
        quantizer = VectorQuantizer(3, 4, **settings).double()
        for tensor in quantizer.state_dict().values():
            tensor.add_(0.3)  # as training leaves it
        quantizer.start_from(points, key=Key(2))
        assert torch.allclose(quantizer.table(), kmeans(points, 3, key=Key(2)), rtol=1e-9)


# -- bad input ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"codes": 0}, "codes=0 is not allowed"),
        ({"dim": 0}, "dim=0 is not allowed"),
        ({"codes": 2.5}, "codes=2.5 is not allowed"),
        ({"gradient": "rotatoin"}, "Did you mean 'rotation'"),
        ({"affine": "lerned"}, "Did you mean 'learned'"),
        ({"commitment": -1.0}, "commitment=-1.0"),
        ({"sync": float("nan")}, "sync=nan"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"alternating_rate": 0.0}, "alternating_rate=0.0"),
        ({"affine_rate": 0.0}, "affine_rate=0.0"),
        ({"dead": 2.0}, "dead=2.0"),
        ({"revive": -1}, "revive=-1"),
        ({"ema": True, "sync": 0.2}, "with ema=true"),
        ({"ema": True, "affine": "learned"}, "with ema=true"),
        ({"ema": True, "alternating": 1}, "with ema=true"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused(settings, told):
    with pytest.raises(SettingError, match=told):
        VectorQuantizer(**{"codes": 4, "dim": 3, **settings})


def test_vectors_of_another_length_are_refused_with_a_hint_where_channels_come_first():
    with pytest.raises(ShapeError, match=r"\(2, 5\); they must be floats \[examples, ..., 4\]"):
        layer()(drawn("z", 2, 5))
    with pytest.raises(ShapeError, match="Channels come last"):
        layer()(drawn("z", 2, 4, 3, 3))


def test_more_codes_than_vectors_to_start_from_are_refused():
    with pytest.raises(SettingError, match="there are 3 vectors to start from"):
        kmeans(drawn("points", 3, 2), 4, key=Key(0))
