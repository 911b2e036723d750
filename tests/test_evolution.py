"""The engines es, eggroll and spsa: what their estimate is, by reductions and laws, and what they do with bad fitness."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from bowls import ENGINES, ERRORS, KEY, NOTHING, ROUNDING, Bowl, distance, flat, generator, look, noise_of, raw
from torch import nn

import altgrad
from altgrad.engines.evolution import ES, SPSA, STATE, Eggroll
from altgrad.errors import NumericsError
from altgrad.probes import ready
from altgrad.rng import Key
from altgrad.shaping import SHAPINGS, shape

# -- reductions -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("noise", ["normal", "sign", "uniform"])
def test_pairs_on_a_quadratic_give_the_forward_gradient_of_the_same_noise(engine, noise):
    problem, rule = Bowl(), raw(engine, noise=noise)
    moves = noise_of(rule, problem)
    expected = (moves @ problem.gradient() / len(moves)) @ moves
    assert distance(flat(look(rule, problem).grads), expected) <= ROUNDING


@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("shaping", ["raw", "z-score", "centred-rank", "nes", "sign", "baseline-pair"])
def test_the_estimate_is_the_weighted_sum_of_noise_over_sigma(rank, shaping):
    problem, rule = Bowl(), Eggroll(population=8, rank=rank, sigma=0.2, shaping=shaping)
    moves = noise_of(rule, problem)
    moves[0] *= shaping != "baseline-pair"  # its first pair stands still
    x = torch.cat([problem.values[name].flatten() for name in sorted(problem.values)])
    members = torch.cat([x + 0.2 * moves, x - 0.2 * moves])
    losses = 0.5 * ((members @ problem.hessian) * members).sum(1) + members @ problem.slope
    expected = shape(shaping, losses, pairs=True) @ torch.cat([moves, -moves]) / 0.2
    found = look(rule, problem)
    assert distance(flat(found.grads), expected) <= ROUNDING
    shown = losses if shaping != "baseline-pair" else losses[[1, 2, 3, 5, 6, 7]]
    assert float(found.loss) == pytest.approx(float(shown.mean()), rel=1e-9)
    assert float(found.metrics["fitness_deviation"]) == pytest.approx(float(shown.std(correction=0)), rel=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_without_pairs_the_clean_loss_is_subtracted(engine):
    problem, rule = Bowl(), raw(engine, antithetic=False)
    moves = noise_of(rule, problem)
    x = torch.cat([problem.values[name].flatten() for name in sorted(problem.values)])
    rise = 0.1 * moves @ problem.gradient() + 0.005 * ((moves @ problem.hessian) * moves).sum(1)
    found = look(rule, problem)
    assert distance(flat(found.grads), rise / 0.1 @ moves / len(moves)) <= 1e-7
    assert float(found.loss) == pytest.approx(float(0.5 * x @ problem.hessian @ x + problem.slope @ x), rel=1e-12)
    assert float(found.metrics["forwards"]) == 9


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("antithetic", [True, False])
def test_the_raw_estimate_is_unbiased_for_the_smoothed_gradient(engine, antithetic):
    """Of sin, whose smoothed gradient is known: E sin(x + σε) = e^(-σ²/2) sin x elementwise for normal noise."""

    class Waves(Bowl):
        def losses(self, params, batch, buffers):
            return sum(value.sin().sum() for value in params.values()).reshape(1)

    problem, sigma = Waves(), 0.5
    rule = raw(engine, antithetic=antithetic, sigma=sigma, rank=None, population=64)
    expected = math.exp(-(sigma**2) / 2) * torch.cat([problem.values[name].cos().flatten() for name in sorted(problem.values)])
    drawn = torch.stack([flat(look(rule, problem, key=KEY.at(step)).grads) for step in range(40)])
    errors = (drawn.mean(0) - expected).abs() / (drawn.std(0) / math.sqrt(len(drawn)))
    assert float(errors.max()) <= ERRORS
    along = drawn @ expected / expected.square().sum()
    plain = drawn @ (expected / math.exp(-(sigma**2) / 2)) / (expected / math.exp(-(sigma**2) / 2)).square().sum()
    error = float(along.std()) / math.sqrt(len(along))
    assert abs(float(along.mean()) - 1) <= ERRORS * error
    assert float(plain.mean()) < float(along.mean())


@pytest.mark.parametrize("shaping", [name for name in SHAPINGS if name != "group-z-score"])
def test_maximizing_is_minimizing_the_negative(shaping):
    up = look(Eggroll(population=8, shaping=shaping, maximize=True), Bowl(wrap=lambda loss: -loss))
    down = look(Eggroll(population=8, shaping=shaping), Bowl())
    assert torch.equal(flat(up.grads), flat(down.grads))
    assert float(up.loss) == -float(down.loss)


def test_presets_differ_by_their_settings_alone():
    settings = {"population": 8, "rank": 1, "sigma": 0.05, "shaping": "centred-rank"}
    found = [flat(look(engine(**settings), Bowl()).grads) for engine in ENGINES]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_spsa_is_one_central_difference_by_default():
    problem, rule = Bowl(), SPSA()
    move = noise_of(rule, problem)[0]
    found = look(rule, problem)
    assert distance(flat(found.grads), (move @ problem.gradient()) * move) <= 1e-7  # losses differ by 1e-3 of themselves
    assert float(found.metrics["forwards"]) == 2


def test_sign_weights_give_the_sign_of_each_difference():
    problem, rule = Bowl(), SPSA(population=8, shaping="sign", sigma=0.01)
    moves = noise_of(rule, problem)
    expected = torch.sign(moves @ problem.gradient()) @ moves / len(moves) / 0.01
    assert distance(flat(look(rule, problem).grads), expected) <= ROUNDING


# -- noise ------------------------------------------------------------------------------------------------------------------------


def test_noise_is_reused_for_as_many_steps_as_asked():
    rule, problem = raw(Eggroll, noise_reuse=3), Bowl()
    first, second, third, fourth = (flat(look(rule, problem, key=KEY.at(step)).grads) for step in (3, 4, 5, 6))
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not torch.equal(third, fourth)


def test_a_seed_of_its_own_overrides_the_runs_and_still_changes_with_the_step():
    rule, problem = raw(Eggroll, seed=5), Bowl()
    here, other_run, other_step = (flat(look(rule, problem, key=key).grads) for key in (Key(1, 2), Key(9, 2), Key(1, 3)))
    assert torch.equal(here, other_run)
    assert not torch.equal(here, other_step)
    assert not torch.equal(here, flat(look(replace(rule, seed=6), problem, key=Key(1, 2)).grads))


def test_parameters_have_noise_of_their_own():
    class Twins(Bowl):
        def params(self):
            return {"first": self.values["matrix"], "second": self.values["matrix"].clone()}

        def losses(self, params, batch, buffers):
            return (params["first"] * 2 + params["second"]).square().sum().reshape(1)

    found = look(raw(Eggroll), Twins()).grads
    assert abs(float(F.cosine_similarity(found["first"].flatten(), found["second"].flatten(), 0))) < 0.9


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sigma_schedule": "constant"}, [0.2, 0.2, 0.2]),
        ({"sigma_schedule": "exponential", "sigma_decay": 0.5}, [0.2, 0.1, 0.02]),
        ({"sigma_schedule": "linear", "sigma_steps": 10, "sigma_floor": 0.5}, [0.2, 0.19, 0.1]),
    ],
    ids=["constant", "exponential", "linear"],
)
def test_sigma_follows_its_schedule(settings, expected):
    rule = Eggroll(population=4, sigma=0.2, **settings)
    assert [float(look(rule, Bowl(), key=KEY.at(step)).metrics["sigma"]) for step in (0, 1, 50)] == pytest.approx(expected)


# -- adaptation -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("adapt", "count"), [("nes", 1), ("nes-per-tensor", 2)])
def test_sigma_adapts_from_the_state_and_is_resumed_bit_for_bit(adapt, count):
    rule, problem = Eggroll(population=16, sigma=0.1, shaping="nes", adapt=adapt), Bowl()
    state, seen = rule.init(problem, problem.params(), KEY), []
    for step in range(4):
        seen.append(state)
        state = look(rule, problem, key=KEY.at(step), state=state).state
    assert state[STATE].shape == (count,)
    assert bool((state[STATE] != math.log(0.1)).all())
    again = seen[2]
    for step in (2, 3):
        again = look(rule, problem, key=KEY.at(step), state=again).state
    assert torch.equal(again[STATE], state[STATE])


def test_sigma_grows_on_a_slope_and_shrinks_at_a_minimum():
    rule = ES(population=32, sigma=0.1, shaping="nes", adapt="nes", sigma_floor=0.1)

    def after(problem):
        state = rule.init(problem, problem.params(), KEY)
        for step in range(30):
            state = look(rule, problem, key=KEY.at(step), state=state).state
        return float(state[STATE])

    slope, bottom = Bowl(), Bowl()
    slope.hessian.zero_()
    bottom.slope.zero_()
    for value in bottom.values.values():
        value.zero_()
    assert after(bottom) < math.log(0.1) < after(slope)


def test_silent_members_have_no_part_in_the_adaptation():
    rule, problem = Eggroll(population=8, sigma=0.1, shaping="baseline-pair", adapt="nes"), Bowl(wrap=lambda loss: loss + 1e3)
    far = look(rule, problem).state[STATE]
    near = look(rule, Bowl()).state[STATE]
    assert torch.allclose(far, near, atol=1e-6)


# -- gradients come one by one ----------------------------------------------------------------------------------------------------


def test_a_gradient_nobody_asks_for_is_never_made(monkeypatch):
    from altgrad.population import Draws

    asked = []
    combine = Draws.combine
    monkeypatch.setattr(Draws, "combine", lambda self, name, weights: asked.append(name) or combine(self, name, weights))
    grads = look(raw(Eggroll), Bowl()).grads
    assert list(grads) == ["matrix", "vector"]
    assert len(grads) == 2
    assert asked == []
    assert grads["vector"].shape == (4,)
    assert asked == ["vector"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_the_chunk_changes_nothing_but_the_order_of_sums(engine, antithetic, chunk):
    rule = raw(engine, antithetic=antithetic, population=10)
    assert distance(flat(look(replace(rule, chunk=chunk), Bowl()).grads), flat(look(rule, Bowl()).grads)) <= ROUNDING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_floats_are_added_in_float32_whatever_the_chunk(dtype):
    rule = Eggroll(population=512, sigma=0.1, shaping="centred-rank")
    whole, parts = (flat(look(replace(rule, chunk=chunk), Bowl(dtype=dtype, wrap=lambda loss: loss.float())).grads) for chunk in (None, 1))
    assert distance(parts, whole) <= 8 * torch.finfo(dtype).eps


# -- weights are never moved ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_steps_of_rate_zero_leave_the_parameters_bit_identical(engine, dtype):
    """A few steps here; benchmarks/zero_rate.py makes the 10,000."""
    model = ready(lambda: nn.Linear(3, 2), generator(1)).to(dtype)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    learner = altgrad.Learner(model, F.cross_entropy, engine=engine(population=4))
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.0)
    x, y = torch.randn(4, 3, generator=generator(2)).to(dtype), torch.tensor([0, 1, 1, 0])
    for _ in range(50):
        optimizer.zero_grad()
        learner.backward(x, y)
        optimizer.step()
    for name, value in model.named_parameters():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8))


def test_the_sigma_of_a_report_is_the_setting_to_the_last_digit():
    assert float(look(Eggroll(population=4, sigma=0.07), Bowl()).metrics["sigma"]) == 0.07


# -- bad fitness ------------------------------------------------------------------------------------------------------------------


def broken_above(limit, value):
    return lambda loss: torch.where(loss > limit, torch.full_like(loss, value), loss)


def limit_of(problem, rule):
    """The middle of the members' losses."""
    moves = noise_of(rule, problem)
    x = torch.cat([problem.values[name].flatten() for name in sorted(problem.values)])
    members = torch.cat([x + rule.sigma * moves, x - rule.sigma * moves])
    return float((0.5 * ((members @ problem.hessian) * members).sum(1) + members @ problem.slope).median())


