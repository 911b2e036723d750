"""Several real processes (gloo, loopback) train as one: the same bits on every rank, and the one-process run to rounding."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import blobs
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import altgrad
from altgrad import trainer
from altgrad.errors import SettingError
from altgrad.problems.supervised import Supervised
from altgrad.trainer import TrainSettings
from altgrad.world import World

STEPS = 4
SECONDS = 90  # a hard limit on every rank
RUNS = {
    "backprop": ("backprop", {}),
    "backprop, accumulated": ("backprop", {"accumulation": 2}),
    "weights": ("forward", {"space": "weights", "tangents": 4}),
    "weights, orthogonal": ("forward", {"space": "weights", "tangents": 4, "combine": "orthogonal"}),
    "weights, with a state": ("forward", {"space": "weights", "tangents": 4, "guess": "momentum"}),
    "activations": ("forward", {"tangents": 4}),
    "activations, replayed": ("forward", {"tangents": 4, "memory": "replay", "noise": "sign"}),
    "activations, with heads": ("forward", {"tangents": 4, "guess": "local"}),
    "population": ("eggroll", {"population": 10, "shaping": "nes", "adapt": "nes"}),
    "fewer directions than ranks": ("spsa", {"sigma": 0.01}),
}
DROPPED = ("backprop", "backprop, accumulated", "weights", "activations, replayed")
NAMES = (*RUNS, *(f"dropout, {name}" for name in DROPPED), "learner")
AWKWARD = [1e8, -1e8, 1.0]  # sums to 1 or to 0, by the order of addition


@dataclass(frozen=True)
class Uneven:
    """Blobs in batches of 10: no number of ranks above 2 divides it."""

    batch_size: int = field(default=10)

    def build(self, key, *, data_dir=None):
        return blobs.Blobs(batch_size=self.batch_size).build(key)


@dataclass(frozen=True)
class Dropped:
    """Blobs behind dropout."""

    def build(self, key, *, data_dir=None):
        problem = blobs.Blobs().build(key)
        model = nn.Sequential(problem.model[0], nn.Dropout(0.4), *problem.model[1:])
        return Supervised(model, nn.CrossEntropyLoss(), dataset=problem.dataset, batch_size=10, key=key, name="dropped")


def train(name, world, *, problem="test_world:Uneven"):
    engine, settings = RUNS[name]
    training = trainer.build(TrainSettings(problem=problem, engine=engine, engine_settings=settings, optimizer="SGD", lr=0.1, steps=STEPS), world=world)
    losses = []
    trainer.fit(training, on_step=lambda training, row: losses.append(row["loss"]))
    return {
        **{f"param {key}": value for key, value in training.values().items()},
        **{f"state {key}": value for key, value in training.state.items()},
        "losses": torch.tensor(losses, dtype=torch.float64),
    }


def learn(world):
    """A loop of somebody's own, in which every rank has its own examples."""
    problem = Uneven().build(altgrad.Key(0))
    learner = altgrad.Learner(problem.model, problem.loss_function, engine="forward", tangents=4, world=world)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        batch = problem.batch(step, world)
        optimizer.zero_grad()
        losses.append(float(learner.backward(batch.inputs, batch.targets).loss))
        optimizer.step()
    return {**{key: value.detach() for key, value in learner.tensors().items()}, "losses": torch.tensor(losses, dtype=torch.float64)}


def everything(world):
    found = {f"{name}/{key}": value for name in RUNS for key, value in train(name, world).items()}
    for name in DROPPED:
        found |= {f"dropout, {name}/{key}": value for key, value in train(name, world, problem="test_world:Dropped").items()}
    return found | {f"learner/{key}": value for key, value in learn(world).items()}


def means(world):
    """What World.mean gives for values that show the order of addition, weights and integers."""
    rank, shares = world.rank, world.shares(world.rank + 1)
    return {
        "awkward": world.mean(torch.tensor([AWKWARD[rank], AWKWARD[-1 - rank]])),
        "half": world.mean(torch.full((3,), 256.0 + rank, dtype=torch.bfloat16)),
        "weighted": world.mean(torch.tensor(float(rank)), shares=shares),
        "integer": world.mean(torch.tensor(2**40 + 1)),
        "unevenly shared integer": world.mean(torch.tensor(2**40 + 1), shares=shares),
        "transposed": world.mean(torch.arange(6.0).reshape(2, 3).T + rank),
        "tree": world.mean_tree({"b": torch.tensor(1.0 + rank), "a": torch.tensor(10.0 * rank)})["b"],
        "place": torch.tensor(world.place(rank + 5)),
    }


