"""One step, the loop, and the run folder it leaves."""

import json
import os
import signal

import pytest
import torch
import toys

from altgrad import checkpoint, errors, runs, signals, trainer
from altgrad.trainer import TrainSettings


def settings(**changes):
    base = {"problem": "toys:LeastSquaresFactory", "engine": "toys:Noisy", "optimizer": "SGD", "lr": 0.1, "steps": 10}
    return TrainSettings(**{**base, **changes})


def start(**changes):
    return trainer.build(settings(**changes))


def estimate_of(training):
    batch = training.problem.batch(training.step, training.world)
    return training.engine.estimate(training.problem, training.values(), training.state, batch, training.key, training.world)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_subtracts_the_rate_times_the_estimate():
    training = start()
    before = {name: tensor.clone() for name, tensor in training.values().items()}
    grads = estimate_of(training).grads
    trainer.step(training)
    assert all(torch.equal(tensor, before[name] - 0.1 * grads[name]) for name, tensor in training.values().items())


def test_training_moves_the_problems_own_tensors():
    training = start()
    trainer.step(training)
    assert torch.equal(training.problem.weight, training.params["weight"])


def test_gradients_of_the_last_step_do_not_add_up():
    training = start(engine_settings={"sigma": 0.0})
    trainer.step(training)
    expected = estimate_of(training).grads["bias"]
    trainer.step(training)
    assert torch.equal(training.params["bias"].grad, expected)


def test_a_parameter_left_out_of_the_estimate_is_not_touched():
    training = start(engine_settings={"leave_out": "bias"}, optimizer="AdamW", optimizer_settings={"weight_decay": 0.5})
    training.params["bias"].data.fill_(3.0)
    trainer.step(training)
    assert training.params["bias"].grad is None
    assert training.params["bias"].tolist() == [3.0, 3.0]


def test_the_engines_own_trainables_are_trained():
    training = start()
    trainer.step(training)
    assert training.params["aux.scale"].item() == pytest.approx(1.1)


def test_state_and_buffers_advance_once_a_step():
    training = start()
    for _ in range(3):
        trainer.step(training)
    assert training.state["draws"].item() == 3
    assert training.problem.own_buffers["seen"].item() == 24


def test_noise_differs_between_steps_and_repeats_with_the_seed():
    first, again, other = start(), start(), start(seed=1)
    norms = [[float(trainer.step(t)["noise_norm"]) for _ in range(3)] for t in (first, again, other)]
    assert norms[0] == norms[1]
    assert len({*norms[0], *norms[2]}) == 6


def test_clipping_bounds_the_whole_gradient_and_leaves_the_engines_tensors_alone():
    training = start(clip=0.01)
    expected = estimate_of(training).grads
    trainer.step(training)
    norm = torch.stack([tensor.grad.norm() for tensor in training.params.values()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-4)
    ratio = training.params["weight"].grad / expected["weight"]
    assert ratio.max().item() == pytest.approx(ratio.min().item(), rel=1e-5)


def test_clipping_leaves_a_small_gradient_as_it_is():
    free, clipped = start(), start(clip=1e6)
    trainer.step(free)
    trainer.step(clipped)
    assert torch.equal(free.params["weight"], clipped.params["weight"])


def test_a_gradient_whose_squares_run_over_is_finite_all_the_same():
    training = start(engine_settings={"huge": True}, clip=1.0)
    trainer.step(training)
    assert training.params["weight"].grad.norm().item() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine_settings": {"blow_up": "bias@2"}}, r"the gradient of 'bias' is infinite \(1 of 2 entries\) at step 2 \(engine toys:Noisy"),
        ({"problem_settings": {"poison": "inputs@2"}}, r"the loss is NaN \(1 of 1 entries\) at step 2 \(engine toys:Noisy"),
    ],
)
@pytest.mark.parametrize("optimizer", ["SGD", "LBFGS"])
def test_what_is_not_finite_is_named_and_stops_before_the_update(changes, message, optimizer):
    training = start(optimizer=optimizer, **changes)
    trainer.step(training)
    trainer.step(training)
    before = {name: tensor.clone() for name, tensor in training.values().items()}
    with pytest.raises(errors.NumericsError, match=message) as caught:
        trainer.step(training)
    assert caught.value.exit_code == 3
    assert training.step == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in training.values().items())


def test_trouble_in_the_middle_of_a_closure_optimizers_step_restores_the_parameters(monkeypatch):
    training = start(optimizer="LBFGS")
    before = {name: tensor.clone() for name, tensor in training.values().items()}
    honest, calls = toys.Noisy.estimate, []

    def estimate(self, *arguments):
        calls.append(1)
        found = honest(self, *arguments)
        return found._replace(loss=found.loss * float("nan")) if len(calls) == 3 else found

    monkeypatch.setattr(toys.Noisy, "estimate", estimate)
    with pytest.raises(errors.NumericsError, match="the loss is NaN"):
        trainer.step(training)
    assert len(calls) == 3
    assert all(torch.equal(before[name], tensor) for name, tensor in training.values().items())


