"""Equilibrium propagation online, with the same update both ways, on devices that are off, and what the log tells of it."""

import itertools
import json
import math

import pytest
import torch
from click.testing import CliRunner
from settled import KEY, Bowl, chain, error, feedback, layered, look, recurrent, reference
from tolerances import tolerance

from altgrad import errors, trainer
from altgrad.alignment import alignment, exact_gradient
from altgrad.cli import cli
from altgrad.engine import Needs
from altgrad.engines.equilibrium import Equilibrium
from altgrad.equilibrium.adjoint import adjoint_gradient
from altgrad.equilibrium.feedback import LayeredFeedback
from altgrad.equilibrium.hardware import mismatched
from altgrad.equilibrium.nudges import around
from altgrad.equilibrium.settling import Settling, squared_error
from altgrad.errors import CapabilityError, NumericsError, SettingError
from altgrad.problem import Batch
from altgrad.rng import Key
from altgrad.training import TrainSettings

ROUND = {"nudge": "holomorphic", "points": 6}

# -- online ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [recurrent, layered, chain])
def test_online_goes_to_the_phases_gradient_as_the_state_has_more_time_at_each_nudge(build):
    problem, batch = build()
    phases = look(Equilibrium(**ROUND), problem, batch).grads
    off = [error(look(Equilibrium(online=sweeps, **ROUND), problem, batch).grads, phases) for sweeps in (1, 2, 4, 8, 40)]
    assert all(after < 0.5 * before or after < 1e-9 for before, after in itertools.pairwise(off))
    assert off[-1] < tolerance("rounding64")


@pytest.mark.parametrize("build", [recurrent, layered])
def test_online_asks_nothing_of_the_free_state(build, monkeypatch):
    """∂E/∂θ of the free state, added to every nudged one, cancels out: Σ_k 1/β_k = 0 over a whole round."""
    assert abs(sum(nudge.weight for nudge in around("holomorphic", 0.1, 6, KEY))) < 1e-12
    assert all(nudge.beta != 0 for nudge in around("holomorphic", 0.1, 6, KEY))
    problem, batch = build()
    engine = Equilibrium(online=4, **ROUND)
    whole = look(engine, problem, batch).grads
    system = type(engine.system(problem, problem.params(), batch, KEY, {}))
    honest = system.gradient

    def moved(self, told):
        self.rest = tuple(leaf + 1 for leaf in self.rest)
        return honest(self, told)

    monkeypatch.setattr(system, "gradient", moved)
    assert error(look(engine, problem, batch).grads, whole) < tolerance("rounding64")


def test_online_carries_the_state_from_nudge_to_nudge():
    problem, batch = recurrent()
    few = look(Equilibrium(online=2, periods=3, **ROUND), problem, batch)
    assert float(few.metrics["relaxations"]) == 12  # two of three rounds count
    assert float(few.metrics["forwards"]) < float(look(Equilibrium(online=2, periods=30, **ROUND), problem, batch).metrics["forwards"])
    late = look(Equilibrium(online=2, periods=30, **ROUND), problem, batch)
    first = look(Equilibrium(online=2, periods=1, **ROUND), problem, batch)
    assert error(few.grads, late.grads) < 0.1 * error(first.grads, late.grads)  # what the start does dies away


@pytest.mark.parametrize("nudge", ["one-sided", "symmetric"])
def test_a_real_nudge_may_go_to_and_fro_too(nudge):
    problem, batch = recurrent()
    phases = look(Equilibrium(nudge=nudge), problem, batch).grads
    assert error(look(Equilibrium(nudge=nudge, online=40), problem, batch).grads, phases) < 1e-9


# -- the same update both ways --------------------------------------------------------------------------------------------------------


def test_the_same_update_is_the_mean_of_the_two():
    problem, batch = feedback()
    own, same = (look(Equilibrium(update=update, correction="none"), problem, batch).grads for update in ("own", "same"))
    for up, down in problem.model.pairs:
        torch.testing.assert_close(same[up], (own[up] + own[down]) / 2)
        assert torch.equal(same[up], same[down])
        assert not torch.allclose(own[up], own[down])
    assert torch.equal(same["weights.0"], own["weights.0"])


def test_a_matrix_among_all_units_gets_its_symmetric_part():
    problem, batch = recurrent()
    own, same = (look(Equilibrium(update=update), problem, batch).grads["recurrent"] for update in ("own", "same"))
    torch.testing.assert_close(same, (own + own.T) / 2)


