"""Figures 1 and 2 of evolution strategies: evaluations to the target, beside pycma's medians, and every strategy's gate.

    OMP_NUM_THREADS=1 python benchmarks/es_convergence.py [--out benchmarks/records/es_convergence.json] [--short] [--pycma]

pycma's medians are those of altgrad/es/gates.py; with --pycma it is run again beside ours on the same seeds (pip install 'altgrad[peers]').
"""

import argparse
import statistics
from collections.abc import Sequence

import numpy as np
from recording import record

from altgrad.es import gates


def counted(case: gates.Case, seeds: Sequence[int], most: int) -> list[int | None]:
    return [gates.evaluations(case, seed, most=most) for seed in seeds]


def median(counts: Sequence[int | None]) -> float | None:
    value = statistics.median(float("inf") if count is None else count for count in counts)
    return None if value == float("inf") else value


def pycma_counts(case: gates.Case, seeds: Sequence[int]) -> list[int]:
    import cma

    f = gates.function_of(case)
    options = {"verbose": -9, "ftarget": case.target, "CMA_diagonal": case.strategy == "sep-cma-es", "tolfun": 0, "tolfunhist": 0}
    found = []
    for seed in seeds:
        search = cma.CMAEvolutionStrategy(np.full(case.dimension, case.x0), case.sigma, {**options, "seed": seed + 1})
        found.append(search.optimize(lambda x: float(f(np.asarray(x)))).result.evaluations)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--short", action="store_true", help="one seed, 10 dimensions or fewer")
    parser.add_argument("--pycma", action="store_true", help="run pycma too")
    arguments = parser.parse_args()
    seeds = range(1) if arguments.short else range(7)
    beside, gated = [], []
    for case in gates.PYCMA:
        if arguments.short and case.dimension > 10:
            continue
        counts = counted(case, seeds, 3 * case.evaluations)
        row = {**case._asdict(), "pycma_median": case.evaluations, "counts": counts, "median": median(counts)}
        row["ratio"] = None if row["median"] is None else row["median"] / case.evaluations
        row |= {"pycma_again": pycma_counts(case, seeds)} if arguments.pycma else {}
        beside.append(row)
        print(f"{case.strategy:10} {case.function:18} n={case.dimension:3}  median {row['median']}  {counts}  pycma {case.evaluations}  ratio {row['ratio']}"
              + (f"  pycma again {statistics.median(row['pycma_again'])}" if arguments.pycma else ""), flush=True)  # fmt: skip
    by = {(row["strategy"], row["function"], row["dimension"]): row["median"] for row in beside}
    rotated = {n: by["cma-es", "rotated-ellipsoid", n] / by["cma-es", "ellipsoid", n] for n in (10, 20) if ("cma-es", "ellipsoid", n) in by}
    print("rotated / unrotated:", {n: round(ratio, 3) for n, ratio in rotated.items()}, flush=True)
    for case in gates.GATES:
        if arguments.short and case.dimension > 10:
            continue
        counts = counted(case, seeds, case.evaluations)
        gated.append({**case._asdict(), "counts": counts, "median": median(counts), "reached": sum(count is not None for count in counts)})
        print(f"{case.strategy:14} {case.function:22} n={case.dimension:3} to {case.target:g}: {gated[-1]['reached']} of {len(counts)}, median "
              f"{gated[-1]['median']}, gate {case.evaluations}", flush=True)  # fmt: skip
    record(arguments.out, {"seeds": list(seeds), "beside_pycma": beside, "rotated_over_unrotated": rotated, "gates": gated})


if __name__ == "__main__":
    main()
