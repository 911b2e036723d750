"""Populations beside their peers: members per second of a whole step, and accuracy after equal evaluations. One script, one process, one run.

    python benchmarks/population_peers.py --part speed --out benchmarks/records/population_peers.json
    python benchmarks/population_peers.py --part accuracy --out benchmarks/records/population_peers.json

Everyone trains the same MLP 784-256-10 (ReLU, cross entropy) from the same weights on the same batches of 64 images of 28x28, with 256 members a step,
in antithetic pairs wherever the peer has them.

speed      seconds of a whole step (draw, evaluate, update), the median over repeats; in each repeat every contender has its turn, so the ratios are
           taken side by side. The first step of a turn is not timed: it finds the caches as another contender left them. Compiling is not timed either,
           and reported.
accuracy   of the test set after `steps` steps. Everyone has three settings to choose from, of which the one with the best accuracy on held-out
           training images after `tune-steps` steps is run with every seed.

A peer that cannot be imported is named in the record and skipped. Everything is in the extra `peers`; eggroll-trainer needs Python 3.12.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peers import BASES, Entry, Task, Weights, installed, module, start
from recording import record
from torch import Tensor

from altgrad import data
from altgrad.errors import DataError, NumericsError

HELD_OUT = 10  # the last tenth of the training images chooses the settings


# ---------------------------------------------------------------------------------------------------------------- data


class Images(NamedTuple):
    """[N, 784] standardised images and their labels."""

    name: str
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def images(name: str) -> Images:
    """MNIST where the cache has it; else scikit-learn's 8x8 digits, each pixel drawn as 3x3 and framed by zeros."""
    try:
        found = data.load("digits" if name == "digits" else "mnist")
    except DataError:
        if name == "mnist":
            raise
        found = data.load("digits")
    sets = [found.train_inputs, found.test_inputs]
    if found.name == "digits":
        sets = [F.pad(x.reshape(-1, 8, 8).repeat_interleave(3, 1).repeat_interleave(3, 2), (2, 2, 2, 2)) for x in sets]
    train, test = (x.flatten(1).contiguous() for x in sets)
    cut = len(train) - len(train) // HELD_OUT
    y = found.train_targets
    label = "mnist" if found.name == "mnist" else "digits, 8x8 drawn as 24x24 and framed to 28x28"
    return Images(label, (train[:cut], y[:cut]), (train[cut:], y[cut:]), (test, found.test_targets))


def batches(pool: tuple[Tensor, Tensor], task: Task, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(pool[0]), (task.batch,), generator=generator)
        yield pool[0][index], pool[1][index]


