"""The facade: what somebody's own training loop meets."""

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from altgrad import Key, Learner
from altgrad.data import ResumableSampler
from altgrad.errors import CheckpointError

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 4, generator=GENERATOR), torch.arange(12) % 3
KINDS = {
    "backprop": {},
    "forward": {"tangents": 2},
    "forward-weights": {"engine": "forward", "space": "weights", "tangents": 2},
    "forward-local": {"engine": "forward", "guess": "local", "tangents": 1},
}


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def learner_of(kind="backprop", *, model=None, loss=F.cross_entropy, seed=0, **settings):
    return Learner(model or net(), loss, **{"engine": kind, **KINDS.get(kind, {}), **settings}, seed=seed)


def grads_of(learner):
    return {name: p.grad.clone() for name, p in learner.model.named_parameters() if p.grad is not None}


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def close(one, other):
    return set(one) == set(other) and all(torch.allclose(one[name], other[name], rtol=tolerance("rounding32"), atol=1e-6) for name in one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:the optimizer was not built")
def test_gradients_are_added_to_what_is_there(kind):
    model = net()
    once, twice = (learner_of(kind, model=copy.deepcopy(model)) for _ in range(2))
    once.backward(X, Y)
    for p in twice.parameters():
        p.grad = torch.ones_like(p)
    twice.backward(X, Y)
    assert close({name: grad + 1 for name, grad in grads_of(once).items()}, grads_of(twice))


def test_backprop_fills_what_loss_backward_fills():
    learner = learner_of()
    twin = copy.deepcopy(learner.model)
    report = learner.backward(X, Y)
    loss = F.cross_entropy(twin(X), Y)
    loss.backward()
    assert float(report.loss) == pytest.approx(loss.item())
    assert close(grads_of(learner), {name: p.grad for name, p in twin.named_parameters()})


def test_accumulated_micro_batches_are_the_whole_batchs_gradient():
    model = net()
    whole, parts = learner_of(model=model), learner_of(model=copy.deepcopy(model))
    whole.backward(X, Y)
    for start in (0, 4, 8):
        parts.backward(X[start : start + 4], Y[start : start + 4])
    assert close(grads_of(whole), {name: grad / 3 for name, grad in grads_of(parts).items()})


def test_gradients_can_be_clipped():
    learner = learner_of("forward")
    learner.backward(X, Y)
    nn.utils.clip_grad_norm_(learner.parameters(), 1e-3)
    assert float(torch.cat([p.grad.flatten() for p in learner.parameters()]).norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind):
    learner = learner_of(kind)
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(float(learner.backward(X, Y).loss))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "backprop"])
@pytest.mark.filterwarnings("ignore:the optimizer was not built")
def test_every_backward_draws_other_noise(kind):
    learner = learner_of(kind)
    seen = []
    for _ in range(2):
        learner.model.zero_grad()
        learner.backward(X, Y)
        seen.append(grads_of(learner))
    assert not same(*seen)


def test_frozen_noise_repeats_and_then_moves_on():
    learner = learner_of("forward")
    seen = []
    with learner.frozen_noise():
        for _ in range(2):
            learner.model.zero_grad()
            learner.backward(X, Y)
            seen.append(grads_of(learner))
    learner.model.zero_grad()
    learner.backward(X, Y)
    assert same(seen[0], seen[1])
    assert not same(seen[0], grads_of(learner))


def test_the_seed_decides_the_noise():
    model = net()
    found = []
    for seed in (0, 0, 1):
        learner = learner_of("forward", model=copy.deepcopy(model), seed=seed)
        learner.backward(X, Y)
        found.append(grads_of(learner))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.parametrize("kind", ["backprop", "forward"])
def test_lbfgs_converges_with_a_closure(kind):
    model = nn.Linear(4, 1)
    target = X @ torch.tensor([1.0, -2.0, 0.5, 3.0]) + 0.5
    learner = learner_of(
        kind, model=model, loss=lambda outputs, y: F.mse_loss(outputs[:, 0], y), **({"space": "weights", "tangents": 24} if kind == "forward" else {})
    )
    optimizer = torch.optim.LBFGS(learner.parameters(), lr=0.5 if kind == "forward" else 1.0, max_iter=5)

    def closure():
        optimizer.zero_grad()
        return learner.backward(X, target).loss

    first = F.mse_loss(model(X)[:, 0], target).item()
    for _ in range(20):
        with learner.frozen_noise():
            optimizer.step(closure)
    assert F.mse_loss(model(X)[:, 0], target).item() < 1e-3 * first