def test_a_closure_optimizer_repeats_the_noise_and_counts_every_evaluation(monkeypatch):
    training = start(optimizer="LBFGS", optimizer_settings={"max_iter": 4})
    honest, seen = toys.Noisy.estimate, []

    def estimate(self, *arguments):
        found = honest(self, *arguments)
        seen.append((float(found.metrics["noise_norm"]), float(found.state["draws"])))
        return found

    monkeypatch.setattr(toys.Noisy, "estimate", estimate)
    trainer.step(training)
    assert len(seen) > 1
    assert len(set(seen)) == 1
    assert training.count("forwards") == 3 * len(seen)
    assert training.problem.own_buffers["seen"].item() == 8


@pytest.mark.parametrize("optimizer", ["SGD", "LBFGS", "Adam"])
def test_training_lowers_the_held_out_loss(optimizer):
    training = start(optimizer=optimizer, lr=0.5 if optimizer == "LBFGS" else 0.1, steps=60, engine_settings={"sigma": 0.0})
    before = trainer.evaluate(training)["test_loss"]
    assert trainer.fit(training).test_loss < 0.05 * before


def test_a_gradient_for_an_unknown_parameter_is_refused(monkeypatch):
    training = start()
    honest = toys.Noisy.estimate
    monkeypatch.setattr(toys.Noisy, "estimate", lambda self, *a: honest(self, *a)._replace(grads={"typo": torch.ones(2)}))
    with pytest.raises(errors.ShapeError, match=r"gradient of shape \(2,\) for 'typo': there is no such parameter"):
        trainer.step(training)


