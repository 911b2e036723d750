"""Blocks trained by losses of their own: gradients against autograd, what losses are shown, and what is refused."""

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from local_bench import EXACT, KEY, Bench, apart, by_hand, data, mlp
from tolerances import tolerance
from torch import nn

from altgrad.conformance import probes
from altgrad.doctor import examine
from altgrad.engines.blockwise import Blockwise
from altgrad.engines.deep_supervision import DeepSupervision
from altgrad.engines.local import Local
from altgrad.engines.mono_forward import MonoForward
from altgrad.errors import CapabilityError, DataError, SettingError, UsageError
from altgrad.learner import Learner
from altgrad.local.losses import frame as losses
from altgrad.local.losses.frame import Judged, LocalLoss, Site, flat, width
from altgrad.problem import Batch
from altgrad.samplers import AddressedSamplers

# -- gradients --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1024, 5])
@pytest.mark.parametrize("extra", [{}, {"dropout": 0.5}, {"norm": True}], ids=["plain", "dropout", "norm"])
def test_every_blocks_gradient_is_autograds_of_its_own_loss(extra, rows):
    bench = Bench(MonoForward(rows=rows), mlp(5, 7, 6, 3, **extra))
    found, exact = bench.look().grads, by_hand(bench)
    assert set(found) == set(exact) == set(bench.params)
    assert apart(found, exact) <= EXACT


def test_greedy_follows_any_loss():
    inputs, _ = data()
    bench = Bench(Local(), mlp(5, 7, 6, 2), F.mse_loss, Batch(inputs, inputs[:, :2] ** 2))
    bench.shape = (12, 2)
    assert apart(bench.look().grads, by_hand(bench)) <= EXACT


def test_convolutions_are_projected_flattened():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()
    images = torch.randn(6, 1, 5, 5, dtype=torch.float64)
    model.example_inputs = images
    bench = Bench(MonoForward(), model, batch=Batch(images, torch.arange(6) % 3))
    assert bench.params["local.projection.0"].shape == (3, 27)
    assert apart(bench.look().grads, by_hand(bench)) <= EXACT


@dataclass(frozen=True)
class Pulled(LocalLoss):
    """½ ‖a - t_k‖² with a target of its own for every block."""

    targets: tuple[float, ...] = (0.0, 0.0)

    labels = False

    def judge(self, look):
        return Judged(0.5 * (look.activity - self.targets[look.site.position]).square().sum(1))


@dataclass(frozen=True)
class Pulling(Blockwise):
    targets: tuple[float, ...] = (0.0, 0.0)

    name = "pulling"
    source = "tests"

    @property
    def rule(self):
        return Pulled(self.targets)


@pytest.mark.parametrize("other", [0, 1])
def test_a_blocks_gradient_does_not_move_with_another_blocks_target(other):
    before = Bench(Pulling()).look().grads
    after = Bench(Pulling(targets=(1.0, 0.0) if other == 0 else (0.0, 1.0))).look().grads
    blocks = {0: "0.", 1: "2.", 2: "4."}
    for position, prefix in blocks.items():
        for name in (name for name in before if name.startswith(prefix)):
            assert torch.equal(before[name], after[name]) == (position != other), name


def test_the_loss_is_the_models_own_and_blocks_report_theirs():
    bench = Bench(MonoForward())
    found = bench.look()
    own = bench.problem.loss(bench.params, bench.batch, {})
    assert abs(float(found.loss - own.detach())) <= tolerance("rounding64")
    assert {"loss.0", "loss.2", "accuracy.0", "accuracy.2", "forwards", "backwards"} == set(found.metrics)


def test_frozen_layers_inside_a_block_are_passed_through():
    model = mlp(5, 7, 6, 3)
    model[0].requires_grad_(False)
    bench = Bench(MonoForward(), model)
    assert [block.name for block in bench.problem.blocks()] == ["2", "4"]
    assert apart(bench.look().grads, by_hand(bench)) <= EXACT


def test_running_statistics_move_once_and_as_in_plain_pytorch():
    model = mlp(5, 7, 6, 3, norm=True)
    twin = copy.deepcopy(model).train()
    bench = Bench(MonoForward(), model)
    twin(bench.batch.inputs)
    found = bench.look().buffers
    assert all(torch.allclose(found[name].double(), value.double()) for name, value in twin.named_buffers())
    assert int(found["1.num_batches_tracked"]) == 1