@pytest.mark.parametrize("shaping", [name for name in SHAPINGS if name != "group-z-score"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_members_that_are_not_finite_are_counted_and_survived(shaping, value):
    rule = Eggroll(population=8, shaping=shaping, sigma=0.1)
    limit = limit_of(Bowl(), rule)
    found = look(rule, Bowl(wrap=broken_above(limit, value)))
    assert 1 <= int(found.metrics["members_not_finite"]) < 8
    assert bool(torch.isfinite(found.loss))
    assert bool(torch.isfinite(found.metrics["fitness_deviation"]))
    assert bool(torch.isfinite(flat(found.grads)).all())
    assert float(found.loss) <= limit


def test_members_that_are_not_finite_are_the_worst_for_ranks():
    rule = Eggroll(population=8, shaping="sign", sigma=0.1)
    limit = limit_of(Bowl(), rule)
    broken, whole = (flat(look(rule, Bowl(wrap=wrap)).grads) for wrap in (broken_above(limit, math.nan), None))
    assert float(broken @ whole) > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_population_of_which_nothing_is_finite_is_refused_by_the_learner(value):
    model = ready(lambda: nn.Linear(3, 2), generator(1))
    learner = altgrad.Learner(model, lambda outputs, targets: outputs.sum() * 0 + (value if learner.draws else 1.0), engine="eggroll", population=4)
    x, y = torch.ones(4, 3), torch.ones(4)
    with pytest.warns(UserWarning, match="all 4 members have the loss 1 at step 0: the update is zero"):
        learner.backward(x, y)
    with pytest.raises(NumericsError, match="the loss is nan in eggroll, step 1"):
        learner.backward(x, y)


@pytest.mark.parametrize("shaping", [name for name in SHAPINGS if name != "group-z-score"])
def test_equal_members_give_a_zero_update_and_one_warning(shaping):
    problem, rule = Bowl(wrap=lambda loss: loss * 0 + 2), Eggroll(population=8, shaping=shaping)
    with pytest.warns(UserWarning, match="all 8 members have the loss 2 at step 4: the update is zero. Raise sigma"):
        found = look(rule, problem)
    assert not bool(flat(found.grads).any())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(rule, problem, key=KEY.at(5))


def test_one_sided_members_that_are_equal_but_worse_than_the_clean_loss_still_teach():
    problem = Bowl()
    clean = float(problem.losses(problem.values, NOTHING, {}))
    step = Bowl(wrap=lambda loss: (loss - clean).abs().gt(1e-9).double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = look(Eggroll(population=4, shaping="raw", antithetic=False), step)
    assert bool(flat(found.grads).any())