def test_lazy_gradients_are_read_one_at_a_time(monkeypatch):
    training = start()
    honest, asked = toys.Noisy.estimate, []

    class Lazy(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    def estimate(self, *arguments):
        found = honest(self, *arguments)
        return found._replace(grads=Lazy(found.grads))

    monkeypatch.setattr(toys.Noisy, "estimate", estimate)
    trainer.step(training)
    assert asked == ["weight", "bias", "aux.scale"]


# Settings.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 is not allowed; it must be 1 or more"),
        ({"epochs": 2}, "steps=10 is not allowed; it must be absent where epochs=2 is given"),
        ({"seed": -1}, r"seed=-1 is not allowed; it must be in \[0, 2\^64\)"),
        ({"clip": 0.0}, "clip=0.0 is not allowed; it must be above 0"),
        ({"lr": -0.1}, "lr=-0.1 is not allowed; it must be 0 or more"),
        ({"model": "mlp"}, "model='mlp' is not allowed: problem toys:LeastSquaresFactory takes no model"),
        ({"optimizer": "Adem"}, "Did you mean 'Adam'"),
        ({"engine": "nothing"}, "unknown engine 'nothing'"),
        ({"engine_settings": {"sigmaa": 1}}, "unknown setting 'sigmaa'. Did you mean 'sigma'"),
        ({"problem_settings": {"poisson": "x"}}, "unknown setting 'poisson'. Did you mean 'poison'"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(changes, message):
    with pytest.raises(errors.UsageError, match=message) as caught:
        start(**changes)
    assert caught.value.exit_code == 2


def test_epochs_are_turned_into_steps():
    training = start(steps=None, epochs=3)
    assert training.total_steps == 12


# The run folder.


def test_a_run_leaves_its_files(tmp_path):
    result = trainer.fit(start(), run_folder=tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "env.json", "metrics.jsonl", "result.json", "checkpoints"}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_loss"] == result.test_loss


def test_the_result_counts_steps_forwards_and_backwards(tmp_path):
    result = trainer.fit(start(), run_folder=tmp_path / "run")
    assert (result.steps, result.forwards, result.backwards, result.seed) == (10, 30, 10, 0)
    assert result.peak_memory_bytes > 1e6
    assert result.seconds > 0


def test_metrics_have_a_row_a_step_and_one_an_epoch(tmp_path):
    trainer.fit(start(), run_folder=tmp_path / "run")
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if "loss" in row] == list(range(1, 11))
    assert [(row["step"], row["epoch"]) for row in found if "test_loss" in row] == [(4, 1), (8, 2), (10, 3)]
    assert [row["forwards"] for row in found if "loss" in row] == list(range(3, 33, 3))


def test_log_every_thins_the_rows_and_keeps_the_last(tmp_path):
    trainer.fit(start(log_every=4), run_folder=tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [4, 8, 10]


def test_save_every_sets_the_steps_of_the_checkpoints(tmp_path):
    trainer.fit(start(save_every=3), run_folder=tmp_path / "run", keep=10)
    assert [checkpoint.step_of(path) for path in checkpoint.available(tmp_path / "run" / "checkpoints")] == [3, 6, 9, 10]


def test_config_holds_the_resolved_settings(tmp_path):
    trainer.fit(start(lr=None), run_folder=tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert config["engine_settings"]["sigma"] == 0.1
    assert config["lr"] == 1e-3
    assert config["problem_settings"] == {"poison": ""}


def test_env_holds_versions_and_no_paths(tmp_path):
    trainer.fit(start(), run_folder=tmp_path / "run")
    environment = json.loads((tmp_path / "run" / "env.json").read_text())
    assert {"python", "torch", "numpy", "threads", "system"} <= set(environment)
    assert environment["torch"] == torch.__version__.replace("+cpu", "") or environment["torch"].startswith("2.")
    assert not any(os.sep in str(value) for value in environment.values())


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(errors.UsageError, match=r"exists and is not empty\..*--overwrite.*altgrad resume"):
        trainer.fit(start(), run_folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_overwrite_leaves_a_folder_alone_that_is_no_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine").write_text("")
    with pytest.raises(errors.UsageError, match="no run folder"):
        trainer.fit(start(), run_folder=tmp_path, overwrite=True)
    assert (tmp_path / "checkpoints" / "mine").exists()


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path):
    trainer.fit(start(), run_folder=tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    trainer.fit(start(steps=2), run_folder=tmp_path / "run", overwrite=True)
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2]
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-00000002"
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(errors.UsageError, match="is a file; a run needs a folder"):
        trainer.fit(start(), run_folder=tmp_path / "run")


def test_a_setting_that_json_cannot_hold_is_refused_before_the_folder_is_made(tmp_path):
    with pytest.raises(errors.UsageError, match=r"cannot be written to config\.json"):
        trainer.fit(start(engine_settings={"sigma": 0.1, "leave_out": object()}), run_folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_finite_become_null(tmp_path):
    run = runs.create(tmp_path / "run", {})
    run.append({"step": 1, "test_loss": float("nan")})
    assert rows(tmp_path / "run") == [{"step": 1, "test_loss": None}]


def test_after_trouble_the_last_good_checkpoint_stays(tmp_path):
    with pytest.raises(errors.NumericsError, match=r"The last good checkpoint stays in .*checkpoints"):
        trainer.fit(start(engine_settings={"blow_up": "bias@6"}), run_folder=tmp_path / "run")
    saved = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert saved.step == 4
    assert rows(tmp_path / "run")[-1]["step"] == 6


def test_parameters_that_the_update_made_infinite_are_never_saved(tmp_path):
    training = start(lr=1e38, save_every=1, engine_settings={"sigma": 1e5})
    with pytest.raises(errors.NumericsError, match="parameter 'weight' is no longer finite after the update of step 0"):
        trainer.fit(training, run_folder=tmp_path / "run")
    assert checkpoint.available(tmp_path / "run" / "checkpoints") == []


def test_an_optimizer_whose_state_only_a_pickle_could_hold_is_refused_at_the_first_step(tmp_path):
    training = start()
    training.optimizer.param_groups[0]["hook"] = print
    with pytest.raises(errors.AltgradError, match=r"param_groups\.0\.hook is a builtin_function_or_method, which cannot be stored"):
        trainer.fit(training, run_folder=tmp_path / "run")
    assert training.step == 1


def test_on_step_sees_every_row_and_can_end_the_run():
    seen = []

    def on_step(training, row):
        seen.append(row["step"])
        return row["forwards"] >= 15

    result = trainer.fit(start(log_every=100), on_step=on_step)
    assert seen == [1, 2, 3, 4, 5]
    assert result.steps == 5
    assert result.test_loss is not None


def test_on_evaluate_sees_the_held_out_figures():
    seen = []
    trainer.fit(start(), on_evaluate=lambda training, row: seen.append((row["step"], sorted(row)[-2:])))
    assert seen == [(step, ["test_accuracy", "test_loss"]) for step in (4, 8, 10)]


# Signals.


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(tmp_path, number, code):
    def on_step(training, row):
        if training.step == 6:
            os.kill(os.getpid(), number)

    with pytest.raises(errors.Interrupted, match=r"stopped after step 6 of 10; a checkpoint was written\. Go on with: altgrad resume") as caught:
        trainer.fit(start(), run_folder=tmp_path / "run", on_step=on_step)
    assert caught.value.exit_code == code
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints").step == 6


def test_a_second_signal_interrupts_at_once(monkeypatch):
    honest, finished = toys.Noisy.estimate, []

    def estimate(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        finished.append(1)
        return honest(self, *arguments)

    monkeypatch.setattr(toys.Noisy, "estimate", estimate)
    with pytest.raises(errors.Interrupted, match="at once") as caught:
        trainer.fit(start())
    assert caught.value.exit_code == 143
    assert finished == []


def test_the_handlers_that_were_there_come_back():
    def mine(number, frame):
        pass

    before = {number: signal.signal(number, mine) for number in signals.WATCHED}
    try:
        trainer.fit(start())
        with pytest.raises(errors.NumericsError):
            trainer.fit(start(engine_settings={"blow_up": "bias@1"}))
        assert [signal.getsignal(number) for number in signals.WATCHED] == [mine, mine]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_another_thread_trains_without_handlers():
    import threading

    found = []
    thread = threading.Thread(target=lambda: found.append(trainer.fit(start()).steps))
    thread.start()
    thread.join()
    assert found == [10]
