"""What local rules learn on MNIST and Fashion-MNIST, beside backprop and backprop with deep supervision.

    OMP_NUM_THREADS=1 python benchmarks/local_quality.py --tune --out benchmarks/records/local_quality.json
    OMP_NUM_THREADS=1 python benchmarks/local_quality.py --out benchmarks/records/local_quality.json

Every rule has the same three rates to choose from, on a sixth of the training set held out (see benchmarks/tuned.py), the same batches of 128, Adam and a
cosine decay, the same epochs unless its row says otherwise, and is scored once, on the test set, after the last step. On Fashion-MNIST, mono-forward and
predsim, which are set against one another, have nine candidates each (six rates more for one, smaller shares of similarity for the other). Forward-forward
on MNIST was run first with its defaults (three candidates, 97.6 % after 40 epochs, one seed); hard negatives and peer normalisation were then
chosen on held-out data, and three candidates more tried with them: six, as for backprop beside it.

Forward-forward and collaboration on Fashion-MNIST have nine candidates each: with their defaults, with goodness as a mean (for collaboration with the
blocks before alone), and three rates more for the one, hard negatives, peer normalisation and a tenth of the others' goodness for the other. Those
negatives help plain forward-forward too, so that it has a row with them: collaboration is to be judged beside both. The tenth was found on the same held-
out data in runs of one epoch and of three; all of the others' goodness, and thresholds from a hundredth to ten times the default, were behind.

"normed" rows are the same comparison of mono-forward, predsim and backprop on a network as predsim's paper has it (batch norm, leaky ReLU, a tenth dropped
out), five epochs, three rates each; predsim with the share of similarity that was chosen before.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from tuned import Table, main

SHARED: dict[str, Any] = {"optimizer": "Adam", "schedule": "cosine", "model": "mlp", "problem_settings": {"batch_size": 128}}
RATES = ({"lr": 3e-4}, {"lr": 1e-3}, {"lr": 3e-3})
MORE_RATES = ({"lr": 2e-3}, {"lr": 5e-3}, {"lr": 1e-2})
BETWEEN = ({"lr": 1.5e-3}, {"lr": 4e-3}, {"lr": 7e-3})


def with_settings(**engine_settings: Any) -> list[dict[str, Any]]:
    """The rates with these settings of the engine in place of the row's."""
    return [{**rate, "engine_settings": engine_settings} for rate in RATES]


LESS_SIMILARITY = [entry for share in (0.9, 0.5) for entry in with_settings(loss="predsim", loss_settings=f"similarity={share}")]


def row(asked: str, problem: str, engine: str, hidden: str, epochs: int, more: Sequence[dict[str, Any]] = (), **engine_settings: Any) -> dict[str, Any]:
    """`engine` on 784-`hidden`-10; `more` are candidates beside the rates."""
    return {
        "asked": asked,
        "settings": {
            "problem": problem,
            "engine": engine,
            "engine_settings": engine_settings,
            "model_settings": {"hidden": hidden},
            "epochs": epochs,
        },
        "candidates": [*RATES, *more],
        "tuning_seeds": (10,),
        "tuning_epochs": 2,
    }


def normed(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """784-1000-1000-10 with batch norm, leaky ReLU and dropout behind every hidden layer."""
    width = math.prod(input_shape)
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(2):
        layers += [nn.Linear(width, 1000), nn.BatchNorm1d(1000), nn.LeakyReLU(0.01), nn.Dropout(0.1)]
        width = 1000
    return nn.Sequential(*layers, nn.Linear(width, classes))


def on_normed(asked: str, engine: str, **engine_settings: Any) -> dict[str, Any]:
    """`engine` on that network."""
    found = row(asked, "fashion-mnist", engine, "", 5, **engine_settings)
    return {**found, "settings": {**found["settings"], "model": "local_quality:normed", "model_settings": {}}}


TWO, THREE = "1000-1000", "1000-1000-1000"
ROWS = {
    "mnist, mono-forward 2x1000": row(">= 98.0 %", "mnist", "mono-forward", TWO, 10),
    "mnist, backprop 2x1000": row("beside it", "mnist", "backprop", TWO, 10),
    "fashion-mnist, mono-forward 2x1000": row(">= 89.5 %", "fashion-mnist", "mono-forward", TWO, 10, [*MORE_RATES, *BETWEEN]),
    "fashion-mnist, predsim 2x1000": row(">= mono-forward", "fashion-mnist", "local", TWO, 10, LESS_SIMILARITY, loss="predsim"),
    "fashion-mnist, direct feedback alignment 2x1000": row(">= 87.0 %", "fashion-mnist", "direct-feedback-alignment", TWO, 10),
    "fashion-mnist, feedback alignment 2x1000": row("beside it", "fashion-mnist", "feedback-alignment", TWO, 10),
    "fashion-mnist, deep supervision 2x1000": row("beside it", "fashion-mnist", "deep-supervision", TWO, 10),
    "fashion-mnist, backprop 2x1000": row("beside it", "fashion-mnist", "backprop", TWO, 10),
    "mnist, forward-forward 3x1000": row(">= 98.0 %", "mnist", "forward-forward", THREE, 40),
    "mnist, forward-forward 3x1000, hard negatives": {
        **row(">= 98.0 %", "mnist", "forward-forward", THREE, 20, negatives="hard", peer=0.03),
        "tuning_epochs": 6,  # two epochs favour rates that are too high for forward-forward's long runs
    },
    "mnist, backprop 3x1000": row("beside it", "mnist", "backprop", THREE, 10, MORE_RATES),
    "fashion-mnist, backprop 3x1000": row("beside it", "fashion-mnist", "backprop", THREE, 10, MORE_RATES),
    "fashion-mnist, forward-forward 3x1000": row(
        *("beside collaboration", "fashion-mnist", "forward-forward", THREE, 10, [*with_settings(goodness="mean"), *MORE_RATES]),
    ),
    "fashion-mnist, forward-forward 3x1000, hard negatives": row(
        *("beside collaboration", "fashion-mnist", "forward-forward", THREE, 10), negatives="hard", peer=0.03
    ),
    "fashion-mnist, collaboration 3x1000": row(
        *(">= 87.5 % and above plain forward-forward", "fashion-mnist", "forward-forward", THREE, 10),
        [
            *with_settings(variant="collaboration", others="before", goodness="mean"),
            *with_settings(variant="collaboration", others="before", gamma=0.1, negatives="hard", peer=0.03),
        ],
        variant="collaboration",
    ),
    "fashion-mnist, mono-forward 2x1000, normed": on_normed("beside predsim", "mono-forward"),
    "fashion-mnist, predsim 2x1000, normed": on_normed(">= mono-forward", "local", loss="predsim", loss_settings="similarity=0.9"),
    "fashion-mnist, backprop 2x1000, normed": on_normed("beside it", "backprop"),
}

if __name__ == "__main__":
    main(Table(ROWS, SHARED), __doc__)
