"""Figures 1 and 2 at the level of the operator: one population layer beside F.linear on the same rows, and the update beside the layer.

    python benchmarks/lowrank_cpu.py [--threads 2] [--repeats 30] [--clock wall] [--out benchmarks/records/lowrank_cpu.json]

Every round times plain inference right before each case and takes the ratio; the median over rounds is printed with its quartiles. "made" is
noise drawn before, "drawn" noise drawn on the way, both in antithetic pairs unless it says single. Above 1 is faster than plain inference
(update: a share of the layer's own time, so below is better). `--clock thread` counts the processor time of one thread: on a shared machine
the only clock worth reading.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from recording import record

from altgrad.kernels import lowrank, noise
from altgrad.rng import Key

KEY, NAME = Key(0), 1
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}


def seconds(function: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    function()
    return clock() - start


def compare(base: Callable[[], object], case: Callable[[], object], repeats: int, clock: Callable[[], float]) -> tuple[list[float], float]:
    """Quartiles of base time / case time over rounds, and the ratio of the two fastest runs."""
    base(), case()
    rounds = [(seconds(base, clock), seconds(case, clock)) for _ in range(repeats)]
    fastest = min(first for first, _ in rounds) / min(second for _, second in rounds)
    return statistics.quantiles([first / second for first, second in rounds], n=4), fastest


def cases(width: int, members: int, tokens: int, rank: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """name -> (what it is compared with, itself)."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight, bias, coefficients = randn(members, tokens, width), randn(width, width), randn(width), randn(members // 2)
    half = range(members // 2)
    shape = (width, width)

    def plain() -> torch.Tensor:
        return F.linear(x, weight, bias)

    def factors(law: str, ids: range) -> tuple[torch.Tensor, torch.Tensor]:
        return lowrank.factors(law, KEY, tensor=NAME, members=ids, rank=rank, shape=shape)

    def drawn(law: str, ids: range) -> Callable[[], torch.Tensor]:
        pairs = len(ids) < members
        return lambda: lowrank.addressed_linear(x, weight, bias, KEY, tensor=NAME, members=ids, law=law, rank=rank, pairs=pairs, scale=0.01)

    def update(law: str) -> Callable[[], torch.Tensor]:
        return lambda: lowrank.addressed_update(coefficients, KEY, tensor=NAME, members=half, law=law, rank=rank, shape=shape)

    a, b = factors("normal", half)
    all_a, all_b = factors("normal", range(members))
    all_a, all_b = all_a.clone(), all_b.clone()  # out of the pool the next draw writes to
    a, b = a.clone(), b.clone()
    weights = weight.expand(members, *shape) if members * width * width <= 2**28 else None
    found: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "made": (plain, lambda: lowrank.population_linear(x, weight, bias, a, b, pairs=True)),
        "made, single": (plain, lambda: lowrank.population_linear(x, weight, bias, all_a, all_b)),
        "drawn, normal": (plain, drawn("normal", half)),
        "drawn, sign": (plain, drawn("sign", half)),
        "drawn, normal, single": (plain, drawn("normal", range(members))),
        "drawn, sign, single": (plain, drawn("sign", range(members))),
        "update / layer, made": (lambda: lowrank.lowrank_update(coefficients, a, b), lambda: lowrank.population_linear(x, weight, bias, a, b, pairs=True)),
        "update / layer, drawn, normal": (update("normal"), drawn("normal", half)),
        "update / layer, drawn, sign": (update("sign"), drawn("sign", half)),
    }
    if weights is not None and tokens == 1:
        dense = weights.contiguous()
        found["dense weights a member"] = (plain, lambda: torch.bmm(x, dense.mT))
    return found


def shared_rows(members: int, rank: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Members that see one batch of 64, in the first layer of 784-256-10."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((64, 784), (256, 784), (256,)))
    rows = x.expand(members, *x.shape).contiguous()
    half = range(members // 2)
    a, b = (f.clone() for f in lowrank.factors("normal", KEY, tensor=NAME, members=half, rank=rank, shape=weight.shape))

    def drawn() -> torch.Tensor:
        return lowrank.addressed_linear(x, weight, bias, KEY, tensor=NAME, members=half, law="normal", rank=rank, shared=True, pairs=True)

    def plain() -> torch.Tensor:
        return F.linear(rows, weight, bias)

    return {
        "shared rows, made": (plain, lambda: lowrank.population_linear(x, weight, bias, a, b, shared=True, pairs=True)),
        "shared rows, drawn, normal": (plain, drawn),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--members", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[0, 1, 4, 16], help="a member; 0 is the shared batch of 784-256-10")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    if arguments.clock == "thread":
        arguments.threads = 1
    torch.set_num_threads(arguments.threads)
    rows = []
    with torch.no_grad(), noise.compiled(True):
        for tokens in arguments.tokens:
            chosen = cases(arguments.width, arguments.members, tokens, arguments.rank) if tokens else shared_rows(arguments.members, arguments.rank)
            for name, (base, case) in chosen.items():
                (low, middle, high), fastest = compare(base, case, arguments.repeats, CLOCKS[arguments.clock])
                rows.append({"tokens": tokens, "case": name, "ratio": middle, "quartiles": [low, high], "fastest": fastest})
                print(f"{tokens:3} tokens  {name:30} {middle:6.3f}  ({low:.3f} … {high:.3f}; fastest runs {fastest:.3f})", flush=True)
    settings = {name: getattr(arguments, name) for name in ("threads", "repeats", "clock", "width", "members", "rank")}
    record(arguments.out, {**settings, "dtype": "float32", "compile_failures": noise.compile_failures(), "rows": rows})


if __name__ == "__main__":
    main()