def test_deep_supervision_is_backprop_of_all_losses_added_up():
    bench = Bench(DeepSupervision(), mlp(5, 7, 6, 3, dropout=0.5))
    leaves = {name: value.detach().clone().requires_grad_() for name, value in bench.params.items()}
    inputs, total = bench.batch.inputs, 0.0
    with AddressedSamplers(KEY.fold("samplers"), examples=12):
        for block in bench.problem.blocks():
            inputs = block.apply(leaves, inputs, {})
            head = leaves.get(f"local.projection.{block.name}")
            total = total + F.cross_entropy(inputs if head is None else inputs @ head.T, bench.batch.targets)
    exact = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    assert apart(bench.look().grads, exact) <= EXACT
    bench.problem.model.eval()
    assert torch.equal(bench.engine.predict(bench.problem, bench.params, {}, data()[0]), bench.problem.forward(bench.params, data()[0], {}))


@dataclass(frozen=True)
class Watching(LocalLoss):
    """Reports what it was shown of the other blocks."""

    sees: str = "none"

    labels = False

    def judge(self, look):
        seen = {f"before_{number}": note.mean() for number, note in enumerate(look.before)}
        seen |= {f"after_{number}": note.mean() for number, note in enumerate(look.after)}
        return Judged(look.activity.square().sum(1), {"looks": look.state["looks"] + 1}, seen)

    def first_state(self, site):
        return {"looks": torch.zeros(())}

    def note(self, activity, site):
        return activity.square().sum(1)


@dataclass(frozen=True)
class Watchers(Blockwise):
    sees: str = "none"

    name = "watchers"
    source = "tests"

    @property
    def rule(self):
        return Watching(self.sees)


@pytest.mark.parametrize("schedule", ["joint", "sequential", "interleaved"])
@pytest.mark.parametrize("sees", ["none", "before", "all"])
def test_a_loss_is_shown_the_notes_of_the_blocks_it_asks_for(sees, schedule):
    bench = Bench(Watchers(sees=sees, schedule=schedule, block_steps=1), mlp(5, 7, 6, 4, 3))
    first = torch.tanh(bench.problem.model[0](bench.batch.inputs))
    second = torch.tanh(bench.problem.model[2](first))
    third = torch.tanh(bench.problem.model[4](second))
    one, _, three = (float(activity.detach().square().sum(1).mean()) for activity in (first, second, third))
    found = bench.look(KEY.at(1))  # the second block's turn, where there are turns
    shown = {name: float(value) for name, value in found.metrics.items() if name.startswith(("before", "after")) and name.endswith(".2")}
    expected = {"none": {}, "before": {"before_0.2": one}, "all": {"before_0.2": one, "after_0.2": three}}[sees]
    assert shown == pytest.approx(expected)
    assert float(found.metrics["forwards"]) == (2 if sees == "all" or (sees == "before" and schedule == "sequential") else 1)


def test_a_losss_state_goes_on_and_that_of_blocks_out_of_turn_stays():
    bench = Bench(Watchers())
    bench.state = bench.look().state
    assert {name: float(value) for name, value in bench.look().state.items()} == {"local.looks.0": 2.0, "local.looks.2": 2.0}
    bench = Bench(Watchers(schedule="interleaved", block_steps=1))
    assert [float(bench.look(KEY.at(1)).state[f"local.looks.{block}"]) for block in "02"] == [0.0, 1.0]


# -- losses -----------------------------------------------------------------------------------------------------------------------


def site(*shape):
    return Site("a", 0, 1, shape, 3, (3,), torch.float32, torch.device("cpu"))


def test_projections_start_uniform_on_one_over_the_root_of_their_inputs():
    drawn = losses.MonoForward().heads(site(400), KEY)["projection"]
    assert drawn.shape == (3, 400)
    assert float(drawn.abs().max()) <= 0.05
    assert float(drawn.std()) == pytest.approx(0.05 / 3**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("shape", "most", "expected"), [((5000,), 10, 5000), ((8, 4, 4), 32, 32), ((8, 4, 4), 128, 128), ((6, 8), 16, 16), ((2, 3, 3, 3), 2, 2)]
)
def test_activities_are_averaged_over_patches_until_they_fit(shape, most, expected):
    assert width(shape, most) == expected
    assert flat(torch.randn(2, *shape), most).shape == (2, expected)


