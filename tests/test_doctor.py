"""What the doctor says of models that are well, and of models that are not."""

import json
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad import doctor
from altgrad.errors import SettingError, UsageError
from altgrad.probes import EXTRA, FAILING, NATIVE, PROBES, Front, Take, ready


def made(make: Any, *shape: int) -> tuple[nn.Module, Tensor]:
    return ready(make, torch.Generator().manual_seed(0)), torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_the_probe_list_is_the_references_27_and_7():
    assert (len(NATIVE), len(FAILING), len({p.name for p in PROBES})) == (27, 7, 34)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_every_probe_is_driven_and_equals_backprop(precision):
    rows = doctor.examine_probes([*PROBES, *EXTRA], precision=precision)
    assert [row["name"] for row in rows if not (row["driven"] and row["agrees"])] == []


def test_no_probe_keeps_anything_for_a_backward_pass_while_backprop_does():
    assert [row["name"] for row in doctor.examine_probes([*PROBES, *EXTRA]) if row["saved_bytes"]] == []
    assert doctor.examine(*made(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), 3, 4)).saved_bytes_backprop > 0


def test_rungs_are_named_by_module_and_function():
    model, x = made(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2)), 3, 2, 6, 6)
    rows = {(row.module, row.kind, row.function): row.rung for row in doctor.examine(model, x).rows}
    assert rows["0", "Conv2d", "conv2d"] == "rule"
    assert rows["1", "BatchNorm2d", "batch_norm"] == "decomposition"
    assert {rung for (module, _, _), rung in rows.items() if module == "2"} == {"native"}


def test_a_function_without_forward_formula_is_reported_as_a_difference():
    probe = next(p for p in EXTRA if p.name == "autograd.Function without jvp")
    report = doctor.examine(*probe.build(torch.Generator().manual_seed(0)))
    assert report.rung == "difference"
    assert [(row.function, row.rung) for row in report.rows if row.rung == "difference"] == [("Cube", "difference")]
    assert any("Cube" in text for text in report.obstacles)


def test_batch_norm_in_training_is_named_as_mixing_examples_and_not_in_evaluation():
    model, x = made(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), 5, 4)
    training, evaluation = doctor.examine(model, x), doctor.examine(model.eval(), x)
    assert training.mixes_examples == ["1 (BatchNorm1d)"]
    assert training.batch_statistics == ["batch_norm"]
    assert evaluation.mixes_examples == evaluation.batch_statistics == []


def test_mixing_in_a_models_own_code_is_found():
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y - y.mean(0)

    assert doctor.examine(*made(Centred, 5, 4)).mixes_examples == ["the model (Centred)"]


def test_attention_over_the_wrong_axis_is_found_by_changing_an_example():
    wrong = made(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), 5, 3, 8)
    right = made(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 5, 3, 8)
    assert doctor.examine(*wrong).mixes_examples == ["self_attn (MultiheadAttention)"]
    assert doctor.examine(*right).mixes_examples == []


def test_parameters_outside_any_layer_rule_are_named():
    report = doctor.examine(*made(lambda: Front(nn.PReLU(4)), 3, 2, 5, 5))
    assert report.weight_tangents == ["tail.weight"]


def test_layers_whose_rows_are_not_examples_are_named():
    def folded(linear: nn.Module, x: Tensor) -> Tensor:
        return linear(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    report = doctor.examine(*made(lambda: Take(nn.Linear(4, 2), folded), 3, 5, 4))
    assert report.rows_not_examples == ["inner.bias", "inner.weight"]


def test_a_model_that_hides_its_derivative_is_caught():
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(self.linear(x).detach().numpy()) + self.linear(x)[:, :1]

    class Crashes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out = torch.zeros(len(x), 4, dtype=x.dtype)
            out[:] = self.linear(x)
            return out

    assert doctor.examine(*made(Hidden, 3, 4)).agrees  # both drop it alike
    report = doctor.examine(*made(Crashes, 3, 4))
    assert not report.driven
    assert any("out of place" in text for text in report.obstacles)
    assert [fit.fits for fit in report.engines if fit.engine == "forward"] == [False]
    assert [fit.fits for fit in report.engines if fit.engine == "backprop"] == [True]


def test_a_disagreement_is_measured_and_reported(monkeypatch):
    from altgrad.forward_mode.dual import RULES

    monkeypatch.setitem(RULES, F.relu, lambda trace, x, inplace=False: x)
    report = doctor.examine(*made(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), 6, 4))
    assert report.driven
    assert not report.agrees
    assert report.error > 1e-3


