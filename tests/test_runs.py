"""The run folder, and when the loop writes to it."""

import json
import os
import shutil

import pytest
import torch

from altgrad import checkpoint, errors, runs, trainer
from altgrad.trainer import TrainSettings


def settings(**changes):
    base = {"problem": "toys:LeastSquaresFactory", "engine": "toys:Noisy", "optimizer": "SGD", "lr": 0.1, "steps": 10}
    return TrainSettings(**{**base, **changes})


def start(**changes):
    return trainer.build(settings(**changes))


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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


def test_evaluate_every_sets_the_steps_of_the_figures_on_the_test_set_and_keeps_the_last(tmp_path):
    trainer.fit(start(evaluate_every=3), run_folder=tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run") if "test_loss" in row] == [3, 6, 9, 10]
    trainer.fit(start(evaluate_every=100), run_folder=tmp_path / "once")
    assert [row["step"] for row in rows(tmp_path / "once") if "test_loss" in row] == [10]
    with pytest.raises(errors.SettingError, match="evaluate_every=0"):
        start(evaluate_every=0)


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
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_run_that_diverges_at_once_leaves_nothing_and_claims_no_checkpoint(tmp_path):
    with pytest.raises(errors.NumericsError, match=r"No checkpoint had been written\.$"):
        trainer.fit(start(engine_settings={"blow_up": "bias@0"}), run_folder=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_diverges_before_its_first_checkpoint_keeps_its_rows_and_frees_its_name(tmp_path):
    for number in (1, 2):
        with pytest.raises(errors.NumericsError, match=rf"No checkpoint had been written; what was logged is in .*run\.failed-{number}\.$"):
            trainer.fit(start(engine_settings={"blow_up": "bias@3"}), run_folder=tmp_path / "run")
        assert len(rows(tmp_path / f"run.failed-{number}")) == 3
    trainer.fit(start(), run_folder=tmp_path / "run")


def test_a_withdrawn_run_leaves_an_empty_folder_that_was_there(tmp_path):
    with pytest.raises(errors.NumericsError):
        trainer.fit(start(engine_settings={"blow_up": "bias@0"}), run_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_withdrawn_run_leaves_somebody_elses_files_where_they_are(tmp_path):
    def leave(training, row):
        (tmp_path / "run" / "notes.txt").write_text("mine")

    with pytest.raises(errors.NumericsError, match=r"what was logged is in .*run\.$"):
        trainer.fit(start(engine_settings={"blow_up": "bias@3"}), run_folder=tmp_path / "run", on_step=leave)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert len(rows(tmp_path / "run")) == 3


def test_a_resumed_run_that_diverges_without_a_checkpoint_stays_where_it_is(tmp_path):
    trainer.fit(start(steps=3), run_folder=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["settings"]["engine_settings"]["blow_up"] = "bias@0"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.NumericsError, match=r"No checkpoint had been written; what was logged is in .*run\.$"):
        trainer.fit(trainer.resume(tmp_path / "run"))
    assert (tmp_path / "run" / "config.json").exists()


def test_an_error_in_the_first_step_leaves_nothing(tmp_path, monkeypatch):
    def broken(self, *arguments):
        raise RuntimeError("boom")

    training = start()
    monkeypatch.setattr(type(training.engine), "estimate", broken)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(training, run_folder=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_later_step_keeps_the_run_to_be_resumed(tmp_path):
    def broken(training, row):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(start(), run_folder=tmp_path / "run", on_step=broken)
    assert trainer.fit(trainer.resume(tmp_path / "run")).steps == 10


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