def test_averaging_keeps_the_mean_of_a_channel():
    x = torch.randn(2, 3, 4, 4)
    assert torch.allclose(flat(x, 3), x.mean((2, 3)), atol=1e-6)


# -- what is refused --------------------------------------------------------------------------------------------------------------


def test_a_model_of_one_block_is_refused():
    with pytest.raises(CapabilityError, match=r"two blocks or more.*'0' holds all of it.*Use backprop"):
        Learner(nn.Sequential(nn.Linear(3, 2)), F.cross_entropy, engine="mono-forward")


def test_the_doctor_says_that_a_model_cannot_be_cut():
    fits = {fit.engine: fit for fit in examine(nn.Linear(3, 2), torch.randn(4, 3)).engines}
    assert not fits["mono-forward"].fits
    assert "two blocks or more" in fits["mono-forward"].reason
    assert fits["backprop"].fits


def test_a_model_with_shared_parameters_is_refused_by_name():
    with pytest.raises(CapabilityError, match=r"'body\.0' and 'body\.2' share the parameter 'body\.0\.weight'"):
        Learner(probes.Tied(), F.cross_entropy, engine="mono-forward")


def test_a_block_without_parameters_is_refused():
    with pytest.raises(CapabilityError, match="block '1' has no trainable parameter; leave it out of cut"):
        Learner(mlp(3, 4, 2), F.cross_entropy, engine="mono-forward", cut="0,1,2")


def test_a_one_class_batch_is_warned_of_once():
    bench = Bench(MonoForward(), batch=Batch(data()[0], torch.full((12,), 2)))
    with pytest.warns(UserWarning, match="all 12 examples of the batch at step 2 have the label 2"):
        bench.look()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bench.look()


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_out_of_range_is_refused(label):
    labels = data()[1].clone()
    labels[4] = label
    with pytest.raises(DataError, match=r"labels run from .* there are 3 classes; they must be in \[0, 2\]"):
        Bench(MonoForward()).look(batch=Batch(data()[0], labels))


def test_regression_targets_are_refused_with_what_takes_them():
    with pytest.raises(DataError, match=r"takes class labels, int64 of shape \(12,\), but the targets are torch.float64 of shape \(12, 3\).*loss=greedy"):
        Bench(MonoForward(), loss=F.mse_loss).look(batch=Batch(data()[0], torch.zeros(12, 3, dtype=torch.float64)))


def test_a_model_with_one_output_has_no_classes():
    with pytest.raises(CapabilityError, match=r"scores classes, two or more, but the model gives outputs of shape \(1,\)"):
        Learner(mlp(3, 4, 1), F.mse_loss, engine="mono-forward")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "sequentail"}, "Did you mean 'sequential'"),
        ({"block_steps": 0}, "block_steps=0"),
        ({"rows": 0}, "rows=0"),
        ({"cache": -1.0}, "cache=-1.0"),
        ({"features": 0}, "features=0"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(SettingError, match=message):
        MonoForward(**settings)


def test_a_wrong_read_out_or_loss_is_named():
    with pytest.raises(SettingError, match=r"unknown readout 'lst'.*Did you mean 'last'"):
        Learner(mlp(3, 4, 2), F.cross_entropy, engine="mono-forward", readout="lst")
    with pytest.raises(SettingError, match=r"unknown loss 'gredy'.*Did you mean 'greedy'"):
        Local(loss="gredy")
    with pytest.raises(UsageError, match=r"unknown setting 'feature'.*Did you mean 'features'"):
        Local(loss_settings="feature=3")


def test_local_takes_a_losss_settings_as_text_or_as_a_mapping():
    assert Local(loss="mono-forward", loss_settings="features=3").rule.features == 3
    assert Local(loss="mono-forward", loss_settings={"features": 3}) == Local(loss="mono-forward", loss_settings="features=3")
