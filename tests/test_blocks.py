"""Models cut into blocks: where, that the chain is the model, and what is said where it cannot be cut."""

import builtins
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from altgrad import models
from altgrad.blocks import alike, chained, check_shared, cut_model, replay
from altgrad.conformance import probes
from altgrad.errors import CapabilityError
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key


def names(model, cut=""):
    return [block.name for block in cut_model(model, cut)]


def own(model):
    return dict(model.named_parameters())


def clones(model):
    return {name: value.clone() for name, value in model.named_buffers()}


class Branch(nn.Module):
    """x + f(x)."""

    def __init__(self, width=4):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two, self.head = nn.Conv2d(1, 4, 3, padding=1), Branch(), Branch(), nn.Linear(4, 3)

    def forward(self, image):
        return self.head(self.two(self.one(torch.relu(self.stem(image)))).mean((2, 3)))


class Forked(nn.Module):
    """A module whose flow depends on the data."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = self.a(x)
        return self.b(h * 2 if h.sum() > 0 else h)


class Straight(nn.Module):
    """Flow that torch.fx cannot follow around modules that do follow each other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 2)

    def forward(self, x):
        if float(x.sum()) > 1e9:
            raise ValueError("too large")
        return self.b(self.a(x))


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x):
        return self.c(self.b(self.a(x))) + x


# -- where ----------------------------------------------------------------------------------------------------------------------


def test_a_sequential_is_cut_at_its_layers_and_what_follows_a_layer_is_its_own():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    blocks = cut_model(model)
    assert [block.name for block in blocks] == ["1", "5", "7"]
    assert blocks[0].parameters == ("1.weight", "1.bias", "2.weight", "2.bias")
    assert blocks[0].buffers == ("2.running_mean", "2.running_var", "2.num_batches_tracked")
    assert blocks[2].parameters == ("7.weight", "7.bias")


def test_nested_sequentials_are_one_chain():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4))), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))
    assert names(model) == ["0.0", "0.2.0", "1.1"]


def test_a_nested_sequential_with_a_hook_is_one_layer():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    assert names(model) == ["0", "1"]


def test_a_frozen_layer_belongs_to_the_block_before_it():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    assert [(block.name, block.parameters) for block in cut_model(model)] == [("0", ("0.weight", "0.bias")), ("2", ("2.weight", "2.bias"))]


def test_a_traced_model_is_cut_between_residual_branches_never_inside():
    blocks = cut_model(Residual())
    assert [block.name for block in blocks] == ["stem", "one", "two", "head"]
    assert set(blocks[1].parameters) == {f"one.{name}" for name, _ in Branch().named_parameters()}


def test_a_skip_over_everything_leaves_one_block():
    assert names(Skipping()) == ["a"]


def test_a_module_that_cannot_be_traced_is_one_piece_of_a_model_that_can():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = Forked(), nn.Linear(2, 2)

        def forward(self, x):
            return self.outer(torch.relu(self.inner(x)))

    assert names(Around()) == ["inner", "outer"]


def test_a_length_is_taken_anew_of_every_batch():
    class Reshaping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x.view(len(x), 2, 2))).reshape(len(x), -1))

    model = Reshaping()
    before = builtins.len
    blocks = cut_model(model)
    assert [block.name for block in blocks] == ["a", "b"]
    assert builtins.len is before
    for count in (5, 2):
        x = torch.randn(count, 4)
        assert torch.equal(chained(blocks, own(model), x, {}), model(x))


