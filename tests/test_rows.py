"""Activation space gives every example a coefficient of its own only where a layer's rows are the examples and stay apart."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import altgrad

EXAMPLES, DRAWS, TANGENTS = 6, 60, 64


class Centred(nn.Module):
    """Mixes examples without being called batch norm."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(torch.tanh(h - h.mean(0)))


class TimeMajor(nn.Module):
    """Its sequences are as long as the batch, and time comes first: row n is a time, not an example."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.transpose(0, 1))).cumsum(0)[-1])


class Apart(nn.Module):
    """The ordinary case."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def case(kind):
    generator = torch.Generator().manual_seed(0)
    shape = (EXAMPLES, EXAMPLES, 4) if kind is TimeMajor else (EXAMPLES, 4)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (EXAMPLES,), generator=generator)
    model = kind().double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model, x, y


def share_of_gradient(kind, name):
    """⟨mean estimate, gradient⟩ / ‖gradient‖² of one parameter: 1 where the estimate is unbiased."""
    model, x, y = case(kind)
    F.cross_entropy(model(x), y).backward()
    exact = dict(model.named_parameters())[name].grad.clone()
    learner = altgrad.Learner(model, F.cross_entropy, engine="forward", tangents=TANGENTS)
    model.zero_grad()
    for _ in range(DRAWS):
        report = learner.backward(x, y)  # adds up
    mean = dict(model.named_parameters())[name].grad / DRAWS
    return float((mean * exact).sum() / exact.square().sum()), report


@pytest.mark.parametrize("kind", [Centred, TimeMajor])
def test_layers_whose_rows_are_not_examples_get_one_coefficient_a_batch(kind):
    assert share_of_gradient(kind, "last.weight")[1].metrics["coefficient_per_batch"] == 2


@pytest.mark.parametrize("kind", [Centred, TimeMajor, Apart])
def test_the_estimate_is_unbiased_along_the_gradient_however_rows_are_laid_out(kind):
    share, _ = share_of_gradient(kind, "first.weight")
    assert share == pytest.approx(1.0, abs=0.15)  # biased by 0.2 and more where rows are taken for examples wrongly


def test_rows_that_stay_apart_keep_a_coefficient_an_example():
    assert share_of_gradient(Apart, "last.weight")[1].metrics["coefficient_per_batch"] == 0
