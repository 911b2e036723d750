"""Binary networks made of plain ones (altgrad.quantize), by every surrogate of the sign, beside full precision and under engines that look forward only.

    OMP_NUM_THREADS=1 python benchmarks/binary_networks.py --network digits --tune --out benchmarks/records/binary_digits.json
    OMP_NUM_THREADS=1 python benchmarks/binary_networks.py --network digits --seeds 0 1 2 3 4 --out benchmarks/records/binary_digits.json
    OMP_NUM_THREADS=1 python benchmarks/binary_networks.py --network fashion --tune --out benchmarks/records/binary_fashion_mnist.json
    OMP_NUM_THREADS=1 python benchmarks/binary_networks.py --network fashion --seeds 0 1 2 --out benchmarks/records/binary_fashion_mnist.json

digits    64-256-256-10 on digits, 40 epochs of batches of 64; the first of the three layers stays real
deep      64-256-256-256-10, the same; the first and the last layer stay real
fashion   convolutions 16-32-32 on Fashion-MNIST, the first of stride 2, pooling behind the second, one linear layer; 20 epochs of batches of 128; the
          first and the last layer stay real

All have batch norm and ReLU and are written without a quantiser; the setting `quantize` puts the sign on weights and inputs of the other layers, with one
surrogate for both (BiPer's square wave is for weights; its inputs are Bi-Real's, its weights real in the first two thirds of the run in "two stages").
Adam, cosine. Every row chooses its rate out of one list, on a sixth of the training set held out (benchmarks/tuned.py; the test set is not read; one epoch
each on Fashion-MNIST), and is scored once a seed on the test set. The other engines, and straight-through and real weights beside them, have a quarter of
the epochs, on Fashion-MNIST one, in which EGGROLL already makes 30,000 passes over batches. --which signs leaves out all rows but full precision and the
surrogates, --which brief all but those short ones.

Means of surrogates on digits differ by less than their spread over seeds: the table says whether a network trains, and is no ranking.
--epochs N is another length, for all rows; a record's `settings` and `seeds` say what it was. 20 epochs and 3 seeds of every surrogate on Fashion-MNIST take
one core for hours.
"""

import argparse
from typing import Any

import torch
from torch import nn
from tuned import Table, main

from altgrad import surrogates

RATES = {"digits": (1e-3, 3e-3, 1e-2), "deep": (1e-3, 3e-3, 1e-2), "fashion": (1e-3, 3e-3)}
SURROGATES = surrogates.names("pointwise", operation="sign")
SHARED: dict[str, Any] = {"optimizer": "Adam", "schedule": "cosine"}
DIGITS: dict[str, Any] = {"problem": "digits", "problem_settings": {"batch_size": 64}, "epochs": 40}
NETWORKS: dict[str, dict[str, Any]] = {
    "digits": {**DIGITS, "model": "binary_networks:two_hidden", "exempt": "first", "asked": ">= 96 %"},
    "deep": {**DIGITS, "model": "binary_networks:three_hidden", "exempt": "first-last", "asked": ">= 96 %"},
    "fashion": {
        **{"problem": "fashion-mnist", "problem_settings": {"batch_size": 128}, "model": "binary_networks:convolutions", "epochs": 20},
        **{"exempt": "first-last", "asked": "the best within 4 points of full precision"},
    },
}
SHORT = {  # engine -> settings, for a quarter of the epochs
    "straight-through": {},
    "forward": {"tangents": 8},
    "eggroll": {"population": 64},
    "likelihood-ratio": {"copies": 32},
}
CHUNKED: dict[str, Any] = {"chunk": 4}  # of EGGROLL on convolutions: fits a CPU's cache, and the result is the same


def perceptron(input_shape: tuple[int, ...], hidden: int, classes: int) -> nn.Sequential:
    """`hidden` layers of 256 units with batch norm and ReLU, and a linear one."""
    width, layers = input_shape[0], []
    for _ in range(hidden):
        layers += [nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU()]
        width = 256
    return nn.Sequential(*layers, nn.Linear(width, classes))


