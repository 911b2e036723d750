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
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from recording import record
from torch import Tensor, nn

from altgrad import data
from altgrad.errors import DataError, NumericsError
from altgrad.kernels import noise
from altgrad.learner import Learner

Weights = dict[str, Tensor]
HELD_OUT = 10  # the last tenth of the training images chooses the settings


class Task(NamedTuple):
    """What all contenders share."""

    population: int
    hidden: int
    batch: int


class Contender(NamedTuple):
    """One trainer at work."""

    step: Callable[[Tensor, Tensor], object]  # draw, evaluate and update on a batch
    weights: Callable[[], Weights]  # the trained weights, by the model's names
    compile_seconds: float = 0.0


class Entry(NamedTuple):
    """Who takes part, and how."""

    package: str | None  # on the package index; None for altgrad
    modules: tuple[str, ...]
    make: Callable[[Task, Weights, float, float, int], Contender]  # (task, start, rate, sigma, seed)
    settings: tuple[tuple[float, float], ...]  # (rate, sigma) to choose from
    how: str


def mlp(task: Task) -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, task.hidden), nn.ReLU(), nn.Linear(task.hidden, 10))


def start(task: Task, seed: int) -> Weights:
    """torch's own initialisation, U(±1/√inputs), from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"0": 784, "2": task.hidden}
    return {
        name: (torch.rand(value.shape, generator=generator) * 2 - 1) / math.sqrt(inputs[name.split(".")[0]]) for name, value in mlp(task).state_dict().items()
    }


def module(task: Task, weights: Weights) -> nn.Sequential:
    model = mlp(task)
    model.load_state_dict(weights)
    return model


def flat(weights: Weights) -> Tensor:
    return torch.cat([value.flatten() for value in weights.values()])


def unflat(vector: Tensor, like: Weights) -> Weights:
    parts = vector.split([value.numel() for value in like.values()])
    return {name: part.reshape(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


# ---------------------------------------------------------------------------------------------------------------- altgrad


def altgrad(engine: str, *, compiled: bool) -> Callable[[Task, Weights, float, float, int], Contender]:
    """The facade as a user would call it, with Adam."""

    def make(task: Task, begin: Weights, rate: float, sigma: float, seed: int) -> Contender:
        model = module(task, begin)
        learner = Learner(model, F.cross_entropy, engine=engine, seed=seed, population=task.population, sigma=sigma)
        optimizer = torch.optim.Adam(learner.parameters(), lr=rate)

        def step(x: Tensor, y: Tensor) -> None:
            with noise.compiled(compiled):
                optimizer.zero_grad()
                learner.backward(x, y)
                optimizer.step()

        spent = noise.compile_seconds()
        with noise.compiled(compiled):
            pass
        return Contender(step, lambda: {name: value.detach() for name, value in model.state_dict().items()}, noise.compile_seconds() - spent)

    return make


# ---------------------------------------------------------------------------------------------------------------- EvoTorch


def evotorch(algorithm: str) -> Callable[[Task, Weights, float, float, int], Contender]:
    """A vectorised Problem: all members' networks by vmap over their flat parameters (SupervisedNE evaluates them one by one)."""

    def make(task: Task, begin: Weights, rate: float, sigma: float, seed: int) -> Contender:
        from evotorch import Problem
        from evotorch.algorithms import PGPE, SNES
        from evotorch.neuroevolution.net.functional import ModuleExpectingFlatParameters

        network = ModuleExpectingFlatParameters(mlp(task), disable_autograd_tracking=True)
        now: dict[str, Tensor] = {}

        def loss(parameters: Tensor) -> Tensor:
            return F.cross_entropy(network(parameters, now["x"]), now["y"])

        def losses(members: Tensor) -> Tensor:
            return torch.func.vmap(loss)(members.as_subclass(torch.Tensor))

        center = flat(begin)
        problem = Problem("min", losses, solution_length=len(center), initial_bounds=(-1, 1), dtype=torch.float32, vectorized=True, seed=seed)
        common = {"popsize": task.population, "center_init": center, "stdev_init": sigma, "center_learning_rate": rate}
        if algorithm == "PGPE":
            searcher = PGPE(problem, **common, stdev_learning_rate=0.1, optimizer="clipup", optimizer_config={"max_speed": 2 * rate})
        else:
            searcher = SNES(problem, **common)

        def step(x: Tensor, y: Tensor) -> None:
            now.update(x=x, y=y)
            searcher.step()

        return Contender(step, lambda: unflat(searcher.status["center"].as_subclass(torch.Tensor).clone(), begin))

    return make


# ---------------------------------------------------------------------------------------------------------------- eggroll-trainer


