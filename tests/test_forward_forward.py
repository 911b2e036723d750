"""Forward-forward, SymBa and layer collaboration: gradients against autograd, labels in inputs, read-outs, learning, and what is refused."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from console import invoke
from local_bench import EXACT, KEY, Bench, apart, data, mlp
from tolerances import tolerance
from torch import nn

import altgrad
from altgrad import data as datasets
from altgrad import models
from altgrad.engines.forward_forward import ForwardForward
from altgrad.errors import CapabilityError, DataError, SettingError, ShapeError
from altgrad.learner import Learner
from altgrad.local.labels import marks_of, no_label, wrong_labels
from altgrad.problem import Batch
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers
from altgrad.world import World

SHARE = ForwardForward().label_scale


def scaled(x):
    """Rows of mean square 1."""
    return x / (x.flatten(1).square().mean(1, keepdim=True) + 1e-8).sqrt().view(-1, *(1 for _ in x.shape[1:]))


def written(x, marks):
    """Marks over the first numbers of rows of mean square 1."""
    rows = scaled(x).flatten(1).clone()
    rows[:, : marks.shape[1]] = SHARE * rows.shape[1] ** 0.5 * marks
    return rows.view(x.shape)


def by_hand(bench, *, classes=3):
    """The gradient of every block's loss as the papers write it: one pass with right labels, one with wrong ones, one without."""
    engine, (x, y) = bench.engine, (bench.batch.inputs, bench.batch.targets)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in bench.params.items()}
    blocks = bench.problem.blocks()
    wrong = wrong_labels(y, classes, KEY.fold("wrong"))
    passes = [written(x, marks_of(y, classes, x)), written(x, marks_of(wrong, classes, x)), written(x, no_label(len(x), classes, x))]
    goodness, units, total, means = [], [], 0.0, []
    for block in blocks[:-1]:
        outputs = [block.apply(leaves, rows, {}) for rows in passes]
        squares = [output.flatten(1).square() for output in outputs]
        goodness.append([(square.sum(1) if engine.goodness == "sum" else square.mean(1)) for square in squares[:2]])
        units.append(squares[0].shape[1] if engine.goodness == "sum" else 1)
        means.append(outputs[0].flatten(2).mean(2).mean(0) if outputs[0].ndim > 2 else outputs[0].mean(0))
        probe = F.linear(scaled(outputs[2].detach()).flatten(1), leaves[f"probe.{block.name}.weight"], leaves[f"probe.{block.name}.bias"])
        total = total + F.cross_entropy(probe, y)
        passes = [scaled(output.detach()) for output in outputs]
    for own, (right, off) in enumerate(goodness):
        limit = engine.threshold * units[own]
        if engine.variant == "symba":
            total = total + F.softplus(-4 / units[own] * (right - off)).mean()
            continue
        if engine.variant == "collaboration":
            others = [place for place in range(len(goodness)) if place < own or (place > own and engine.others == "all")]
            right, off = (side + engine.gamma * sum(goodness[place][which].detach() for place in others) for which, side in enumerate((right, off)))
            limit = limit + engine.gamma * sum(engine.threshold * units[place] for place in others)
        total = total + (F.softplus(-(right - limit)) + F.softplus(off - limit)).mean()
        if engine.peer:
            running = 0.9 * 0 + 0.1 * means[own]
            total = total + engine.peer * (running.mean() - running).square().mean()
    total = total + F.cross_entropy(blocks[-1].apply(leaves, passes[2], {}), y)
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}


VARIANTS = [
    {},
    {"rows": 5},
    {"goodness": "mean", "threshold": 0.3},
    {"peer": 0.5},
    {"variant": "symba"},
    {"variant": "collaboration"},
    {"variant": "collaboration", "others": "before", "gamma": 0.7},
]


# -- gradients --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_every_blocks_gradient_is_autograds_of_the_loss_written_out(settings):
    bench = Bench(ForwardForward(**settings), mlp(5, 7, 6, 4, 3))
    found, exact = bench.look().grads, by_hand(bench)
    assert set(found) == set(exact) == set(bench.params)
    assert apart(found, exact) <= EXACT