def two_hidden(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """64-256-256-10."""
    return perceptron(input_shape, 2, classes)


def three_hidden(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """64-256-256-256-10."""
    return perceptron(input_shape, 3, classes)


def convolutions(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Three 3x3 convolutions in channels-last layout, faster on a CPU; pooling comes before the norm, so that a sign behind it sees both of its sides."""
    side = -(-input_shape[-1] // 2) // 2
    model = nn.Sequential(
        *(nn.Conv2d(input_shape[0], 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * side**2, classes)),
    )
    return model.to(memory_format=torch.channels_last)


def row(
    network: str, engine: str = "straight-through", engine_settings: dict[str, Any] | None = None, *, beside: bool = True, **quantize: str
) -> dict[str, Any]:
    """A network with quantisers, or without any, under an engine; `beside` is a row that nothing is asked of."""
    settings = {key: value for key, value in NETWORKS[network].items() if key not in {"exempt", "asked"}}
    quantised = {**quantize, "exempt": NETWORKS[network]["exempt"]} if quantize else {}
    return {
        "asked": "beside it" if beside else NETWORKS[network]["asked"],
        "settings": {**settings, "engine": engine, "engine_settings": engine_settings or {}, "quantize": quantised},
        "candidates": [{"lr": rate} for rate in RATES[network]],
        "tuning_seeds": (10,),
        **({"tuning_epochs": 1} if network == "fashion" else {}),
    }


def brief(network: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The row for a quarter of the epochs, tuned on 3 of them; on Fashion-MNIST for one."""
    settings = entry["settings"]
    epochs = 1 if network == "fashion" else max(1, settings["epochs"] // 4)
    return {**entry, "settings": {**settings, "epochs": epochs}, "tuning_epochs": min(epochs, 3)}


def signs(weights: str, inputs: str) -> dict[str, str]:
    """The sign of weights and inputs by these surrogates."""
    return {"weights": f"sign:{weights}", "activations": f"sign:{inputs}"}


def rows_of(network: str) -> dict[str, Any]:
    """Every surrogate of the sign, full precision, more bits, and other engines."""
    square = {"weights": "square-wave:biper", "activations": "sign:bireal"}
    short = {**SHORT, "eggroll": {**SHORT["eggroll"], **CHUNKED}} if network == "fashion" else SHORT
    few = {"uniform lsq, 4 bits": "uniform:lsq,bits=4", "uniform, 8 bits": "uniform:round,bits=8"}
    return {
        "full precision": row(network, "backprop"),
        **{name: row(network, beside=False, **signs(name, name)) for name in SURROGATES},
        "biper, one stage": row(network, beside=False, **square),
        "biper, two stages": row(network, engine_settings={"real_weights": 0.67}, beside=False, **square),
        "ternary": row(network, weights="ternary", activations="sign:bireal"),
        **{name: row(network, weights=text, activations=text) for name, text in few.items()},
        "full precision, brief": brief(network, row(network, "backprop")),
        **{f"{engine}, brief": brief(network, row(network, engine, settings, **signs("bireal", "bireal"))) for engine, settings in short.items()},
    }


if __name__ == "__main__":
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--network", choices=tuple(NETWORKS), default="digits")
    early.add_argument("--epochs", type=int)
    early.add_argument("--which", choices=("all", "signs", "brief"), default="all")
    given, rest = early.parse_known_args()
    if given.epochs is not None:
        NETWORKS[given.network]["epochs"] = given.epochs
    rows = rows_of(given.network)
    kinds = {"all": list(rows), "signs": ["full precision", *SURROGATES, "biper, one stage", "biper, two stages"]}
    kinds["brief"] = [name for name in rows if name.endswith("brief")]
    main(Table(rows, SHARED), __doc__, rest if "--rows" in rest else [*rest, "--rows", *kinds[given.which]])
