"""Every layer of a population is the layer at W + σE, member by member, to rounding in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from population_cases import LAYERS, LINEAR, TOKENS, VECTORS, free, generator, layer
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves, tree_map

from altgrad.errors import CapabilityError
from altgrad.kernels import noise
from altgrad.population import Draws, Notes, Perturbed, population
from altgrad.rng import Key, tensor_id
from altgrad.samplers import AddressedSamplers

KEY, SIGMA, DIRECTIONS = Key(11, 2), 0.3, 3
EXACT = 1e-10  # relative, in float64: the figure that is claimed


def unit(law: str, name: str, direction: int, shape: Any) -> Tensor:
    """Noise of variance 1 straight from its address, one direction."""
    drawn = noise.draw(law, KEY, tensor_id(name), [direction], shape)[0]
    return (drawn - 0.5) * math.sqrt(12) if law == "uniform" else drawn


def explicit(params: dict[str, Tensor], direction: int, sign: int, *, rank: int | None, law: str, sigma: float = SIGMA) -> dict[str, Tensor]:
    """θ + σ s E written out, from the definition of E."""
    moved = {}
    for name, value in params.items():
        rows, columns = (value.shape[0], value.shape[1:].numel()) if value.ndim >= 2 else (0, 0)
        if rank is None or rank >= min(rows, columns):
            noise_of = unit(law, name, direction, value.shape)
        else:
            factors = unit(law, name, direction, (rows + columns, rank)).double()
            noise_of = (factors[:rows] @ factors[rows:].T / math.sqrt(rank)).reshape(value.shape)
        moved[name] = value + sigma * sign * noise_of.to(value.dtype)
    return moved


def members(antithetic: bool, count: int = DIRECTIONS) -> list[tuple[int, int]]:
    return [(d, sign) for sign in ((1, -1) if antithetic else (1,)) for d in range(count)]


def trainable(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.named_buffers()}


def samplers() -> AddressedSamplers:
    return AddressedSamplers(Key(5))


def drawn_for(module: nn.Module, *, rank: int | None = 1, law: str = "normal", antithetic: bool = True, chunk: int | None = None) -> Draws:
    return Draws(KEY, trainable(module), DIRECTIONS, sigma=SIGMA, rank=rank, law=law, antithetic=antithetic, chunk=chunk)


def together(module: nn.Module, inputs: tuple[Any, ...], notes: Notes | None = None, **how: Any) -> Any:
    """All members at once."""

    def call(values: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(module, {**values, **buffers_of(module)}, inputs)

    return population(call, drawn_for(module, **how), samplers=samplers, notes=notes)


def one_by_one(module: nn.Module, inputs: tuple[Any, ...], *, rank: int | None = 1, law: str = "normal", antithetic: bool = True) -> Any:
    """Each member by plain PyTorch with its weights written out."""
    found = []
    for direction, sign in members(antithetic):
        with torch.no_grad(), samplers():
            values = explicit(trainable(module), direction, sign, rank=rank, law=law)
            found.append(torch.func.functional_call(module, {**values, **buffers_of(module)}, inputs))
    return tree_map(lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *found)


def distance(found: Any, expected: Any) -> float:
    """The largest relative distance of any output."""
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    assert pairs
    worst = 0.0
    for a, b in pairs:
        if isinstance(b, Tensor):
            assert a.shape == b.shape
            worst = max(worst, float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)))
    return worst


# -- the claim, for every layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("name", LAYERS)
def test_the_population_is_the_layer_at_explicit_weights(name, rank):
    module, inputs = LAYERS[name]()
    assert distance(together(module, inputs, rank=rank), one_by_one(module, inputs, rank=rank)) <= EXACT


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_a_rule_never_writes_its_weight_out(name):
    notes = Notes()
    module, inputs = LAYERS[name]()
    together(module, inputs, notes)
    assert notes.metrics() == {}


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("law", ["normal", "sign", "uniform"])
def test_every_law_with_and_without_pairs(law, antithetic):
    module, inputs = LINEAR["two layers"]()
    how = {"law": law, "antithetic": antithetic, "rank": 2}
    assert distance(together(module, inputs, **how), one_by_one(module, inputs, **how)) <= EXACT


@pytest.mark.parametrize("name", ["two layers", "conv2d, grouped", "attention, self", "lstm", "batch norm, train", "dropout", "tied weights"])
@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("antithetic", [True, False])
def test_the_chunk_does_not_change_the_result(name, chunk, antithetic):
    module, inputs = LAYERS[name]()
    assert distance(together(module, inputs, chunk=chunk, antithetic=antithetic), together(module, inputs, antithetic=antithetic)) <= EXACT


def test_members_of_a_population_differ():
    module, inputs = LINEAR["two layers"]()
    flat = together(module, inputs).flatten(1)
    assert float(torch.pdist(flat).min()) > 0.1


# -- what has no rule -------------------------------------------------------------------------------------------------------------


class Smooth(nn.Module):
    """A parametrisation that reads the weight elementwise."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh()


