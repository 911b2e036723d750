"""The contenders of population_peers.py: one small adapter for each trainer, altgrad's beside its peers'.

Every adapter takes the same weights to start from and gives a step (draw, evaluate, update) and the trained weights, by its package's fastest way.
"""

import math
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad.kernels import noise
from altgrad.learner import Learner

Weights = dict[str, Tensor]


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


def ours(engine: str, *, compiled: bool) -> Callable[[Task, Weights, float, float, int], Contender]:
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


def members_losses(task: Task, now: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """All members' networks by vmap over their flat parameters [P, d] -> [P]."""
    from evotorch.neuroevolution.net.functional import ModuleExpectingFlatParameters

    network = ModuleExpectingFlatParameters(mlp(task), disable_autograd_tracking=True)

    def loss(parameters: Tensor) -> Tensor:
        return F.cross_entropy(network(parameters, now["x"]), now["y"])

    return lambda members: torch.func.vmap(loss)(members.as_subclass(torch.Tensor))


def evotorch_pgpe(task: Task, begin: Weights, rate: float, sigma: float, seed: int) -> Contender:
    """Its functional PGPE, faster than the same over a vectorised Problem; it draws from torch's global generator."""
    from evotorch.algorithms.functional import pgpe, pgpe_ask, pgpe_tell

    torch.manual_seed(seed)
    now: dict[str, Any] = {}
    losses = members_losses(task, now)
    now["state"] = pgpe(
        center_init=flat(begin),
        stdev_init=sigma,
        center_learning_rate=rate,
        stdev_learning_rate=0.1,
        optimizer="clipup",
        optimizer_config={"max_speed": 2 * rate},
        ranking_method="centered",
        objective_sense="min",
    )

    def step(x: Tensor, y: Tensor) -> None:
        now.update(x=x, y=y)
        members = pgpe_ask(now["state"], popsize=task.population)
        now["state"] = pgpe_tell(now["state"], members, losses(members))

    return Contender(step, lambda: unflat(now["state"].optimizer_state.center, begin))


def evotorch_snes(task: Task, begin: Weights, rate: float, sigma: float, seed: int) -> Contender:
    """Over a vectorised Problem: SNES has no functional form, and SupervisedNE would evaluate members one by one."""
    from evotorch import Problem
    from evotorch.algorithms import SNES

    now: dict[str, Tensor] = {}
    center = flat(begin)
    problem = Problem("min", members_losses(task, now), solution_length=len(center), initial_bounds=(-1, 1), dtype=torch.float32, vectorized=True, seed=seed)
    searcher = SNES(problem, popsize=task.population, center_init=center, stdev_init=sigma, center_learning_rate=rate)

    def step(x: Tensor, y: Tensor) -> None:
        now.update(x=x, y=y)
        searcher.step()

    return Contender(step, lambda: unflat(searcher.status["center"].as_subclass(torch.Tensor).clone(), begin))


# ---------------------------------------------------------------------------------------------------------------- eggroll-trainer


def eggroll_trainer(task: Task, begin: Weights, rate: float, sigma: float, seed: int) -> Contender:
    """Rank 1; noise_reuse=1 means antithetic pairs and new noise every step."""
    from eggroll_trainer import EGGROLLTrainer

    model = module(task, begin)
    now: dict[str, Tensor] = {}

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
    spsa = tz.m.SPSA(h=sigma, n_samples=task.population // 2, return_approx_loss=True, seed=seed)
    optimizer = tz.Optimizer(model.parameters(), spsa, tz.m.Adam(), tz.m.LR(rate))

    def step(x: Tensor, y: Tensor) -> None:
        def closure(backward: bool = True) -> Tensor:
            with torch.no_grad():
                return F.cross_entropy(model(x), y)

        optimizer.step(closure)

    return Contender(step, lambda: {name: value.detach() for name, value in model.state_dict().items()})


# ---------------------------------------------------------------------------------------------------------------- who takes part

ADAM = ((0.003, 0.02), (0.01, 0.02), (0.03, 0.02))  # the same three for everyone who runs Adam at a scale of its own choice
ENTRIES: dict[str, Entry] = {
    "altgrad eggroll": Entry(None, (), ours("eggroll", compiled=True), ADAM, "Learner, rank 1, z-score, Adam; compiled noise"),
    "altgrad eggroll, eager": Entry(None, (), ours("eggroll", compiled=False), ADAM, "the same with eager noise"),
    "altgrad es": Entry(None, (), ours("es", compiled=True), ADAM, "Learner, dense noise, z-score, Adam; compiled noise"),
    "altgrad es, eager": Entry(None, (), ours("es", compiled=False), ADAM, "the same with eager noise"),
    "eggroll-trainer": Entry(
        "eggroll-trainer",
        ("eggroll_trainer",),
        eggroll_trainer,
        ((0.01, 0.1), (0.15, 0.02), (0.5, 0.02)),
        "EGGROLLTrainer, rank 1, antithetic, its own SGD; the first setting is its default; it evaluates members one by one",
    ),
    "torchzero SPSA": Entry(
        "torchzero",
        ("torchzero",),
        torchzero,
        ((0.003, 0.001), (0.01, 0.001), (0.03, 0.001)),
        "SPSA of 128 central samples at its default h, Adam; it evaluates members one by one",
    ),
    "EvoTorch PGPE": Entry(
        "evotorch",
        ("evotorch",),
        evotorch_pgpe,
        ((0.15, 0.02), (0.5, 0.02), (1.5, 0.02)),
        "functional PGPE, vmap over ModuleExpectingFlatParameters; symmetric, centred ranks, ClipUp with max_speed 2 x rate",
    ),
    "EvoTorch SNES": Entry(
        "evotorch",
        ("evotorch",),
        evotorch_snes,
        ((0.3, 0.02), (1.0, 0.02), (3.0, 0.02)),
        "vectorised Problem, vmap over ModuleExpectingFlatParameters; NES ranks, no optimizer (its defaults; rate 1 is one); it has no antithetic pairs",
    ),
    "evosax Open_ES": Entry(
        "evosax", ("evosax", "jax", "optax"), evosax, ADAM, "JAX on CPU, the whole step jitted, plain JAX MLP by vmap; antithetic, centred ranks, Adam"
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
        peers.update({needed.replace("_", "-"): version(needed.replace("_", "-")) for needed in entry.modules})
        present[name] = entry
    return present, peers
