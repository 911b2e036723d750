"""One step, the settings, and signals."""

import os
import signal

import pytest
import torch
import toys

from altgrad import checkpoint, errors, signals, trainer
from altgrad.engine import Split
from altgrad.trainer import TrainSettings
from altgrad.world import World


def settings(**changes):
    base = {"problem": "toys:LeastSquaresFactory", "engine": "toys:Noisy", "optimizer": "SGD", "lr": 0.1, "steps": 10}
    return TrainSettings(**{**base, **changes})


def start(**changes):
    return trainer.build(settings(**changes))


def estimate_of(training):
    batch = training.problem.batch(training.step, training.world)
    return training.engine.estimate(training.problem, training.values(), training.state, batch, training.key, training.world)


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


def test_a_parameter_left_out_after_it_was_given_is_not_moved_by_the_old_gradient(monkeypatch):
    training = start()
    trainer.step(training)
    before = training.params["bias"].tolist()
    honest = toys.Noisy.estimate

    def estimate(self, *arguments):
        found = honest(self, *arguments)
        return found._replace(grads={name: g for name, g in found.grads.items() if name != "bias"})

    monkeypatch.setattr(toys.Noisy, "estimate", estimate)
    trainer.step(training)
    assert training.params["bias"].tolist() == before


class Doubling(World):
    """A stand-in for two ranks: the mean over them is twice what this one has."""

    def shares(self, weight, *, device="cpu"):
        return [0.5, 0.5]

    def mean(self, tensor, *, shares=None):
        return tensor * 2


@pytest.mark.parametrize(("split", "factor"), [(Split.DATA, 2), (Split.POPULATION, 1)], ids=["data", "population"])
def test_ranks_average_what_they_divide(monkeypatch, split, factor):
    monkeypatch.setattr(toys.Noisy, "split", split)
    training = start()
    expected = estimate_of(training)
    training.world = Doubling(size=2)
    loss = trainer.step(training)["loss"]
    assert torch.equal(training.params["weight"].grad, factor * expected.grads["weight"])
    assert torch.equal(loss, factor * expected.loss)


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


def test_clipping_bounds_the_whole_gradient_and_keeps_its_direction():
    training = start(clip=0.01)
    expected = estimate_of(training).grads
    trainer.step(training)
    norm = torch.stack([tensor.grad.norm() for tensor in training.params.values()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-4)
    ratio = training.params["weight"].grad / expected["weight"]
    assert ratio.max().item() == pytest.approx(ratio.min().item(), rel=1e-5)


def test_clipping_leaves_the_engines_tensors_alone(monkeypatch):
    training = start(clip=0.01)
    honest, given = toys.Noisy.estimate, []

    def estimate(self, *arguments):
        found = honest(self, *arguments)
        given.extend((tensor, tensor.clone()) for tensor in found.grads.values())
        return found

    monkeypatch.setattr(toys.Noisy, "estimate", estimate)
    trainer.step(training)
    assert len(given) == 3
    assert all(torch.equal(tensor, before) for tensor, before in given)


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
    assert len(seen) == next(iter(training.optimizer.state.values()))["func_evals"] > 1
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