def parametrised() -> nn.Module:
    module = nn.Linear(5, 4)
    nn.utils.parametrize.register_parametrization(module, "weight", Smooth())
    return module


RULELESS = {
    "einsum": (free(lambda w, b, x: torch.einsum("ni,oi->no", x, w), (4, 5), (6, 5)), "weight: einsum"),
    "elementwise": (free(lambda w, b, x: x @ (w * 2).T, (4, 5), (6, 5)), "weight: mul"),
    "parametrised": (layer(parametrised, (6, 5)), "parametrizations.weight.original: tanh"),
    "weight norm": (layer(lambda: parametrizations.weight_norm(nn.Linear(5, 4)), (6, 5)), "parametrizations.weight.original1: _weight_norm"),
    "spectral norm, eval": (layer(lambda: parametrizations.spectral_norm(nn.Linear(5, 4)), (6, 5), train=False), "parametrizations.weight.original"),
    "weight times weight": (free(lambda w, b, x: x @ (w @ w), (5, 5), (6, 5)), "weight: as an input"),
    "a vector's product": (free(lambda w, b, x: torch.mv(w, x), (4, 5), (5,)), "weight: mv"),
    "standardised": (free(lambda w, b, x: x @ ((w - w.mean(1, keepdim=True)) / w.norm()).T, (4, 5), (6, 5)), "weight: mean"),
    "stacked": (free(lambda w, b, x: F.linear(x, torch.cat([w, w])), (4, 5), (6, 5)), "weight: cat"),
    "one row": (free(lambda w, b, x: x + w[1], (4, 5), (6, 5)), "weight: __getitem__"),
    "unexpected keyword": (free(lambda w, b, x: torch.matmul(input=x, other=w), (5, 4), (6, 5)), ""),
    "renormalised embedding": (layer(lambda: nn.Embedding(7, 4, max_norm=None, scale_grad_by_freq=True), TOKENS), ""),
}


@pytest.mark.parametrize("name", RULELESS)
def test_what_has_no_rule_runs_dense_and_is_counted_by_parameter_and_function(name):
    made, noted = RULELESS[name]
    module, inputs = made()
    notes = Notes()
    assert distance(together(module, inputs, notes, rank=2), one_by_one(module, inputs, rank=2)) <= EXACT
    if noted:
        assert any(place.startswith(noted) for place in notes.written_out), notes.written_out
        assert notes.metrics()["fallback_dense_weights"] == sum(notes.written_out.values()) >= 1


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda w, b, x: x @ w.mul_(0.5).T, "mul_ would change the parameter 'weight' in place"),
        (lambda w, b, x: x @ w.clamp_(-1, 1).T, "clamp_ would change the parameter 'weight' in place"),
        (lambda w, b, x: (w.__setitem__(0, 1.0), x @ w.T)[1], "__setitem__ would change the parameter 'weight' in place"),
        (lambda w, b, x: (torch.mul(w, 2, out=w), x @ w.T)[1], "mul would change the parameter 'weight' in place"),
        (lambda w, b, x: x @ F.relu(w, inplace=True).T, "relu would change the parameter 'weight' in place"),
        (lambda w, b, x: x @ nn.init.zeros_(w).T, "in place"),
    ],
    ids=["mul_", "clamp_", "setitem", "out", "inplace", "init"],
)
def test_a_parameter_changed_in_place_is_refused_by_name(use, said):
    module, inputs = free(use, (4, 5), (6, 5))()
    before = module.weight.detach().clone()
    with pytest.raises(CapabilityError, match=said):
        together(module, inputs)
    assert torch.equal(module.weight, before)


def test_a_detached_parameter_still_moves():
    module, inputs = free(lambda w, b, x: x @ w.detach().T, (4, 5), (6, 5))()
    assert distance(together(module, inputs), one_by_one(module, inputs)) <= EXACT


def test_a_parameter_handed_out_is_written_out():
    module, inputs = free(lambda w, b, x: (F.linear(x, w), w, w.T, None, 3), (4, 5), (6, 5))()
    found = together(module, inputs)
    assert distance(found[:3], one_by_one(module, inputs)[:3]) <= EXACT
    assert found[3:] == (None, 3)


