"""Losses of members: every rung gives the same ones, fallbacks are counted, groups see their own data, and memory is bounded by the chunk."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad import metrics
from altgrad.engines.evolution import ES, Eggroll
from altgrad.errors import CapabilityError, SettingError, ShapeError
from altgrad.population import Draws, Notes
from altgrad.population import fitness as fitness_module
from altgrad.population.fitness import Evaluation
from altgrad.probes import ready
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers
from altgrad.shaping import group_index
from altgrad.world import World

KEY, EXAMPLES, FEATURES, CLASSES, POPULATION = Key(3, 1), 8, 5, 3, 6
ROUNDING = 1e-10  # relative, in float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network():
    return ready(lambda: nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES)), generator(1)).double()


def dropped():
    return ready(lambda: nn.Sequential(nn.Linear(FEATURES, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, CLASSES)), generator(1)).double()


def data():
    return torch.randn(EXAMPLES, FEATURES, generator=generator(2), dtype=torch.float64), torch.arange(EXAMPLES) % CLASSES


def squared(outputs, targets):
    return (outputs - F.one_hot(targets, CLASSES)).square().sum(1).mean()


class Branching(nn.Module):
    """A path that depends on the data and the weights."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        return y if float(y.sum()) > 0 else 2 * y


def one_by_one(problem, draws, batch, *, index=None, groups=1):
    """Each member's objective in plain PyTorch, weights written out."""
    found = []
    part = draws.chunk(0, draws.count)
    for member in range(draws.members):
        values = {}
        for name, value in draws.params.items():
            if name in part.full:
                values[name] = part.full[name][member]
            else:
                left, right = part.thin[name]
                values[name] = value + (left[member] @ right[member].T).reshape(value.shape)
        size = len(batch.targets) // groups
        rows = slice(0, size) if index is None else slice(int(index[member]) * size, (int(index[member]) + 1) * size)
        own = batch._replace(inputs=batch.inputs[rows], targets=batch.targets[rows])
        with torch.no_grad(), AddressedSamplers(KEY.fold("samplers"), examples=size):
            found.append(problem.objective(values, own, problem.fresh_buffers()))
    return torch.stack(found).double()