def test_same_updates_with_weight_decay_make_weights_agree():
    problem, batch = feedback(torch.float32)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1, weight_decay=0.3)
    (up, down), apart = problem.model.pairs[0], []
    for step in range(40):
        found = look(Equilibrium(update="same", correction="none"), problem, batch, KEY.at(step)).grads
        params = problem.params()
        apart.append(float((params[up] - params[down]).norm().detach()))
        for name, parameter in params.items():
            parameter.grad = found[name]
        optimizer.step()
    assert apart[-1] == pytest.approx(apart[0] * (1 - 0.03) ** 39, rel=1e-4)  # nothing but the decay moves the difference


@pytest.mark.parametrize("build", [layered, chain, lambda: recurrent(symmetric=True)])
def test_the_same_update_is_refused_where_there_are_no_two(build):
    with pytest.raises(CapabilityError, match="no such pairs"):
        look(Equilibrium(update="same"), *build())


# -- nets with weights of their own each way ------------------------------------------------------------------------------------------


def test_at_angle_zero_no_correction_is_needed():
    problem, batch = feedback(angle=0.0)
    found = look(Equilibrium(**ROUND, correction="none"), problem, batch)
    assert error(found.grads, reference(problem, batch)) < 1e-6
    assert float(found.metrics["asymmetry"]) < tolerance("rounding64")


def test_the_bias_without_correction_grows_with_the_angle_and_the_correction_takes_it_away():
    biases = []
    for angle in (0.0, 30.0, 90.0):
        problem, batch = feedback(angle=angle)
        exact = reference(problem, batch)
        biases.append(error(look(Equilibrium(**ROUND, correction="none"), problem, batch).grads, exact))
        assert error(look(Equilibrium(**ROUND), problem, batch).grads, exact) < 1e-6
    assert biases[0] < 1e-6
    assert 0.05 < biases[1] < 0.7 * biases[2]


def test_first_weights_up_and_down_are_at_the_angle():
    net = LayeredFeedback([8, 200, 200, 5], key=Key(1), angle=60.0)
    up, down = net.weights[1].detach().flatten(), net.backward_weights[0].detach().flatten()
    assert float(up @ down / (up.norm() * down.norm())) == pytest.approx(0.5, abs=0.02)


# -- devices --------------------------------------------------------------------------------------------------------------------------


def test_a_mismatch_belongs_to_the_device_and_to_weights_alone():
    params = {"weight": torch.ones(200, 200), "bias": torch.ones(200)}
    one, again, other = (mismatched(params, 0.05, device) for device in (0, 0, 1))
    assert torch.equal(one["bias"], params["bias"])
    assert torch.equal(one["weight"], again["weight"])
    assert not torch.equal(one["weight"], other["weight"])
    assert float((one["weight"] - 1).std()) == pytest.approx(0.05, rel=0.02)


def test_the_gradient_is_that_of_the_devices_own_weights():
    problem, batch = recurrent()
    engine = Equilibrium(mismatch=0.05, **ROUND)
    found = look(engine, problem, batch).grads
    there = adjoint_gradient(problem, mismatched({name: value.detach() for name, value in problem.params().items()}, 0.05, 0), batch)
    assert error(found, there) < 1e-6
    assert error(found, reference(problem, batch)) > 1e-2


def test_a_device_predicts_with_its_own_weights():
    problem, batch = chain()
    params = {name: value.detach() for name, value in problem.params().items()}
    own = mismatched(params, 0.05, 3)
    engine = Equilibrium(mismatch=0.05, device=3)
    torch.testing.assert_close(engine.predict(problem, params, {}, batch.inputs), problem.forward(own, batch.inputs, {}))
    assert torch.equal(engine.bake(problem, params, {})["0.weight"], own["0.weight"])


# -- the log --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [recurrent, layered, feedback, chain])
def test_the_engines_own_reference_is_the_exact_gradient(build):
    problem, batch = build()
    found = Equilibrium().exact(problem, problem.params(), batch, KEY)
    exact = reference(problem, batch)
    assert set(found) == set(exact)
    assert error(found, exact) < 1e-9


def test_an_energy_without_a_step_has_a_reference_too():
    class Alone(Settling):
        @property
        def provides(self):
            return super().provides & ~Needs.FIXED_POINT

    model, batch = Bowl(), recurrent()[1]
    whole, alone = (kind(model, squared_error) for kind in (Settling, Alone))
    assert error(Equilibrium().exact(alone, alone.params(), batch, KEY), reference(whole, batch)) < tolerance("rounding64")