def test_the_model_is_left_as_it_was():
    model, x = made(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()), 5, 4)
    before, inputs = {n: v.clone() for n, v in model.state_dict().items()}, x.clone()
    state = torch.get_rng_state()
    doctor.examine(model, x)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.equal(x, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_buffers_that_the_pass_writes_are_named():
    report = doctor.examine(*made(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), 5, 4))
    assert report.buffers_written == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


def test_unused_parameters_are_named():
    report = doctor.examine(*made(lambda: Take(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), lambda both, x: both[0](x)), 5, 4))
    assert report.unused == ["inner.1.weight", "inner.1.bias"]


def test_a_loss_with_targets_is_examined_as_such():
    model, x = made(lambda: nn.Linear(4, 3), 5, 4)
    report = doctor.examine(model, x, loss=F.cross_entropy, targets=torch.tensor([0, 1, 2, 0, 1]))
    assert report.agrees
    assert ("", "cross_entropy") in {(row.module, row.function) for row in report.rows}


def test_frozen_parameters_and_dict_inputs_are_examined():
    model, x = made(lambda: Take(nn.Linear(4, 4), lambda linear, x: linear(x).tanh()), 5, 4)
    model.inner.weight.requires_grad_(False)
    assert doctor.examine(model, {"x": x}).agrees


def test_a_model_that_refuses_float64_is_examined_in_float32():
    report = doctor.examine(*made(lambda: Take(nn.Linear(4, 4), lambda linear, x: linear(x) @ torch.ones(4, 4)), 5, 4))
    assert (report.precision, report.agrees) == ("float32", True)


def test_inputs_that_the_model_refuses_are_a_usage_error():
    with pytest.raises(UsageError, match="Linear fails on these inputs"):
        doctor.examine(*made(lambda: nn.Linear(4, 4), 5, 3))


def test_an_unknown_precision_is_a_setting_error():
    with pytest.raises(SettingError, match="float16"):
        doctor.examine(*made(lambda: nn.Linear(4, 4), 5, 4), precision="float16")


def test_a_report_is_plain_json():
    report = doctor.examine(*made(lambda: nn.Linear(4, 4), 5, 4))
    assert json.loads(json.dumps(report.as_dict()))["rung"] == "rule"


@pytest.fixture
def module_with_models(monkeypatch):
    module = types.ModuleType("models_for_the_doctor")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_inputs_come_from_a_shape_the_model_or_its_module(module_with_models):
    model = nn.Linear(3, 2)
    assert doctor.example_inputs(model, shape="1,28,28").shape == (4, 1, 28, 28)
    with pytest.raises(UsageError, match="--input-shape"):
        doctor.example_inputs(model, "models_for_the_doctor:make")
    module_with_models.example_inputs = lambda: torch.ones(7, 3)
    assert doctor.example_inputs(model, "models_for_the_doctor:make").shape == (7, 3)
    model.example_inputs = torch.ones(5, 3)
    assert doctor.example_inputs(model, "models_for_the_doctor:make").shape == (5, 3)


@pytest.mark.parametrize("shape", ["", "a,b", "0,3", "-1"])
def test_a_shape_that_cannot_be_read_is_a_usage_error(shape):
    with pytest.raises(UsageError, match="input-shape"):
        doctor.example_inputs(nn.Linear(3, 2), shape=shape)