DENSE = sorted(
    name
    for name in dir(torch.optim)
    if isinstance(kind := getattr(torch.optim, name), type) and issubclass(kind, torch.optim.Optimizer) and name not in {"Optimizer", "SparseAdam", "LBFGS"}
)


@pytest.mark.parametrize("name", DENSE)
def test_optimizer_of_torch_takes_a_step(name):
    learner = learner_of("forward", model=nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)))  # Muon takes matrices only
    before = [p.detach().clone() for p in learner.parameters()]
    optimizer = getattr(torch.optim, name)(learner.parameters(), lr=1e-2)
    learner.backward(X, Y)
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, learner.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_learner_moved_to_float64_goes_on_in_float64(kind):
    learner = learner_of(kind)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    assert learner.to(torch.float64) is learner
    learner.backward(X.double(), Y)
    assert {p.grad.dtype for p in learner.parameters()} == {torch.float64}
    before = [p.detach().clone() for p in learner.parameters()]
    optimizer.step()  # the optimizer still holds the same parameters
    assert all(not torch.equal(old, new) for old, new in zip(before, learner.parameters(), strict=True))


def test_state_moves_with_the_learner():
    learner = learner_of("forward", space="weights", guess="momentum")
    learner.backward(X, Y)
    learner.to(torch.float64)
    assert {value.dtype for value in learner.state.values()} == {torch.float64}


def test_an_optimizer_built_without_the_engines_own_trainables_is_warned_about():
    learner = learner_of("forward-local")
    torch.optim.SGD(learner.model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"learner\.parameters\(\).*guess\.0\.weight"):
        learner.backward(X, Y)


