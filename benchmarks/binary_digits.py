"""Binary networks on digits: every sign estimator under straight-through, and the same network under engines that look at forward passes alone.

    OMP_NUM_THREADS=1 python benchmarks/binary_digits.py --tune --out benchmarks/records/binary_digits.json
    OMP_NUM_THREADS=1 python benchmarks/binary_digits.py --seeds 0 1 2 3 4 --out benchmarks/records/binary_digits.json

64-256-256-256-10 with batch norm; weights and activations are binary in the two layers between the first and the last, 40 epochs of batches of 64, Adam,
cosine.
Each row has the same three rates to choose from, on a sixth of the training set held out (see benchmarks/tuned.py), and is scored once, on the
test set. Means of estimators differ by less than their spread over seeds: the table says whether a network trains, and is no ranking. BiPer is for weights;
its activations are Bi-Real's, its weights real in the first two thirds of the run. The other engines have a quarter of the epochs, and straight-through
beside them too; forward gradients use Bi-Real's derivative, the others look at losses.
"""

from typing import Any

from tuned import Table, main

from altgrad import surrogates

SHARED: dict[str, Any] = {
    "problem": "digits",
    "problem_settings": {"batch_size": 64},
    "model": "binary-mlp",
    "optimizer": "Adam",
    "schedule": "cosine",
    "epochs": 40,
}
RATES = ({"lr": 1e-3}, {"lr": 3e-3}, {"lr": 1e-2})
NETWORK = {"hidden": "256-256-256", "exempt": "first-last"}


def row(asked: str, engine: str, *, weights: str, activations: str, **engine_settings: Any) -> dict[str, Any]:
    """The network with these surrogates, or "real", under an engine."""
    return {
        "asked": asked,
        "settings": {"engine": engine, "engine_settings": engine_settings, "model_settings": {**NETWORK, "weights": weights, "activations": activations}},
        "candidates": list(RATES),
        "tuning_seeds": (10,),
    }


def short(engine: str, **engine_settings: Any) -> dict[str, Any]:
    """Bi-Real's network for a quarter of the time under an engine, tuned on 3 epochs."""
    found = row("beside it", engine, weights="bireal", activations="bireal", **engine_settings)
    return {**found, "settings": {**found["settings"], "epochs": 10}, "tuning_epochs": 3}


ROWS = {
    **{name: row(">= 96 %", "straight-through", weights=name, activations=name) for name in surrogates.names("pointwise", operation="sign")},
    "biper, one stage": row(">= 96 %", "straight-through", weights="biper", activations="bireal"),
    "biper, two stages": row(">= 96 %", "straight-through", weights="biper", activations="bireal", real_weights=0.67),
    "real weights and activations": row("beside it", "backprop", weights="real", activations="real"),
    "straight-through, 10 epochs": short("straight-through"),
    "forward, 10 epochs": short("forward", tangents=8),
    "eggroll, 10 epochs": short("eggroll", population=64),
    "likelihood-ratio, 10 epochs": short("likelihood-ratio", copies=32),
}

if __name__ == "__main__":
    main(Table(ROWS, SHARED), __doc__)