def test_shapes_and_dtypes_of_a_perturbed_parameter_are_its_own():
    seen = {}

    def look(w, b, x):
        seen.update(
            shape=w.shape, ndim=w.ndim, dtype=w.dtype, size=w.size(0), numel=w.numel(), floating=w.is_floating_point(), perturbed=isinstance(w, Perturbed)
        )
        return F.linear(x, w) + w.new_zeros(4)

    module, inputs = free(look, (4, 5), (6, 5))()
    together(module, inputs)
    assert seen == {"shape": (4, 5), "ndim": 2, "dtype": torch.float64, "size": 4, "numel": 20, "floating": True, "perturbed": True}


# -- inputs of their own ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("antithetic", [True, False])
def test_members_may_see_inputs_of_their_own(antithetic, chunk):
    module, _ = LINEAR["two layers"]()
    own = torch.randn(len(members(antithetic)), 6, 5, generator=generator(4), dtype=torch.float64)
    draws = drawn_for(module, antithetic=antithetic, chunk=chunk)
    found = population(lambda values, x: torch.func.functional_call(module, values, (x,)), draws, inputs=own)
    for place, (direction, sign) in enumerate(members(antithetic)):
        expected = torch.func.functional_call(module, explicit(trainable(module), direction, sign, rank=1, law="normal"), (own[place],))
        assert distance(found[place], expected) <= EXACT


def test_inputs_of_their_own_may_be_a_tree():
    module, _ = LINEAR["bilinear"]()
    drawn = generator(4)
    own = {"a": torch.randn(6, 2, 5, generator=drawn, dtype=torch.float64), "b": torch.randn(6, 2, 4, generator=drawn, dtype=torch.float64)}
    found = population(lambda values, x: torch.func.functional_call(module, values, (x["a"], x["b"])), drawn_for(module), inputs=own)
    direction, sign = members(True)[4]
    expected = torch.func.functional_call(module, explicit(trainable(module), direction, sign, rank=1, law="normal"), (own["a"][4], own["b"][4]))
    assert distance(found[4], expected) <= EXACT


# -- samplers and statistics ------------------------------------------------------------------------------------------------------


def test_all_members_meet_one_dropout_mask():
    masks = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(torch.ones_like(x), 0.5, self.training) * (x * 0 + 1)

    module, inputs = layer(lambda: nn.Sequential(nn.Linear(5, 8), Spy()), (6, 5))()
    masks = together(module, inputs)
    assert all(torch.equal(masks[0], other) for other in masks[1:])
    assert 0 < float((masks[0] == 0).double().mean()) < 1


@pytest.mark.parametrize("rank", [1, None])
def test_members_write_no_running_statistics(rank):
    module, inputs = VECTORS["batch norm, train"]()
    own = {name: value for name, value in buffers_of(module).items() if "running" in name}
    before = {name: value.clone() for name, value in own.items()}
    draws = drawn_for(module, rank=rank)
    population(lambda values: torch.func.functional_call(module, {**values, **own}, inputs), draws, samplers=samplers)
    assert all(torch.equal(own[name], value) for name, value in before.items())


# -- precision --------------------------------------------------------------------------------------------------------------------

SHORT = {
    "two layers": 4,
    "conv2d, grouped": 4,
    "convᵀ 2d, grouped": 4,
    "embedding": 2,
    "addmm": 4,
    "attention, self": 12,
    "layer norm": 8,
    "batch norm, train": 24,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHORT)
def test_short_floats_keep_their_dtype_and_lose_no_more_than_plain_pytorch_loses(name, dtype):
    module, inputs = LAYERS[name]()
    exact = one_by_one(module, inputs)
    short, given = module.to(dtype), tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    found, plain = together(short, given), one_by_one(short, given)
    assert [leaf.dtype for leaf in tree_leaves(found)] == [leaf.dtype for leaf in tree_leaves(plain)]
    assert distance(found, exact) <= max(2 * distance(plain, exact), SHORT[name] * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", [*(name for name in SHORT if name != "layer norm"), "bilinear", "x @ W", "lstm", "gru cell", "linear on rows"])
def test_under_autocast_outputs_have_plain_pytorchs_dtype_and_precision(name):
    module, inputs = LAYERS[name]()
    exact = one_by_one(module, inputs)
    module, given = module.float(), tuple(x.float() if x.is_floating_point() else x for x in inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, plain = together(module, given), one_by_one(module, given)
    assert [leaf.dtype for leaf in tree_leaves(found)] == [leaf.dtype for leaf in tree_leaves(plain)]
    assert distance(found, exact) <= max(2 * distance(plain, exact), SHORT.get(name, 8) * torch.finfo(torch.bfloat16).eps)
