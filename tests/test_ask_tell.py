"""ask-tell: a strategy of altgrad.es moves the parameters; SGD with lr=1 lands on its mean, and the strategy's state is the engine's."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import tolerance
from torch import nn

from altgrad import Key, Learner, es, registry, trainer
from altgrad.cli_listings import described
from altgrad.compare import Choice, CompareSettings
from altgrad.conformance import probes
from altgrad.engines.ask_tell import STATE, AskTell
from altgrad.engines.subspace import Z
from altgrad.errors import SettingError, UsageError
from altgrad.problem import Problem
from altgrad.trainer import TrainSettings
from altgrad.world import World

NAMES = sorted(es.STRATEGIES)


class Bowl(Problem):
    """Σ (x - 1)² of a matrix and a vector; `value` may make something else of it."""

    name = "bowl"

    def __init__(self, *, dtype=torch.float64, start=0.0, value=lambda loss, x: loss):
        self.values = {"a.weight": torch.full((2, 3), start, dtype=dtype), "a.bias": torch.full((2,), start, dtype=dtype)}
        self.value = value

    def params(self):
        return self.values

    def batch(self, step, world):
        return trainer.Batch(torch.zeros(4, 1), torch.zeros(4))

    def forward(self, params, inputs, buffers):
        return torch.cat([params[name].reshape(-1) for name in self.values])

    def losses(self, params, batch, buffers):
        x = self.forward(params, batch.inputs, buffers)
        return self.value((x - 1).square().sum(), x).reshape(1)

    def judge(self, outputs, batch):
        return self.value((outputs - 1).square().sum(), outputs)


class Search:
    """An engine on a problem, moved by plain SGD with lr=1."""

    def __init__(self, problem=None, **settings):
        self.problem = problem or Bowl()
        self.engine = AskTell(**{"strategy": "snes", "sigma": 0.3, "population": 8, **settings})
        self.params = {**self.problem.params(), **self.engine.aux(self.problem, Key(1))}
        self.params = {name: value.detach().clone() for name, value in self.params.items()}
        self.state = self.engine.init(self.problem, self.params, Key(1))
        self.steps = 0

    def step(self, count=1, *, move=lambda value, grad: value - grad):
        for _ in range(count):
            found = self.engine.estimate(self.problem, self.params, self.state, self.problem.batch(0, World()), Key(2, self.steps), World())
            self.grads = dict(found.grads)
            self.params = {name: move(value, self.grads[name]) if name in self.grads else value for name, value in self.params.items()}
            self.state, self.steps = found.state, self.steps + 1
        return found

    def vector(self):
        return torch.cat([value.reshape(-1).double() for value in self.params.values()]).numpy()

    def mean(self):
        return self.state[STATE + "mean"].numpy()


# -- the move --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", NAMES)
def test_a_step_of_sgd_lands_on_the_strategys_mean(strategy):
    search = Search(strategy=strategy)
    before = search.mean().copy()
    for _ in range(3):
        search.step()
        assert np.allclose(search.vector(), search.mean(), rtol=0, atol=tolerance("rounding64"))
    assert not np.array_equal(before, search.mean())


@pytest.mark.parametrize("strategy", NAMES)
def test_the_engine_is_the_strategys_own_loop(strategy):
    search = Search(strategy=strategy)
    rule = es.build(strategy, {"sigma": 0.3, "population": 8})
    state = rule.init(es.Key(0), np.zeros(8))
    for step in range(4):
        search.step()
        state = es.base.replace(state, seed=Key(2, step).fold("ask-tell", step).seed)
        population = rule.ask(state)
        state = rule.tell(state, population, np.square(population - 1).sum(1))
        assert np.allclose(search.mean(), state.mean, rtol=0, atol=tolerance("rounding64"))
    assert float(search.state[STATE + "evaluations"]) == state.evaluations == 32


def test_the_loss_falls_to_the_bottom_of_a_bowl():
    search = Search(strategy="cma-es", sigma=0.5, population=None)
    search.step(100)
    assert float(search.step().loss) < 1e-6


def test_a_move_smaller_than_a_short_floats_rounding_is_kept_by_the_strategy():
    search = Search(Bowl(dtype=torch.bfloat16, start=3.0), sigma=1e-2)
    search.step()
    moved = search.mean() - 3.0
    assert 0 < np.abs(moved).max() < 2.0**-7  # no bfloat16 beside 3 is that near
    search.step(3)
    assert np.abs(search.mean() - 3.0).max() > np.abs(moved).max()


def test_state_is_tensors_of_the_strategy_and_no_seed():
    search = Search(strategy="cma-es")
    search.step()
    assert {value.dtype for value in search.state.values()} == {torch.float64, torch.int64}
    assert {STATE + name for name in ("mean", "sigma", "covariance", "generation", "best")} <= set(search.state)
    assert STATE + "seed" not in search.state


def test_noise_is_addressed_by_the_step():
    search = Search()
    first, again, later = (
        search.engine.estimate(search.problem, search.params, search.state, search.problem.batch(0, World()), Key(2, step), World()).grads for step in (0, 0, 1)
    )
    assert torch.equal(first["a.weight"], again["a.weight"])
    assert not torch.equal(first["a.weight"], later["a.weight"])


def test_forwards_are_the_members_and_the_pass_at_the_mean():
    found = Search().step()
    assert float(found.metrics["forwards"]) == 9
    assert float(found.loss) == 8.0
    assert float(found.metrics["best_fitness"]) < 8.0


def test_maximize_is_minimising_the_negative():
    up, down = Search(Bowl(value=lambda loss, x: -loss), maximize=True), Search()
    found = up.step(3)
    down.step(3)
    assert np.array_equal(up.mean(), down.mean())
    assert -8.0 < float(found.metrics["best_fitness"]) < 0


# -- other optimizers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sgd_with_a_rate_of_one_is_no_other_optimizer(dtype):
    search = Search(Bowl(dtype=dtype, start=-4.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search.step(30)


def test_another_step_is_warned_of_once_and_the_search_goes_on_from_the_parameters():
    search = Search()
    search.step(move=lambda value, grad: value - 0.1 * grad)
    here = search.vector()
    with pytest.warns(UserWarning, match="not where snes moved them .step 1.*SGD with lr=1"):
        search.step()
    landed = search.vector()
    assert np.abs(landed - here).max() < 1  # two sigma or so from here, not from the mean
    search.step(move=lambda value, grad: value - 0.1 * grad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search.step()


def test_weights_loaded_after_init_are_where_the_search_begins():
    search = Search()
    search.params = {name: value + 100 for name, value in search.params.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search.step()
    assert np.abs(search.mean() - 100).max() < 3
    assert np.abs(search.state[STATE + "best"].numpy() - 100).max() < 3


def small(**changes):
    return TrainSettings(**{"problem": "quadratic", "engine": "ask-tell", "engine_settings": {"population": 6}, "steps": 6, **changes})


def test_training_takes_sgd_with_a_rate_of_one_unless_told_otherwise():
    plain, told = trainer.build(small()), trainer.build(small(optimizer="Adam", lr=0.5))
    assert (type(plain.optimizer), plain.optimizer.param_groups[0]["lr"]) == (torch.optim.SGD, 1.0)
    assert (plain.settings.optimizer, plain.settings.lr) == ("SGD", 1.0)
    assert (type(told.optimizer), told.optimizer.param_groups[0]["lr"]) == (torch.optim.Adam, 0.5)


def test_training_takes_adam_for_engines_that_state_nothing():
    training = trainer.build(small(engine="forward", engine_settings={"space": "weights"}))
    assert isinstance(training.optimizer, torch.optim.Adam)
    assert training.settings.lr == 1e-2  # the problem's own


def test_describe_shows_what_training_takes():
    assert (described("ask-tell")["train"]["optimizer"], described("ask-tell")["train"]["lr"]) == ("SGD", 1.0)
    assert described("es")["train"]["optimizer"] == "Adam"


def test_compare_neither_tunes_nor_schedules_an_engine_made_for_one_optimizer():
    settings = CompareSettings(engines=(Choice("ask", "ask-tell"), Choice("es", "es")), schedule="cosine")
    ask, other = (settings.train_settings(choice, seed=0, lr=0.01) for choice in settings.engines)
    assert (ask.optimizer, ask.lr, ask.schedule) == ("SGD", 1.0, "constant")
    assert (other.optimizer, other.lr, other.schedule) == ("Adam", 0.01, "cosine")
    assert set(settings.made_for()) == {"ask"}


# -- what is searched ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parameters", "moved"), [("a.bias", {"a.bias"}), ("*.weight", {"a.weight"}), ("a.bias,*.weight", {"a.weight", "a.bias"})])
def test_only_the_named_parameters_move(parameters, moved):
    search = Search(parameters=parameters)
    search.step(3)
    assert set(search.grads) == moved
    for name, value in search.params.items():
        assert bool((value != 0).any()) == (name in moved)


def test_the_others_values_are_those_of_the_step():
    search = Search(parameters="a.bias")
    search.params["a.weight"] = torch.full((2, 3), 5.0, dtype=torch.float64)
    assert float(search.step().loss) == 6 * 16 + 2


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name():
    with pytest.raises(SettingError, match=r"parameters='a.weigth': unknown parameter 'a.weigth'. Did you mean 'a.weight'"):
        Search(parameters="a.weigth")


def test_a_subspace_is_searched_by_its_coordinates():
    search = Search(probes.network(torch.float64), dimension=5, strategy="cma-es", sigma=1.0)
    first = float(search.step().loss)
    assert set(search.grads) == {Z}
    assert float(search.step(40).loss) < 0.8 * first
    inputs = search.problem.batch(0, World()).inputs
    own = search.problem.forward(search.params, inputs, {})
    read = search.engine.predict(search.problem, search.params, search.state, inputs)
    baked = search.engine.bake(search.problem, search.params, search.state)
    assert not torch.allclose(own, read)
    assert torch.allclose(search.problem.forward(baked, inputs, {}), read)


def test_a_subspace_of_some_parameters_leaves_the_others():
    search = Search(probes.network(torch.float64), dimension=3, parameters="0.*")
    search.step(3)
    baked = search.engine.bake(search.problem, search.params, search.state)
    changed = {name for name, value in search.problem.params().items() if not torch.equal(baked[name], value)}
    assert changed == {"0.weight", "0.bias"}


def test_frozen_and_full_subspaces_are_bounded_by_the_parameters():
    with pytest.raises(SettingError, match=r"dimension=3 is not allowed; it must be at most 2"):
        Search(parameters="a.bias", dimension=3)


# -- bounds ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["clip", "reflect", "transform", "penalty"])
def test_members_and_parameters_stay_within_the_bounds(how):
    seen = []

    def value(loss, x):
        seen.append(x.detach())
        return loss

    search = Search(Bowl(dtype=torch.float32, value=value), lower=-0.1, upper=0.3, bounds=how, sigma=0.1)
    search.problem.facts["population rung"] = "member"  # outside vmap, so that the points can be looked at
    search.step(20)
    assert len(seen) == 20 * 9 + 1  # and the one that is measured
    assert all(float(x.min()) >= -0.1001 and float(x.max()) <= 0.3001 for x in seen)
    assert search.vector().max() <= 0.3001
    assert search.vector().mean() > 0.15  # the optimum is beyond the upper face


@pytest.mark.parametrize("strategy", ["openes", "ars", "guided-es"])
def test_a_clipped_mean_does_not_run_away_behind_a_face(strategy):
    search = Search(lower=-0.1, upper=0.3, bounds="clip", sigma=0.1, strategy=strategy)
    search.step(20)
    assert search.mean().max() <= 0.3
    assert search.vector().mean() > 0.28


def test_a_start_outside_the_bounds_is_refused():
    with pytest.raises(SettingError, match=r"x0\[0\]=0 is not allowed.*\[1, 2\]"):
        Search(lower=1.0, upper=2.0)


# -- members that fail -----------------------------------------------------------------------------------------------------------


def test_a_member_without_a_value_has_the_worst_rank():
    broken = Search(Bowl(value=lambda loss, x: torch.where(loss > 9, torch.nan, loss)))
    worst = Search(Bowl(value=lambda loss, x: torch.where(loss > 9, loss + 1e6, loss)))
    found = broken.step()
    worst.step()
    assert 1 <= float(found.metrics["members_not_finite"]) <= 4  # the worse half have one utility, whatever their order
    assert broken.mean().any()
    assert np.allclose(broken.mean(), worst.mean(), atol=tolerance("rounding64"))


def test_a_generation_without_any_value_moves_nothing():
    search = Search(Bowl(value=lambda loss, x: loss * torch.nan))
    found = search.step()
    assert np.array_equal(search.vector(), np.zeros(8))
    assert not bool(torch.isfinite(found.loss))


def test_a_mean_without_a_value_ends_nothing_while_members_have_one():
    search = Search(Bowl(value=lambda loss, x: torch.where(loss == 8, torch.nan, loss)))
    found = search.step()
    assert bool(torch.isfinite(found.loss))
    assert search.vector().any()


def test_members_that_are_all_equal_are_warned_of_once():
    search = Search(Bowl(value=lambda loss, x: loss * 0 + 2))
    with pytest.warns(UserWarning, match="all 8 members have the loss 2 at step 0"):
        search.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search.step()


def test_an_objective_outside_pytorch_is_evaluated_member_by_member_and_counted():
    model = nn.Linear(2, 3)
    learner = Learner(model, lambda outputs, targets: float((outputs.argmax(1) != targets).float().mean()), engine="ask-tell", population=6, sigma=1.0)
    report = learner.backward(torch.eye(2).repeat(6, 1), torch.tensor([0, 2] * 6))
    assert float(report.metrics["fallback_objective_loop"]) == 6


# -- settings --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": "cma"}, "unknown strategy 'cma'. Did you mean 'cma-es'"),
        ({"strategy_settings": "mean_rat=2", "strategy": "snes"}, "strategy snes: unknown setting 'mean_rat'. Did you mean 'mean_rate'"),
        ({"strategy_settings": "sigma=2"}, "without sigma, which is a setting of the engine"),
        ({"strategy": "openes", "population": 7}, "population=7 is not allowed; it must be even"),
        ({"sigma": 0.0}, "sigma=0.0 is not allowed; it must be a number above 0"),
        ({"chunk": 0}, "chunk=0 is not allowed"),
        ({"dimension": 0}, "dimension=0 is not allowed"),
        ({"parameters": " "}, "parameters=' ' is not allowed"),
        ({"bounds": "reflct", "lower": 0.0}, "unknown kind of bounds 'reflct'. Did you mean 'reflect'"),
        ({"lower": 1.0, "upper": 0.0}, "the lower one must be below the upper one"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_at_once(settings, words):
    with pytest.raises(UsageError, match=words.replace("[", r"\[")):
        registry.engine("ask-tell", settings)


def test_settings_of_the_strategy_reach_it():
    engine = registry.engine("ask-tell", {"strategy": "cma-es", "strategy_settings": "active=false; keep=2", "population": "12"})
    assert (engine.rule.active, engine.rule.keep, engine.rule.population) == (False, 2, 12)
    assert AskTell(strategy_settings={"active": False}).strategy_settings == "active=False"


def test_more_parameters_than_a_strategy_takes_are_refused_with_what_to_do():
    with pytest.raises(SettingError, match=r"n=8 is above the limit of cma-es, which is 7.*sep-cma-es.*lm-ma-es.*dimension=200"):
        Search(strategy="cma-es", strategy_settings="max_dimension=7")


# -- resuming --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", NAMES)
def test_a_resumed_run_has_the_same_bits(strategy, tmp_path):
    def fresh():
        return trainer.build(small(engine_settings={"strategy": strategy, "population": 6}))

    straight, halted = fresh(), fresh()
    trainer.fit(straight)
    trainer.fit(halted, run_folder=tmp_path / "run", on_step=lambda now, row: now.step == 3)
    resumed = trainer.resume(tmp_path / "run")
    assert resumed.step == 3
    trainer.fit(resumed)
    assert all(torch.equal(resumed.params[name], value) for name, value in straight.params.items())
    assert set(resumed.state) == set(straight.state)
    assert all(torch.equal(resumed.state[name], value) for name, value in straight.state.items())


def test_a_resumed_search_of_a_subspace_has_the_same_bits(tmp_path):
    def fresh():
        return trainer.build(small(engine_settings={"strategy": "cma-es", "population": 6, "dimension": 4}))

    straight, halted = fresh(), fresh()
    trainer.fit(straight)
    trainer.fit(halted, run_folder=tmp_path / "run", on_step=lambda now, row: now.step == 3)
    resumed = trainer.resume(tmp_path / "run")
    trainer.fit(resumed)
    assert all(torch.equal(resumed.params[name], value) for name, value in straight.params.items())
    assert all(torch.equal(resumed.state[name], value) for name, value in straight.state.items())


# -- figure 4 --------------------------------------------------------------------------------------------------------------------


def test_a_short_search_learns_digits():
    made = TrainSettings(
        problem="digits",
        problem_settings={"batch_size": 512},
        model_settings={"hidden": "32"},
        engine="ask-tell",
        engine_settings={"strategy": "snes", "population": 32},
        steps=20,
    )
    assert trainer.fit(trainer.build(made)).test_accuracy > 0.5  # chance is 0.1


def test_the_record_puts_the_strategies_beside_eggroll_and_backprop():
    record = Path(__file__).parent.parent / "benchmarks" / "records" / "ask_tell_digits.json"
    rows = {row["row"]: row for row in json.loads(record.read_text(encoding="utf8"))["summary"]}
    assert {"eggroll", "backprop"} < set(rows)
    assert max(rows[f"ask-tell, {name}"]["accuracy"] for name in ("snes", "sep-cma-es")) >= 0.85
