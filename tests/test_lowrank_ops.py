"""Low-rank population operators: the layer of every member, the update, and what torch.library asks of them."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from altgrad.errors import SettingError, ShapeError
from altgrad.kernels import lowrank, noise
from altgrad.kernels.perturbations import unit_noise
from altgrad.metrics import flops, live_bytes
from altgrad.rng import LAWS, Key, tensor_id

MEMBERS, INPUTS, OUTPUTS = 6, 5, 7
KEY, NAME = Key(2026, 3), tensor_id("layer.weight")
OPS = torch.ops.altgrad
EXACT = 1e-10  # the figure for float64

FORMS = [
    pytest.param(shared, pairs, bias, rank, id=f"{'shared' if shared else 'own'}-{'pairs' if pairs else 'single'}-{bias}-rank{rank}")
    for shared, pairs, bias, rank in itertools.product((False, True), (False, True), ("none", "one", "each"), (1, 2, 4))
]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def case(shared, pairs, bias, rank, *, extra=(3,), dtype=torch.float64, outputs=OUTPUTS, inputs=INPUTS):
    """x, weight, bias, a, b; the factors are slices of one block, as they are drawn."""
    count = MEMBERS // 2 if pairs else MEMBERS
    block = randn(count, outputs + inputs, rank, seed=1, dtype=dtype)
    x = randn(*(() if shared else (MEMBERS,)), *extra, inputs, seed=2, dtype=dtype)
    biases = {"none": None, "one": randn(outputs, seed=3, dtype=dtype), "each": randn(MEMBERS, outputs, seed=3, dtype=dtype)}
    return x, randn(outputs, inputs, seed=4, dtype=dtype), biases[bias], block[:, :outputs], block[:, outputs:]


def explicit(x, weight, bias, a, b, *, shared, pairs, scale=1.0):
    """Member by member with W + a bᵀ written out."""
    if pairs:
        a, b = torch.cat([a, -a]), torch.cat([b, b])
    rows = [x] * len(a) if shared else x
    biases = bias if bias is not None and bias.ndim == 2 else [bias] * len(a)
    return torch.stack([F.linear(row, weight + scale * left @ right.T, each) for row, left, right, each in zip(rows, a, b, biases, strict=True)])


@pytest.mark.parametrize(("shared", "pairs", "bias", "rank"), FORMS)
@pytest.mark.parametrize("extra", [(), (1,), (3,), (2, 3)])
def test_every_member_gets_its_explicit_weight(shared, pairs, bias, rank, extra):
    given = case(shared, pairs, bias, rank, extra=extra)
    found = lowrank.population_linear(*given, shared=shared, pairs=pairs, scale=0.3)
    wanted = explicit(*given, shared=shared, pairs=pairs, scale=0.3)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < EXACT


def test_rows_with_strides_are_taken_as_they_are():
    x, *rest = case(False, False, "one", 2, extra=(3, 2))
    x = x.transpose(1, 2)
    assert (lowrank.population_linear(x, *rest) - explicit(x, *rest, shared=False, pairs=False)).abs().max() < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("shared", [False, True])
def test_16_bit_error_is_at_most_twice_that_of_explicit_weights(dtype, rank, shared):
    given = case(shared, False, "one", rank, dtype=dtype, outputs=48, inputs=64, extra=(8,))
    exact = explicit(*(part.double() for part in given), shared=shared, pairs=False, scale=0.1)
    ours = (lowrank.population_linear(*given, shared=shared, scale=0.1).double() - exact).square().mean().sqrt()
    plain = (explicit(*given, shared=shared, pairs=False, scale=0.1).double() - exact).square().mean().sqrt()
    assert ours <= 2 * plain


def test_nothing_records_a_graph():
    given = [None if part is None else part.requires_grad_() for part in case(False, False, "one", 1)]
    assert lowrank.population_linear(*given).grad_fn is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(MEMBERS, OUTPUTS + 1, 1)}, "do not fit a weight"),
        ({"b": torch.zeros(MEMBERS, INPUTS, 2)}, "do not fit a weight"),
        ({"x": torch.zeros(MEMBERS - 1, 3, INPUTS)}, rf"must be \[{MEMBERS}, ..., {INPUTS}\]"),
        ({"x": torch.zeros(MEMBERS, 3, INPUTS - 1)}, rf"must be \[{MEMBERS}, ..., {INPUTS}\]"),
        ({"bias": torch.zeros(OUTPUTS - 1)}, rf"must be \[{OUTPUTS}\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    given = dict(zip(("x", "weight", "bias", "a", "b"), case(False, False, "one", 1), strict=True)) | change
    with pytest.raises(ShapeError, match=message):
        lowrank.population_linear(**given)


# ---------------------------------------------------------------------------------------------------------------- vmap


@pytest.mark.parametrize("bias", ["none", "one", "each"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("operator", [lowrank.member_linear, lambda *args: OPS.member_linear(*args, 1.0)], ids=["function", "operator"])
def test_vmap_over_members_equals_the_loop(shared, bias, operator):
    x, weight, bias, a, b = case(shared, False, bias, 2)
    over_bias = 0 if bias is not None and bias.ndim == 2 else None
    found = torch.vmap(operator, in_dims=(None if shared else 0, None, over_bias, 0, 0))(x, weight, bias, a, b)
    assert (found - explicit(x, weight, bias, a, b, shared=shared, pairs=False)).abs().max() < EXACT


@pytest.mark.parametrize(
    "in_dims", [(1, None, None, 2, 1), (0, None, None, None, None), (None, None, None, 0, None), (0, 0, None, 0, 0), (None, None, 0, None, None)]
)
def test_vmap_along_any_axis_of_any_argument_equals_the_loop(in_dims):
    shapes = [(3, INPUTS), (OUTPUTS, INPUTS), (OUTPUTS,), (OUTPUTS, 2), (INPUTS, 2)]
    given = [
        randn(*shape[: axis or 0], *(() if axis is None else (4,)), *shape[axis or 0 :], seed=i)
        for i, (shape, axis) in enumerate(zip(shapes, in_dims, strict=True))
    ]
    rows = [given[i].unbind(axis) if axis is not None else [given[i]] * 4 for i, axis in enumerate(in_dims)]
    found = torch.vmap(lowrank.member_linear, in_dims=in_dims)(*given)
    assert (found - torch.stack([lowrank.member_linear(*row) for row in zip(*rows, strict=True)])).abs().max() < EXACT


def test_operations_of_members_are_counted_under_vmap():
    x, weight, bias, a, b = case(False, False, "one", 1)
    rows = MEMBERS * 3
    assert flops(lambda: torch.vmap(lowrank.member_linear, in_dims=(0, None, None, 0, 0))(x, weight, bias, a, b)) >= 2 * rows * INPUTS * (OUTPUTS + 1)


@pytest.mark.parametrize("shared", [False, True])
def test_vmap_of_rows_within_vmap_of_members_equals_the_loop(shared):
    x, weight, bias, a, b = case(shared, False, "one", 2)
    inner = torch.vmap(lowrank.member_linear, in_dims=(0, None, None, None, None))
    found = torch.vmap(inner, in_dims=(None if shared else 0, None, None, 0, 0))(x, weight, bias, a, b)
    assert (found - explicit(x, weight, bias, a, b, shared=shared, pairs=False)).abs().max() < EXACT


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_vmap_of_rows_of_a_population_equals_the_whole(shared, pairs):
    x, *rest = case(shared, pairs, "one", 2)
    found = torch.vmap(lambda x: lowrank.population_linear(x, *rest, shared=shared, pairs=pairs), in_dims=0 if shared else 1, out_dims=1)(x)
    assert (found - lowrank.population_linear(x, *rest, shared=shared, pairs=pairs)).abs().max() < EXACT


# ---------------------------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (5, 7)])
def test_update_is_the_explicit_sum(rank, rows, columns):
    block, weights = randn(MEMBERS, rows + columns, rank), randn(MEMBERS, seed=1)
    a, b = block[:, :rows], block[:, rows:]
    assert (lowrank.lowrank_update(weights, a, b) - torch.einsum("p,pmr,pnr->mn", weights, a, b)).abs().max() < EXACT


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("chunk", [1, 2, 4, 6, 100, None])
@pytest.mark.parametrize("rank", [1, 3])
def test_addressed_update_is_the_explicit_sum_for_every_chunk(law, chunk, rank):
    members, shape, weights = [9, 3, 4, 100, 2**32 - 1, 7], (7, 2, 3), randn(6)
    a, b = lowrank.factors(law, KEY, tensor=NAME, members=members, rank=rank, shape=shape, dtype=torch.float64)
    found = lowrank.addressed_update(weights, KEY, tensor=NAME, members=members, law=law, rank=rank, shape=shape, chunk=chunk, dtype=torch.float64)
    assert (found - torch.einsum("p,pmr,pnr->mn", weights, a, b).view(shape)).abs().max() < EXACT


def test_memory_of_an_update_is_that_of_a_chunk():
    shape, members = (96, 160), range(512)

    def peak(chunk):
        with live_bytes() as live:
            lowrank.addressed_update(torch.ones(512), KEY, tensor=NAME, members=members, law="normal", rank=1, shape=shape, chunk=chunk)
        return live.peak

    one = 4 * sum(shape)  # bytes of one member's factors
    assert peak(512) > 512 * one
    assert peak(8) < 2 * 4 * 96 * 160 + 64 * one + 2**16


def test_update_of_16_bit_factors_is_summed_in_float32():
    block, weights = randn(4096, 4, 1).bfloat16(), torch.ones(4096)
    a, b = block[:, :2], block[:, 2:]
    exact = torch.einsum("pmr,pnr->mn", a.double(), b.double())
    found = lowrank.lowrank_update(weights, a, b)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 4096 * 2**-20  # bfloat16 sums would be off by whole units


def test_factors_are_one_block_of_rows_then_columns():
    a, b = lowrank.factors("normal", KEY, tensor=NAME, members=[5, 8], rank=2, shape=(3, 2, 2))
    drawn = noise.draw("normal", KEY, NAME, [5, 8], (3 + 4, 2))
    assert torch.equal(a, drawn[:, :3] * 2**-0.5)
    assert torch.equal(b, drawn[:, 3:])


@pytest.mark.parametrize("law", LAWS)
def test_noise_of_every_law_has_mean_zero_and_unit_variance(law):
    drawn = unit_noise(law, KEY, tensor=NAME, members=range(16), shape=(4096,)).double()
    assert drawn.mean().abs() < 4 * 65536**-0.5
    assert (drawn.square().mean() - 1).abs() < 4 * (2 / 65536) ** 0.5


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("chunk", [1, 400, 1024, None])
def test_axpy_adds_the_explicit_sum_for_every_chunk(law, chunk):
    start, weights = randn(7, 101), randn(3)
    drawn = unit_noise(law, KEY, tensor=NAME, members=[4, 1, 6], shape=(7, 101), dtype=torch.float64)
    found = start.clone()
    assert lowrank.addressed_axpy_(found, weights, key=KEY, tensor=NAME, members=[4, 1, 6], law=law, chunk=chunk) is found
    assert (found - start - torch.einsum("p,pij->ij", weights, drawn)).abs().max() < EXACT


def test_axpy_writes_through_strides():
    whole = torch.zeros(6, 4)
    lowrank.addressed_axpy_(whole.T[1:], torch.ones(1), key=KEY, tensor=NAME, members=[4], law="normal")
    assert torch.equal(whole.T[1:], noise.draw("normal", KEY, NAME, [4], (3, 6))[0])
    assert not whole[:, 0].any()


def test_axpy_rounds_16_bit_weights_once():
    start, weights = randn(300).bfloat16(), randn(50).float()
    found = lowrank.addressed_axpy_(start.clone(), weights, key=KEY, tensor=NAME, members=range(50), law="normal", chunk=50 * 128)
    drawn = unit_noise("normal", KEY, tensor=NAME, members=range(50), shape=(300,))
    assert torch.equal(found, torch.addmv(start.float(), drawn.T, weights).bfloat16())


def test_axpy_with_zero_coefficients_leaves_every_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        start = randn(500).to(dtype)
        assert torch.equal(lowrank.addressed_axpy_(start.clone(), torch.zeros(3), key=KEY, tensor=NAME, members=range(3), law="normal"), start)


def test_coefficients_must_match_the_members():
    with pytest.raises(SettingError, match="one for each of the 3 members"):
        lowrank.addressed_update(torch.ones(2), KEY, tensor=NAME, members=range(3), law="normal", rank=1, shape=(4, 4))


def test_a_vector_has_no_low_rank_update():
    with pytest.raises(SettingError, match="two axes or more"):
        lowrank.addressed_update(torch.ones(3), KEY, tensor=NAME, members=range(3), law="normal", rank=1, shape=(4,))


@pytest.mark.parametrize("law", [*LAWS, "integers"])
def test_fill_writes_what_draw_gives(law):
    out = torch.empty(3, 5, 4, dtype=torch.int64 if law == "integers" else torch.float32)
    lowrank.addressed_fill_(out, key=KEY, tensor=NAME, members=[1, 7, 2], law=law, start=3)
    if law == "integers":
        assert torch.equal(out, noise.integers(KEY, NAME, [1, 7, 2], (5, 4), start=3))
    else:
        assert torch.equal(out, noise.draw(law, KEY, NAME, [1, 7, 2], (5, 4), start=3))


@pytest.mark.parametrize("pairs", [False, True])
def test_addressed_layer_is_the_layer_of_the_drawn_factors(pairs):
    x, weight, bias, *_ = case(False, pairs, "one", 2)
    members = range(MEMBERS // 2 if pairs else MEMBERS)
    a, b = lowrank.factors("normal", KEY, tensor=NAME, members=members, rank=2, shape=weight.shape, dtype=torch.float64)
    found = lowrank.addressed_linear(x, weight, bias, KEY, tensor=NAME, members=members, law="normal", rank=2, pairs=pairs, scale=0.3)
    assert torch.equal(found, lowrank.population_linear(x, weight, bias, a, b, pairs=pairs, scale=0.3))


# ---------------------------------------------------------------------------------------------------------------- operators

IDS = torch.tensor([0, 5, 2, 3, 4, 1])
ADDRESS = (IDS, -3, 7, 11, "normal")
X, WEIGHT, BIAS, A, B = case(False, False, "one", 2, dtype=torch.float32)
HALF = MEMBERS // 2
CALLS = {
    "population_linear": (X, WEIGHT, BIAS, A, B, 0.5, False, False),
    "population_linear-pairs": (X, WEIGHT, None, A[:HALF], B[:HALF], 0.5, False, True),
    "population_linear-shared": (X[0], WEIGHT, BIAS, A, B, 0.5, True, False),
    "member_linear": (X[0], WEIGHT, BIAS, A[0], B[0], 0.5),
    "lowrank_update": (BIAS[:MEMBERS], A, B),
    "addressed_linear": (X, WEIGHT, BIAS, *ADDRESS, 2, 0.5, False, False),
    "addressed_linear-shared-pairs": (X[0], WEIGHT, BIAS, IDS[:HALF], *ADDRESS[1:], 2, 0.5, True, True),
    "addressed_update": (BIAS[:MEMBERS], *ADDRESS, 2, OUTPUTS, INPUTS, None, torch.float32),
    "addressed_axpy_": (torch.zeros(OUTPUTS, INPUTS), BIAS[:MEMBERS], *ADDRESS, None),
    "addressed_fill_": (torch.zeros(MEMBERS, INPUTS), *ADDRESS, 3),
}


@pytest.mark.parametrize("name", CALLS)
def test_operator_passes_opcheck(name):
    torch.library.opcheck(getattr(OPS, name.split("-")[0]).default, CALLS[name])


@pytest.mark.parametrize("name", [name for name in CALLS if "_linear" in name and "member" not in name])
def test_fake_shape_is_the_real_one(name):
    operator = getattr(OPS, name.split("-")[0])
    meta = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in CALLS[name]]
    assert operator(*meta).shape == operator(*CALLS[name]).shape


def step(x, weight, bias, a, b, coefficients):
    """One step's calls, in one graph."""
    hidden = torch.relu(lowrank.population_linear(x, weight, bias, a, b, scale=0.5))
    loud = lowrank.addressed_linear(x, weight, None, KEY, tensor=NAME, members=range(MEMBERS), law="normal", rank=2)
    thin = lowrank.addressed_update(coefficients, KEY, tensor=NAME, members=range(MEMBERS), law="sign", rank=1, shape=(OUTPUTS, INPUTS))
    moved = lowrank.addressed_axpy_(weight * 1.0, coefficients, key=KEY, tensor=NAME, members=range(MEMBERS), law="normal")
    return hidden, loud, lowrank.lowrank_update(coefficients, a, b), thin, moved


def test_compiled_in_one_graph_equals_eager():
    given = (X, WEIGHT, BIAS, A, B, BIAS[:MEMBERS])
    for found, wanted in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(*given), step(*given), strict=True):
        assert torch.equal(found, wanted)
