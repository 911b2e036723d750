"""A quadratic with a matrix and a vector, and the noise and estimates of population engines on it."""

import torch
from tolerances import tolerance

from altgrad.engines.evolution import ES, SPSA, Eggroll
from altgrad.perturb import directions
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.world import World

KEY = Key(7, 4)
ROUNDING, ERRORS = tolerance("rounding64"), tolerance("standard_errors")
ENGINES = [ES, Eggroll, SPSA]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Bowl(Problem):
    """½ xᵀHx + bᵀx of a matrix and a vector together; `wrap` changes what is seen of it."""

    name = "bowl"

    def __init__(self, rows=3, columns=4, *, dtype=torch.float64, wrap=None):
        drawn, size = generator(1), rows * columns + columns
        root = torch.randn(size, size, generator=drawn, dtype=torch.float64)
        self.hessian, self.slope = (root @ root.T / size).to(dtype), torch.randn(size, generator=drawn, dtype=torch.float64).to(dtype)
        self.values = {
            "matrix": torch.randn(rows, columns, generator=drawn, dtype=torch.float64).to(dtype),
            "vector": torch.randn(columns, generator=drawn, dtype=torch.float64).to(dtype),
        }
        self.wrap = wrap or (lambda value: value)

    def params(self):
        return self.values

    def batch_size_of(self, batch):
        return 1

    def losses(self, params, batch, buffers):
        x = torch.cat([params["matrix"].flatten(), params["vector"]])
        return self.wrap(0.5 * x @ self.hessian @ x + self.slope @ x).reshape(1)

    def gradient(self):
        x = torch.cat([value.flatten() for value in self.values.values()])
        return self.hessian @ x + self.slope


NOTHING = Batch((), ())


def look(engine, problem, *, key=KEY, state=None, batch=NOTHING, world=None):
    params = problem.params()
    return engine.estimate(problem, params, engine.init(problem, params, key) if state is None else state, batch, key, world or World())


def flat(grads):
    return torch.cat([grads[name].flatten() for name in sorted(grads)]).double()


def noise_of(engine, problem, key=KEY):
    """E of every direction, all parameters as one vector [D, d], from addresses."""
    stream = (key if engine.seed is None else Key(engine.seed)).fold("evolution").at(key.step // engine.noise_reuse)
    rows = [
        directions(stream, name, problem.params()[name], range(engine.directions), law=engine.noise, rank=engine.rank).dense().flatten(1)
        for name in sorted(problem.params())
    ]
    return torch.cat(rows, 1).double()


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


def raw(engine, **settings):
    return engine(**{"population": 8, "shaping": "raw", "sigma": 0.1, **settings})
