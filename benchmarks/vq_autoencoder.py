"""Code usage and reconstruction error of a vector-quantised autoencoder by the derivative and the codebook's rule, on digits and on Fashion-MNIST.

    OMP_NUM_THREADS=1 python benchmarks/vq_autoencoder.py --tune --out benchmarks/records/vq_autoencoder.json
    OMP_NUM_THREADS=1 python benchmarks/vq_autoencoder.py --out benchmarks/records/vq_autoencoder.json

Every row has the same three rates to choose from, by the least mean square error on a sixth of the training set held out (see benchmarks/tuned.py), Adam,
a cosine decay and 128 codes of 16 numbers that begin uniform on ±1/128; it is scored once, on the whole test set, after the last step. Digits: 30 passes in
batches of 64. Fashion-MNIST: 1,000 updates with batches of 64 (64,000 of the 60,000 images, a little over one pass), so that a run stays under two minutes
on one core. A step of every row is one forward and one backward pass; the row of plain straight-through is the reference for the others.
"""

import statistics
from collections.abc import Mapping
from typing import Any

from tuned import Row, Table, main

SHARED: dict[str, Any] = {"optimizer": "Adam", "schedule": "cosine", "engine": "straight-through", "problem": "vq-autoencoder"}
RATES = ({"lr": 3e-3}, {"lr": 1e-2}, {"lr": 3e-2})
VARIANTS: dict[str, dict[str, Any]] = {
    "straight-through": {},
    "rotation": {"gradient": "rotation"},
    "affine learned": {"affine": "learned"},
    "affine running": {"affine": "running"},
    "sync 0.2": {"sync": 0.2},
    "alternating 2": {"alternating": 2},
    "moving average": {"ema": True},
    "moving average, revival": {"ema": True, "revive": 20},
    "rotation, revival": {"gradient": "rotation", "revive": 20},
}
LENGTHS: dict[str, dict[str, int]] = {"digits": {"epochs": 30}, "fashion-mnist": {"steps": 1000}}


def row(data: str, variant: dict[str, Any]) -> dict[str, Any]:
    """The variant on the data set."""
    return {
        "asked": "code usage and MSE of the variants, 3 seeds",
        "settings": {"problem_settings": {"data": data, **variant}, **LENGTHS[data]},
        "candidates": list(RATES),
        "tuning_seeds": (10,),
    }


class LeastError(Table):
    """Candidates are held to their mean square error, as there are no classes."""

    def best(self, name: str, tuning: list[dict[str, Any]]) -> Row | None:
        chosen = self.rows[name]

        def error(candidate: Mapping[str, Any]) -> float:
            own = [entry["held_out"] for entry in tuning if entry["row"] == name and entry["candidate"] == candidate]
            return float("inf") if None in own else statistics.mean(figures["mse"] for figures in own)

        whole = all(self.tried(name, candidate, seed, tuning) for candidate in chosen["candidates"] for seed in chosen["tuning_seeds"])
        return min(chosen["candidates"], key=error) if whole else None


ROWS = {f"{data}, {variant}": row(data, settings) for data in LENGTHS for variant, settings in VARIANTS.items()}

if __name__ == "__main__":
    main(LeastError(ROWS, SHARED), __doc__)