def drawn(problem, *, chunk=None, rank=1, antithetic=True):
    params = {name: value.detach() for name, value in problem.params().items()}
    return Draws(KEY, params, POPULATION // 2 if antithetic else POPULATION, sigma=0.2, rank=rank, law="normal", antithetic=antithetic, chunk=chunk)


def evaluate(problem, *, notes=None, groups=1, inputs=None, **how):
    x, y = data()
    draws = drawn(problem, **how)
    index = group_index(POPULATION, groups, pairs=draws.antithetic) if groups > 1 else None
    batch = Batch(x if inputs is None else inputs, y)
    return Evaluation(problem, draws, batch, KEY, notes or Notes(), groups=groups, index=index).run(range(draws.count)).double()


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


def accuracy(outputs, targets) -> float:
    """The share of errors by NumPy: a Python float."""
    return float(np.mean(outputs.detach().cpu().numpy().argmax(1) != targets.numpy()))


def item(outputs, targets) -> Tensor:
    return torch.tensor(squared(outputs, targets).item(), dtype=torch.float64)


# -- the rungs --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("antithetic", [True, False])
def test_losses_are_those_of_each_member_alone(rank, antithetic):
    problem = Supervised(network(), F.cross_entropy)
    expected = one_by_one(problem, drawn(problem, rank=rank, antithetic=antithetic), Batch(*data()))
    assert distance(evaluate(problem, rank=rank, antithetic=antithetic), expected) <= ROUNDING


def test_a_plain_objective_needs_no_fallback():
    notes = Notes()
    evaluate(Supervised(network(), F.cross_entropy), notes=notes)
    assert notes.metrics() == {}


@pytest.mark.parametrize("loss", [item, accuracy])
def test_an_objective_that_leaves_torch_is_taken_member_by_member_and_counted(loss):
    problem, notes = Supervised(network(), loss), Notes()
    found = evaluate(problem, notes=notes)
    assert problem.facts["population rung"] == "objective"
    assert notes.metrics() == {"fallback_objective_loop": POPULATION}
    assert notes.reason
    assert distance(found, one_by_one(problem, drawn(problem), Batch(*data()))) <= 1e-6  # a Python float is kept in float32


def test_a_model_that_branches_on_its_data_is_run_member_by_member_and_counted():
    problem, notes = Supervised(Branching(network()), squared), Notes()
    found = evaluate(problem, notes=notes)
    assert problem.facts["population rung"] == "member"
    assert notes.metrics() == {"fallback_member_loop": POPULATION}
    assert distance(found, one_by_one(problem, drawn(problem), Batch(*data()))) <= ROUNDING


@pytest.mark.parametrize("rung", fitness_module.RUNGS)
@pytest.mark.parametrize("model", [network, dropped])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_all_rungs_give_the_same_losses(rung, model, chunk):
    problem = Supervised(model(), squared)
    expected = evaluate(problem)
    problem.facts["population rung"] = rung
    assert distance(evaluate(problem, chunk=chunk), expected) <= ROUNDING


@pytest.mark.parametrize("rung", fitness_module.RUNGS)
def test_all_members_meet_the_mask_that_one_alone_would(rung):
    problem = Supervised(dropped(), squared)
    problem.facts["population rung"] = rung
    assert distance(evaluate(problem), one_by_one(problem, drawn(problem), Batch(*data()))) <= ROUNDING


def test_the_rung_is_found_once():
    calls = []

    def counted(outputs, targets):
        calls.append(type(outputs))
        return item(outputs, targets)

    problem = Supervised(network(), counted)
    evaluate(problem)
    first = len(calls)
    evaluate(problem)
    assert len(calls) - first == POPULATION


def test_a_batch_that_no_rung_can_take_leaves_the_rung_as_it_was():
    problem = Supervised(network(), F.cross_entropy)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        evaluate(problem, inputs=torch.zeros(EXAMPLES, FEATURES + 1, dtype=torch.float64))
    assert problem.facts["population rung"] == "vmap"


def test_a_model_that_changes_its_weights_is_refused_on_every_rung():
    class Clamps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            self.inner[0].weight.clamp_(-1, 1)
            return self.inner(x)

    problem = Supervised(Clamps(), squared)
    with pytest.raises(CapabilityError, match=r"clamp_ would change the parameter 'inner.0.weight' in place.*change it between steps"):
        evaluate(problem)


def test_an_objective_that_returns_no_number_is_refused():
    problem = Supervised(network(), lambda outputs, targets: "low")
    with pytest.raises(ShapeError, match="the loss returned str"):
        evaluate(problem)


def test_losses_of_half_precision_outputs_are_judged_in_float32():
    model = network().bfloat16()
    problem = Supervised(model, F.cross_entropy)
    x, y = data()
    draws = drawn(problem)
    found = Evaluation(problem, draws, Batch(x.bfloat16(), y), KEY, Notes()).run(range(draws.count))
    assert found.dtype == torch.float32
    assert len(set(found.tolist())) == POPULATION  # bfloat16 has 8 bits


# -- inputs and outputs of all kinds ----------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, a, b=None, flag=None):
        return self.inner(a if b is None else a + b)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_inputs_may_be_a_tuple_or_a_dict(kind, groups):
    x, _ = data()
    inputs = (x / 2, x / 2) if kind == "tuple" else {"a": x / 2, "b": x / 2, "flag": None}
    problem = Supervised(Pair(), squared)
    how = {"groups": groups, "antithetic": False}
    assert distance(evaluate(problem, inputs=inputs, **how), evaluate(problem, **how)) <= ROUNDING


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


class Hugging(nn.Module):
    """Takes labels and returns its loss beside its logits."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = network(), kind

    def forward(self, x, labels):
        logits = self.inner(x)
        loss = squared(logits, labels)
        return Output(loss, logits) if self.kind == "dataclass" else {"loss": loss, "logits": logits, "cache": None}


@pytest.mark.parametrize("kind", ["dataclass", "dict"])
def test_models_that_return_their_own_loss_run_by_vmap(kind):
    x, y = data()
    problem, notes = Supervised(Hugging(kind), lambda out, _: out.loss if kind == "dataclass" else out["loss"]), Notes()
    found = evaluate(problem, inputs={"x": x, "labels": y}, notes=notes)
    assert notes.metrics() == {}
    problem.facts["population rung"] = "member"
    assert distance(found, evaluate(problem, inputs={"x": x, "labels": y})) <= ROUNDING


def test_outputs_in_a_dict_may_be_judged_outside_torch():
    x, y = data()
    problem, notes = Supervised(Hugging("dict"), lambda out, targets: accuracy(out["logits"], targets)), Notes()
    found = evaluate(problem, inputs={"x": x, "labels": y}, notes=notes)
    assert notes.metrics() == {"fallback_objective_loop": POPULATION}
    assert bool(((found * EXAMPLES - (found * EXAMPLES).round()).abs() < 1e-6).all())


def test_outputs_in_a_class_of_ones_own_judged_outside_torch_are_taken_member_by_member():
    x, y = data()
    problem, notes = Supervised(Hugging("dataclass"), lambda out, targets: accuracy(out.logits, targets)), Notes()
    evaluate(problem, inputs={"x": x, "labels": y}, notes=notes)
    assert notes.metrics() == {"fallback_member_loop": POPULATION}


# -- groups -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rung", fitness_module.RUNGS)
@pytest.mark.parametrize(("groups", "antithetic"), [(2, False), (2, True), (4, True)])
def test_each_group_sees_its_own_part_of_the_batch(groups, antithetic, rung):
    problem = Supervised(network(), squared)
    problem.facts["population rung"] = rung
    count = 8 if groups == 4 else 4
    params = {name: value.detach() for name, value in problem.params().items()}
    draws = Draws(KEY, params, count // 2 if antithetic else count, sigma=0.2, rank=1, law="normal", antithetic=antithetic)
    index = group_index(count, groups, pairs=antithetic)
    found = Evaluation(problem, draws, Batch(*data()), KEY, Notes(), groups=groups, index=index).run(range(draws.count))
    assert distance(found, one_by_one(problem, draws, Batch(*data()), index=index, groups=groups)) <= ROUNDING


def test_groups_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(SettingError, match="groups=3 is not allowed; it must be a divisor of the batch's 8 examples"):
        evaluate(Supervised(network(), squared), groups=3)


def test_the_chunk_does_not_change_groups():
    problem = Supervised(network(), squared)
    params = {name: value.detach() for name, value in problem.params().items()}
    index = group_index(8, 4, pairs=True)

    def losses(chunk):
        draws = Draws(KEY, params, 4, sigma=0.2, rank=1, law="normal", antithetic=True, chunk=chunk)
        return Evaluation(problem, draws, Batch(*data()), KEY, Notes(), groups=4, index=index).run(range(4))

    assert distance(losses(3), losses(None)) <= ROUNDING


# -- shares of the population -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("antithetic", [True, False])
def test_ranks_evaluate_their_own_members(size, antithetic):
    problem = Supervised(network(), squared)
    whole, draws = evaluate(problem, antithetic=antithetic), drawn(problem, antithetic=antithetic)
    halves = whole.reshape(2 if antithetic else 1, -1)
    for rank in range(size):
        share = World(rank, size).share(draws.count)
        found = Evaluation(problem, draws, Batch(*data()), KEY, Notes()).run(share).double()
        expected = halves[:, share.start : share.stop].flatten()
        assert found.shape == expected.shape
        assert len(share) == 0 or distance(found, expected) <= ROUNDING


# -- memory -----------------------------------------------------------------------------------------------------------------------


def engine_step(engine, problem, batch):
    params = problem.params()
    return engine.estimate(problem, params, engine.init(problem, params, KEY), batch, KEY, World())


@pytest.mark.parametrize("engine", [Eggroll, ES])
def test_a_chunk_that_does_not_fit_is_refused_before_it_is_tried_and_one_that_fits_is_named(engine, monkeypatch):
    problem = Supervised(network(), squared)
    monkeypatch.setattr(fitness_module, "available", lambda device: 100_000)
    monkeypatch.setattr(fitness_module, "UNCHECKED", 0)
    with pytest.raises(
        SettingError, match=r"chunk=None is not allowed: 512 directions \(1024 members\) at once need about .* and 97.7 KiB are free\. Set chunk=\d+ or less"
    ) as told:
        engine_step(engine(population=1024), problem, Batch(*data()))
    fits = int(str(told.value).split("Set chunk=")[1].split()[0])
    assert 1 <= fits < 512
    engine_step(engine(population=1024, chunk=fits), problem, Batch(*data()))
    with pytest.raises(SettingError, match=f"chunk={2 * fits + 8} is not allowed"):
        engine_step(engine(population=1024, chunk=2 * fits + 8), problem, Batch(*data()))


def test_a_system_that_does_not_tell_its_memory_is_trusted(monkeypatch):
    monkeypatch.setattr(fitness_module, "available", lambda device: None)
    engine_step(Eggroll(population=8), Supervised(network(), squared), Batch(*data()))


def test_memory_is_measured_once(monkeypatch):
    problem, asked = Supervised(network(), squared), []
    monkeypatch.setattr(fitness_module, "available", lambda device: asked.append(device) or 1 << 40)
    for _ in range(3):
        engine_step(Eggroll(population=8), problem, Batch(*data()))
    assert len(asked) == 1


def peak(depth, *, directions, chunk, width=16):
    model = ready(lambda: nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh()))), generator(1))
    problem = Supervised(model, lambda outputs, _: outputs.square().mean())
    params = {name: value.detach() for name, value in problem.params().items()}
    draws = Draws(KEY, params, directions, sigma=0.1, rank=1, law="normal", antithetic=True, chunk=chunk)
    batch = Batch(torch.randn(64, width, generator=generator(2)), None)
    evaluation = Evaluation(problem, draws, batch, KEY, Notes())
    with metrics.live_bytes(exclude=params.values()) as meter:
        evaluation.run(range(directions))
    return meter.peak


def activations(chunk, width=16, examples=64):
    return 2 * chunk * examples * width * 4


def test_live_bytes_are_bounded_by_the_chunk_whatever_the_population():
    small, large = peak(3, directions=8, chunk=4), peak(3, directions=64, chunk=4)
    assert large <= 1.1 * small


def test_live_activations_do_not_grow_with_depth():
    factors = 2 * 4 * 3 * 16 * 4  # of one layer: L, R and bias of a chunk's members, a few times over
    assert peak(12, directions=8, chunk=4) - peak(3, directions=8, chunk=4) <= 9 * 6 * factors
    assert 9 * 6 * factors < 9 * activations(4)


def test_live_bytes_of_a_chunk_are_a_few_of_its_activations():
    assert peak(6, directions=8, chunk=8) <= 6 * activations(8)
