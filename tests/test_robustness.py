"""FGSM: a linear model's closed form, units, what cannot be attacked, and how `compare` reports it."""

import json
import math

import blobs
import pytest
import torch
from console import invoke
from test_compare import FORWARD, settings
from tolerances import tolerance
from torch import nn
from torch.nn.functional import cross_entropy, softplus

from altgrad import compare as comparing
from altgrad import data, errors, report, robustness, trainer
from altgrad.comparison import Comparison
from altgrad.networks import MLP
from altgrad.problems.accuracy import error_of_each
from altgrad.problems.supervised import Supervised
from altgrad.robustness import accuracy_under_fgsm, fgsm
from altgrad.training import TrainSettings

WIDE = {"low": -100.0, "high": 100.0}  # a range of 200, which no step here leaves
FEATURES = 6


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, INPUTS = drawn(FEATURES, seed=1), drawn(400, FEATURES, seed=2)
LABELS = (INPUTS @ WEIGHT + 0.5 * drawn(400, seed=3) > 0).long()
SIGNS = 2 * LABELS.double() - 1  # y in {-1, +1}


def logistic(inputs):
    """w·x as the second of two logits."""
    score = inputs @ WEIGHT.to(inputs.dtype)
    return torch.stack([torch.zeros_like(score), score], 1)


def attacked(model, epsilon, inputs=INPUTS, targets=LABELS, loss=cross_entropy, **range_):
    return accuracy_under_fgsm(model, inputs, targets, epsilons=[epsilon], loss=loss, **(range_ or WIDE))[epsilon]


# -- the closed form -------------------------------------------------------------------------------------------------------------


def test_a_logistic_models_inputs_move_against_their_label_along_the_signs_of_its_weights():
    moved = fgsm(logistic, INPUTS, LABELS, epsilon=0.001, loss=cross_entropy, **WIDE)
    assert torch.allclose(moved, INPUTS - 0.001 * 200 * SIGNS[:, None] * WEIGHT.sign(), rtol=0, atol=tolerance("rounding64"))


@pytest.mark.parametrize("epsilon", [0.0, 0.0005, 0.002, 0.01])
def test_a_logistic_model_keeps_the_examples_whose_margin_exceeds_epsilon_times_the_weights_one_norm(epsilon):
    margin = SIGNS * (INPUTS @ WEIGHT)
    expected = (margin > epsilon * 200 * WEIGHT.abs().sum()).double().mean()
    assert attacked(logistic, epsilon).accuracy == pytest.approx(float(expected))


def test_the_attack_raises_a_logistic_models_loss_to_that_of_the_shrunken_margin():
    moved = fgsm(logistic, INPUTS, LABELS, epsilon=0.001, loss=cross_entropy, **WIDE)
    expected = softplus(0.001 * 200 * WEIGHT.abs().sum() - SIGNS * (INPUTS @ WEIGHT))
    assert torch.allclose(cross_entropy(logistic(moved), LABELS, reduction="none"), expected, rtol=0, atol=tolerance("rounding64"))


def test_no_other_step_of_that_length_lowers_a_linear_models_accuracy_further():
    worst = attacked(logistic, 0.002).accuracy
    for seed in range(5):
        other = INPUTS + 0.002 * 200 * drawn(400, FEATURES, seed=seed).sign()
        assert float((logistic(other).argmax(1) == LABELS).double().mean()) >= worst


# -- units and range -------------------------------------------------------------------------------------------------------------


def test_epsilon_is_a_share_of_the_range_of_each_channel():
    low, high = torch.tensor([-2.0, 0.0]).view(1, 2, 1, 1), torch.tensor([6.0, 1.0]).view(1, 2, 1, 1)
    images = (low + high) / 2 + torch.zeros(3, 2, 4, 4)
    moved = fgsm(
        lambda x: torch.stack([x.mean((1, 2, 3)), 0 * x.mean((1, 2, 3))], 1), images, torch.zeros(3).long(), epsilon=0.1, loss=cross_entropy, low=low, high=high
    )
    assert torch.allclose((images - moved)[0, :, 0, 0], torch.tensor([0.8, 0.1]), atol=tolerance("rounding32"))


def test_standardised_pixels_are_attacked_as_the_pixels_themselves():
    pixels, mean, std = torch.rand(50, FEATURES, generator=torch.Generator().manual_seed(1)), 0.3, 0.2
    labels = torch.arange(50) % 2
    plain = fgsm(lambda x: logistic((x - mean) / std), pixels, labels, epsilon=0.1, loss=cross_entropy)
    range_ = {"low": -mean / std, "high": (1 - mean) / std}
    standardised = fgsm(logistic, (pixels - mean) / std, labels, epsilon=0.1, loss=cross_entropy, **range_)
    assert torch.allclose(standardised * std + mean, plain, atol=tolerance("rounding32"))