def test_convolutions_follow_the_goodness_of_the_whole_map():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()
    images = torch.randn(6, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    model.example_inputs = images
    bench = Bench(ForwardForward(peer=0.5), model, batch=Batch(images, torch.arange(6) % 3))
    assert apart(bench.look().grads, by_hand(bench)) <= EXACT


@pytest.mark.parametrize("others", ["all", "before"])
def test_collaboration_without_the_others_goodness_is_forward_forward(others):
    plain = Bench(ForwardForward()).look()
    silent = Bench(ForwardForward(variant="collaboration", others=others, gamma=0.0)).look()
    assert all(torch.equal(plain.grads[name], grad) for name, grad in silent.grads.items())


def test_the_others_goodness_moves_a_blocks_gradient():
    plain, moved = (Bench(ForwardForward(variant=variant), mlp(5, 7, 6, 4, 3)).look().grads for variant in ("logistic", "collaboration"))
    assert all(not torch.allclose(plain[name], moved[name]) for name in ("0.weight", "2.weight", "4.weight"))
    assert torch.equal(plain["6.weight"], moved["6.weight"])


def test_examples_without_a_label_do_not_count():
    inputs, labels = data()
    labels[8:] = -100
    all_of_them = Bench(ForwardForward(), batch=Batch(inputs, labels)).look()
    first = Bench(ForwardForward(), batch=Batch(inputs[:8], labels[:8])).look()
    assert float(abs(all_of_them.loss - first.loss)) <= tolerance("rounding32")  # the share of labels is a float32
    assert apart(all_of_them.grads, first.grads) <= tolerance("rounding32")


def test_peer_normalisation_keeps_the_running_mean_of_activities_on_right_labels():
    bench = Bench(ForwardForward(peer=0.03))
    state = bench.look().state
    x, y = bench.batch.inputs, bench.batch.targets
    activity = torch.tanh(F.linear(written(x, marks_of(y, 3, x)), bench.params["0.weight"], bench.params["0.bias"]))
    assert torch.allclose(state["local.activity.0"], 0.1 * activity.mean(0).detach(), atol=tolerance("rounding64"))


def test_an_examples_rows_see_one_dropout_mask():
    whole = []
    with AddressedSamplers(KEY, first=6, examples=12, copies=3):
        whole.append(F.dropout(torch.ones(12, 50), 0.5))
    rows = whole[0].view(4, 3, 50)
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert torch.equal(rows[:, 0], rows[:, 2])
    assert not torch.equal(rows[0, 0], rows[1, 0])
    with AddressedSamplers(KEY, first=2, examples=4):
        assert torch.equal(F.dropout(torch.ones(4, 50), 0.5), rows[:, 0])
    with AddressedSamplers(KEY, first=10, examples=5, copies=3):  # a part that begins inside an example
        assert torch.equal(F.dropout(torch.ones(5, 50), 0.5), whole[0][4:9])


@pytest.mark.parametrize("settings", [{}, {"variant": "collaboration"}, {"peer": 0.1}], ids=str)
def test_parts_of_a_batch_and_ranks_change_rounding_only(settings):
    one, other = (Bench(ForwardForward(rows=rows, **settings), mlp(5, 7, 6, 3, dropout=0.5)).look().grads for rows in (1024, 5))
    assert apart(one, other) <= EXACT


# -- read-outs --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [10_000, 12])
def test_goodness_of_all_labels_in_one_call_is_a_loop_over_labels(at_once, monkeypatch):
    monkeypatch.setattr("altgrad.engines.forward_forward.READ_ROWS", at_once)
    bench = Bench(ForwardForward(readout="goodness"), mlp(5, 7, 6, 4, 3))
    x, model = bench.batch.inputs, bench.problem.model
    expected = []
    for label in range(3):
        rows, seen = written(x, marks_of(torch.full((12,), label), 3, x)), []
        for layer in (0, 2, 4):
            rows = torch.tanh(model[layer](rows))
            seen.append(rows.square().sum(1))
            rows = scaled(rows)
        expected.append(torch.stack(seen, 1))
    expected = torch.stack(expected, 1).detach()  # [N, classes, blocks]

    def read(**settings):
        return replace(bench.engine, **settings).predict(bench.problem, bench.params, bench.state, x)

    cases = {"goodness": expected[..., 1:], "network": expected, "last": expected[..., 2:], "2": expected[..., 1:2]}
    for readout, parts in cases.items():
        assert torch.allclose(read(readout=readout), parts.sum(2), atol=tolerance("rounding64"))
    assert torch.allclose(read(skip=2), expected[..., 2:].sum(2), atol=tolerance("rounding64"))
    assert torch.allclose(read(skip=9), expected[..., 2:].sum(2), atol=tolerance("rounding64"))  # the last block is always read


def test_probe_and_own_head_read_inputs_without_a_label():
    bench = Bench(ForwardForward(readout="probe"))
    x, model, params = bench.batch.inputs, bench.problem.model, bench.params
    rows, said = written(x, no_label(12, 3, x)), []
    for layer in (0, 2):
        rows = scaled(torch.tanh(model[layer](rows)))
        said.append(F.linear(rows, params[f"probe.{layer}.weight"], params[f"probe.{layer}.bias"]))
    assert torch.allclose(bench.engine.predict(bench.problem, params, {}, x), sum(said) / 2, atol=tolerance("rounding64"))
    own = replace(bench.engine, readout="own").predict(bench.problem, params, {}, x)
    assert torch.allclose(own, model[4](rows), atol=tolerance("rounding64"))


def test_blocks_that_were_never_trained_are_not_read():
    bench = Bench(ForwardForward(schedule="sequential", block_steps=1, readout="network"), mlp(5, 7, 6, 4, 3))
    x = bench.batch.inputs
    bench.state = bench.look(KEY.at(0)).state
    found = bench.engine.predict(bench.problem, bench.params, bench.state, x)
    assert torch.equal(found, bench.engine.goodnesses(bench.problem, bench.params, {}, x)["0"])


# -- learning ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


def accuracy(digits, rate, *, epochs=4, batch=32, seed=0, **settings):
    """Held-out accuracy of a 64-128-128-10 network on the digits."""
    model = models.build("mlp", {"hidden": "128-128"}, input_shape=(64,), classes=10, key=Key(seed))
    learner = Learner(model, F.cross_entropy, engine="forward-forward", seed=seed, **settings)
    optimizer = torch.optim.Adam(learner.parameters(), lr=rate)
    for epoch in range(epochs):
        order = torch.randperm(len(digits.train_inputs), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(batch):
            optimizer.zero_grad()
            learner.backward(digits.train_inputs[index], digits.train_targets[index])
            optimizer.step()
    return float((learner.predict(digits.test_inputs).argmax(1) == digits.test_targets).float().mean())


@pytest.mark.parametrize("rate", [3e-4, 1e-3, 3e-3])
def test_defaults_learn_the_digits_at_every_usual_rate(digits, rate):
    assert accuracy(digits, rate) > 0.6


@pytest.mark.parametrize("settings", [{"variant": "symba"}, {"variant": "collaboration"}, {"goodness": "mean"}], ids=str)
def test_variants_learn_the_digits(digits, settings):
    assert accuracy(digits, 2e-3, epochs=3, **settings) > 0.7


def test_collapsed_goodness_is_reported_and_warned_of_once():
    model = mlp(5, 7, 6, 3)
    with torch.no_grad():
        model[2].weight.mul_(0.01), model[2].bias.zero_()
    bench = Bench(ForwardForward(), model)
    assert int(bench.look(KEY.at(99)).metrics["collapsed"]) == 1
    assert int(Bench(ForwardForward()).look(KEY.at(100)).metrics["collapsed"]) == 0
    with pytest.warns(UserWarning, match=r"goodness has collapsed in block 2: at step 100 it is below 0\.05"):
        bench.look(KEY.at(100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bench.look(KEY.at(200))


def test_metrics_tell_goodness_on_right_and_wrong_labels_and_count_three_passes():
    found = Bench(ForwardForward(rows=5)).look().metrics
    whole = Bench(ForwardForward()).look().metrics
    assert set(found) >= {f"{name}.{block}" for name in ("loss", "goodness", "wrong_goodness", "right", "accuracy", "probe_loss") for block in ("0", "2")}
    assert all(torch.allclose(found[name], value) for name, value in whole.items())
    assert float(whole["forwards"]) == 3
    assert float(Bench(ForwardForward(variant="collaboration")).look().metrics["forwards"]) == 6


# -- what is refused --------------------------------------------------------------------------------------------------------------


def test_an_input_too_small_for_the_overlay_is_refused_with_concatenation():
    with pytest.raises(CapabilityError, match=r"an input of 3 numbers has no room for a label of 3 classes.*altgrad\.LabelConcat\(3\)"):
        Learner(mlp(3, 4, 4, 3), F.cross_entropy, engine="forward-forward")


def test_token_ids_are_refused_with_concatenation():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(CapabilityError, match=r"over inputs of torch\.int64; put altgrad\.LabelConcat\(3, vocabulary=…\)"):
        Learner(model, F.cross_entropy, engine="forward-forward", example=torch.zeros(2, 6, dtype=torch.int64))


def test_a_label_module_of_other_classes_is_refused():
    model = nn.Sequential(altgrad.LabelConcat(4), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ShapeError, match=r"LabelConcat\(4\) was given marks of 3 classes; make it 3"):
        Learner(model, F.cross_entropy, engine="forward-forward", example=torch.zeros(2, 5))


def test_a_one_class_batch_is_warned_of_once():
    bench = Bench(ForwardForward(), batch=Batch(data()[0], torch.full((12,), 2)))
    with pytest.warns(UserWarning, match="all 12 examples of the batch at step 2 have the label 2"):
        bench.look()


def test_a_label_out_of_range_is_refused():
    labels = data()[1].clone()
    labels[4] = 3
    with pytest.raises(DataError, match=r"labels run from 0 to 3 .* they must be in \[0, 2\]"):
        Bench(ForwardForward()).look(batch=Batch(data()[0], labels))


def test_regression_targets_are_refused_with_what_takes_them():
    with pytest.raises(DataError, match=r"takes class labels, int64 of shape \(12,\), but the targets are torch\.float64.*loss=greedy"):
        Bench(ForwardForward(), loss=F.mse_loss).look(batch=Batch(data()[0], torch.zeros(12, 3, dtype=torch.float64)))


def test_a_model_of_one_block_is_refused():
    with pytest.raises(CapabilityError, match=r"two blocks or more.*Use backprop"):
        Learner(nn.Sequential(nn.Linear(5, 3)), F.cross_entropy, engine="forward-forward")


def test_a_problem_without_labels_is_refused():
    with pytest.raises(CapabilityError, match=r"ForwardForward\(\) needs BLOCKS, LABELS.*with_label"):
        altgrad.fit_check(ForwardForward(), altgrad.registry.problem("quadratic", {}).build(Key(0)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "simba"}, "Did you mean 'symba'"),
        ({"goodness": "max"}, "goodness='max'"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"variant": "symba", "alpha": -1.0}, "alpha=-1.0"),
        ({"variant": "collaboration", "others": "after"}, "others='after'"),
        ({"variant": "collaboration", "gamma": -1.0}, "gamma=-1.0"),
        ({"peer": -0.1}, "peer=-0.1"),
        ({"label_scale": 0.0}, "label_scale=0.0"),
        ({"skip": -1}, "skip=-1"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(SettingError, match=message):
        ForwardForward(**settings)


def test_a_wrong_read_out_is_named():
    with pytest.raises(SettingError, match=r"unknown readout 'godness'.*Did you mean 'goodness'"):
        Learner(mlp(5, 4, 3), F.cross_entropy, engine="forward-forward", readout="godness")


def test_two_ranks_see_one_batch_with_dropout():
    """With dropout too: rows are addressed by their example."""
    model = mlp(5, 7, 6, 3, dropout=0.5)
    bench = Bench(ForwardForward(), model)
    x, y = data()
    whole = bench.look().grads
    parts = [
        bench.engine.estimate(bench.problem, bench.params, bench.state, Batch(x[start : start + 6], y[start : start + 6], start), KEY, World(rank, 2)).grads
        for rank, start in enumerate((0, 6))
    ]
    assert apart({name: (parts[0][name] + parts[1][name]) / 2 for name in whole}, whole) <= EXACT


@pytest.mark.parametrize("settings", [[], ["-s", "variant=collaboration", "-s", "schedule=sequential"]], ids=["joint", "sequential"])
def test_the_command_line_trains_it_and_reports_every_read_out(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # run folders
    found = invoke("train", "--engine", "forward-forward", *settings, "--epochs", 1, "--batch-size", 256, "--quiet", "--json")
    assert found.exit_code == 0, found.output
    result = found.output.strip().splitlines()[-1]
    assert all(f'"test_accuracy{readout}"' in result for readout in ("", "_goodness", "_last", "_probe", "_own"))
