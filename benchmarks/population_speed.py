"""What a population costs beside plain inference: figures 1 to 3 of the populations issue.

    python benchmarks/population_speed.py --out benchmarks/records/population_speed.json

1  forward of 256 members (rank 1, antithetic pairs) through an unmodified 3-layer nn.Sequential of width 1024, fp32, 1 and 4 rows a member, against
   plain inference of the same rows: noise made before, and made on the way; and per-member dense weights on the same work. Members that share one
   batch: 784-256-10, B=64.
2  the update (gradient estimate) of that population against its forward, at 1, 4 and 16 rows a member: factors kept, and drawn again.
3  bytes above inference: 2^16 members of a 6-layer model by chunks, at several depths and chunks.

Ratios are taken in one run: each repeat times every contender in turn, and the median over repeats of the ratios is reported. Noise is drawn by the
compiled block (compile time excluded and reported).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from recording import record
from torch import nn

from altgrad import metrics
from altgrad.engines.evolution import Eggroll, Moves
from altgrad.kernels import noise
from altgrad.population import Draws, population
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key
from altgrad.world import World

MEMBERS, WIDTH = 256, 1024


def ratios(base: Callable[[], object], others: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median over repeats of time(base) / time(other)."""
    for function in (base, *others.values()):
        function()
        function()
    found: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(repeats):
        start = time.perf_counter()
        base()
        plain = time.perf_counter() - start
        for name, function in others.items():
            start = time.perf_counter()
            function()
            found[name].append(plain / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def stack(width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def draws_of(params: dict[str, torch.Tensor], step: int, law: str, members: int = MEMBERS) -> Draws:
    return Draws(Key(1, step), params, members // 2, sigma=0.01, rank=1, law=law, antithetic=True)


def own_rows(rows: int, law: str, repeats: int, width: int = WIDTH, members: int = MEMBERS) -> dict[str, float]:
    """Figure 1, every member with rows of its own."""
    model = stack(width, 3)
    params = values_of(model)
    x = torch.randn(members, rows, width) if rows > 1 else torch.randn(members, width)
    kept, step = draws_of(params, 0, law, members), [0]

    def infer() -> None:
        with torch.no_grad():
            model(x)

    def call(values: dict[str, torch.Tensor], own: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, values, (own,))

    def fresh() -> None:
        step[0] += 1
        population(call, draws_of(params, step[0], law, members), inputs=x)

    return ratios(infer, {"noise made before": lambda: population(call, kept, inputs=x), "noise made on the way": fresh}, repeats)


def dense_weights(repeats: int, width: int = WIDTH, members: int = MEMBERS) -> dict[str, float]:
    """Figure 1: the same work with each member's weights written out, one layer at a time so that it fits; noise made before, then with its drawing."""
    weight, x = torch.randn(width, width) / width**0.5, torch.randn(members, width)
    small = members // 16  # weights of all members would be 1 GiB a layer: a sixteenth is timed, with its own inference beside it
    own = weight + 0.01 * torch.randn(small, width, width)

    def infer() -> None:
        F.linear(x, weight)

    def product() -> None:
        torch.bmm(own, x[:small, :, None])

    def with_noise() -> None:
        torch.bmm(weight + 0.01 * noise.draw("normal", Key(0), 1, range(small), (width, width)), x[:small, :, None])

    found = ratios(infer, {"weights made before": product, "weights made on the way": with_noise}, repeats)
    return {name: members / small / value for name, value in found.items()}  # times slower than inference, for all members


def shared_batch(law: str, repeats: int) -> dict[str, float]:
    """Figure 1, one batch for all members."""
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    params, x = values_of(model), torch.randn(64, 784)
    rows, step = x.repeat(MEMBERS, 1), [0]

    def infer() -> None:
        with torch.no_grad():
            model(rows)

    def fresh() -> None:
        step[0] += 1
        population(lambda values: torch.func.functional_call(model, values, (x,)), draws_of(params, step[0], law))

    return ratios(infer, {"noise made on the way": fresh}, repeats)


def update(rows: int, law: str, repeats: int, width: int = WIDTH, members: int = MEMBERS) -> dict[str, float]:
    """Figure 2: seconds of the update over seconds of the forward that made its noise on the way."""
    model = stack(width, 3)
    params = values_of(model)
    x = torch.randn(members, rows, width) if rows > 1 else torch.randn(members, width)
    weights, step = torch.randn(members, dtype=torch.float64), [0]
    kept = draws_of(params, 0, law, members)
    kept.chunk(0, kept.count)

    def call(values: dict[str, torch.Tensor], own: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, values, (own,))

    def forward() -> None:
        step[0] += 1
        population(call, draws_of(params, step[0], law, members), inputs=x)

    def estimate(draws: Draws) -> None:  # as optimizers take it: tensor by tensor, each dropped before the next is made
        moves = Moves(draws, weights)
        for name in moves:
            moves[name]

    found = ratios(forward, {"factors kept": lambda: estimate(kept), "drawn again": lambda: estimate(draws_of(params, 0, law, members))}, repeats)
    return {name: 1 / value for name, value in found.items()}


def memory(depth: int, chunk: int, population_size: int) -> dict[str, float]:
    """Figure 3: peak bytes of a whole step (forward of all members, then the update tensor by tensor), above plain inference's."""
    model = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(128, 128), nn.ReLU())))
    problem = Supervised(model, F.cross_entropy)
    batch = Batch(torch.randn(4, 128), torch.randint(0, 128, (4,)))
    engine = Eggroll(population=population_size, chunk=chunk)
    params = values_of(model)
    with metrics.live_bytes(exclude=params.values()) as plain, torch.no_grad():
        problem.objective(params, batch, {})
    started = time.perf_counter()
    with metrics.live_bytes(exclude=params.values()) as meter:
        estimate = engine.estimate(problem, params, {}, batch, Key(0), World())
        for name in estimate.grads:
            estimate.grads[name]
    return {"depth": depth, "chunk": chunk, "members": population_size, "peak_mib": (meter.peak - plain.peak) / 2**20, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--short", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out")
    options = parser.parse_args()
    repeats, width, members = (2, 64, 16) if options.short else (options.repeats, WIDTH, MEMBERS)
    torch.manual_seed(0)
    forward, updates = [], []
    with noise.compiled(not options.short):
        for law in ("normal", "sign"):
            for rows in (1, 4):
                forward.append({"law": law, "rows": rows, **own_rows(rows, law, repeats, width, members)})
                print(forward[-1], flush=True)
            for rows in (1, 4, 16):
                updates.append({"law": law, "rows": rows, **update(rows, law, repeats, width, members)})
                print(updates[-1], flush=True)
        shared = [{"law": law, **shared_batch(law, repeats)} for law in ("normal", "sign")]
        print(shared, flush=True)
        dense = dense_weights(repeats, width, members)
        print("dense weights, times slower than inference:", dense, flush=True)
        sizes = [(2, 4, 32)] if options.short else [(6, 256, 2**16), (6, 1024, 2**16), (6, 256, 2**12), (24, 256, 2**12)]
        bytes_above = []
        for depth, chunk, count in sizes:
            bytes_above.append(memory(depth, chunk, count))
            print(bytes_above[-1], flush=True)
    record(
        options.out,
        {
            "asked": "forward: noise before >= 0.85 at both, on the way >= 0.60 (1 row) and 0.70 (4 rows) of inference; shared batch >= 1.8; "
            "dense >= 100 x slower; "
            "update <= 0.7 x its forward at 1 row, <= 0.1 x at 16; 2^16 members of 6 layers < 2 GiB, independent of depth",
            "forward_over_inference": forward,
            "update_over_forward": updates,
            "shared_batch_over_inference": shared,
            "dense_times_slower_than_inference": dense,
            "memory_above_inference": bytes_above,
            "compile_seconds": noise.compile_seconds(),
        },
    )


if __name__ == "__main__":
    main()