def rank_main(folder):
    world = World.from_environment(timeout_seconds=SECONDS, rendezvous=f"file://{folder}/meeting")
    found = everything(world) | {f"mean/{name}": value for name, value in means(world).items()}
    save_file({name: value.contiguous() for name, value in found.items()}, f"{folder}/rank-{world.rank}.safetensors")
    world.close()


CHILD = "import sys, torch; torch.set_num_threads(1); import test_world; test_world.rank_main(sys.argv[1])"


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """What every rank of a world of so many processes found."""
    folder, size = tmp_path_factory.mktemp("world"), request.param
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    base = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(size), "ALTGRAD_COMPILE": "auto"}
    running = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], env={**base, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True) for rank in range(size)
    ]
    end = time.monotonic() + SECONDS
    try:
        said = [process.communicate(timeout=max(1.0, end - time.monotonic()))[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(said)
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(size)]


@pytest.fixture(scope="module")
def alone():
    return everything(World())


def part(found, name):
    return {key.removeprefix(f"{name}/"): value for key, value in found.items() if key.startswith(f"{name}/")}


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_end_with_the_same_bits(ranks, name):
    first = part(ranks[0], name)
    assert first
    for other in ranks[1:]:
        assert all(torch.equal(value, part(other, name)[key]) for key, value in first.items())


@pytest.mark.parametrize("name", NAMES)
def test_ranks_together_equal_one_process_to_rounding(ranks, alone, name):
    found, expected = part(ranks[0], name), part(alone, name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-5), key  # float32 sums in another order, over four steps


def test_the_mean_is_added_in_the_order_of_ranks_on_every_rank(ranks):
    size = len(ranks)
    forward, backward = torch.tensor(0.0), torch.tensor(0.0)
    for rank in range(size):
        forward, backward = forward + AWKWARD[rank], backward + AWKWARD[-1 - rank]
    for found in ranks:
        assert found["mean/awkward"].tolist() == [float(forward / size), float(backward / size)]


def test_the_mean_of_half_precision_is_added_in_float32(ranks):
    exact = 256 + (len(ranks) - 1) / 2
    assert ranks[0]["mean/half"].dtype == torch.bfloat16
    assert ranks[0]["mean/half"].tolist() == torch.full((3,), exact).to(torch.bfloat16).tolist()


def test_the_mean_weighs_ranks_by_their_shares(ranks):
    size = len(ranks)
    weights = [rank + 1 for rank in range(size)]
    assert ranks[0]["mean/weighted"].item() == pytest.approx(sum(rank * w for rank, w in enumerate(weights)) / sum(weights))


@pytest.mark.parametrize("name", ["integer", "unevenly shared integer"])
def test_the_mean_of_equal_integers_is_exact(ranks, name):
    assert ranks[0][f"mean/{name}"].item() == 2**40 + 1


def test_the_mean_takes_any_layout_and_any_tree(ranks):
    size = len(ranks)
    assert torch.allclose(ranks[0]["mean/transposed"], torch.arange(6.0).reshape(2, 3).T + (size - 1) / 2)
    assert ranks[0]["mean/tree"].item() == pytest.approx(1 + (size - 1) / 2)


def test_every_rank_knows_where_its_examples_begin(ranks):
    assert [found["mean/place"].item() for found in ranks] == [0, 5, 11][: len(ranks)]


def test_one_process_sends_nothing():
    tree = {"w": torch.ones(3)}
    assert World().mean_tree(tree) is tree
    assert World().mean(tree["w"]) is tree["w"]
    assert (World().place(7), World().shares(3.0), World().share(5)) == (0, [1.0], range(5))


def test_shares_of_a_batch_are_whole_and_in_order():
    shares = [World(rank, 3).share(10) for rank in range(3)]
    assert [example for share in shares for example in share] == list(range(10))


def test_a_batch_with_nothing_for_a_rank_is_refused():
    problem = Uneven(batch_size=2).build(altgrad.Key(0))
    with pytest.raises(SettingError, match="batch_size=2 is not allowed; it must be at least the number of processes, 3"):
        problem.batch(0, World(0, 3))
