"""The losses of the table against losses written by hand, in NumPy or in one line, and against autograd."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_local import EXACT, KEY, Bench, apart, mlp, site
from torch import nn

from altgrad import registry, trainer
from altgrad.engines.deep_supervision import DeepSupervision
from altgrad.engines.local import Local
from altgrad.engines.predsim import PredSim as PredSimEngine
from altgrad.errors import CapabilityError, SettingError
from altgrad.learner import Learner
from altgrad.local.losses import TABLE, ChannelGoodness, PredSim, Prototypes
from altgrad.local.losses.frame import Look
from altgrad.local.losses.predsim import embedded, similarities
from altgrad.problem import Batch
from altgrad.samplers import AddressedSamplers
from altgrad.training import TrainSettings, build


def images():
    """A batch of images [6, 2, 5, 5], float64, and the model for them."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)).double()
    inputs = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    model.example_inputs = inputs
    return model, Batch(inputs, torch.arange(6) % 3)


def cosines(x):
    """S(x) by the definition, pair by pair."""
    x = x - x.mean(1, keepdim=True)
    return torch.stack([torch.stack([torch.dot(a, b) / (a.norm() * b.norm()) for b in x]) for a in x])


def predsim(activity, head, labels, beta, kernel=True):
    told = F.cross_entropy(activity.flatten(1) @ head["weight"].T + head["bias"], labels)
    if activity.ndim == 4:
        maps = F.conv2d(activity, head["kernel"], padding=1)
        seen = ((maps - maps.mean((2, 3), keepdim=True)).square().sum((2, 3)) / (maps[0, 0].numel() - 1)).sqrt()
    else:
        seen = activity @ head["kernel"].T if kernel else activity
    return (1 - beta) * told + beta * (cosines(seen) - cosines(torch.eye(3).to(seen)[labels])).square().mean()


