"""Local rules in use: memory, schedules, frozen blocks, read-outs, training."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from local_bench import EXACT, KEY, Bench, apart, data, mlp
from torch import nn

from altgrad import metrics, registry, trainer
from altgrad.engines.mono_forward import MonoForward
from altgrad.errors import CapabilityError, SettingError
from altgrad.learner import Learner
from altgrad.local.streaming import stream
from altgrad.problem import Batch
from altgrad.rng import Key
from altgrad.training import TrainSettings, build
from altgrad.world import World

# -- memory -----------------------------------------------------------------------------------------------------------------------


def saved(engine, depth, *, width=64, count=256):
    model = mlp(*[width] * (depth + 1), 3, dtype=torch.float32)
    inputs, labels = data(count, width, dtype=torch.float32)
    bench = Bench(engine, model, batch=Batch(inputs, labels))
    bench.look()
    with metrics.saved_bytes([*bench.params.values(), inputs, labels]) as meter:
        bench.look()
    return meter.peak


def test_saved_bytes_are_at_most_two_fifths_of_backprops_at_depth_4_and_a_tenth_at_16():
    backprop = registry.engine("backprop", {})
    rule = MonoForward(rows=64)  # a quarter of the batch, as the default is of 4,096
    assert saved(rule, 4) <= 0.40 * saved(backprop, 4)
    assert saved(rule, 16) <= 0.10 * saved(backprop, 16)


def test_saved_bytes_do_not_grow_with_depth():
    assert saved(MonoForward(), 16) == saved(MonoForward(), 4)


def test_rows_bound_what_a_block_saves_and_change_rounding_only():
    whole, parts = Bench(MonoForward()), Bench(MonoForward(rows=4))
    assert apart(parts.look().grads, whole.look().grads) <= EXACT
    assert float(parts.look().loss) == pytest.approx(float(whole.look().loss), rel=1e-12)
    assert float(parts.look().metrics["accuracy.0"]) == pytest.approx(float(whole.look().metrics["accuracy.0"]))
    assert saved(MonoForward(rows=64), 4) < 0.7 * saved(MonoForward(), 4)


def test_blocks_whose_examples_see_one_another_are_run_whole():
    bench = Bench(MonoForward(rows=4), nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double())
    bench.look()
    found = bench.engine.mixed_blocks(bench.problem, bench.params, bench.problem.blocks(), bench.batch, KEY)
    assert found == {0}


class Counting(nn.Module):
    """Counts its passes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.passes.add_(1)
        return x


def test_a_buffer_is_written_once_a_step_though_rows_come_in_parts():
    bench = Bench(MonoForward(rows=4), nn.Sequential(nn.Linear(5, 7), Counting(), nn.Linear(7, 3)).double())
    assert int(bench.look().buffers["1.passes"]) == 1


def test_stream_runs_no_block_after_the_last_that_is_trained():
    bench = Bench(MonoForward())
    blocks, seen = bench.problem.blocks(), []

    def objective(position, output, leaves, rows):
        seen.append(position)
        return output.square().mean()

    grads = stream(blocks, bench.params, bench.batch.inputs, {}, objective, trained={1})
    assert seen == [0, 1]
    assert set(grads) == {"2.weight", "2.bias"}


# -- schedules --------------------------------------------------------------------------------------------------------------------


def touched(engine, steps, **more):
    bench = Bench(engine, **more)
    return ["".join(sorted({name.removeprefix("local.projection.")[0] for name in bench.look(KEY.at(step)).grads})) for step in range(steps)]


def test_sequential_trains_one_block_after_another_and_stays_with_the_last():
    assert touched(MonoForward(schedule="sequential", block_steps=2), 8) == ["0", "0", "2", "2", "4", "4", "4", "4"]


def test_interleaved_goes_round():
    assert touched(MonoForward(schedule="interleaved", block_steps=2), 8) == ["0", "0", "2", "2", "4", "4", "0", "0"]


def test_sequential_shares_the_run_among_the_blocks():
    bench, blocks = Bench(MonoForward(schedule="sequential")), []
    for progress in (0.0, 0.3, 0.34, 0.66, 0.67, 1.0):
        bench.problem.progress = progress
        blocks.append(int(bench.look().metrics["block"]))
    assert blocks == [0, 0, 1, 1, 2, 2]


def test_sequential_asks_for_the_length_of_a_turn_where_nobody_knows_the_runs():
    with pytest.raises(SettingError, match="set block_steps"):
        Bench(MonoForward(schedule="sequential")).look()