def test_an_optimizer_built_from_the_learner_is_not_warned_about():
    learner = learner_of("forward-local")
    torch.optim.SGD(learner.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.backward(X, Y)


def test_the_engines_own_trainables_are_trained():
    learner = learner_of("forward-local")
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    before = learner.aux["guess.0.weight"].detach().clone()
    learner.backward(X, Y)
    optimizer.step()
    assert not torch.equal(before, learner.aux["guess.0.weight"])


# -- state and resume ------------------------------------------------------------------------------------------------------------


def run(learner, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        learner.backward(X, Y)
        optimizer.step()


@pytest.mark.parametrize("settings", [{"tangents": 2}, {"tangents": 1, "guess": "local"}, {"space": "weights", "guess": "momentum"}], ids=str)
def test_a_saved_learner_goes_on_bit_for_bit(settings, tmp_path):
    model = net()
    straight = learner_of("forward", model=copy.deepcopy(model), seed=7, **settings)
    optimizer = torch.optim.Adam(straight.parameters(), lr=1e-2)
    run(straight, optimizer, 3)
    torch.save({"model": straight.model.state_dict(), "optimizer": optimizer.state_dict(), "learner": straight.state_dict()}, tmp_path / "saved.pt")
    run(straight, optimizer, 3)

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = learner_of("forward", model=net(), seed=99, **settings)
    resumed.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["learner"])
    other = torch.optim.Adam(resumed.parameters(), lr=1e-2)
    other.load_state_dict(saved["optimizer"])
    run(resumed, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_state_of_another_engine_is_refused():
    with pytest.raises(CheckpointError, match="'forward'"):
        learner_of().load_state_dict(learner_of("forward").state_dict())


def test_state_of_other_settings_is_refused():
    with pytest.raises(CheckpointError, match="other settings"):
        learner_of("forward").load_state_dict(learner_of("forward-local").state_dict())


def test_training_resumed_in_mid_epoch_with_a_dataloader_is_bit_exact():
    examples = TensorDataset(X, Y)

    def fit(learner, optimizer, first, last):
        """Batches `first` … `last` - 1 of an endless run of 3 batches an epoch."""
        sampler = ResumableSampler(examples, key=Key(4))
        loader, count = DataLoader(examples, batch_size=4, sampler=sampler), first
        while count < last:
            epoch, place = divmod(count, 3)
            sampler.set_epoch(epoch, start=4 * place)
            for x, y in loader:
                if count == last:
                    break
                optimizer.zero_grad()
                learner.backward(x, y)
                optimizer.step()
                count += 1

    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, 3))
    straight, halted = (learner_of("forward", model=copy.deepcopy(model)) for _ in range(2))
    optimizers = [torch.optim.Adam(learner.parameters()) for learner in (straight, halted)]
    fit(straight, optimizers[0], 0, 8)
    fit(halted, optimizers[1], 0, 4)
    resumed = learner_of("forward", model=copy.deepcopy(halted.model))
    resumed.load_state_dict(halted.state_dict())
    again = torch.optim.Adam(resumed.parameters())
    again.load_state_dict(optimizers[1].state_dict())
    torch.rand(5)  # the global generator is no part of it
    fit(resumed, again, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


# -- models and losses of all kinds ----------------------------------------------------------------------------------------------


@dataclass
class ModelOutput:
    """An output object as Hugging Face models return it: no tuple, no dict."""

    loss: Tensor | None
    logits: Tensor


class Classifier(nn.Module):
    """Called with keywords; gives logits, and a loss where labels are given."""

    def __init__(self, *, as_object: bool):
        super().__init__()
        self.body, self.as_object = net(), as_object

    def forward(self, inputs=None, labels=None):
        logits = self.body(inputs)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ModelOutput(loss, logits) if self.as_object else {"loss": loss, "logits": logits}


@pytest.mark.parametrize("as_object", [True, False])
@pytest.mark.parametrize("kind", ["backprop", "forward", "forward-weights"])
def test_a_loss_inside_the_models_output_is_used(kind, as_object):
    model = Classifier(as_object=as_object)
    learner = learner_of(kind, model=copy.deepcopy(model), loss=lambda outputs, _: outputs.loss if as_object else outputs["loss"])
    plain = learner_of(kind, model=copy.deepcopy(model), loss=lambda outputs, y: F.cross_entropy(outputs.logits if as_object else outputs["logits"], y))
    report, other = learner.backward({"inputs": X, "labels": Y}, None), plain.backward({"inputs": X}, Y)
    assert float(report.loss) == pytest.approx(float(other.loss))
    assert all(torch.isfinite(p.grad).all() for p in learner.parameters())
    if kind != "forward":  # there the model's own loss gives one coefficient a batch
        assert close(grads_of(learner), grads_of(plain))


@pytest.mark.parametrize("kind", ["backprop", "forward", "forward-weights"])
def test_autocast_and_grad_scaler_train_as_with_autograd(kind):
    learner = learner_of(kind)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in learner.parameters()]
    learner.problem.loss_function = lambda outputs, y: scaler.scale(F.cross_entropy(outputs, y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = learner.backward(X, Y)
    scaler.unscale_(optimizer)
    unscaled = grads_of(learner)
    scaler.step(optimizer)
    scaler.update()
    assert float(report.loss) == pytest.approx(8 * F.cross_entropy(learner.model(X), Y).item(), rel=0.2)
    moved = [old - 0.1 * unscaled[name] for old, name in zip(before, unscaled, strict=True)]
    assert all(torch.allclose(new, expected) for new, expected in zip(learner.parameters(), moved, strict=True))


def test_buffers_move_once_a_backward():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    learner = learner_of("forward", model=copy.deepcopy(model), tangents=3, chunk=1, memory="replay")
    learner.backward(X, Y)
    model(X)
    assert int(learner.model[1].num_batches_tracked) == 1
    assert torch.allclose(learner.model[1].running_mean, model[1].running_mean)


def test_predict_gives_the_models_outputs_without_a_graph():
    learner = learner_of("forward")
    outputs = learner.predict(X)
    assert torch.allclose(outputs, learner.model(X))
    assert not outputs.requires_grad


def test_metrics_of_a_backward_count_forwards():
    report = learner_of("forward", tangents=5).backward(X, Y)
    assert int(report.metrics["forwards"]) == 6
    assert int(report.metrics["backwards"]) == 0
