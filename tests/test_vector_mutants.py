"""Planted bugs in vector quantisation, which is no engine: each must fail the test named beside it."""

from unittest import mock

import pytest
import test_vector
import torch

from altgrad.vector import affine, gradients, moving, quantizer, usage

ROTATION, AVERAGED, REVIVED = gradients.rotation, moving.averaged, usage.revived


def without_length(e, q):
    """R without λ."""
    size = torch.linalg.vector_norm(e.detach(), dim=-1, keepdim=True)
    wanted = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    return q.detach() + (ROTATION(e, q) - q.detach()) * size / wanted


def one_reflection(e, q):
    """H_r alone."""
    held = e.detach()
    mirror = gradients.unit(gradients.unit(held, 0.0) + gradients.unit(q, 0.0), 1e-15)
    factor = torch.linalg.vector_norm(q, dim=-1, keepdim=True) / torch.linalg.vector_norm(held, dim=-1, keepdim=True)
    return q.detach() + factor * gradients.reflected(mirror, gradients.carried(e))


def backwards(e, q):
    """Rᵀ where R belongs."""
    held = e.detach()
    before, mirror = gradients.unit(held, 0.0), gradients.unit(gradients.unit(held, 0.0) + gradients.unit(q, 0.0), 1e-15)
    factor = torch.linalg.vector_norm(q, dim=-1, keepdim=True) / torch.linalg.vector_norm(held, dim=-1, keepdim=True)
    return q.detach() + factor * gradients.reflected(before, gradients.reflected(mirror, gradients.carried(e)))


def by_the_matrix(e, q):
    """I - 2 r rᵀ + 2 q̂ êᵀ as it stands in the paper: nothing guards it where ê + q̂ is 0."""
    held, v = e.detach(), gradients.carried(e)
    size, wanted = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (held, q))
    before, after = held / size, q / wanted
    r = (before + after) / torch.linalg.vector_norm(before + after, dim=-1, keepdim=True)
    turned = v - 2 * r * (r * v).sum(-1, keepdim=True) + 2 * after * (before * v).sum(-1, keepdim=True)
    return q.detach() + wanted / size * turned


def added_and_taken_away(e, q):
    """e + sg(q - e), whose value is q to rounding only."""
    return e + (q - e).detach()


def init_with(name, change):
    """A layer whose setting `name` is changed after it was checked."""
    plain = quantizer.VectorQuantizer.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        setattr(self, name, change(getattr(self, name)))

    return init


def sums_alone(old, new, *, decay):
    """The shares are left as they were."""
    return old[0], AVERAGED(old, new, decay=decay)[1]


def without_floor(old, new, *, decay):
    return tuple(decay * before + (1 - decay) * now for before, now in zip(old, new, strict=True))


def all_on_one(table, dead, points, *, key):
    return REVIVED(table, dead, points[:1].expand_as(points), key=key)


def keyless(table, dead, points, *, key):
    return REVIVED(table, dead, points, key=test_vector.Key(0))


def unscaled(codes, mean, square):
    return torch.ones_like(mean), mean - codes.detach().mean(0)


def in_bits(share):
    return (torch.special.entr(share).sum() / torch.log(torch.tensor(2.0))).exp()


def everywhere():
    """As if no transform were ever active."""
    return None


BUGS = [
    ("rotation without the ratio of lengths", "rotation", without_length, "test_rotation_scales_the_gradient_by_the_ratio_of_the_lengths"),
    ("one reflection for a rotation", "rotation", one_reflection, "test_rotation_keeps_the_angle_between_gradient_and_code_for_the_encoders_output"),
    ("the rotation backwards", "rotation", backwards, "test_rotation_is_the_papers_matrix"),
    ("the paper's matrix unguarded", "rotation", by_the_matrix, "test_rotation_of_an_opposite_code_is_finite_and_keeps_the_length"),
    ("the straight-through value rounded", "straight-through", added_and_taken_away, "test_the_value_is_the_code_to_the_last_bit"),
]
PATCHED = [
    (
        "sync reversed",
        quantizer.VectorQuantizer,
        "__init__",
        init_with("sync", lambda nu: -nu),
        "test_synchronised_commitment_gives_codes_nu_times_the_gradient",
    ),
    ("sync without nu", quantizer.VectorQuantizer, "__init__", init_with("sync", bool), "test_synchronised_commitment_gives_codes_nu_times_the_gradient"),
    ("commitment doubled", quantizer.VectorQuantizer, "__init__", init_with("commitment", lambda beta: 2 * beta), "test_the_losses_are_commitment_and_pull"),
    ("pull forgotten", quantizer.VectorQuantizer, "__init__", init_with("pull", lambda alpha: 0.0), "test_the_losses_are_commitment_and_pull"),
    ("sums averaged, shares not", moving, "averaged", sums_alone, "test_a_moving_average_codebook_is_the_update_written_by_hand"),
    ("shares without a floor", moving, "averaged", without_floor, "test_a_code_that_nothing_chooses_stays_where_it_is_for_ever"),
    ("all dead codes on one vector", usage, "revived", all_on_one, "test_dead_codes_come_back_on_different_vectors_of_the_batch"),
    ("revival from one key", usage, "revived", keyless, "test_the_choice_of_vectors_is_the_keys"),
    ("an affine map without a scale", affine, "running", unscaled, "test_a_running_map_gives_codes_the_vectors_mean_and_variance"),
    ("perplexity in bits", test_vector, "perplexity", in_bits, "test_usage_and_perplexity_of_a_case_worked_by_hand"),
    ("buffers written under transforms", quantizer, "maybe_current_level", everywhere, "test_a_transformed_pass_writes_no_buffer"),
]


def cases(name):
    """The test, with every one of its parametrised arguments."""
    test = getattr(test_vector, name)
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    if not marks:
        return [(test, {})]
    names, values = marks[0].args
    names = [names] if isinstance(names, str) else list(names)
    return [(test, dict(zip(names, value if len(names) > 1 else (value,), strict=True))) for value in values]


def fails(test, arguments):
    try:
        test(**arguments)
    except (AssertionError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize(("gradient", "bug", "name"), [bug[1:] for bug in BUGS], ids=[bug[0] for bug in BUGS])
def test_a_planted_derivative_fails_its_test(gradient, bug, name):
    own = {"rotation": "rotation", "straight-through": "straight_through"}[gradient]
    with mock.patch.dict(gradients.GRADIENTS, {gradient: bug}), mock.patch.object(test_vector, own, bug):
        assert any(fails(test, arguments) for test, arguments in cases(name))
    assert not any(fails(test, arguments) for test, arguments in cases(name))


@pytest.mark.parametrize(("owner", "attribute", "bug", "name"), [bug[1:] for bug in PATCHED], ids=[bug[0] for bug in PATCHED])
def test_a_planted_bug_fails_its_test(owner, attribute, bug, name):
    with mock.patch.object(owner, attribute, bug):
        assert any(fails(test, arguments) for test, arguments in cases(name))
    assert not any(fails(test, arguments) for test, arguments in cases(name))
