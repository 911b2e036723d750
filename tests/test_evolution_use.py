"""The engines es, eggroll and spsa in use: settings, ranks, Learner and altgrad.grad, optimizers, mixed precision."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bowls import ENGINES, ROUNDING, Bowl, distance, flat, generator, look
from torch import nn

import altgrad
from altgrad.engine import Bias, Split
from altgrad.engines.evolution import SPSA, Eggroll
from altgrad.errors import SettingError
from altgrad.probes import ready
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key
from altgrad.world import World

# -- settings ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"population": 7}, "population=7 is not allowed; it must be even with antithetic pairs; use one member more, or antithetic=False"),
        ({"population": 0}, "population=0 is not allowed; it must be a whole number >= 2"),
        ({"population": 1.5, "antithetic": False}, "population=1.5 is not allowed"),
        ({"sigma": 0.0}, "sigma=0.0 is not allowed; it must be a positive number"),
        ({"sigma": math.nan}, "sigma=nan is not allowed"),
        ({"rank": 0}, "rank=0 is not allowed"),
        ({"noise": "gaussian"}, "unknown noise law 'gaussian'"),
        ({"noise": "nomal"}, "unknown noise law 'nomal'. Did you mean 'normal'?"),
        ({"shaping": "zscore"}, "unknown shaping 'zscore'. Did you mean 'z-score'?"),
        ({"shaping": "group-z-score"}, "needs groups"),
        ({"shaping": "sign", "antithetic": False}, "needs antithetic=True"),
        ({"groups": 3}, "groups=3 is not allowed"),
        ({"chunk": 0}, "chunk=0 is not allowed"),
        ({"noise_reuse": 0}, "noise_reuse=0 is not allowed"),
        ({"sigma_schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"sigma_schedule": "linear"}, "sigma_steps=0 is not allowed"),
        ({"sigma_schedule": "linear", "sigma_steps": 1.5}, "sigma_steps=1.5 is not allowed"),
        ({"sigma_decay": 2.0}, "sigma_decay=2.0 is not allowed"),
        ({"sigma_floor": "a"}, "sigma_floor='a' is not allowed"),
        ({"sigma_schedule": None}, "unknown sigma schedule 'None'"),
        ({"sigma": None}, "sigma=None is not allowed; it must be a positive number"),
        ({"sigma": "0.1"}, "sigma='0.1' is not allowed"),
        ({"rank": 2.5}, "rank=2.5 is not allowed; it must be None or a whole number >= 1"),
        ({"rank": "1"}, "rank='1' is not allowed"),
        ({"chunk": 1.5}, "chunk=1.5 is not allowed; it must be None or a whole number >= 1"),
        ({"groups": 2.0}, "groups=2.0 is not allowed; it must be a whole number >= 1"),
        ({"noise_reuse": 1.5}, "noise_reuse=1.5 is not allowed"),
        ({"noise": ["normal"]}, "unknown noise law"),
        ({"shaping": None}, "unknown shaping 'None'"),
        ({"shaping": ["raw"]}, "unknown shaping"),
        ({"adapt": ["nes"]}, "adapt=['nes'] is not allowed"),
        ({"truncation": 3}, "unknown truncation '3'"),
        ({"maximize": "false"}, "maximize='false' is not allowed; it must be True or False"),
        ({"antithetic": "no"}, "antithetic='no' is not allowed"),
        ({"seed": 1.5}, "seed=1.5 is not allowed"),
        ({"adapt": "cma"}, "adapt='cma' is not allowed"),
        ({"adapt": "nes", "sigma_schedule": "cosine", "sigma_steps": 9}, "must be 'constant' where sigma adapts"),
        ({"adapt": "nes", "noise": "sign"}, "sigma cannot adapt to rank 1 noise='sign'"),
        ({"seed": -1}, "seed=-1 is not allowed"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(f"{key}={setting}" for key, setting in value.items()),
)
def test_settings_out_of_range_are_refused_with_what_is_allowed(settings, said):
    with pytest.raises(SettingError) as told:
        Eggroll(**{"population": 8, **settings})
    assert said in str(told.value)


def test_a_rank_above_every_matrix_is_refused_by_name():
    with pytest.raises(SettingError, match=r"rank=5 is not allowed: the widest matrix, 'matrix', is \(3, 4\) and has rank 3; it must be at most 3"):
        look(Eggroll(population=4, rank=5), Bowl())


def test_a_matrix_without_elements_has_no_say_in_the_rank():
    def function(values):
        return values["empty"].sum() + values["vector"].square().sum()

    values = {"empty": torch.ones(0, 3), "vector": torch.ones(2)}
    found = altgrad.grad(function, engine="eggroll", population=8)(values, key=Key(0))
    assert found["empty"].shape == (0, 3)
    assert bool(found["vector"].any())


def test_a_model_without_matrices_takes_any_rank():
    class Vector(Bowl):
        def params(self):
            return {"vector": self.values["vector"]}

        def losses(self, params, batch, buffers):
            return params["vector"].square().sum().reshape(1)

    assert bool(flat(look(Eggroll(population=4, rank=5), Vector()).grads).any())


@pytest.mark.parametrize("engine", ENGINES)
def test_traits_are_those_of_a_smoothed_population(engine):
    assert engine().split is Split.POPULATION
    assert engine().bias is Bias.SMOOTHED


# -- ranks ------------------------------------------------------------------------------------------------------------------------


class Together:
    """Ranks of one process: each evaluates its share, then all gather."""

    def __init__(self, size):
        self.size, self.sent = size, {}

    def world(self, rank):
        ranks = self

        class Meeting(World):
            def gather(self, tensor):
                ranks.sent[rank] = tensor
                if len(ranks.sent) < ranks.size:
                    raise Waiting
                return [ranks.sent[other] for other in range(ranks.size)]

        return Meeting(rank, self.size)


class Waiting(Exception):
    """The other ranks have not sent theirs."""


def on_ranks(rule, make, size, **where):
    together = Together(size)
    for rank in range(size):
        try:
            look(rule, make(), world=together.world(rank), **where)
        except Waiting:
            continue
    return [look(rule, make(), world=together.world(rank), **where) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("settings", [{}, {"antithetic": False}, {"chunk": 1}, {"adapt": "nes", "shaping": "nes"}], ids=str)
def test_ranks_have_the_same_bits_and_those_of_one_process(size, settings):
    rule = Eggroll(**{"population": 8, "shaping": "raw", "sigma": 0.1, **settings})
    alone, found = look(rule, Bowl()), on_ranks(rule, Bowl, size)
    for other in found[1:]:
        assert torch.equal(flat(other.grads), flat(found[0].grads))
        assert torch.equal(other.loss, found[0].loss)
        assert all(torch.equal(value, found[0].state[name]) for name, value in other.state.items())
    assert distance(flat(found[0].grads), flat(alone.grads)) <= ROUNDING
    assert float(found[0].loss) == pytest.approx(float(alone.loss), rel=1e-9)


def test_more_ranks_than_directions_still_agree():
    alone, found = look(SPSA(), Bowl()), on_ranks(SPSA(), Bowl, 3)
    for one in found:
        assert distance(flat(one.grads), flat(alone.grads)) <= ROUNDING


# -- the facade -------------------------------------------------------------------------------------------------------------------


def problem_of(dtype=torch.float32, *, normalised=False):
    norm = nn.BatchNorm1d(6) if normalised else nn.Identity()
    model = ready(lambda: nn.Sequential(nn.Linear(5, 6), norm, nn.Tanh(), nn.Linear(6, 3)), generator(1)).to(dtype)
    return model, torch.randn(12, 5, generator=generator(2)).to(dtype), torch.arange(12) % 3


@pytest.mark.parametrize(("engine", "settings"), [("es", {}), ("eggroll", {}), ("spsa", {"population": 16})])
def test_a_learner_learns(engine, settings):
    model, x, y = problem_of()
    learner = altgrad.Learner(model, F.cross_entropy, engine=engine, **{"population": 32, **settings})
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(float(learner.backward(x, y).loss))
        optimizer.step()
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_running_statistics_follow_the_unperturbed_pass():
    model, x, y = problem_of(normalised=True)
    twin = copy.deepcopy(model)
    twin(x)
    altgrad.Learner(model, F.cross_entropy, engine="eggroll", population=4).backward(x, y)
    for name, value in twin.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], value)


@pytest.mark.parametrize("engine", ["es", "eggroll", "spsa"])
def test_grad_estimates_a_function_of_any_tree(engine):
    def function(values, scale):
        return scale * (values["a"].square().sum() + (values["b"][0] @ values["b"][1]).sum())

    values = {"a": torch.ones(3, dtype=torch.float64), "b": (torch.ones(2, 3, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64))}
    estimate = altgrad.grad(function, engine=engine, population=2000, shaping="raw", sigma=0.01)
    found = estimate(values, 2.0, key=Key(1))
    exact = torch.func.grad(function)(values, 2.0)
    one, other = (torch.cat([leaf.flatten() for leaf in (tree["a"], *tree["b"])]) for tree in (found, exact))
    assert float(F.cosine_similarity(one, other, 0)) > 0.95
    assert float(one @ other / other.square().sum()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("number", [float, lambda value: value.numpy() + np.float64(0), lambda value: round(float(value) * 1e6)], ids=["float", "numpy", "int"])
@pytest.mark.parametrize("settings", [{"engine": "es"}, {"engine": "eggroll", "antithetic": False}, {"engine": "spsa", "population": 256}], ids=str)
def test_grad_takes_a_function_that_returns_a_plain_number(number, settings):
    point = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)
    estimates = [
        altgrad.grad(function, **{"population": 256, **settings})(point, key=Key(0))
        for function in (lambda x: number(x.square().sum()), lambda x: x.square().sum())
    ]
    assert float(F.cosine_similarity(*estimates, 0)) == pytest.approx(1, abs=1e-3)


def test_lbfgs_descends_with_frozen_noise():
    model, x, y = problem_of()
    learner = altgrad.Learner(model, F.cross_entropy, engine="eggroll", population=2048, shaping="raw", sigma=0.01)
    optimizer = torch.optim.LBFGS(learner.parameters(), lr=0.5, max_iter=3)

    def closure():
        optimizer.zero_grad()
        return learner.backward(x, y).loss

    losses = []
    for _ in range(3):
        with learner.frozen_noise():
            losses.append(float(optimizer.step(closure)))
    assert losses[-1] < losses[0]
    assert learner.draws == 3


def test_a_grad_scaler_and_autocast_leave_a_usable_gradient():
    model, x, y = problem_of()
    learner = altgrad.Learner(model, F.cross_entropy, engine="eggroll", population=64, shaping="raw", sigma=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = learner.backward(x, y)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    exact = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    one, other = (torch.cat([g.flatten() for g in grads]) for grads in ([p.grad for p in model.parameters()], exact))
    assert float(F.cosine_similarity(one, other, 0)) > 0.5
    scaler.scale(report.loss)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def test_a_learner_resumes_with_its_sigma():
    model, x, y = problem_of()
    learner = altgrad.Learner(model, F.cross_entropy, engine="eggroll", population=8, shaping="nes", adapt="nes")
    learner.backward(x, y)
    saved = learner.state_dict()
    first = learner.backward(x, y)
    other = altgrad.Learner(model, F.cross_entropy, engine="eggroll", population=8, shaping="nes", adapt="nes")
    other.load_state_dict(saved)
    again = other.backward(x, y)
    assert torch.equal(first.metrics["sigma"], again.metrics["sigma"])
    assert torch.equal(first.loss, again.loss)


def test_an_objective_without_derivative_is_learnt():
    model, x, y = problem_of()

    def errors(outputs, targets):
        return float((outputs.argmax(1) != targets).float().mean())

    learner = altgrad.Learner(model, errors, engine="eggroll", population=64, sigma=0.1)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.1)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        report = learner.backward(x, y)
        losses.append(float(report.loss))
        optimizer.step()
    assert int(report.metrics["fallback_objective_loop"]) == 64
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_frozen_parameters_get_no_gradient():
    model, x, y = problem_of()
    model[0].weight.requires_grad_(False)
    problem = Supervised(model, F.cross_entropy)
    assert "0.weight" not in look(Eggroll(population=4), problem, batch=Batch(x, y)).grads