def eggroll_trainer(task: Task, begin: Weights, rate: float, sigma: float, seed: int) -> Contender:
    """Rank 1; noise_reuse=1 means antithetic pairs and new noise every step."""
    from eggroll_trainer import EGGROLLTrainer

    model, now = module(task, begin), {}

    def fitness(candidate: nn.Module) -> float:
        with torch.no_grad():
            return -float(F.cross_entropy(candidate(now["x"]), now["y"]))

    trainer = EGGROLLTrainer(
        model.parameters(), model, fitness, population_size=task.population, learning_rate=rate, sigma=sigma, rank=1, noise_reuse=1, seed=seed
    )

    def step(x: Tensor, y: Tensor) -> None:
        now.update(x=x, y=y)
        with torch.no_grad():
            trainer.step()

    return Contender(step, lambda: {name: value.detach() for name, value in model.state_dict().items()})


# ---------------------------------------------------------------------------------------------------------------- evosax


def evosax(task: Task, begin: Weights, rate: float, sigma: float, seed: int) -> Contender:
    """Ask, vmapped MLP, tell: one jitted function; Adam of optax."""
    import jax
    import jax.numpy as jnp
    import optax
    from evosax.algorithms import Open_ES

    weights = {name: jnp.asarray(value.numpy()) for name, value in begin.items()}
    algorithm = Open_ES(task.population, weights, optimizer=optax.adam(rate), std_schedule=optax.constant_schedule(sigma))
    settings = algorithm.default_params

    def loss(values: dict[str, Any], x: Any, y: Any) -> Any:
        hidden = jax.nn.relu(x @ values["0.weight"].T + values["0.bias"])
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ values["2.weight"].T + values["2.bias"], y).mean()

    def whole(key: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        key, ask, tell = jax.random.split(key, 3)
        members, state = algorithm.ask(ask, state, settings)
        losses = jax.vmap(loss, (0, None, None))(members, x, y)
        return key, algorithm.tell(tell, members, losses, state, settings)[0]

    key = jax.random.key(seed)
    state = algorithm.init(key, weights, settings)
    began = time.perf_counter()
    compiled = jax.jit(whole).lower(key, state, jnp.zeros((task.batch, 784)), jnp.zeros((task.batch,), jnp.int32)).compile()
    seconds, now = time.perf_counter() - began, [key, state]

    def step(x: Tensor, y: Tensor) -> None:
        now[:] = compiled(*now, jnp.asarray(x.numpy()), jnp.asarray(y.int().numpy()))
        now[1].mean.block_until_ready()

    def trained() -> Weights:
        return {name: torch.tensor(jax.device_get(value)) for name, value in algorithm.get_mean(now[1]).items()}

    return Contender(step, trained, seconds)


# ---------------------------------------------------------------------------------------------------------------- torchzero


def torchzero(task: Task, begin: Weights, rate: float, sigma: float, seed: int) -> Contender:
    """population / 2 central differences a step: as many evaluations as the others have; its Adam."""
    import torchzero as tz

    model = module(task, begin)
    spsa = tz.m.SPSA(h=sigma, n_samples=task.population // 2, pre_generate=PRE_GENERATE, return_approx_loss=True, seed=seed)
    optimizer = tz.Optimizer(model.parameters(), spsa, tz.m.Adam(), tz.m.LR(rate))

    def step(x: Tensor, y: Tensor) -> None:
        def closure(backward: bool = True) -> Tensor:
            with torch.no_grad():
                return F.cross_entropy(model(x), y)

        optimizer.step(closure)

    return Contender(step, lambda: {name: value.detach() for name, value in model.state_dict().items()})


PRE_GENERATE = False  # draws each direction when it is needed: less memory than its default, and faster

# ---------------------------------------------------------------------------------------------------------------- who takes part

ADAM = ((0.003, 0.02), (0.01, 0.02), (0.03, 0.02))  # the same three for everyone who runs Adam at a scale of its own choice
ENTRIES: dict[str, Entry] = {
    "altgrad eggroll": Entry(None, (), altgrad("eggroll", compiled=True), ADAM, "Learner, rank 1, z-score, Adam; compiled noise"),
    "altgrad eggroll, eager": Entry(None, (), altgrad("eggroll", compiled=False), ADAM, "the same with eager noise"),
    "altgrad es": Entry(None, (), altgrad("es", compiled=True), ADAM, "Learner, dense noise, z-score, Adam; compiled noise"),
    "altgrad es, eager": Entry(None, (), altgrad("es", compiled=False), ADAM, "the same with eager noise"),
    "EvoTorch PGPE": Entry(
        "evotorch",
        ("evotorch",),
        evotorch("PGPE"),
        ((0.15, 0.02), (0.5, 0.02), (1.5, 0.02)),
        "vectorised Problem, vmap over ModuleExpectingFlatParameters; symmetric, centred ranks, ClipUp with max_speed 2 x rate",
    ),
    "EvoTorch SNES": Entry(
        "evotorch",
        ("evotorch",),
        evotorch("SNES"),
        ((0.3, 0.02), (1.0, 0.02), (3.0, 0.02)),
        "vectorised Problem, vmap over ModuleExpectingFlatParameters; NES ranks, no optimizer (its defaults; rate 1 is one); it has no antithetic pairs",
    ),
    "eggroll-trainer": Entry(
        "eggroll-trainer",
        ("eggroll_trainer",),
        eggroll_trainer,
        ((0.01, 0.1), (0.15, 0.02), (0.5, 0.02)),
        "EGGROLLTrainer, rank 1, antithetic, its own SGD; the first setting is its default; it evaluates members one by one",
    ),
    "evosax Open_ES": Entry(
        "evosax", ("evosax", "jax", "optax"), evosax, ADAM, "JAX on CPU, the whole step jitted, plain JAX MLP by vmap; antithetic, centred ranks, Adam"
    ),
    "torchzero SPSA": Entry(
        "torchzero",
        ("torchzero",),
        torchzero,
        ((0.003, 0.001), (0.01, 0.001), (0.03, 0.001)),
        "SPSA of 128 central samples at its default h, Adam; it evaluates members one by one",
    ),
}
BASES = ("altgrad eggroll", "altgrad eggroll, eager")


def installed() -> tuple[dict[str, Entry], dict[str, str]]:
    """Who can take part, and every peer's version or the reason why it does not."""
    present: dict[str, Entry] = {}
    peers: dict[str, str] = {}
    for name, entry in ENTRIES.items():
        try:
            for needed in entry.modules:
                import_module(needed)
        except Exception as error:  # a peer may fail to import in any way
            reason = "not installed" if isinstance(error, ModuleNotFoundError) else "cannot be imported"
            peers[entry.package or name] = f"{reason}: {error}"
            print(f"{name} skipped, {reason}: {error}", flush=True)
            continue
        if entry.package:
            peers[entry.package] = version(entry.package)
        present[name] = entry
    return present, peers


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


def speed(present: dict[str, Entry], task: Task, pool: tuple[Tensor, Tensor], repeats: int) -> list[dict[str, Any]]:
    """Whole steps, every contender in turn."""
    begin = start(task, 0)
    made = {name: entry.make(task, begin, *entry.settings[0], 0) for name, entry in present.items()}
    (x, y), seconds, each = next(batches(pool, task, 1, 0)), {name: [] for name in made}, {}
    for name, contender in made.items():
        contender.step(x, y)
        contender.step(x, y)
        began = time.perf_counter()
        contender.step(x, y)
        each[name] = max(1, min(20, round(0.1 / (time.perf_counter() - began))))  # steps of a turn
    for _ in range(repeats):
        for name, contender in made.items():
            contender.step(x, y)
            began = time.perf_counter()
            for _ in range(each[name]):
                contender.step(x, y)
            seconds[name].append((time.perf_counter() - began) / each[name])
    rows = []
    for name, times in seconds.items():
        middle = statistics.median(times)
        row = {
            "contender": name,
            "how": present[name].how,
            "members_per_second": round(task.population / middle, 1),
            "milliseconds_per_step": round(1000 * middle, 2),
            "quartiles_ms": [round(1000 * value, 2) for value in statistics.quantiles(times, n=4, method="inclusive")[::2]],
            "compile_seconds": round(made[name].compile_seconds, 2),
        }
        for base in (base for base in BASES if base in seconds):
            row[f"times slower than {base}"] = round(statistics.median(slow / fast for slow, fast in zip(times, seconds[base], strict=True)), 2)
        print(row, flush=True)
        rows.append(row)
    return rows


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


def keeper(path: str | None, peers: dict[str, str], part: str) -> Callable[[dict[str, Any]], None]:
    """What saves one part's figures and leaves the other part of the record as it was."""
    before = json.loads(pathlib.Path(path).read_text(encoding="utf8")) if path and pathlib.Path(path).is_file() else {}
    others = {name: before[name] for name in ("speed", "accuracy") if name != part and name in before}
    asked = "altgrad ahead of every peer in members per second, and >= 20 x EvoTorch's PGPE and SNES (784-256-10, B=64, 256 members)"
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    about = {"command": command, "date": date.today().isoformat(), "torch_threads": torch.get_num_threads()}

    def save(figures: dict[str, Any]) -> None:
        load = [round(value, 1) for value in os.getloadavg()]
        record(path, {"asked": asked, "peers": peers, **others, part: {**about, "load_average": load, **figures}})

    return save


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
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tune-steps", type=int, default=100)
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
    if options.part != "accuracy":
        keeper(options.out, peers, "speed")({"setup": setup, "repeats": repeats, "rows": speed(present, task, found.train, repeats)})
    if options.part != "speed":
        save, rows = keeper(options.out, peers, "accuracy"), {}
        for name, entry in present.items():
            if options.only not in name or (name.endswith("eager") and not options.short):  # eager noise learns what compiled noise learns
                continue
            rows[name] = reached(entry, task, found, steps=steps, tune_steps=tune_steps, seeds=seeds)
            print(name, rows[name], flush=True)
            save({"setup": setup, "steps": steps, "tune_steps": tune_steps, "contenders": rows})


if __name__ == "__main__":
    main()
