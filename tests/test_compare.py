"""Engines side by side: equal budgets, equal tuning, honest words."""

import json
import statistics
from dataclasses import replace
from types import SimpleNamespace

import blobs
import pytest
import torch

from altgrad import compare as comparing
from altgrad import errors, trainer
from altgrad.budget import Budget, equivalents
from altgrad.compare import Choice, CompareSettings, compare
from altgrad.compare_settings import BASELINES, choice_of
from altgrad.comparison import Comparison

FORWARD = Choice("forward", "forward", {"tangents": 2})


def settings(**changes):
    base = {"problem": "blobs:Blobs", "engines": (FORWARD,), "seeds": (0, 1), "budget": "epochs=1", "lr": 0.01, "points": 4}
    return CompareSettings(**{**base, **changes})


@pytest.fixture(scope="module")
def plain():
    """One comparison that several tests read."""
    return compare(settings())


@pytest.fixture(scope="module")
def tuned():
    """The same with a grid in which one learning rate is hopeless, and what it told on the way."""
    events = []
    return compare(settings(lr=None, lrs=(1e-9, 0.03), budget="epochs=3"), progress=events.append), events


def row_of(comparison, label):
    return next(row for row in comparison.rows if row.label == label)


def test_the_three_forms_of_backprop_are_always_there(plain):
    assert [row.label for row in plain.rows] == ["backprop", "backprop + checkpointing", "backprop + accumulation", "forward"]
    assert [row.baseline for row in plain.rows] == [True, True, True, False]


def test_an_engine_that_is_a_baseline_is_not_run_twice():
    asked = settings(engines=(Choice("mine", "backprop", {"accumulation": "4"}), FORWARD))
    assert [choice.label for choice in asked.choices()] == [*(choice.label for choice in BASELINES), "forward"]


@pytest.mark.parametrize("label", ["backprop", "backprop + checkpointing", "forward"])
def test_a_budget_of_forwards_is_reached_and_exceeded_by_less_than_a_step(label):
    choice = next(choice for choice in settings().choices() if choice.label == label)
    end = comparing.run(settings(budget="forwards=50"), choice, seed=0, lr=0.01, tuning=False).curve[-1]
    a_step = equivalents(end) / end["step"]
    assert 50 <= equivalents(end) < 50 + a_step


def test_a_budget_of_seconds_ends_with_the_step_that_reaches_it(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: 0.4 * next(ticks)))  # every step takes 0.4 s
    end = comparing.run(settings(budget="seconds=3"), FORWARD, seed=0, lr=0.01, tuning=False).curve[-1]
    assert end["step"] == 8


def test_a_budget_of_epochs_may_end_inside_one():
    assert comparing.run(settings(budget="epochs=1.5"), FORWARD, seed=0, lr=0.01, tuning=False).curve[-1]["step"] == 9  # 6 steps in an epoch


def test_a_backward_counts_as_two_forwards(plain):
    row = row_of(plain, "backprop")
    assert (row.forwards, row.backwards, row.equivalents) == (6, 6, 18)


def test_a_curve_starts_before_the_first_step_and_has_the_points_asked_for():
    curve = comparing.run(settings(points=3, budget="epochs=2"), FORWARD, seed=0, lr=0.01, tuning=False).curve
    assert curve[0]["step"] == 0
    assert curve[-1]["step"] == 12
    assert len(curve) >= 4


def test_tuning_reads_no_test_data():
    hidden = settings(problem_settings={"hidden_test": True})
    comparing.run(hidden, FORWARD, seed=0, lr=0.01, tuning=True)
    with pytest.raises(AssertionError, match="were read"):
        comparing.run(hidden, FORWARD, seed=0, lr=0.01, tuning=False)


def test_what_is_held_out_is_not_trained_on_and_together_they_are_the_training_data():
    asked = settings(validation=0.25)
    whole = blobs.Blobs().build(comparing.Key(0))
    carved = comparing.held_out(whole, asked).dataset
    assert (len(carved.train_inputs), len(carved.test_inputs)) == (72, 24)
    together = torch.cat([carved.train_inputs, carved.test_inputs])
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, whole.dataset.train_inputs.tolist()))


def test_every_engine_is_tuned_on_the_same_grid_with_one_run_each(tuned):
    tried = {label: {(at.lr, at.seed) for at in tuned[1] if at.stage == "tune" and at.label == label} for label in ("backprop", "forward")}
    assert tried["backprop"] == tried["forward"] == {(1e-9, 1000), (0.03, 1000)}


def test_tuning_spends_the_budget_of_the_real_runs():
    outcome = comparing.run(settings(budget="forwards=50"), FORWARD, seed=0, lr=0.01, tuning=True)
    assert 50 <= equivalents(outcome.curve[-1]) < 53


