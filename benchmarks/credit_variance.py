"""The relative variance E‖ĝ - g‖² / ‖g‖² of one draw, with and without influence maps, and what a step takes.

    python benchmarks/credit_variance.py --out benchmarks/records/credit_variance.json

texture   a picture of as many pixels as there are texels; each pixel is a fixed blend of the four texels around it and loses its squared distance to a
          target. spsa, one pair of signs, a group for each texel.
heads     64-32-10, squared losses of ten outputs; likelihood-ratio, one copy, its output layer's units each with the output that they are.
"""

import argparse
import time

import torch
from recording import record
from torch import Tensor, nn

from altgrad import Influence, registry
from altgrad.alignment import exact_gradient
from altgrad.kernels import noise
from altgrad.problem import Batch, Problem
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key, tensor_id
from altgrad.world import World

SIDES = (32, 100, 317)  # texels along an edge: about 10^3, 10^4 and 10^5 of them


def drawn(label: str, *shape: int) -> Tensor:
    """Addressed normal numbers."""
    return noise.draw("normal", Key(0), tensor_id(label), [0], shape)[0]


class Texture(Problem):
    """Pixels blended from the four texels around them."""

    def __init__(self, side: int, *, mapped: bool):
        self.side, self.mapped = side, mapped
        self.texels = drawn("texels", side, side)
        self.shares = drawn("shares", 4, side, side).softmax(0)
        self.target = drawn("target", side, side)
        pixels = torch.arange(side * side).reshape(side, side)
        touching = torch.stack([self.around(pixels, place) for place in range(4)])  # the texel of each pixel
        self.map = Influence.pairs(pixels, touching.flatten(), pixels.expand(4, side, side).flatten(), count=side * side)

    @staticmethod
    def around(values: Tensor, place: int) -> Tensor:
        return values.roll((-(place // 2), -(place % 2)), (0, 1))

    def params(self) -> dict[str, Tensor]:
        return {"texels": self.texels}

    def losses(self, params: dict[str, Tensor], batch: Batch, buffers: dict[str, Tensor]) -> Tensor:
        picture = sum(self.shares[place] * self.around(params["texels"], place) for place in range(4))
        return (picture - self.target).square().reshape(1, -1)

    def influence(self, params: dict[str, Tensor], batch: Batch) -> dict[str, Influence]:
        return {"texels": self.map} if self.mapped else {}


def heads(*, mapped: bool) -> Supervised:
    """An MLP whose ten outputs lose on their own."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(drawn(name, *value.shape) * max(1, value[0].numel()) ** -0.5)
    own = torch.eye(10, dtype=torch.bool)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square()

    return Supervised(model, loss, influence={"2.weight": own, "2.bias": own} if mapped else None)


def measure(problem: Problem, batch: Batch, engine: str, settings: dict[str, object], names: list[str], draws: int) -> dict[str, float]:
    """The relative variance over `draws` keys of the parameters `names`, and the median seconds of an estimate."""
    rule, params = registry.engine(engine, settings), problem.params()
    exact = exact_gradient(problem, params, batch, Key(1))[1]
    state, errors, seconds = rule.init(problem, params, Key(1)), [], []
    for step in range(draws):
        start = time.perf_counter()
        found = dict(rule.estimate(problem, params, state, batch, Key(1, step), World()).grads)
        seconds.append(time.perf_counter() - start)
        errors.append(sum(float((found[name] - exact[name]).square().sum()) for name in names))
    scale = sum(float(exact[name].square().sum()) for name in names)
    return {"relative_variance": sum(errors) / draws / scale, "seconds": sorted(seconds)[draws // 2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=None)
    parser.add_argument("--draws", type=int, default=20)
    given = parser.parse_args()
    rows = []
    for side in SIDES:
        batch = Batch(torch.zeros(1, 1), torch.zeros(1))
        for mapped in (False, True):
            found = measure(Texture(side, mapped=mapped), batch, "spsa", {"noise": "sign"}, ["texels"], given.draws)
            rows.append({"problem": "texture", "engine": "spsa", "parameters": side * side, "map": mapped, **found})
    batch = Batch(drawn("inputs", 16, 64), drawn("targets", 16, 10))
    for mapped in (False, True):
        found = measure(heads(mapped=mapped), batch, "likelihood-ratio", {"copies": 1, "sigma": 0.01}, ["2.weight", "2.bias"], 10 * given.draws)
        rows.append({"problem": "heads", "engine": "likelihood-ratio", "parameters": 330, "map": mapped, **found})
    for row in rows:
        place = f"{row['problem']:8s} {row['engine']:17s} {row['parameters']:7d} map={row['map']!s:6s}"
        print(f"{place} {row['relative_variance']:12.2f} {row['seconds'] * 1e3:8.1f} ms")
    record(given.out, {"draws": given.draws, "rows": rows})


if __name__ == "__main__":
    main()
