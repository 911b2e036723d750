"""Small models with a deep equilibrium layer and the same ones unrolled, for the tests of the layer and of the engine implicit."""

import torch
import torch.nn.functional as F
from torch import nn

from altgrad import models, registry
from altgrad.engine import fit_check
from altgrad.implicit.cells import Contracting, Plain, Subhomogeneous
from altgrad.implicit.layers import DEQ
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key
from altgrad.world import World

KIND = {"dtype": torch.float64}
WIDTH = 6


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **KIND)


class Unrolled(nn.Module):
    """`steps` applications of a cell, from zeros; its parameters have DEQ's names."""

    def __init__(self, cell, steps=300):
        super().__init__()
        self.cell, self.steps = cell, steps

    def forward(self, u):
        z = torch.zeros_like(u)
        for _ in range(self.steps):
            z = self.cell(z, u)
        return z


def network(layer):
    model = nn.Sequential(nn.Linear(4, WIDTH), layer, nn.Linear(WIDTH, 3))
    models.initialise(model, Key(1))
    return model.double()


def fixed_batch():
    return drawn(5, 4, seed=1), torch.tensor([0, 1, 2, 0, 1])


def pair(cell=None, **settings):
    """(a model with the layer, the same one unrolled)."""
    deq = network(DEQ(cell or Plain(WIDTH, nn.Tanh()), tol=1e-13, **settings))
    return deq, nn.Sequential(deq[0], Unrolled(deq[1].cell), deq[2])


def gradients(model):
    x, y = fixed_batch()
    return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


class Fixed(Supervised):
    def batch(self, step, world):
        share = world.share(5)
        x, y = fixed_batch()
        return Batch(x[share.start : share.stop], y[share.start : share.stop], share.start)


def estimated(model, engine="implicit", key=None, **settings):
    problem, rule = Fixed(model, F.cross_entropy), registry.engine(engine, settings)
    fit_check(rule, problem)
    return rule.estimate(problem, problem.params(), {}, problem.batch(0, World()), key or Key(0, 1), World())


def close(found, wanted, limit):
    for own, exact in zip(found, wanted, strict=True):
        assert float((own - exact).norm() / exact.norm()) <= limit


CELLS = {
    "plain": lambda: Plain(WIDTH, nn.Tanh()),
    "contracting": lambda: Contracting(WIDTH, "tanh", kappa=0.8),
    "subhomogeneous": lambda: Subhomogeneous(WIDTH),
}