def test_the_most_accurate_learning_rate_on_held_out_data_is_taken(tuned):
    for row in tuned[0].rows:
        assert row.lr == float(max(row.tuning, key=lambda lr: row.tuning[lr])) == 0.03


def test_a_learning_rate_that_diverges_is_not_taken():
    fine = comparing.Outcome([{"test_accuracy": 0.2, "test_loss": 3.0}], 0.1, diverged=False)
    gone = comparing.Outcome([{"test_accuracy": 0.9, "test_loss": 1.0}], 1.0, diverged=True)
    assert comparing.rank(fine) > comparing.rank(gone)


def test_one_learning_rate_for_all_means_no_tuning(plain):
    assert {row.lr for row in plain.rows} == {0.01}
    assert not any(row.tuning for row in plain.rows)
    assert any("No tuning" in sentence for sentence in plain.method)


def test_a_rate_set_by_hand_is_used_and_told():
    found = compare(settings(lr=None, lrs=(0.01, 0.02), rates={"forward": 0.5}, seeds=(0,)))
    assert row_of(found, "forward").lr == 0.5
    assert row_of(found, "forward").tuning == {}
    assert any("Set by hand, not tuned: forward lr=0.5" in sentence for sentence in found.method)


def test_mean_and_spread_are_those_of_the_seeds(plain):
    row = row_of(plain, "forward")
    assert row.accuracies == [curve[-1]["test_accuracy"] for curve in row.curves]
    assert row.accuracy == pytest.approx(statistics.fmean(row.accuracies))
    assert row.accuracy_spread == pytest.approx(statistics.stdev(row.accuracies))


def test_a_single_seed_has_no_spread():
    found = compare(settings(seeds=(3,)))
    assert row_of(found, "forward").accuracy_spread is None
    assert any("One seed tells nothing" in sentence for sentence in found.verdict())


def test_backprop_points_where_backprop_points_and_forward_does_not_quite(plain):
    assert row_of(plain, "backprop + accumulation").cosine == pytest.approx(1, abs=1e-5)
    assert 0.05 < row_of(plain, "forward").cosine < 0.95


def test_memory_is_measured_and_only_backprop_saves_for_a_backward_sweep(plain):
    assert row_of(plain, "backprop").saved_bytes > 0
    assert row_of(plain, "forward").saved_bytes == 0
    assert all(row.peak_memory_bytes > 0 for row in plain.rows)


def test_the_measured_peak_is_that_of_activations_that_can_be_counted_by_hand():
    # 16 examples, 8 hidden units: relu output, the gradient there and behind the relu, 4 bytes each, are alive at once.
    training = trainer.build(settings().train_settings(BASELINES[0], seed=0, lr=0.01))
    assert 2 * 16 * 8 * 4 <= comparing.measure(training).peak_memory_bytes <= 5 * 16 * 8 * 4


def test_the_same_settings_give_the_same_accuracies(plain):
    again = compare(settings())
    assert [row.accuracies for row in again.rows] == [row.accuracies for row in plain.rows]


def test_a_comparison_survives_json(plain):
    assert Comparison.of(json.loads(json.dumps(plain.as_dict()))).as_dict() == plain.as_dict()
    assert plain.as_dict()["verdict"] == plain.verdict() != []


def test_finished_rows_are_handed_over_one_by_one():
    seen = []
    compare(settings(seeds=(0,)), on_row=lambda so_far: seen.append(len(so_far.rows)))
    assert seen == [1, 2, 3, 4]


def test_progress_counts_every_run_and_reaches_its_end(tuned):
    runs = [at for at in tuned[1] if at.stage != "measure"]
    assert {at.run for at in runs} == set(range(runs[0].runs)) == set(range(4 * (2 + 2)))
    assert all(max(at.fraction for at in runs if at.run == number) == 1.0 for number in range(16))


def test_a_run_that_diverges_is_counted_and_told():
    found = compare(settings(engines=(Choice("bang", "blobs:Exploding"),)))
    assert row_of(found, "bang").diverged == 2
    assert any("bang: 2 of 2 runs diverged" in sentence for sentence in found.verdict())


def test_an_engine_that_reports_no_forwards_is_refused():
    with pytest.raises(errors.AltgradError, match="reports no forwards"):
        compare(settings(engines=(Choice("silent", "blobs:Silent"),)))


def test_a_baseline_that_the_model_does_not_allow_is_left_out_with_the_reason():
    found = compare(settings(problem_settings={"one_layer": True}, engines=(), seeds=(0,)))
    assert [row.label for row in found.rows] == ["backprop", "backprop + accumulation"]
    assert any(sentence.startswith("backprop + checkpointing was not run: checkpointing=True needs") for sentence in found.verdict())


