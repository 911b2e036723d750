"""Figure 5's laws: the second moment of one population direction, and the cosine to the gradient after N of them.

    OMP_NUM_THREADS=1 python benchmarks/population_laws.py [--out benchmarks/records/population_laws.json]

For a linear loss with gradient G [m, n], E = A Bᵀ/√r and factors of kurtosis κ,

    E‖E⟨G, E⟩‖² / ‖G‖² = [(m-1+κ)(n-1+κ) + (r-1)(mn+2)] / r,        mn - 1 + κ for dense noise (rank 0 below),
    cos²(ĝ, G) = N / (N + d'),  d' = that second moment - 1,

with ĝ the mean of N directions. The cosine is a mean over seeds of N directions each.
"""

import argparse
import itertools

import torch
from recording import record

from altgrad.kernels import noise
from altgrad.perturb import LowRank, draw, kurtosis
from altgrad.rng import Key, tensor_id

KEY, PART, SIDE = Key(2511), 1 << 14, 32
LAWS, RANKS = ("normal", "uniform", "sign"), (0, 1, 2, 4)
SHAPES, COUNTS = ((8, 5), (24, 24)), (64, 256, 1024, 4096)


def gradient(m: int, n: int) -> torch.Tensor:
    drawn = noise.draw("normal", KEY.fold("gradient"), 0, [0], (m, n))[0].double()
    return drawn / drawn.norm()


def predicted(law: str, rank: int, m: int, n: int) -> float:
    kappa = kurtosis(law)
    return m * n - 1 + kappa if rank == 0 else ((m - 1 + kappa) * (n - 1 + kappa) + (rank - 1) * (m * n + 2)) / rank


def factors(law: str, rank: int, key: Key, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = LowRank(key, "weight", torch.empty(m, n), range(PART), law, rank).factors()
    return a.double(), b.double()


def second_moment(law: str, rank: int, m: int, n: int, parts: int) -> tuple[float, float]:
    target, found = gradient(m, n), []
    for step in range(parts):
        if rank == 0:
            dense = draw(law, KEY.at(step), tensor_id("weight"), range(PART), (m * n,)).double()
            square, slope = dense.square().sum(1), dense @ target.flatten()
        else:
            a, b = factors(law, rank, KEY.at(step), m, n)
            square, slope = ((a.transpose(1, 2) @ a) * (b.transpose(1, 2) @ b)).sum((1, 2)), (a * (target @ b)).sum((1, 2))
        found.append(square * slope.square())
    return mean_and_error(torch.cat(found))


def squared_cosine(law: str, rank: int, count: int, parts: int) -> tuple[float, float]:
    target, found = gradient(SIDE, SIDE), []
    for step in range(parts):
        a, b = factors(law, rank, KEY.fold("cosine").at(step), SIDE, SIDE)
        slope = (a * (target @ b)).sum((1, 2), keepdim=True)
        left, right = (f.transpose(1, 2).reshape(PART // count, count * rank, SIDE) for f in (a * slope, b))
        estimates = left.transpose(1, 2) @ right  # [seeds, side, side]
        found.append((estimates * target).sum((1, 2)).square() / estimates.square().sum((1, 2)))
    return mean_and_error(torch.cat(found))


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--parts", type=int, default=16, help=f"draws of {PART} directions for each row")
    arguments = parser.parse_args()
    moments, cosines = [], []
    for (m, n), law, rank in itertools.product(SHAPES, LAWS, RANKS):
        measured, error = second_moment(law, rank, m, n, arguments.parts)
        law_says = predicted(law, rank, m, n)
        errors = (measured - law_says) / error
        moments.append({"shape": [m, n], "law": law, "rank": rank or "dense", "measured": measured, "predicted": law_says,
                        "standard_error": error, "errors_off": errors})  # fmt: skip
        print(f"{m:2} × {n:2}  {law:8} rank {rank or 'dense':<6} {measured:8.2f} ± {error:5.2f}   predicted {law_says:8.2f}   {errors:+.1f} errors", flush=True)
    for law, rank, count in itertools.product(LAWS, (1, 4), COUNTS):
        measured, error = squared_cosine(law, rank, count, arguments.parts)
        law_says = count / (count + predicted(law, rank, SIDE, SIDE) - 1)
        cosines.append({"shape": [SIDE, SIDE], "law": law, "rank": rank, "directions": count, "measured": measured, "predicted": law_says,
                        "standard_error": error, "ratio": measured / law_says})  # fmt: skip
        print(f"cos²  {law:8} rank {rank}  N {count:5}  {measured:.4f} ± {error:.4f}   predicted {law_says:.4f}   ratio {measured / law_says:.4f}", flush=True)
    print(f"second moment: at most {max(abs(row['errors_off']) for row in moments):.1f} standard errors off; "
          f"cos²: at most {max(abs(row['ratio'] - 1) for row in cosines):.2%} off")  # fmt: skip
    record(arguments.out, {"draws": arguments.parts * PART, "second_moment": moments, "squared_cosine": cosines})


if __name__ == "__main__":
    main()