def test_cosines_are_told_every_so_many_steps_and_are_those_to_the_exact_gradient():
    problem, batch = recurrent()
    engine = Equilibrium(correction="none", diagnose=3)
    told = look(engine, problem, batch, KEY.at(2))
    exact = reference(problem, batch)
    for name, gradient in exact.items():
        wanted = torch.nn.functional.cosine_similarity(told.grads[name].flatten(), gradient.flatten(), dim=0)
        assert float(told.metrics[f"cosine/{name}"]) == pytest.approx(float(wanted), abs=1e-9)
    assert float(told.metrics["cosine"]) < 0.95
    assert "cosine" not in look(engine, problem, batch, KEY.at(3)).metrics
    assert float(look(Equilibrium(diagnose=1), problem, batch).metrics["cosine"]) > 0.9999


def test_alignment_holds_the_engine_to_the_fixed_point_and_not_to_so_many_sweeps():
    net = LayeredFeedback([12, 10, 8, 5], key=Key(3), angle=0.0, sweeps=3).double()
    problem, batch = Settling(net, squared_error), layered()[1]
    unrolled = exact_gradient(problem, problem.params(), batch, KEY)[1]
    assert error(unrolled, reference(problem, batch)) > 0.05  # three sweeps are too few
    found = alignment(Equilibrium(), problem, problem.params(), batch, [KEY])
    assert found["cosine"] > 0.999
    assert set(found["layers"]) == set(problem.params())


def test_a_net_that_does_not_settle_has_no_reference():
    problem, batch = recurrent(gain=6.0)
    with pytest.raises(NumericsError, match="recurrent backprop is not at rest"):
        Equilibrium(steps=20).exact(problem, problem.params(), batch, KEY)


# -- settings, runs and the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"online": -1}, "online=-1"),
        ({"periods": 0}, "periods=0"),
        ({"update": "some"}, "Did you mean 'same'"),
        ({"diagnose": -1}, "diagnose=-1"),
        ({"mismatch": -0.1}, "mismatch=-0.1"),
        ({"device": -1}, "device=-1"),
    ],
)
def test_a_wrong_setting_is_refused(settings, words):
    with pytest.raises(SettingError, match=words):
        Equilibrium(**settings)


RUNS = {
    "phases": {},
    "online, noisy": {"nudge": "holomorphic", "points": 3, "online": 2, "periods": 2, "noise": 0.02, "steps": 5},
    "mismatch, same updates, diagnosed": {"mismatch": 0.03, "update": "same", "correction": "none", "diagnose": 2, "tolerance": 1e-4},
}


@pytest.mark.parametrize("kind", RUNS)
def test_resume_is_bit_exact(tmp_path, kind):
    from test_resume import contents, interrupt_after, rows

    changes = {
        "problem": "recurrent-digits",
        "problem_settings": {"hidden": "8", "homeostasis": 0.1},
        "engine": "equilibrium",
        "engine_settings": RUNS[kind],
        "steps": 7,
        "save_every": 2,
    }
    trainer.fit(trainer.build(TrainSettings(**changes)), run_folder=tmp_path / "whole")
    with pytest.raises(errors.Interrupted):
        trainer.fit(trainer.build(TrainSettings(**changes)), run_folder=tmp_path / "broken", on_step=interrupt_after(3))
    trainer.fit(trainer.resume(tmp_path / "broken"))
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


@pytest.mark.parametrize("settings", [{"noise": 0.01, "steps": 20, "online": 3}, {"mismatch": 0.05, "update": "same"}], ids=str)
def test_two_ranks_average_to_the_whole_batch(settings):
    problem, batch = feedback()
    engine = Equilibrium(**settings)
    whole = look(engine, problem, batch).grads
    parts = [look(engine, problem, Batch(batch.inputs[rows], batch.targets[rows], rows.start)).grads for rows in (slice(0, 3), slice(3, 6))]
    assert error({name: (parts[0][name] + parts[1][name]) / 2 for name in whole}, whole) < tolerance("rounding64")


def test_the_command_line_logs_residual_asymmetry_and_cosines(tmp_path):
    settings = ["-s", "diagnose=2", "-s", "online=3", "-s", "mismatch=0.02", "-s", "update=same", "--problem-setting", "hidden=8"]
    command = ["train", "--problem", "recurrent-digits", "--engine", "equilibrium", "--steps", "4", "--out", str(tmp_path / "run"), *settings]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in log if "residual" in row]
    assert all(math.isfinite(row["asymmetry"]) for row in steps)
    assert [row["step"] for row in steps if "cosine/weights.0" in row] == [2, 4]
