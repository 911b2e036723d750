"""Figure 3 of evolution strategies: time of ask and tell, beside pycma and beside drawing the normals.

    OMP_NUM_THREADS=1 python benchmarks/es_speed.py [--out benchmarks/records/es_speed.json] [--short]

CMA-ES at n = 100, λ = 50 beside pycma (pip install 'altgrad[peers]') on the rotated ellipsoid, in turns; f is evaluated outside the clock. The mean
over generations counts, since a decomposition comes only every few of them. Separable strategies at n = 100,000, λ = 64 beside two ways of drawing
as many normals: our own, addressed (Philox, Box-Muller, float32), and NumPy's generator (ziggurat, float64), which is faster and cannot be addressed
by member and coordinate. Strategies with pairs m ± ε draw half as many. All times are processor time of one thread, so that
other programs on the machine do not count. Without pycma its part is left out.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from recording import record

from altgrad.es import ARS, CEM, CMAES, PGPE, SNES, Key, OpenES, RandomSearch, SepCMAES, Strategy, draws, functions

LARGE = (SNES, SepCMAES, OpenES, PGPE, ARS, CEM, RandomSearch)


def clocked(work: Callable[[], object]) -> tuple[float, object]:
    begin = time.process_time()
    value = work()
    return time.process_time() - begin, value


class Ours:
    def __init__(self, strategy: Strategy, dimension: int):
        self.strategy, self.state = strategy, strategy.init(Key(1), np.ones(dimension))

    def generation(self, f: functions.Function) -> float:
        first, population = clocked(lambda: self.strategy.ask(self.state))
        fitness = f(population)
        second, self.state = clocked(lambda: self.strategy.tell(self.state, population, fitness))
        return first + second


class Pycma:
    def __init__(self, dimension: int, members: int):
        import cma

        self.search = cma.CMAEvolutionStrategy(np.ones(dimension), 0.5, {"popsize": members, "seed": 1, "verbose": -9})

    def generation(self, f: functions.Function) -> float:
        first, population = clocked(self.search.ask)
        fitness = f(np.asarray(population)).tolist()
        second, _ = clocked(lambda: self.search.tell(population, fitness))
        return first + second


def beside_pycma(dimension: int, members: int, generations: int) -> dict:
    f = functions.find("rotated-ellipsoid")
    ours, theirs = Ours(CMAES(sigma=0.5, population=members), dimension), Pycma(dimension, members)
    times: dict[str, list[float]] = {"altgrad": [], "pycma": []}
    for _ in range(generations):
        times["altgrad"].append(ours.generation(f))
        times["pycma"].append(theirs.generation(f))
    # The mean too, since a decomposition comes only every few generations.
    found = {name: {"median_ms": 1e3 * statistics.median(values), "mean_ms": 1e3 * statistics.mean(values)} for name, values in times.items()}
    return {"n": dimension, "members": members, "generations": generations, **found, "ratio_of_means": found["altgrad"]["mean_ms"] / found["pycma"]["mean_ms"]}


def drawing(dimension: int, members: int, repeats: int) -> dict[str, float]:
    """Milliseconds to draw members × n normals: addressed, and by NumPy's generator."""
    generator = np.random.default_rng(0)
    addressed = [clocked(lambda step=step: draws.normals(Key(0, step), members, dimension))[0] for step in range(repeats)]
    ziggurat = [clocked(lambda: generator.standard_normal((members, dimension)))[0] for _ in range(repeats)]
    return {"addressed_ms": 1e3 * statistics.median(addressed), "numpy_ms": 1e3 * statistics.median(ziggurat)}


def pycma_version() -> str | None:
    try:
        import cma
    except ModuleNotFoundError:
        return None
    return cma.__version__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--short", action="store_true", help="smaller, in seconds: the code runs, the figures mean little")
    arguments = parser.parse_args()
    generations, dimension, repeats = (20, 2_000, 3) if arguments.short else (400, 100_000, 15)
    sizes = ((100, 50), (10, 10), (40, 15))
    version = pycma_version()
    matrix = [] if version is None else [beside_pycma(n, members, generations) for n, members in sizes]
    for row in matrix:
        print(f"n={row['n']:4} λ={row['members']:3}  altgrad {row['altgrad']['mean_ms']:.3f} ms  pycma {row['pycma']['mean_ms']:.3f} ms  "
              f"ratio {row['ratio_of_means']:.2f}", flush=True)  # fmt: skip
    normals = drawing(dimension, 64, repeats)
    print(f"normals 64 × {dimension}: addressed {normals['addressed_ms']:.0f} ms, NumPy's generator {normals['numpy_ms']:.0f} ms", flush=True)
    rows = []
    for kind in LARGE:
        search = Ours(kind(sigma=0.5, population=64), dimension)
        milliseconds = 1e3 * statistics.median(search.generation(functions.sphere) for _ in range(repeats))
        row = {
            "strategy": kind.name,
            "ms": milliseconds,
            "of_addressed": milliseconds / normals["addressed_ms"],
            "of_numpy": milliseconds / normals["numpy_ms"],
        }
        rows.append(row)
        print(f"{kind.name:14} {milliseconds:7.0f} ms  {row['of_addressed']:.2f} × addressed  {row['of_numpy']:.2f} × NumPy's", flush=True)
    record(arguments.out, {"pycma": version, "beside_pycma": matrix, "normals": {"n": dimension, "members": 64, **normals}, "separable": rows})


if __name__ == "__main__":
    main()