@pytest.mark.parametrize("schedule", ["sequential", "interleaved"])
def test_the_block_whose_turn_it_is_gets_the_joint_gradient_where_nothing_is_random(schedule):
    joint = Bench(MonoForward()).look().grads
    for turn in range(3):
        alone = Bench(MonoForward(schedule=schedule, block_steps=1)).look(KEY.at(turn)).grads
        assert apart({name: joint[name] for name in alone}, dict(alone)) <= EXACT


def test_frozen_blocks_run_in_evaluation_mode_and_their_statistics_stay():
    bench = Bench(MonoForward(schedule="sequential", block_steps=1), mlp(5, 7, 6, 3, norm=True, dropout=0.5))
    found = bench.look(KEY.at(2))
    assert not found.buffers  # the head has none
    first = bench.problem.model
    first.eval()
    with torch.no_grad():
        expected = first(bench.batch.inputs)
    first.train()
    assert float(found.loss) == pytest.approx(float(F.cross_entropy(expected, bench.batch.targets)), rel=1e-12)
    assert all(module.training for module in first.modules())


def digits(**engine):
    return build(TrainSettings(engine="mono-forward", engine_settings=engine, model_settings={"hidden": "24-16"}, steps=9))


def test_a_kept_prefix_gives_what_running_it_again_gives():
    runs = []
    for cache in (1.0, 0.0):
        training, kept = digits(schedule="sequential", cache=cache), []
        for _ in range(9):
            kept.append(float(trainer.step(training)["prefix_kept"]))
        runs.append((kept, training.values()))
    assert runs[0][0] == [0.0] * 3 + [1.0] * 6
    assert runs[1][0] == [0.0] * 9
    assert all(torch.allclose(value, runs[1][1][name], rtol=1e-4, atol=1e-6) for name, value in runs[0][1].items())


def test_a_prefix_is_made_anew_when_its_weights_change():
    training = digits(schedule="sequential", block_steps=1)
    for _ in range(2):
        trainer.step(training)
    with torch.no_grad():
        training.params["0.weight"].mul_(2)
    found, again = trainer.fill(training, training.problem.batch(1, World())), digits(schedule="sequential", block_steps=1, cache=0.0)
    with torch.no_grad():
        for name, value in again.params.items():
            value.copy_(training.params[name])
    again.step = training.step
    assert torch.allclose(found.loss, trainer.fill(again, again.problem.batch(1, World())).loss, rtol=1e-5)


class Jitter(nn.Module):
    """Noise in training and in evaluation: data augmented inside the model."""

    def forward(self, x):
        return x + torch.randn_like(x)


@pytest.mark.parametrize("kind", ["random model", "unknown examples", "no room"])
def test_a_prefix_is_not_kept_where_it_may_not_be(kind):
    training = digits(schedule="sequential", block_steps=1, cache=1e-9 if kind == "no room" else 1.0)
    if kind == "random model":
        training.problem.model.insert(0, Jitter())
        training.problem.facts.clear()
        training = replace(training, params={**training.problem.params(), **training.engine.aux(training.problem, Key(0))}, step=1)
        training.state = training.engine.init(training.problem, training.params, Key(0))
    training.step = 1
    batch = training.problem.batch(1, World())
    if kind == "unknown examples":
        batch = batch._replace(numbers=None)
    found = training.engine.estimate(training.problem, training.values(), training.state, batch, KEY.at(1), World())
    assert float(found.metrics["prefix_kept"]) == 0


def test_sequential_resumes_bit_for_bit(tmp_path):
    settings = TrainSettings(engine="mono-forward", engine_settings={"schedule": "sequential"}, model_settings={"hidden": "24-16"}, steps=9, save_every=1)
    whole = build(settings)
    trainer.fit(whole)
    part = build(settings)
    trainer.fit(part, run_folder=tmp_path / "run", on_step=lambda now, row: now.step == 5)
    again = trainer.resume(tmp_path / "run")
    assert again.step == 5
    trainer.fit(again)
    assert all(torch.equal(value, again.params[name]) for name, value in whole.params.items())


# -- read-outs --------------------------------------------------------------------------------------------------------------------


def test_read_outs_are_what_they_say():
    bench = Bench(MonoForward())
    inputs = bench.batch.inputs
    first = torch.tanh(bench.problem.model[0](inputs))
    second = torch.tanh(bench.problem.model[2](first))
    heads = [first @ bench.params["local.projection.0"].T, second @ bench.params["local.projection.2"].T]
    expected = {
        "own": bench.problem.model(inputs),
        "last": heads[1],
        "sum": (heads[0] + heads[1]) / 2,
        "vote": ((heads[0].softmax(1) + heads[1].softmax(1)) / 2).log(),
        "0": heads[0],
    }
    for name, value in expected.items():
        found = replace(bench.engine, readout=name).predict(bench.problem, bench.params, bench.state, inputs)
        assert torch.allclose(found, value), name