def channels(activity, labels, temperature=1.0, power=2):
    means = (activity**power).flatten(2).mean(2) if activity.ndim > 2 else activity**power
    edges = [len(means[0]) * j // 3 for j in range(4)]
    scores = torch.stack([means[:, edges[j] : edges[j + 1]].sum(1) / (edges[j + 1] - edges[j]) for j in range(3)], 1) / temperature
    return -torch.log(scores.exp()[torch.arange(len(labels)), labels] / scores.exp().sum(1)).mean()


def prototypes(activity, directions, labels, temperature):
    a = activity.flatten(1)
    cosine = (a @ directions.T) / (a.norm(dim=1)[:, None] * directions.norm(dim=1))
    return F.nll_loss((cosine / temperature).log_softmax(1), labels)


def layer(activity):
    flat = activity.flatten(1)
    spread = ((flat - flat.mean(1, keepdim=True)).square().mean(1, keepdim=True) + 1e-5).sqrt()
    return ((flat - flat.mean(1, keepdim=True)) / spread).reshape(activity.shape)


LOSSES = {
    "predsim": (Local(loss="predsim"), lambda a, head, y: predsim(a, head, y, 0.99)),
    "predsim half": (Local(loss="predsim", loss_settings="similarity=0.5"), lambda a, head, y: predsim(a, head, y, 0.5)),
    "channels": (Local(loss="channel-goodness"), lambda a, head, y: channels(a, y)),
    "deeper": (
        Local(loss="channel-goodness", loss_settings="goodness=mean,normalise=layer,temperature=0.5"),
        lambda a, head, y: channels(a, y, temperature=0.5, power=1),
    ),
    "prototypes": (Local(loss="prototypes"), lambda a, head, y: prototypes(a, head["prototypes"], y, 0.1)),
}


def by_hand(bench, loss):
    """Gradients of every block's loss, and of the head's, as a plain program computes them."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in bench.params.items()}
    inputs, total, blocks = bench.batch.inputs, 0.0, bench.problem.blocks()
    with AddressedSamplers(KEY.fold("samplers"), examples=len(bench.batch.targets)):
        for block in blocks:
            output = block.apply(leaves, inputs, {})
            head = {
                short: leaves[f"local.{short}.{block.name}"] for short in ("weight", "bias", "kernel", "prototypes") if f"local.{short}.{block.name}" in leaves
            }
            total = total + (F.cross_entropy(output, bench.batch.targets) if block is blocks[-1] else loss(output, head, bench.batch.targets))
            inputs = layer(output.detach()) if "normalise=layer" in bench.engine.loss_settings else output.detach()
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


# -- gradients --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("shape", ["vectors", "maps"])
def test_every_blocks_gradient_is_that_of_the_loss_written_by_hand(kind, shape):
    engine, loss = LOSSES[kind]
    model, batch = (mlp(5, 7, 6, 3, dropout=0.5), None) if shape == "vectors" else images()
    bench = Bench(engine, model, batch=batch)
    exact = by_hand(bench, loss)
    found = dict(bench.look().grads)
    assert set(found) == set(exact)
    assert apart(found, exact) <= EXACT


def test_deep_supervision_with_a_losss_own_heads_is_backprop_of_all_losses():
    bench = Bench(DeepSupervision(loss="predsim"))
    leaves = {name: value.detach().clone().requires_grad_() for name, value in bench.params.items()}
    first = torch.tanh(bench.batch.inputs @ leaves["0.weight"].T + leaves["0.bias"])
    second = torch.tanh(first @ leaves["2.weight"].T + leaves["2.bias"])
    total = F.cross_entropy(second @ leaves["4.weight"].T + leaves["4.bias"], bench.batch.targets)
    for name, activity in (("0", first), ("2", second)):
        total = total + predsim(activity, {short: leaves[f"local.{short}.{name}"] for short in ("weight", "bias", "kernel")}, bench.batch.targets, 0.99)
    exact = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    assert apart(dict(bench.look().grads), exact) <= EXACT


@pytest.mark.parametrize("name", TABLE)
def test_a_large_batch_run_in_parts_gives_the_gradient_of_the_whole(name):
    whole, parts = (dict(Bench(Local(loss=name, rows=rows)).look().grads) for rows in (1024, 5))
    assert apart(parts, whole) <= EXACT


def test_the_engine_predsim_is_local_with_its_loss():
    settings = {"similarity": 0.25, "features": 4, "transform": False}
    named, plain = (dict(Bench(engine).look().grads) for engine in (PredSimEngine(**settings), Local(loss="predsim", loss_settings=settings)))
    assert set(named) == set(plain)
    assert all(torch.equal(named[name], plain[name]) for name in named)


# -- similarity matching ----------------------------------------------------------------------------------------------------------


def test_similarities_are_numpys_correlations():
    x = torch.randn(7, 11, dtype=torch.float64)
    assert np.allclose(similarities(x).numpy(), np.corrcoef(x.numpy()), rtol=0, atol=1e-12)


def test_a_constant_row_is_alike_to_nothing_and_has_a_finite_gradient():
    x = torch.randn(4, 5, dtype=torch.float64)
    x[1] = 2.0
    x.requires_grad_()
    found = similarities(x)
    found.square().sum().backward()
    assert torch.equal(found[1], torch.zeros(4, dtype=torch.float64))
    assert bool(torch.isfinite(x.grad).all())


def test_activities_alike_as_their_labels_are_have_no_similarity_loss():
    labels = torch.arange(6) % 3
    rule, where = PredSim(similarity=1.0, transform=False), site(3)
    judged = rule.judge(Look(torch.eye(3)[labels] * 5 + 2, labels, rule.heads(where, KEY), {}, where, None, (), (), KEY))
    assert float(judged.losses.abs().max()) < 1e-10


def test_labels_that_are_left_out_leave_out_their_pairs():
    labels, where = torch.tensor([0, -100, 1, 2]), site(4)
    rule, activity = PredSim(), torch.randn(4, 4)
    head = rule.heads(where, KEY)
    losses = rule.judge(Look(activity, labels, head, {}, where, None, (), (), KEY)).losses
    kept = [0, 2, 3]
    alone = rule.judge(Look(activity[kept], labels[kept], head, {}, where, None, (), (), KEY))
    told = F.cross_entropy(rule.scores(activity[kept], head, where), labels[kept], reduction="none")
    assert float(losses[1]) == 0.0
    matched = alone.losses - 0.01 * told
    assert torch.allclose(losses[kept], 0.01 * told + matched * 3 / 4, atol=1e-6)  # the mean still runs over four


def test_a_sequence_is_matched_by_the_spread_over_time():
    where, rule = site(3, 5), PredSim()
    activity, head = torch.randn(2, 3, 5), rule.heads(where, KEY)
    assert head["kernel"].shape == (5, 5)
    assert torch.allclose(embedded(activity, head, where), (activity @ head["kernel"].T).std(1), atol=1e-6)


def test_without_a_transform_there_is_no_kernel():
    assert "kernel" not in PredSim(transform=False).heads(site(8), KEY)


# -- channels and prototypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [9, 10, 3])
def test_every_channel_belongs_to_one_class(width):
    rule = ChannelGoodness()
    owners = torch.stack([rule.scores(row[None], {}, site(width))[0] for row in torch.eye(width)])  # [channels, classes]
    assert torch.equal((owners > 0).sum(1), torch.ones(width, dtype=torch.int64))
    assert torch.equal(owners.argmax(1), owners.argmax(1).sort().values)
    assert torch.allclose(owners.sum(0), torch.ones(3))


def test_a_block_with_fewer_channels_than_classes_is_refused():
    with pytest.raises(CapabilityError, match=r"block '0' has 2 for 3 classes.*cut=.*loss=mono-forward"):
        Learner(mlp(5, 2, 6, 3), F.cross_entropy, engine=Local(loss="channel-goodness"))


def test_a_prototypes_score_is_the_cosine_over_the_temperature():
    rule = Prototypes(temperature=0.25)
    directions = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    found = rule.scores(torch.tensor([[5.0, 0.0]]), {"prototypes": directions}, site(2))
    assert torch.allclose(found, torch.tensor([[4.0, 0.0, 4 / math.sqrt(2)]]), atol=1e-6)


def test_fixed_prototypes_get_no_gradient_and_the_block_gets_the_same():
    learned, fixed = (dict(Bench(Local(loss="prototypes", loss_settings={"learned": flag})).look().grads) for flag in (True, False))
    assert set(learned) - set(fixed) == {"local.prototypes.0", "local.prototypes.2"}
    assert all(torch.equal(fixed[name], learned[name]) for name in fixed)


# -- training and settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "accuracy"), [("predsim", 0.9), ("channel-goodness", 0.85), ("prototypes", 0.85)])
def test_it_learns_digits(name, accuracy):
    result = trainer.fit(build(TrainSettings(engine="local", engine_settings={"loss": name}, epochs=4, lr=3e-3)))
    assert result.test_accuracy > accuracy


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        ("predsim", "similarity=1.5", "similarity=1.5"),
        ("predsim", "features=0", "features=0"),
        ("channel-goodness", "goodness=sqare", "Did you mean 'square'"),
        ("channel-goodness", "normalise=leyer", "Did you mean 'layer'"),
        ("channel-goodness", "temperature=0", "temperature=0"),
        ("prototypes", "temperature=-1", "temperature=-1"),
        ("prototypes", "features=0", "features=0"),
    ],
)
def test_wrong_settings_of_a_loss_are_named(loss, settings, message):
    if loss == "predsim":
        with pytest.raises(SettingError, match=message):
            registry.engine(loss, registry.split_pairs([settings]))
    with pytest.raises(SettingError, match=message):
        Local(loss=loss, loss_settings=settings)