def test_an_engine_that_the_problem_cannot_feed_is_refused_before_any_training(monkeypatch):
    monkeypatch.setattr(comparing, "run", lambda *a, **k: pytest.fail("something was trained"))
    with pytest.raises(errors.CapabilityError, match="needs ENERGY"):
        compare(settings(engines=(Choice("greedy", "blobs:Greedy"),)))


def test_a_problem_without_classes_is_compared_by_its_loss():
    found = compare(settings(problem="quadratic", problem_settings={"dimension": 5}, budget="forwards=30", lr=None, seeds=(0, 1)))
    assert row_of(found, "forward").accuracy is None
    assert row_of(found, "forward").loss > row_of(found, "backprop").loss
    assert any("backprop on test loss" in sentence for sentence in found.verdict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "forward=10"}, "Did you mean 'forwards'"),
        ({"budget": "forwards=0"}, "a number above 0"),
        ({"budget": "epochs"}, "a number above 0"),
        ({"seeds": ()}, "one or more"),
        ({"seeds": (1, 1)}, "different"),
        ({"lr": 0.1, "lrs": (0.1, 0.2)}, "absent where lr"),
        ({"lr": None, "lrs": (0.1, 0.1)}, "different numbers"),
        ({"validation": 1.0}, r"in \(0, 1\)"),
        ({"engines": (Choice("backprop", "forward"),)}, "two engines are called 'backprop'"),
        ({"engines": (Choice("x", "foward"),)}, "Did you mean 'forward'"),
        ({"engines": (Choice("x", "forward", {"tangent": 2}),)}, "Did you mean 'tangents'"),
        ({"rates": {"foward": 0.1}}, "Did you mean 'forward'"),
    ],
)
def test_bad_settings_are_refused_with_what_to_do(changes, message):
    with pytest.raises(errors.UsageError, match=message):
        settings(**changes)


def test_a_budget_of_epochs_needs_epochs():
    with pytest.raises(errors.SettingError, match="has no epochs"):
        compare(settings(problem="blobs:Endless"))


def test_a_grid_needs_data_to_hold_out():
    with pytest.raises(errors.SettingError, match="no training data to hold out"):
        compare(settings(problem="quadratic", lr=None, lrs=(0.1, 0.2)))


def test_a_choice_can_be_written_as_text():
    assert choice_of("forward:space=weights:tangents=4") == Choice("forward space=weights tangents=4", "forward", {"space": "weights", "tangents": "4"})
    assert choice_of("my.module:Engine:k=2").engine == "my.module:Engine"


def test_a_choice_without_an_engine_is_refused():
    with pytest.raises(errors.UsageError, match="names no engine"):
        choice_of("tangents=4")


def test_a_budget_reads_as_it_was_written():
    assert str(Budget.parse(" forwards = 20000 ")) == "forwards=20000"


def judged(plain, **changes):
    """The sentences, had forward come to something else."""
    rows = [replace(row, **changes) if row.label == "forward" else replace(row, accuracy=0.9, accuracy_spread=0.01) for row in plain.rows]
    return " ".join(replace(plain, rows=rows).verdict())


def test_the_words_say_where_backprop_wins(plain):
    assert "Backprop wins on test accuracy against forward (-10.0 points)." in judged(plain, accuracy=0.8, accuracy_spread=0.01)


def test_the_words_call_a_difference_within_the_spread_level(plain):
    told = judged(plain, accuracy=0.89, accuracy_spread=0.02)
    assert "Level with backprop on test accuracy, within the spread of the seeds: forward (-1.0 points)." in told
    assert "wins on test accuracy" not in told


def test_the_words_say_where_backprop_loses(plain):
    assert "Ahead of backprop on test accuracy: forward (+5.0 points)." in judged(plain, accuracy=0.95, accuracy_spread=0.01)


def test_the_words_hold_a_lean_engine_against_the_leanest_form_of_backprop(plain):
    rows = [replace(row, peak_memory_bytes=size) for row, size in zip(plain.rows, (100, 50, 80, 70), strict=True)]
    told = " ".join(replace(plain, rows=rows).verdict())
    assert "Less peak memory than backprop: forward (0.7 × as much)." in told
    assert "Below the leanest form of backprop (backprop + checkpointing) in peak memory: none." in told


def test_the_words_name_wall_time_that_backprop_wins(plain):
    rows = [replace(row, seconds=2.0 if row.label == "forward" else 1.0) for row in plain.rows]
    assert "Backprop wins on wall time: forward took 2 × as much." in " ".join(replace(plain, rows=rows).verdict())


def test_a_best_rate_at_the_edge_of_the_grid_is_told(plain):
    rows = [replace(row, lr=0.1, tuning={"0.1": 0.9, "0.01": 0.8, "0.001": 0.7}) for row in plain.rows]
    assert "at the edge of the grid for backprop (0.1)" in " ".join(replace(plain, rows=rows).verdict())
