"""Quantised networks made of plain ones (altgrad.quantize), on Fashion-MNIST and on digits, beside full precision and under other engines.

    OMP_NUM_THREADS=1 python benchmarks/binary_networks.py --network cnn --tune --out benchmarks/records/binary_networks.json
    OMP_NUM_THREADS=1 python benchmarks/binary_networks.py --network cnn --seeds 0 1 2 --out benchmarks/records/binary_networks.json

A row's name begins with its network. cnn: four 3x3 convolutions 32-32-64-64 with batch norm and ReLU, two poolings, one linear layer, on Fashion-MNIST, 20
epochs of batches of 128; first and last layer stay real. mlp: 64-256-256-10 with batch norm and ReLU on digits, 40 epochs of batches of 64; the first layer
stays real. Both are written without a quantiser in them; the setting `quantize` puts signs (or other levels) on weights and on the inputs of the
quantised layers. Adam, cosine. Rates are chosen on a sixth of the training set held out (benchmarks/tuned.py), one candidate list for every row.

--network takes the rows of one network, --epochs N is another length for all of them: a record says which (`settings`).
"""

import argparse
import sys
from typing import Any

from torch import nn
from tuned import Table, main

from altgrad import surrogates

SIGNS = surrogates.names("pointwise", operation="sign")
RATES = ({"lr": 1e-3}, {"lr": 3e-3}, {"lr": 1e-2})
SHARED: dict[str, Any] = {"optimizer": "Adam", "schedule": "cosine"}
CNN: dict[str, Any] = {"problem": "fashion-mnist", "problem_settings": {"batch_size": 128}, "model": "binary_networks:cnn", "epochs": 20}
MLP: dict[str, Any] = {"problem": "digits", "problem_settings": {"batch_size": 64}, "model": "binary_networks:mlp", "epochs": 40}


def cnn(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A plain convolutional network; pooling comes before the norm, so that a sign behind it sees both of its sides."""
    layers: list[nn.Module] = []
    depth = input_shape[0]
    for place, deeper in enumerate((32, 32, 64, 64)):
        pool = [nn.MaxPool2d(2)] if place % 2 else []
        layers += [nn.Conv2d(depth, deeper, 3, padding=1, bias=False), *pool, nn.BatchNorm2d(deeper), nn.ReLU()]
        depth = deeper
    side = input_shape[-1] // 4
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * side * side, classes))


def mlp(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A plain multilayer perceptron."""
    inner = input_shape[0]
    return nn.Sequential(
        *(nn.Linear(inner, 256), nn.BatchNorm1d(256), nn.ReLU()),
        *(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU()),
        nn.Linear(256, classes),
    )


def row(asked: str, network: dict[str, Any], engine: str = "straight-through", *, exempt: str = "first-last", **quantize: str) -> dict[str, Any]:
    """A network with quantisers, or without any, under an engine with its settings in brackets behind its name."""
    name, _, rest = engine.partition("[")
    pairs = dict(pair.split("=") for pair in rest.removesuffix("]").split(",") if pair)
    settings = {**network, "engine": name, "engine_settings": pairs, "quantize": {**quantize, "exempt": exempt} if quantize else {}}
    return {"asked": asked, "settings": settings, "candidates": list(RATES), "tuning_seeds": (10,)}


def both(estimator: str) -> dict[str, str]:
    """The sign of weights and inputs by one estimator."""
    return {"weights": f"sign:{estimator}", "activations": f"sign:{estimator}"}


def rows_of(network: dict[str, Any], asked: str, *, exempt: str) -> dict[str, Any]:
    """Full precision, every sign estimator, BiPer, more bits, and other engines."""
    binary = both("bireal")
    return {
        "full precision": row("beside it", network, "backprop"),
        **{name: row(asked, network, exempt=exempt, **both(name)) for name in SIGNS},
        "biper": row(asked, network, "straight-through[real_weights=0.67]", exempt=exempt, weights="square-wave:biper", activations="sign:bireal"),
        "ternary": row("beside it", network, exempt=exempt, weights="ternary", activations="sign:bireal"),
        "lsq 4": row("beside it", network, exempt=exempt, weights="uniform:lsq,bits=4", activations="uniform:lsq,bits=4,signed=false"),
        "int8": row("beside it", network, exempt=exempt, weights="uniform:round,bits=8", activations="uniform:round,bits=8"),
        "forward": row("beside it", network, "forward[tangents=16]", exempt=exempt, **binary),
        "eggroll": row("beside it", network, "eggroll[population=128]", exempt=exempt, **binary),
    }


def table(networks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All rows by "network name"."""
    found = {f"mlp {name}": entry for name, entry in rows_of(networks["mlp"], ">= 96 %", exempt="first").items()}
    return found | {f"cnn {name}": entry for name, entry in rows_of(networks["cnn"], "best within 4 points of full precision", exempt="first-last").items()}


if __name__ == "__main__":
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--network", choices=("mlp", "cnn"))
    early.add_argument("--epochs", type=int)
    given, rest = early.parse_known_args()
    sys.argv = [sys.argv[0], *rest]
    changed = {} if given.epochs is None else {"epochs": given.epochs}
    rows = {name: entry for name, entry in table({"mlp": {**MLP, **changed}, "cnn": {**CNN, **changed}}).items() if name.startswith(given.network or "")}
    main(Table(rows, SHARED), __doc__)
