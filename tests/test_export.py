"""Exported modules against what the engine reads out, and linear probes against scikit-learn's."""

import io
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import nn

from altgrad import compare as comparing
from altgrad import registry
from altgrad.compare import Choice, CompareSettings
from altgrad.comparison import Comparison
from altgrad.engines.forward_forward import ForwardForward
from altgrad.engines.local import Local
from altgrad.engines.mono_forward import MonoForward
from altgrad.errors import CapabilityError, DataError, NumericsError, SettingError
from altgrad.learner import Learner
from altgrad.local import linear_probe, reading
from altgrad.local.losses import TABLE
from altgrad.local.losses.frame import LocalLoss
from altgrad.problems.quadratic import Quadratic
from altgrad.rng import Key
from altgrad.tables import from_csv, to_csv
from altgrad.training import TrainSettings, build

READOUTS = ("own", "last", "sum", "vote", "0")


class Residual(nn.Module):
    """A model that torch.fx has to cut, with statistics, dropout and two inputs, of which one has a default."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.inner, self.head = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, scale=2.0):
        x = F.dropout(self.norm(self.stem(x * scale)).relu(), 0.5, self.training)
        return self.head(x + self.inner(x).tanh())


def conv():
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))


def plain():
    return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))


def trained(engine, model=None, inputs=None):
    """A learner after one step, its model in evaluation mode, and inputs."""
    inputs = torch.randn(6, 5) if inputs is None else inputs
    learner = Learner(model or plain(), F.cross_entropy, engine=engine, example=inputs[:2])
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.05)
    learner.backward(inputs, torch.arange(len(inputs)) % 3)
    optimizer.step()
    learner.model.eval()
    return learner, inputs


# -- export -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("loss", TABLE)
def test_an_exported_module_gives_what_the_learner_predicts(loss, readout):
    learner, x = trained(Local(loss=loss, readout=readout))
    assert torch.equal(learner.export()(x), learner.predict(x))


@pytest.mark.parametrize("loss_settings", ["", "goodness=mean,normalise=layer"])
def test_an_exported_convolution_keeps_pooling_and_what_is_between_blocks(loss_settings):
    engine = Local(loss="channel-goodness", loss_settings=loss_settings) if loss_settings else MonoForward(features=7)
    learner, x = trained(engine, conv(), torch.randn(6, 1, 6, 6))
    assert torch.equal(learner.export()(x), learner.predict(x))


def test_an_exported_sequence_model_keeps_its_averages_over_time():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Flatten(), nn.Linear(24, 3))
    learner, x = trained(MonoForward(features=12, readout="sum"), model, torch.randn(6, 4, 6))
    assert learner.aux["local.projection.0"].shape == (3, 12)
    assert torch.equal(learner.export()(x), learner.predict(x))


def test_an_exported_module_takes_inputs_as_the_model_does():
    learner, x = trained(MonoForward(), Residual())
    module = learner.export()
    assert torch.equal(module(x), learner.predict(x))
    assert torch.equal(module(x, scale=3.0), learner.predict({"x": x, "scale": 3.0}))


@pytest.mark.parametrize("name", [name for name in registry.names("engine") if name not in {"mixed", "ask-tell"}])
def test_every_engines_export_gives_its_read_out(name):
    settings = {"random-subspace": {"dimension": 9}}.get(name, {})
    learner, x = trained(registry.engine(name, settings))
    assert torch.allclose(learner.export()(x), learner.predict(x), atol=1e-6)


def test_an_export_is_a_copy_in_evaluation_mode():
    learner, x = trained(MonoForward(), Residual())
    learner.model.train()
    module = learner.export()
    before = module(x)
    with torch.no_grad():
        for value in learner.tensors().values():
            value.add_(1.0)
    assert not any(part.training for part in module.modules())
    assert torch.equal(module(x), before)


def test_what_a_read_out_does_not_look_at_is_left_out():
    learner, _ = trained(MonoForward())
    names = set(learner.export(readout="0").state_dict())
    assert names == {"block0.0.weight", "block0.0.bias", "head0.projection"}


def test_heads_that_were_never_trained_are_not_exported():
    learner, x = trained(MonoForward(schedule="sequential", block_steps=1))
    assert torch.equal(learner.export()(x), learner.export(readout="0")(x))


def test_a_state_dict_goes_from_one_export_into_another():
    (one, x), (other, _) = trained(MonoForward()), trained(MonoForward())
    module = other.export()
    module.load_state_dict(one.export().state_dict())
    assert torch.equal(module(x), one.predict(x))


def test_a_saved_export_runs_where_there_is_no_altgrad(tmp_path):
    learner, x = trained(MonoForward(), Residual().eval())
    torch.jit.trace(learner.export(), x).save(tmp_path / "traced.pt")
    torch.save((learner.export(readout="vote"), x, learner.predict(x)), tmp_path / "module.pt")
    stranger = tmp_path / "stranger.py"
    stranger.write_text(
        "import sys, types, torch\n"
        "sys.modules['altgrad'] = None\n"
        f"traced = torch.jit.load({str(tmp_path / 'traced.pt')!r})\n"
        f"module, x, expected = torch.load({str(tmp_path / 'module.pt')!r}, weights_only=False)\n"
        "assert torch.allclose(traced(x), expected, atol=1e-6)\n"
        "assert module(x).shape == expected.shape\n"
    )
    done = subprocess.run([sys.executable, str(stranger)], capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_export_is_scripted_and_pickled_whole():
    learner, x = trained(Local(loss="predsim"))
    module, store = learner.export(), io.BytesIO()
    assert torch.equal(torch.jit.script(module)(x), module(x))
    torch.save(module, store)
    store.seek(0)
    assert torch.equal(torch.load(store, weights_only=False)(x), module(x))


@pytest.mark.parametrize("readout", ["goodness", "probe", "own", "0"])
def test_a_read_out_that_takes_several_passes_is_saved_and_captured(readout, tmp_path):
    learner, x = trained(ForwardForward(readout=readout))
    module = learner.export()
    assert torch.equal(module(x), learner.predict(x))
    torch.save(module, tmp_path / "module.pt")
    assert torch.equal(torch.load(tmp_path / "module.pt", weights_only=False)(x), learner.predict(x))
    assert torch.allclose(torch.export.export(module, (x,)).module()(x), learner.predict(x), atol=1e-5)
    other = trained(ForwardForward(readout=readout))[0].export()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), learner.predict(x))


def test_forward_forwards_reads_are_what_it_predicts():
    learner, x = trained(ForwardForward())
    args = (learner.problem, learner.tensors(), learner.state, x)
    found = learner.engine.reads(*args)
    assert {"goodness", "network", "last", "probe", "own", "0", "2"} == set(found)
    assert all(torch.equal(value, replace(learner.engine, readout=name).predict(*args)) for name, value in found.items())


def test_an_export_can_be_trained_on():
    learner, x = trained(MonoForward())
    module = learner.export()
    module(x).sum().backward()
    assert all(value.grad is not None for name, value in module.named_parameters() if name.startswith("head"))


def test_a_wrong_read_out_is_named():
    learner, _ = trained(MonoForward())
    with pytest.raises(SettingError, match=r"unknown readout 'lst'.*Did you mean 'last'"):
        learner.export(readout="lst")
    with pytest.raises(SettingError, match="engine backprop has one read-out"):
        trained("backprop")[0].export(readout="sum")


@dataclass(frozen=True)
class Shapely(LocalLoss):
    """Scores that ask the activity for its shape."""

    def scores(self, activity, head, site):
        return activity[:, : 3 if activity.shape[1] > 3 else 1]


def test_scores_that_cannot_be_a_graph_are_refused_with_what_to_do():
    learner, x = trained(MonoForward())
    engine = MonoForward()
    engine.__dict__["rule"] = Shapely()
    with pytest.raises(CapabilityError, match=r"Shapely.*site\.shape.*readout='own'"):
        engine.export(learner.problem, learner.tensors(), learner.state)
    engine = MonoForward(readout="own")
    engine.__dict__["rule"] = Shapely()
    assert torch.equal(engine.export(learner.problem, learner.tensors(), learner.state)(x), learner.model(x))


def test_a_problem_without_a_model_has_nothing_to_export():
    problem = Quadratic().build(Key(0))
    with pytest.raises(CapabilityError, match="QuadraticProblem has no model to export"):
        registry.engine("backprop", {}).export(problem, problem.params(), {})


# -- linear probes ----------------------------------------------------------------------------------------------------------------


def features(count=60):
    generator = torch.Generator().manual_seed(4)
    found = {"a": torch.randn(count, 5, generator=generator) * 3 + 1, "b": torch.randn(count, 4, generator=generator)}
    found["b"][:, 2] = 0.7  # a dead unit
    return found, torch.randint(3, (count,), generator=generator)


@pytest.mark.parametrize("names", [("a", "b"), ("b",)])
def test_a_probe_is_scikit_learns_ridge_on_standardised_features(names):
    found, labels = features()
    given = torch.cat([found[name] for name in names], 1).double().numpy()
    scaled = StandardScaler().fit_transform(given)
    expected = Ridge(alpha=0.02 * len(labels)).fit(scaled, F.one_hot(labels, 3).double().numpy()).predict(scaled)
    parts = [({name: value[part] for name, value in found.items()}, labels[part]) for part in (slice(0, 25), slice(25, 60))]
    probe = linear_probe.fit(parts, 3, penalty=0.02, groups=[("a",), names])[1]
    assert torch.allclose(probe.scores(found), torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_a_probe_without_examples_or_with_wild_features_is_refused():
    with pytest.raises(DataError, match="no examples to fit"):
        linear_probe.fit([], 3)
    with pytest.raises(NumericsError, match="not finite"):
        linear_probe.fit([({"a": torch.full((4, 2), float("nan"))}, torch.arange(4) % 3)], 3)
    with pytest.raises(SettingError, match="penalty=0"):
        linear_probe.fit([features()], 3, penalty=0)


def test_features_are_the_blocks_outputs_as_the_next_block_sees_the_one_before():
    learner, x = trained(MonoForward())
    first = learner.model[1](learner.model[0](x))
    found = learner.engine.activities(learner.problem, learner.tensors(), learner.state, x)
    assert torch.equal(found["0"], first)
    assert torch.equal(found["2"], learner.model[3](learner.model[2](first)))


# -- read-outs side by side -------------------------------------------------------------------------------------------------------


def test_reads_give_what_predict_gives_for_every_read_out():
    learner, x = trained(MonoForward())
    args = (learner.problem, learner.tensors(), learner.state, x)
    found = learner.engine.reads(*args)
    assert set(found) == {"own", "last", "sum", "vote", "0", "2"}
    assert all(torch.equal(value, replace(learner.engine, readout=name).predict(*args)) for name, value in found.items())


def test_accuracies_are_those_of_the_test_data():
    training = build(TrainSettings(engine="mono-forward", model_settings={"hidden": "12-9"}))
    found = reading.accuracies(training.engine, training.problem, training.values(), training.state)
    assert found["sum"] == pytest.approx(training.problem.evaluate(training.predict)["accuracy"])
    assert reading.accuracies(registry.engine("backprop", {}), training.problem, training.values(), training.state) == {}


@pytest.fixture(scope="module")
def compared():
    """A local rule beside backprop and deep supervision, tuned."""
    return comparing.compare(
        CompareSettings(
            problem="blobs:Blobs",
            engines=(Choice("mono", "mono-forward"),),
            baselines=("backprop", "backprop + deep supervision"),
            seeds=(0, 1),
            budget="epochs=2",
            lrs=(1e-9, 0.03),
            points=1,
        )
    )


def test_compare_reports_every_read_out_and_the_probes(compared):
    row = compared.rows[-1]
    assert {"own", "last", "sum", "vote", "best", "linear-probe", "linear-probe.0"} <= set(row.readouts)
    assert all(len(values) == 2 and None not in values for values in row.readouts.values())
    assert row.readouts["sum"] == row.accuracies
    assert row.readouts["best"] == row.readouts[row.best_readout]
    assert not compared.rows[0].readouts


def test_the_best_read_out_is_the_one_of_the_tuning_run():
    tuned = comparing.Outcome([], 0.1, False, {}, {"own": 0.4, "sum": 0.7, "0": 0.6})
    assert comparing.best_readout(tuned) == "sum"


def test_the_words_name_the_read_outs(compared):
    told = next(sentence for sentence in compared.verdict() if sentence.startswith("Test accuracy of mono by read-out"))
    assert "sum (the one in the table)" in told
    assert f"best on held-out data ({compared.rows[-1].best_readout})" in told
    assert "linear probe of all blocks" in told


def test_read_outs_survive_json(compared):
    assert Comparison.of(compared.as_dict()).rows[-1].readouts == compared.rows[-1].readouts


def test_read_outs_survive_csv(compared, tmp_path):
    back = from_csv(to_csv(compared, tmp_path / "a.csv"))[-1]
    assert (back["readouts"], back["best_readout"]) == (compared.rows[-1].readouts, compared.rows[-1].best_readout)


def test_deep_supervision_stands_beside_local_rules_only(compared):
    assert [(row.label, row.baseline) for row in compared.rows] == [("backprop", True), ("backprop + deep supervision", True), ("mono", False)]
    others = CompareSettings(problem="blobs:Blobs", engines=(Choice("forward", "forward"),))
    assert "backprop + deep supervision" not in [choice.label for choice in others.choices()]