def test_heads_that_were_never_trained_have_no_say():
    bench = Bench(MonoForward(schedule="sequential", block_steps=1))
    inputs = bench.batch.inputs
    assert torch.equal(bench.engine.predict(bench.problem, bench.params, bench.state, inputs), bench.problem.model(inputs))
    state = bench.look(KEY.at(0)).state
    first = torch.tanh(bench.problem.model[0](inputs)) @ bench.params["local.projection.0"].T
    assert torch.allclose(bench.engine.predict(bench.problem, bench.params, state, inputs), first)


def test_every_read_out_is_evaluated():
    training = digits()
    figures = trainer.evaluate(training)
    assert {"test_accuracy", "test_accuracy_own", "test_accuracy_last", "test_accuracy_vote"} <= set(figures)


@pytest.mark.parametrize("engine", ["mono-forward", "deep-supervision", "forward-forward"])
def test_one_pass_over_the_test_set_gives_the_figures_that_each_read_out_gives_alone(engine, monkeypatch):
    training = build(TrainSettings(engine=engine, model_settings={"hidden": "24-16-12"}, steps=20))
    for _ in range(20):
        trainer.step(training)
    alone = {}
    for name in ("", *training.engine.readouts):
        read = replace(training.engine, readout=name) if name else training.engine
        found = training.problem.evaluate(replace(training, engine=read).predict, split="test")
        alone |= {f"test_{figure}_{name}".removesuffix("_"): value for figure, value in found.items()}
    rows, own = [], type(training.engine).reads
    monkeypatch.setattr(
        type(training.engine), "reads", lambda self, problem, params, state, inputs: rows.append(len(inputs)) or own(self, problem, params, state, inputs)
    )
    assert trainer.evaluate(training) == pytest.approx(alone, abs=1e-6)
    assert len({round(value, 6) for name, value in alone.items() if "loss" in name}) > 2
    assert sum(rows) == len(training.problem.dataset.test_inputs)


# -- training ---------------------------------------------------------------------------------------------------------------------


def test_mono_forward_learns_digits_and_its_projections_with_it():
    training = build(TrainSettings(engine="mono-forward", epochs=4))
    before = {name: value.clone() for name, value in training.params.items()}
    result = trainer.fit(training)
    assert result.test_accuracy > 0.88
    assert all(not torch.equal(value, before[name]) for name, value in training.params.items())


def test_a_learner_trains_the_heads_and_saves_them():
    x, y = data(60, dtype=torch.float32)
    learner = Learner(mlp(5, 16, 16, 3, dtype=torch.float32), F.cross_entropy, engine="mono-forward")
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.02)
    first = None
    for _ in range(40):
        optimizer.zero_grad()
        report = learner.backward(x, y)
        first = first or {name: float(value) for name, value in report.metrics.items()}
        optimizer.step()
    assert float(report.metrics["loss.0"]) < 0.7 * first["loss.0"]
    other = Learner(learner.model, F.cross_entropy, engine="mono-forward", seed=9)
    other.load_state_dict(learner.state_dict())
    assert torch.equal(other.predict(x), learner.predict(x))


def test_a_learner_measures_shapes_on_its_example():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    with pytest.raises(CapabilityError, match="example=x"):
        Learner(model, F.cross_entropy, engine="mono-forward")
    learner = Learner(model, F.cross_entropy, engine="mono-forward", example=torch.randn(2, 1, 6, 6))
    assert len(list(learner.parameters())) == 5
    assert learner.aux["local.projection.0"].shape == (3, 48)
    learner.backward(torch.randn(6, 1, 6, 6), torch.arange(6) % 3)
    assert learner.aux["local.projection.0"].grad is not None


def test_a_model_that_reshapes_its_inputs_before_a_linear_layer_asks_for_an_example():
    model = nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Linear(2, 6), nn.Flatten(), nn.Linear(24, 3))
    with pytest.raises(CapabilityError, match=r"does not take zeros of .* example=x"):
        Learner(model, F.cross_entropy, engine="mono-forward")
    assert Learner(model, F.cross_entropy, engine="mono-forward", example=torch.zeros(2, 8)).aux["local.projection.1"].shape == (3, 24)


def test_ranks_that_divide_the_batch_average_to_it():
    bench = Bench(MonoForward(), mlp(5, 7, 6, 3, dropout=0.5))
    whole, inputs, labels = bench.look(), *bench.batch[:2]
    parts = [bench.look(batch=Batch(inputs[half], labels[half], half.start)) for half in (slice(0, 6), slice(6, 12))]
    assert apart({name: (parts[0].grads[name] + parts[1].grads[name]) / 2 for name in whole.grads}, dict(whole.grads)) <= EXACT
