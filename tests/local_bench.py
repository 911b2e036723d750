"""An engine with local losses on a small model and one batch, and its blocks' gradients by hand."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

import altgrad
from altgrad.local.losses.frame import Greedy
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers
from altgrad.world import World

KEY = Key(5, 2)
EXACT = 1e-10  # figure 2's own: relative, in float64


def mlp(*sizes, dtype=torch.float64, dropout=0.0, norm=False):
    """Linear layers with tanh between them; the same weights for the same arguments."""
    torch.random.default_generator.set_state(torch.Generator().get_state())
    layers = []
    for inner, outer in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(inner, outer), *([nn.BatchNorm1d(outer)] if norm else []), nn.Tanh(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1])).to(dtype)


def data(count=12, features=5, classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, features, generator=generator).to(dtype), torch.arange(count) % classes


class Bench:
    """An engine on a model and one batch."""

    def __init__(self, engine, model=None, loss=F.cross_entropy, batch=None, **problem):
        self.engine, self.problem = engine, Supervised(mlp(5, 7, 6, 3) if model is None else model, loss, **problem)
        altgrad.fit_check(engine, self.problem)
        self.params = {**self.problem.params(), **engine.aux(self.problem, Key(1))}
        self.state = engine.init(self.problem, self.params, KEY)
        self.batch = batch or Batch(*data())

    def look(self, key=KEY, batch=None):
        return self.engine.estimate(self.problem, self.params, self.state, batch or self.batch, key, World())


def by_hand(bench, key=KEY):
    """The gradient of every block's own loss: everything in one graph, the blocks' inputs leaves of their own."""
    blocks, sites, rule = bench.problem.blocks(bench.engine.cut), bench.engine.sites(bench.problem), bench.engine.rule
    leaves = {name: value.detach().clone().requires_grad_() for name, value in bench.params.items()}
    inputs, total, found = bench.batch.inputs, 0.0, {}
    with AddressedSamplers(key.fold("samplers"), examples=len(bench.batch.targets)):
        for position, block in enumerate(blocks):
            output = block.apply(leaves, inputs, bench.problem.fresh_buffers())
            if position == len(sites):
                value = bench.problem.loss_function(output, bench.batch.targets)
            elif isinstance(rule, Greedy):
                head = {part: leaves[f"local.{part}.{block.name}"] for part in ("weight", "bias")}
                value = bench.problem.loss_function((output.flatten(1) @ head["weight"].T + head["bias"]).reshape(bench.shape), bench.batch.targets)
            else:
                value = F.cross_entropy(output.flatten(1) @ leaves[f"local.projection.{block.name}"].T, bench.batch.targets)
            total, inputs = total + value, output.detach()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found.update({name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None})
    return found


def apart(one, other):
    return max(float((one[name] - other[name]).norm() / other[name].norm().clamp_min(1e-30)) for name in other)
