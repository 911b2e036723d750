"""What a population costs beside plain inference, on this machine: the measurement behind `altgrad bench lowrank`.

    share = time of plain inference on the same rows / time of the population's forward pass        (1: as cheap as inference)

Contenders are timed in turn, repeat by repeat, and medians of the ratios are reported: a loaded machine slows all of them alike.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from altgrad.engines.evolution import Moves
from altgrad.errors import UsageError, require
from altgrad.kernels import noise
from altgrad.perturb import kurtosis
from altgrad.population import Draws, population
from altgrad.rng import Key

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """A stack of linear layers and the population that goes through it."""

    width: int = field(default=1024, metadata={"help": "inputs and outputs of every layer"})
    depth: int = field(default=3, metadata={"help": "layers"})
    members: int = field(default=256, metadata={"help": "of the population, in antithetic pairs; even"})
    rows: int = field(default=1, metadata={"help": "rows (tokens) of each member's own"})
    rank: int = field(default=1, metadata={"help": "of the perturbation"})
    law: str = field(default="normal", metadata={"help": "of the noise: normal, sign or uniform"})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    repeats: int = field(default=20, metadata={"help": "times that everything is measured"})

    def __post_init__(self) -> None:
        for name in ("width", "depth", "rows", "rank", "repeats"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.members >= 2 and self.members % 2 == 0, "members", self.members, "even and 2 or more")
        require(self.rank < self.width, "rank", self.rank, f"below the width, {self.width}")
        require(self.dtype in DTYPES, "dtype", self.dtype, ", ".join(DTYPES))
        kurtosis(self.law)
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(f"device={self.device!r} is not allowed: PyTorch sees no CUDA device here; it must be cpu.")


def ratios(base: Callable[[], Any], others: Mapping[str, Callable[[], Any]], *, repeats: int, wait: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Median over repeats of time(base) / time(other); `wait` ends what runs behind."""

    def timed(function: Callable[[], Any]) -> float:
        wait()
        start = time.perf_counter()
        function()
        wait()
        return time.perf_counter() - start

    for function in (base, *others.values()):
        timed(function)
        timed(function)
    found: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(repeats):
        plain = timed(base)
        for name, function in others.items():
            found[name].append(plain / timed(function))
    return {name: statistics.median(values) for name, values in found.items()}


def lowrank(settings: Settings) -> dict[str, Any]:
    """The shares of plain inference's speed that a population reaches, and the cost of its update.

    Returns:
        "noise_before", "noise_on_the_way": forward passes, as shares of inference; "update", "update_drawn_again": seconds of the gradient
        estimate over seconds of the forward pass that drew its noise.
    """
    dtype, device = DTYPES[settings.dtype], torch.device(settings.device)
    drawn = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Linear(settings.width, settings.width) for _ in range(settings.depth))).to(device, dtype)
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    x = torch.randn(settings.members, settings.rows, settings.width, generator=drawn).to(device, dtype)
    weights = torch.randn(settings.members, generator=drawn, dtype=torch.float64).to(device)
    step = [0]

    def draws(number: int) -> Draws:
        return Draws(Key(0, number), params, settings.members // 2, sigma=0.01, rank=settings.rank, law=settings.law, antithetic=True)

    def call(values: dict[str, Tensor], own: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (own,))

    def infer() -> None:
        with torch.no_grad():
            model(x)

    def fresh() -> None:
        step[0] += 1
        population(call, draws(step[0]), inputs=x)

    kept = draws(0)
    population(call, kept, inputs=x)
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    with noise.compiled(True):
        forward = ratios(infer, {"noise_before": lambda: population(call, kept, inputs=x), "noise_on_the_way": fresh}, repeats=settings.repeats, wait=wait)
        update = ratios(
            fresh,
            {"update": lambda: dict(Moves(kept, weights)), "update_drawn_again": lambda: dict(Moves(draws(0), weights))},
            repeats=settings.repeats,
            wait=wait,
        )
    return {**forward, **{name: 1 / value for name, value in update.items()}, "compile_seconds": noise.compile_seconds()}
