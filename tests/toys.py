"""A problem and an engine small enough to check by hand: least squares, and its exact gradient plus addressed noise."""

from dataclasses import dataclass, field
from typing import Any

import torch

from altgrad import rng
from altgrad.engine import Bias, Engine, Estimate, Needs, Split
from altgrad.problem import Batch, Problem
from altgrad.rng import Key


class LeastSquares(Problem):
    """½ mean ‖xW + b - y‖², with batches addressed by the step and two buffers that count and average."""

    name = "least-squares"
    steps_per_epoch = 4

    def __init__(self, key: Key, poison: str):
        self.key, self.poison = key, poison
        self.weight = torch.from_numpy(rng.normal(key.fold("weight"), 0, [0], 6)[0].copy()).reshape(3, 2)
        self.bias = torch.zeros(2)
        self.own_buffers = {"seen": torch.zeros((), dtype=torch.int64), "running": torch.zeros(3)}

    def params(self):
        return {"weight": self.weight, "bias": self.bias}

    def buffers(self):
        return self.own_buffers

    def batch(self, step, world):
        x = torch.from_numpy(rng.normal(self.key.fold("inputs").at(step), 0, [0], 24)[0].copy()).reshape(8, 3)
        if self.poison == f"inputs@{step}":
            x[0, 0] = float("nan")
        return Batch(x, x[:, :2] * 2 + 1)

    def forward(self, params, inputs, buffers):
        return inputs @ params["weight"] + params["bias"]

    def losses(self, params, batch, buffers):
        return 0.5 * (self.forward(params, batch.inputs, buffers) - batch.targets).square().sum(1)

    def evaluate(self, predict, *, split="test"):
        batch = self.batch(10_000, None)
        error = (predict(batch.inputs) - batch.targets).abs()
        return {"loss": float(error.square().mean()), "accuracy": float((error < 0.1).float().mean())}


@dataclass(frozen=True)
class LeastSquaresFactory:
    """Settings of LeastSquares; `poison` = "inputs@7" puts a NaN into the inputs of step 7."""

    poison: str = field(default="", metadata={"help": "where to put a NaN"})

    def build(self, key: Key, *, data_dir: str | None = None) -> LeastSquares:
        return LeastSquares(key, self.poison)


@dataclass(frozen=True)
class Noisy(Engine):
    """The exact gradient plus sigma times addressed noise plus a little of the mean of earlier ones, which is its state."""

    sigma: float = 0.1
    shape: tuple[int, ...] = (1, 2)  # only there to be written to config.json
    leave_out: str = ""
    blow_up: str = ""  # "bias@5": that gradient is infinite at step 5
    huge: bool = False

    needs = Needs.VALUE
    bias = Bias.UNBIASED
    split = Split.DATA
    source = "tests"

    def aux(self, problem: Any, key: Key):
        return {"aux.scale": torch.ones(())}

    def init(self, problem: Any, params: Any, key: Key):
        return {"mean": torch.zeros(3, 2, dtype=torch.float64), "draws": torch.zeros((), dtype=torch.int64)}

    def estimate(self, problem, params, state, batch, key, world):
        assert not any(tensor.requires_grad for tensor in params.values())
        residual = problem.forward(params, batch.inputs, {}) - batch.targets  # [examples, 2]
        weight = batch.inputs.T @ residual / len(residual)
        noise = torch.from_numpy(rng.normal(key, rng.tensor_id("weight"), [0], 6)[0].copy()).reshape(3, 2)
        grads = {"weight": weight + self.sigma * noise + (0.1 * state["mean"]).float(), "bias": residual.mean(0), "aux.scale": params["aux.scale"] - 2}
        if self.huge:
            grads["weight"] = grads["weight"] * 0 + 1e30
        if self.blow_up.endswith(f"@{key.step}"):
            grads[self.blow_up.split("@")[0]][0] = float("inf")
        grads.pop(self.leave_out, None)
        draws = state["draws"] + 1
        return Estimate(
            loss=problem.losses(params, batch, {}).mean(),
            grads=grads,
            state={"mean": state["mean"] + (weight.double() - state["mean"]) / draws, "draws": draws},
            metrics={"forwards": torch.tensor(3), "backwards": torch.tensor(1), "noise_norm": noise.norm()},
            buffers={"seen": problem.buffers()["seen"] + 8, "running": 0.9 * problem.buffers()["running"] + 0.1 * batch.inputs.mean(0).nan_to_num()},
        )