def test_attacked_inputs_stay_in_their_range():
    pixels = torch.rand(50, FEATURES, generator=torch.Generator().manual_seed(1))
    moved = fgsm(logistic, pixels, torch.arange(50) % 2, epsilon=0.6, loss=cross_entropy)
    assert float(moved.min()) == 0
    assert float(moved.max()) == 1


def test_the_span_of_digits_is_black_and_white():
    digits = data.load("digits")
    low, high = robustness.span(digits.train_inputs, digits.test_inputs)
    pixels = 16 * (digits.train_inputs - low) / (high - low)  # sixteen grey levels above black
    assert low.numel() == high.numel() == 1
    assert torch.allclose(pixels, pixels.round(), atol=1e3 * tolerance("rounding32") / 16)


def test_the_span_of_colour_images_is_that_of_each_channel():
    images = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1)
    low, high = robustness.span(images[:3], images[3:])
    assert low.shape == high.shape == (1, 3, 1, 1)
    assert torch.equal(high.flatten(), images.amax((0, 2, 3)))


# -- what the gradient is --------------------------------------------------------------------------------------------------------


def test_a_sure_answers_gradient_is_not_rounded_away():
    weight = torch.tensor([[3.0, 1.0], [1.0, 3.0]])  # the logits' slopes agree in sign, so that only their difference tells the way
    inputs = torch.tensor([[7.5, -7.5]])  # a margin of 30: in float32 the probability is 1
    moved = fgsm(lambda x: x @ weight.T, inputs, torch.tensor([0]), epsilon=0.001, loss=cross_entropy, **WIDE)
    assert torch.equal((moved - inputs).sign(), torch.tensor([[-1.0, 1.0]]))


@pytest.mark.parametrize("loss", [cross_entropy, nn.CrossEntropyLoss(reduction="none"), nn.CrossEntropyLoss(reduction="sum")], ids=["mean", "none", "sum"])
def test_how_the_loss_is_reduced_changes_nothing(loss):
    assert attacked(logistic, 0.001, loss=loss) == attacked(logistic, 0.001)


def test_examples_that_nothing_moves_are_counted():
    found = attacked(lambda inputs: logistic(inputs.relu() * torch.eye(FEATURES, dtype=torch.float64)[0]), 0.001)  # reads the first feature, if positive
    assert found.unmoved == pytest.approx(float((INPUTS[:, 0] <= 0).double().mean()))


def test_chunks_do_not_change_the_result(monkeypatch):
    whole = attacked(logistic, 0.002)
    monkeypatch.setattr(robustness, "CHUNK", 7)
    assert attacked(logistic, 0.002) == whole


def test_the_models_own_gradients_and_the_inputs_are_left_alone():
    model, inputs = nn.Linear(FEATURES, 2).double(), INPUTS.clone()
    fgsm(model, inputs, LABELS, epsilon=0.001, loss=cross_entropy, **WIDE)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(inputs, INPUTS)


# -- bad input -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [-0.1, math.nan, math.inf])
def test_an_epsilon_that_is_no_length_is_refused(epsilon):
    with pytest.raises(errors.SettingError, match=r"epsilon=.* is not allowed; it must be a finite number, 0 or more"):
        attacked(logistic, epsilon)


def rounded(inputs):
    return logistic(inputs.sign())


def without_graph(inputs):
    with torch.no_grad():
        return logistic(inputs)


def by_numpy(inputs):
    return torch.from_numpy(inputs.numpy() @ torch.eye(FEATURES, 2).double().numpy())


@pytest.mark.parametrize("model", [rounded, without_graph, by_numpy])
def test_a_model_without_a_derivative_is_named_and_not_called_robust(model):
    with pytest.raises(errors.CapabilityError, match="no derivative that leads to the inputs"):
        attacked(model, 0.1)


def test_a_loss_without_a_derivative_is_named():
    with pytest.raises(errors.CapabilityError, match="zero for all 400 examples"):
        attacked(logistic, 0.1, loss=error_of_each)


def test_inputs_outside_the_range_are_refused_with_what_to_give():
    with pytest.raises(errors.UsageError, match=r"outside \[low, high\] = \[0, 1\].* -mean / std"):
        fgsm(logistic, INPUTS, LABELS, epsilon=0.1, loss=cross_entropy)


def test_an_empty_range_is_refused():
    with pytest.raises(errors.UsageError, match="low must be below high"):
        fgsm(logistic, INPUTS, LABELS, epsilon=0.1, loss=cross_entropy, low=1.0, high=1.0)


def test_inputs_that_are_no_numbers_to_move_are_refused():
    with pytest.raises(errors.CapabilityError, match=r"torch\.int64; FGSM moves inputs along a gradient"):
        attacked(logistic, 0.1, inputs=LABELS[:, None])


def test_no_inputs_are_refused():
    with pytest.raises(errors.ShapeError, match="no example"):
        attacked(logistic, 0.1, inputs=INPUTS[:0], targets=LABELS[:0])


def test_a_gradient_that_is_not_finite_is_named():
    with pytest.raises(errors.NumericsError, match="NaN or infinite"):
        attacked(lambda inputs: logistic(inputs) * math.inf, 0.1)


