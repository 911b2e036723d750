"""What equilibrium propagation learns on Hopfield nets, beside backprop through the same nets' sweeps and on plain networks; and with noisy states.

    OMP_NUM_THREADS=1 python benchmarks/equilibrium_quality.py --tune --out benchmarks/records/equilibrium_quality.json
    OMP_NUM_THREADS=1 python benchmarks/equilibrium_quality.py --out benchmarks/records/equilibrium_quality.json

Every rule has the same four rates to choose from, on a sixth of the training set held out (see benchmarks/tuned.py), the same batches, Adam, a cosine decay
and the same epochs, and is scored once, on the test set, after the last step. Squared errors, but for the plain networks, which have cross-entropy.
The rows with noise have a standard deviation of 0.04 added to every unit after every sweep, in training and in prediction, and eight epochs.
"""

from typing import Any

from tuned import Table, main

SHARED: dict[str, Any] = {"optimizer": "Adam", "schedule": "cosine"}
RATES = ({"lr": 5e-4}, {"lr": 1e-3}, {"lr": 2e-3}, {"lr": 4e-3})
DIGITS = {"problem_settings": {"batch_size": 64, "hidden": "256"}, "epochs": 30}
IMAGES = {"problem_settings": {"batch_size": 128, "hidden": "512"}, "epochs": 10}
LOOSE = {"tolerance": 1e-3}  # at rest, for training: finer relaxations cost sweeps and change no accuracy
NOISY = {"noise": 0.04, "steps": 15}
FEW = {**DIGITS, "epochs": 8}  # every sweep draws its noise, and all are taken: twenty times the time


def row(asked: str, problem: str, engine: str, settings: dict[str, Any], **engine_settings: Any) -> dict[str, Any]:
    """`engine` on a problem; long runs are tuned over two epochs and one seed, short ones in full over two."""
    long = settings["epochs"] < DIGITS["epochs"]
    return {
        "asked": asked,
        "settings": {"problem": problem, "engine": engine, "engine_settings": engine_settings, **settings},
        "candidates": list(RATES),
        "tuning_seeds": (10,) if long else (10, 11),
        **({"tuning_epochs": 2} if long else {}),
    }


def unrolled(settings: dict[str, Any]) -> dict[str, Any]:
    """Ten sweeps, about as many as the loose tolerance takes."""
    return {**settings, "problem_settings": {**settings["problem_settings"], "sweeps": 10}}


def plain(settings: dict[str, Any], hidden: str) -> dict[str, Any]:
    """A feed-forward network of the same sizes."""
    return {"problem_settings": {"batch_size": settings["problem_settings"]["batch_size"]}, "model_settings": {"hidden": hidden}, "epochs": settings["epochs"]}


ROWS = {
    "digits, symmetric nudges": row("within 0.5 points of backprop on the same net", "hopfield-digits", "equilibrium", DIGITS, **LOOSE),
    "digits, backprop through the sweeps": row("beside it", "hopfield-digits", "backprop", unrolled(DIGITS)),
    "digits, backprop on a plain 64-256-10": row("beside it", "digits", "backprop", plain(DIGITS, "256")),
    "mnist, symmetric nudges": row(">= 97.5 %", "hopfield-mnist", "equilibrium", IMAGES, **LOOSE),
    "mnist, backprop through the sweeps": row("beside it", "hopfield-mnist", "backprop", unrolled(IMAGES)),
    "mnist, backprop on a plain 784-512-10": row("beside it", "mnist", "backprop", plain(IMAGES, "512")),
    "fashion-mnist, symmetric nudges": row(">= 87.5 %", "hopfield-fashion-mnist", "equilibrium", IMAGES, **LOOSE),
    "fashion-mnist, backprop through the sweeps": row("beside it", "hopfield-fashion-mnist", "backprop", unrolled(IMAGES)),
    "fashion-mnist, backprop on a plain 784-512-10": row("beside it", "fashion-mnist", "backprop", plain(IMAGES, "512")),
    "digits, noise, one-sided, beta 0.01": row("collapses", "hopfield-digits", "equilibrium", FEW, nudge="one-sided", beta=0.01, **NOISY),
    "digits, noise, one-sided, beta 0.1": row("beside it", "hopfield-digits", "equilibrium", FEW, nudge="one-sided", beta=0.1, **NOISY),
    "digits, noise, symmetric, beta 0.4": row("beside it", "hopfield-digits", "equilibrium", FEW, nudge="symmetric", beta=0.4, **NOISY),
    "digits, noise, holomorphic, beta 0.4": row("does not", "hopfield-digits", "equilibrium", FEW, nudge="holomorphic", beta=0.4, **NOISY),
}

if __name__ == "__main__":
    main(Table(ROWS, SHARED), __doc__)
