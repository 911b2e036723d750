"""Labels put into inputs: by which module, and which wrong ones."""

import pytest
import torch
from local_bench import KEY, Bench, data, mlp
from test_forward_forward import SHARE, scaled
from tolerances import tolerance
from torch import nn

import altgrad
from altgrad.engines.forward_forward import ForwardForward
from altgrad.errors import DataError, SettingError
from altgrad.local.labels import Labelled, LabelOverlay, marks_of, wrong_labels
from altgrad.problem import Batch
from altgrad.rng import Key


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_wrong_label_is_never_the_right_one(classes):
    labels = torch.arange(400) % classes
    for seed in range(50):
        drawn = wrong_labels(labels, classes, Key(seed, seed))
        assert bool((drawn != labels).all())
        assert int(drawn.min()) >= 0
        assert int(drawn.max()) < classes


def test_wrong_labels_are_uniform_over_the_others():
    count, classes = 90_000, 10
    labels = torch.arange(count) % classes
    drawn = wrong_labels(labels, classes, Key(3))
    table = torch.zeros(classes, classes).index_put_((labels, drawn), torch.ones(()), accumulate=True)
    expected = count / classes / (classes - 1)
    off = table[~torch.eye(classes, dtype=torch.bool)] - expected
    assert float(off.square().sum()) / expected <= classes * (classes - 2) + tolerance("standard_errors") * (2 * classes * (classes - 2)) ** 0.5  # χ²
    assert float(off.abs().max()) > 0  # drawn, not dealt


def test_hard_wrong_labels_are_drawn_by_their_chances_and_never_right():
    count, classes = 60_000, 5
    labels, chances = torch.arange(count) % classes, torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    drawn = wrong_labels(labels, classes, Key(3), chances=chances.expand(count, classes))
    table = torch.zeros(classes, classes).index_put_((labels, drawn), torch.ones(()), accumulate=True) * classes / count
    expected = (chances * (1 - torch.eye(classes))) / (chances.sum() - chances)[:, None]
    error = (expected * (1 - expected) * classes / count).sqrt()
    assert bool(((table - expected).abs() <= tolerance("standard_errors") * error).all())  # exactly 0 where the chance is 0, the right label's too
    whole = wrong_labels(labels[:30], classes, KEY, chances=chances.expand(30, classes))
    assert torch.equal(whole[13:], wrong_labels(labels[13:30], classes, KEY, first=13, chances=chances.expand(17, classes)))
    alone = torch.nn.functional.one_hot(labels[:30], classes).float()  # sure of the right label: the others are alike
    assert len(set(((wrong_labels(labels[:30], classes, KEY, chances=alone) - labels[:30]) % classes).tolist())) > 1


def test_hard_negatives_are_what_the_probes_take_for_right():
    bench, seen = Bench(ForwardForward(negatives="hard"), mlp(5, 7, 6, 3)), []
    for name, value in bench.params.items():
        if name.startswith("probe."):
            with torch.no_grad():
                value.copy_(torch.tensor([0.0, 40.0, 20.0]) if name.endswith("bias") else torch.zeros_like(value))
    put = bench.problem.with_label
    bench.problem.with_label = lambda x, marks: seen.append(marks) or put(x, marks)
    found = bench.look()
    y = bench.batch.targets
    _, right, wrong, _ = (marks.argmax(1) for marks in seen)  # the pass before, then the three rows
    assert torch.equal(right, y)
    assert torch.equal(wrong, torch.where(y == 1, 2, 1))
    assert float(found.metrics["forwards"]) == 4
    with pytest.raises(SettingError, match="negatives='harder' is not allowed; it must be 'uniform' or 'hard'"):
        ForwardForward(negatives="harder")


def test_wrong_labels_do_not_depend_on_how_a_batch_is_divided():
    labels = torch.arange(30) % 7
    whole = wrong_labels(labels, 7, KEY, first=0)
    assert torch.equal(whole[13:], wrong_labels(labels[13:], 7, KEY, first=13))


def test_overlay_writes_over_the_first_numbers_and_leaves_the_rest():
    images = torch.randn(2, 3, 4, 4)
    found = LabelOverlay(5)(Labelled(images, marks_of(torch.tensor([4, 0]), 5, images)))
    assert found.flatten(1)[:, :5].tolist() == [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]
    assert torch.equal(found.flatten(1)[:, 5:], images.flatten(1)[:, 5:])
    assert LabelOverlay(5)(images).flatten(1)[0, :5].tolist() == pytest.approx([0.2] * 5)


def test_concatenation_adds_features_channels_or_a_token():
    label = torch.tensor([2, 0])
    vectors, texts, images = torch.randn(2, 6), torch.randn(2, 4, 6), torch.randn(2, 3, 5, 5)
    concat = altgrad.LabelConcat(3)
    for x, place, size in ((vectors, lambda y: y[:, 6:], 1), (texts, lambda y: y[:, 1, 6:], 1 / 2), (images, lambda y: y[:, 3:, 2, 4], 1 / 5)):
        found = concat(Labelled(x, marks_of(label, 3, x)))
        assert torch.allclose(place(found), size * torch.tensor([[0.0, 0, 1], [1, 0, 0]]))  # as long as the mark, all in all
        assert float(found.flatten(1).square().sum() - x.square().sum()) == pytest.approx(2, abs=1e-3)
    tokens = torch.tensor([[5, 6], [7, 8]])
    reading = altgrad.LabelConcat(3, vocabulary=100)
    assert reading(Labelled(tokens, marks_of(label, 3, tokens))).tolist() == [[102, 5, 6], [100, 7, 8]]
    assert reading(tokens).tolist() == [[103, 5, 6], [103, 7, 8]]


def test_an_embedded_label_is_trained_with_the_first_block():
    model = nn.Sequential(altgrad.LabelEmbed(3, (2,)), nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = data(features=2)
    model.example_inputs = x
    bench = Bench(ForwardForward(), model, batch=Batch(x, y))
    assert [block.name for block in bench.problem.blocks()] == ["1", "3", "5"]
    assert float(bench.look().grads["0.pattern"].abs().min()) > 0


def test_a_concatenated_label_is_seen_by_the_model_as_it_is_written():
    model = nn.Sequential(altgrad.LabelConcat(3), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    x, y = data(features=2)
    model.example_inputs = x
    bench = Bench(ForwardForward(skip=0), model, batch=Batch(x, y))
    found = bench.engine.goodnesses(bench.problem, bench.params, bench.state, x)["1"]
    rows = torch.cat([scaled(x), SHARE * 2**0.5 * marks_of(torch.full((12,), 2), 3, x)], 1)
    assert torch.allclose(found[:, 2], model[2](model[1](rows)).square().sum(1), atol=tolerance("rounding64"))


def test_with_label_takes_labels_where_the_classes_are_known():
    problem = altgrad.registry.problem("digits", {}).build(Key(0))
    x = problem.dataset.train_inputs[:3]
    assert torch.equal(problem.with_label(x, torch.tensor([1, 2, 3])), problem.with_label(x, marks_of(torch.tensor([1, 2, 3]), 10, x)))
    with pytest.raises(DataError, match="hand in marks"):
        Bench(ForwardForward()).problem.with_label(data()[0], data()[1])