# -- runs and comparisons --------------------------------------------------------------------------------------------------------


def trained(**changes):
    training = trainer.build(TrainSettings(**{"problem": "blobs:Blobs", "engine": "backprop", "epochs": 3, "lr": 0.01, **changes}))
    trainer.fit(training)
    return training


def test_a_run_without_an_attack_scores_its_test_accuracy():
    training = trained()
    assert robustness.attack(training, epsilons=[0.0])[0.0].accuracy == pytest.approx(training.figures["test_accuracy"])


def test_a_run_is_attacked_in_evaluation_mode_and_left_in_its_own():
    training = trained()
    modes = []
    training.problem.model.register_forward_hook(lambda module, *_: modes.append(module.training))
    training.problem.model.train()
    robustness.attack(training, epsilons=[0.1])
    assert not any(modes)
    assert training.problem.model.training


def test_a_problem_without_a_test_set_is_named():
    with pytest.raises(errors.CapabilityError, match="quadratic has no test set"):
        robustness.attack(trainer.build(TrainSettings(problem="quadratic", engine="backprop")), epsilons=[0.1])


@pytest.fixture(scope="module")
def compared():
    """Backprop and forward gradients, tuned and attacked."""
    return comparing.compare(settings(fgsm=(0.0, 0.1), baselines=("backprop",), lr=None, lrs=(0.01, 0.03)))


def test_every_row_of_a_comparison_has_every_epsilon_and_seed(compared):
    assert [{epsilon: len(values) for epsilon, values in row.fgsm.items()} for row in compared.rows] == [{"0": 2, "0.1": 2}] * 2


def test_a_comparisons_row_without_an_attack_is_its_accuracy(compared):
    for row in compared.rows:
        assert row.fgsm["0"] == pytest.approx(row.accuracies)


def test_a_comparisons_table_has_a_column_for_every_epsilon(compared):
    assert report.headings(compared.rows)[-2:] == ["FGSM 0", "FGSM 0.1"]
    assert {len(report.cells(row)) for row in compared.rows} == {len(report.headings(compared.rows))}


def test_a_comparison_says_what_the_attack_is(compared):
    assert any("one weak attack" in sentence for sentence in compared.method)


def test_an_attacked_comparison_survives_json_and_csv(compared, tmp_path):
    assert Comparison.of(json.loads(json.dumps(compared.as_dict()))).rows == compared.rows
    assert report.from_csv(report.to_csv(compared, tmp_path / "a.csv"))[0]["fgsm"] == compared.rows[0].fgsm


def test_tuning_is_not_attacked(monkeypatch):
    monkeypatch.setattr(robustness, "attack", lambda *_, **__: pytest.fail("a tuning run was attacked"))
    run = comparing.run(settings(fgsm=(0.1,)), FORWARD, seed=0, lr=0.01, tuning=True)
    assert run.fgsm == {}


class Steps(blobs.Blobs):
    """Blobs behind a hard sign."""

    def build(self, key, *, data_dir=None):
        plain = super().build(key)
        return Supervised(nn.Sequential(MLP(activation="sign", hidden="8").build((4,), 3)), plain.loss_function, dataset=plain.dataset, batch_size=16, key=key)


def test_a_network_of_hard_signs_has_no_figure_in_a_comparison():
    row = comparing.compare(settings(problem="test_robustness:Steps", fgsm=(0.1,), engines=(), baselines=("backprop",), seeds=(0,))).rows[0]
    assert row.fgsm == {"0.1": [None]}
    assert report.cells(row)[-1] == "-"


def test_a_problem_without_a_derivative_is_refused_before_any_training():
    choices = settings(problem="accuracy", engines=(comparing.Choice("es", "es"),), fgsm=(0.1,))
    with pytest.raises(errors.CapabilityError, match="problem accuracy: the model and its loss have no derivative"):
        comparing.compare(choices)


@pytest.mark.parametrize("epsilons", [(-0.1,), (0.1, 0.1), (math.inf,)])
def test_a_comparison_refuses_bad_epsilons(epsilons):
    with pytest.raises(errors.SettingError, match=r"fgsm=.* different finite numbers, 0 or more"):
        settings(fgsm=epsilons)


def test_the_command_line_attacks_what_it_compared(tmp_path):
    told = ("--problem", "blobs:Blobs", "--engines", "backprop", "--budget", "epochs=1", "--lr", "0.01", "--seeds", 1, "--points", 1)
    done = invoke("compare", *told, "--fgsm", "0.05,0.1", "--out", tmp_path / "c")
    assert done.exit_code == 0, done.stderr
    assert "FGSM 0.05" in done.stdout
    assert "FGSM 0.1" in done.stdout


def test_the_command_line_names_epsilons_that_are_no_numbers():
    done = invoke("compare", "--fgsm", "a;b")
    assert done.exit_code == 2
    assert "--fgsm 'a;b' is not a list of numbers" in done.stderr