def accuracy(task: Task, weights: Weights, pool: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((module(task, weights)(pool[0]).argmax(1) == pool[1]).double().mean())


# ---------------------------------------------------------------------------------------------------------------- the two figures


def speed(present: dict[str, Entry], task: Task, pool: tuple[Tensor, Tensor], repeats: int, save: Callable[[int, list[dict[str, Any]]], None]) -> None:
    """Whole steps, every contender in turn; what is known is saved after each repeat."""
    begin = start(task, 0)
    made = {name: entry.make(task, begin, *entry.settings[0], 0) for name, entry in present.items()}
    x, y = next(batches(pool, task, 1, 0))
    seconds: dict[str, list[float]] = {name: [] for name in made}
    each: dict[str, int] = {}
    for name, contender in made.items():
        contender.step(x, y)
        began = time.perf_counter()
        contender.step(x, y)
        each[name] = max(1, min(20, round(0.1 / (time.perf_counter() - began))))  # steps of a turn
    for repeat in range(repeats):
        for name, contender in made.items():
            contender.step(x, y)
            began = time.perf_counter()
            for _ in range(each[name]):
                contender.step(x, y)
            seconds[name].append((time.perf_counter() - began) / each[name])
        save(repeat + 1, [{"contender": name, "how": present[name].how, **summary(name, seconds, task, made[name].compile_seconds)} for name in made])


def summary(name: str, seconds: dict[str, list[float]], task: Task, compile_seconds: float) -> dict[str, Any]:
    """One contender's figures; ratios are taken within each repeat."""
    times = seconds[name]
    middle = statistics.median(times)
    slower = {
        f"times slower than {base}": round(statistics.median(slow / fast for slow, fast in zip(times, seconds[base], strict=True)), 2)
        for base in BASES
        if base in seconds
    }
    return {
        "members_per_second": round(task.population / middle, 1),
        "milliseconds_per_step": round(1000 * middle, 2),
        "lowest_and_highest_ms": [round(1000 * min(times), 2), round(1000 * max(times), 2)],
        "compile_seconds": round(compile_seconds, 2),
        **slower,
    }


def train(entry: Entry, task: Task, pool: tuple[Tensor, Tensor], setting: tuple[float, float], steps: int, seed: int) -> Weights | None:
    """Trained weights; None where the run diverged."""
    contender = entry.make(task, start(task, seed), *setting, seed)
    try:
        for x, y in batches(pool, task, steps, seed):
            contender.step(x, y)
    except NumericsError:
        return None
    return contender.weights()


def reached(entry: Entry, task: Task, found: Images, *, steps: int, tune_steps: int, seeds: int) -> dict[str, Any]:
    """Test accuracy of the setting that does best on held-out images."""
    began = time.perf_counter()
    tried = {}
    for setting in entry.settings:
        weights = train(entry, task, found.train, setting, tune_steps, 1000)
        tried[setting] = 0.0 if weights is None else accuracy(task, weights, found.held_out)
    best = max(tried, key=lambda setting: tried[setting])
    scores = []
    for seed in range(seeds):
        weights = train(entry, task, found.train, best, steps, seed)
        scores.append(0.0 if weights is None else accuracy(task, weights, found.test))
    return {
        "test_accuracy": round(statistics.mean(scores), 4),
        "each_seed": [round(score, 4) for score in scores],
        "evaluations": steps * task.population,
        "rate_and_sigma": best,
        "held_out_accuracy": [[*setting, round(score, 4)] for setting, score in tried.items()],
        "seconds": round(time.perf_counter() - began, 1),
    }


class Keeper:
    """Saves one part's figures and leaves the other part of the record as it was."""

    def __init__(self, path: str | None, peers: dict[str, str], part: str):
        self.path, self.peers, self.part = path, peers, part

    def before(self) -> dict[str, Any]:
        """The record as it is now: the other part may be running too."""
        return json.loads(pathlib.Path(self.path).read_text(encoding="utf8")) if self.path and pathlib.Path(self.path).is_file() else {}

    def rows(self, setup: dict[str, Any]) -> dict[str, Any]:
        """What an earlier run with the same setup found, to be added to with --only."""
        own = self.before().get(self.part, {})
        return own.get("contenders", {}) if own.get("setup") == setup else {}

    def save(self, figures: dict[str, Any]) -> None:
        others = {name: value for name, value in self.before().items() if name in ("speed", "accuracy") and name != self.part}
        asked = "altgrad ahead of every peer in members per second, and >= 20 x EvoTorch's PGPE and SNES (784-256-10, B=64, 256 members)"
        about = {
            "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
            "date": date.today().isoformat(),
            "torch_threads": torch.get_num_threads(),
            "load_average": [round(value, 1) for value in os.getloadavg()],
        }
        record(self.path, {"asked": asked, "peers": self.peers, **others, self.part: {**about, **figures}})


def limit(threads: int) -> None:
    """torch and JAX get the same number of threads; JAX reads the environment when it is imported."""
    torch.set_num_threads(threads)
    os.environ.update({"NPROC": str(threads), "JAX_PLATFORMS": "cpu", "EVOTORCH_VERBOSE_LEVEL": "0", "RAY_DISABLE_IMPORT_WARNING": "1"})
    if threads == 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("speed", "accuracy", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--tune-steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", choices=("auto", "mnist", "digits"), default="auto", help="auto: mnist where the cache has it, else digits")
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    parser.add_argument("--short", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--out")
    options = parser.parse_args()
    limit(options.threads)
    task = Task(population=8, hidden=16, batch=16) if options.short else Task(population=256, hidden=256, batch=64)
    repeats, steps, tune_steps, seeds = (2, 4, 2, 1) if options.short else (options.repeats, options.steps, options.tune_steps, options.seeds)
    present, peers = installed()
    found = images("digits" if options.short and options.data == "auto" else options.data)
    setup = {"data": found.name, **task._asdict()}
    if options.short:  # nothing is compiled
        present = {name: entry for name, entry in present.items() if name not in ("altgrad eggroll", "altgrad es")}
    if options.only:
        present = {name: entry for name, entry in present.items() if options.only in name}
    if options.part != "accuracy":
        timed = Keeper(options.out, peers, "speed")
        shown: list[dict[str, Any]] = []

        def save(done: int, figures: list[dict[str, Any]]) -> None:
            shown[:] = figures
            timed.save({"setup": setup, "repeats": done, "rows": figures})

        speed(present, task, found.train, repeats, save)
        for row in shown:
            print(row, flush=True)
    if options.part != "speed":
        keeper, setup = Keeper(options.out, peers, "accuracy"), {**setup, "steps": steps, "tune_steps": tune_steps, "seeds": seeds}
        rows = keeper.rows(setup) if options.only else {}
        for name, entry in present.items():
            if name.endswith("eager") and not options.short:  # eager noise learns what compiled noise learns
                continue
            rows[name] = reached(entry, task, found, steps=steps, tune_steps=tune_steps, seeds=seeds)
            print(name, rows[name], flush=True)
            keeper.save({"setup": setup, "contenders": rows})


if __name__ == "__main__":
    main()