class Optional(nn.Module):
    """An argument that may be left out, and a switch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x, scale=None, double=False, kind="plain"):
        h = torch.tanh(self.a(x))
        h = h if scale is None else h * scale
        return self.b(2 * h if double or kind == "odd" else h)


@pytest.mark.parametrize("given", ["x", "x and scale", "by name"])
def test_arguments_that_are_not_given_keep_their_defaults(given):
    model, x, scale = Optional(), torch.randn(4, 3), torch.randn(4, 1)
    inputs = {"x": x, "x and scale": (x, scale), "by name": {"x": x, "scale": scale}}[given]
    expected = model(x) if given == "x" else model(x, scale)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocks = cut_model(model, inputs=inputs)
    assert [block.name for block in blocks] == ["a", "b"]
    assert torch.equal(chained(blocks, own(model), inputs, {}), expected)


def test_an_argument_that_was_left_out_when_the_model_was_cut_is_refused_later():
    model, x = Optional(), torch.randn(4, 3)
    blocks = cut_model(model, inputs=x)
    with pytest.raises(CapabilityError, match=r"do not give the model.s output.*TypeError"):
        replay(model, blocks, lambda: model(x, x), lambda: chained(blocks, own(model), (x, x), {}))


def test_parameters_used_outside_modules_make_blocks_too():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Parameter(torch.ones(3, 2))

        def forward(self, x):
            return torch.tanh(self.first(x)) @ self.second

    model = Bare()
    blocks = cut_model(model)
    assert [block.parameters for block in blocks] == [("first.weight", "first.bias"), ("second",)]
    x = torch.randn(4, 3)
    assert torch.equal(chained(blocks, own(model), x, {}), model(x))


def test_named_cuts_are_where_blocks_start_and_nowhere_else():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    blocks = cut_model(model, "0, 4")
    assert [(block.name, len(block.parameters)) for block in blocks] == [("0", 4), ("4", 2)]
    assert names(Residual(), "stem,two") == ["stem", "two"]


# -- the chain is the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(models.TABLE) - {"window", "graph-solver"}))
@pytest.mark.parametrize("training", [True, False])
def test_the_blocks_of_every_model_give_its_output_and_its_buffers(name, training):
    model = models.build(name, {}, input_shape=(1, 8, 8), classes=10, key=Key(0)).train(training)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    blocks, alone, together = cut_model(model), clones(model), clones(model)
    assert len(blocks) >= 2
    with torch.no_grad():
        expected = torch.func.functional_call(model, {**own(model), **together}, (x,))
        assert torch.equal(chained(blocks, own(model), x, alone), expected)
    assert all(torch.equal(alone[key], together[key]) for key in alone)
    assert sorted(key for block in blocks for key in block.parameters) == sorted(own(model))


def test_the_first_block_takes_what_the_model_takes():
    model, x = Residual().eval(), torch.randn(2, 1, 5, 5)
    for inputs in (x, (x,), {"image": x}):
        assert torch.equal(chained(cut_model(model), own(model), inputs, clones(model)), model(x))


def test_a_block_runs_with_the_parameters_it_is_given():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    params = {name: torch.full_like(value, 2.0) for name, value in model.named_parameters()}
    assert cut_model(model)[0].apply(params, torch.ones(1, 2), {}).tolist() == [[6.0, 6.0]]
    assert not any(bool((value == 2).all()) for value in model.parameters())


def test_a_trace_leaves_nothing_on_the_model_and_draws_nothing():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)) * torch.tensor([1.0, 2.0, 3.0]) + 0 * torch.rand(3))

    model, before = Constant(), torch.get_rng_state()
    kept = set(vars(model))
    blocks = cut_model(model)
    assert torch.equal(before, torch.get_rng_state())
    assert set(vars(model)) == kept
    x = torch.randn(4, 3)
    assert torch.allclose(chained(blocks, own(model), x, {}), model(x))


def test_blocks_follow_the_models_mode():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 50), nn.Linear(50, 2)

        def forward(self, x):
            return self.b(F.dropout(self.a(x), 0.5, self.training))

    problem = Supervised(Functional(), F.cross_entropy)
    training = problem.blocks()
    problem.model.eval()
    evaluation = problem.blocks()
    x = torch.ones(1, 3)
    assert training is not evaluation
    assert torch.equal(evaluation[0].apply(problem.params(), x, {}), problem.model.a(x))
    assert not torch.equal(training[0].apply(problem.params(), x, {}), problem.model.a(x))


# -- what is said -----------------------------------------------------------------------------------------------------------------


def test_a_model_that_fx_cannot_follow_is_refused_with_what_to_do():
    with pytest.raises(CapabilityError, match=r"Forked cannot be cut.*control flow.*cut='first,second.third'"):
        cut_model(Forked())


def test_named_modules_stand_in_where_fx_cannot_follow():
    model = Straight()
    blocks, x = cut_model(model, "a,b"), torch.randn(4, 3)
    assert torch.equal(chained(blocks, own(model), x, {}), model(x))
    replay(model, blocks, lambda: model(x), lambda: chained(blocks, own(model), x, {}))


def test_a_chain_that_is_not_the_model_is_refused_and_says_where():
    model = Forked()
    nn.init.ones_(model.a.weight)
    blocks, x = cut_model(model, "a,b"), torch.ones(4, 3)
    with pytest.raises(CapabilityError, match=r"'a', 'b' do not give the model's output: the first difference is at 'b' after 'a'"):
        replay(model, blocks, lambda: model(x), lambda: chained(blocks, own(model), x, {}))


def test_a_module_left_out_of_the_chain_is_named():
    model = Straight()
    blocks, x = cut_model(model, "a"), torch.ones(4, 3)
    with pytest.raises(CapabilityError, match="'b' is not run by them"):
        replay(model, blocks, lambda: model(x), lambda: chained(blocks, own(model), x, {}))


def test_an_unknown_cut_suggests_the_nearest_module():
    with pytest.raises(CapabilityError, match=r"unknown module 'tow'. Did you mean 'two'"):
        cut_model(Residual(), "one,tow")


def test_a_cut_inside_a_branch_is_refused():
    with pytest.raises(CapabilityError, match=r"cannot be cut between 'one.first' and 'one.second': more than one tensor is alive"):
        cut_model(Residual(), "one.first,one.second")


@pytest.mark.parametrize(("model", "prefix"), [(probes.Tied().body, ""), (probes.Tied(), "body.")], ids=["sequential", "traced"])
def test_shared_parameters_are_named_with_their_blocks(model, prefix):
    with pytest.raises(CapabilityError, match=f"rule trains every block.*'{prefix}0' and '{prefix}2' share the parameter '{prefix}0.weight'"):
        check_shared(cut_model(model), "rule")


def test_one_layer_run_twice_shares_its_parameters():
    layer = nn.Linear(3, 3)
    with pytest.raises(CapabilityError, match=r"'0' and '1' share the parameter '0.weight'"):
        check_shared(cut_model(nn.Sequential(layer, layer)), "rule")


def test_a_tied_weight_inside_one_block_is_no_trouble():
    body = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    body[2].weight = body[0].weight
    blocks = cut_model(body, "0,4")
    check_shared(blocks, "rule")
    x, twice = torch.randn(4, 3), {**own(body), "0.weight": 2 * body[0].weight.detach()}
    assert torch.allclose(chained(blocks, twice, x, {}), torch.func.functional_call(body, twice, (x,)))


def test_alike_takes_rounding_and_nothing_more():
    a = torch.tensor([1.0, float("nan"), float("inf")])
    assert alike(a, a * (1 + 1e-6))
    assert not alike(a, a * 1.001)
    assert not alike(a, a.double())
    assert not alike(a, a[:2])
