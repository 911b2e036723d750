"""What local rules learn on CIFAR-10 in a few epochs, beside backprop and backprop with deep supervision at as many.

    OMP_NUM_THREADS=1 python benchmarks/local_cifar10.py --tune --out benchmarks/records/local_cifar10.json
    OMP_NUM_THREADS=1 python benchmarks/local_cifar10.py --out benchmarks/records/local_cifar10.json

A table of equal epochs, not of converged runs: three epochs of batches of 128, Adam with a cosine decay, no augmentation. Every rule has the same two
rates to choose from, on a sixth of the training set held out (see benchmarks/tuned.py), and is scored once, on the test set, after the last step.
"""

from typing import Any

import torch
from torch import nn
from tuned import Table, main

from altgrad import Key, models

SHARED: dict[str, Any] = {"problem": "cifar10", "optimizer": "Adam", "schedule": "cosine", "problem_settings": {"batch_size": 128}, "epochs": 3}
RATES = ({"lr": 3e-4}, {"lr": 1e-3})
MODELS: dict[str, dict[str, Any]] = {
    "mlp 3x2000": {"model": "mlp", "model_settings": {"hidden": "2000-2000-2000"}},
    "cnn 40-80-160": {"model": "local_cifar10:convolutions", "model_settings": {"channels": "40-80-160"}},
}


def convolutions(input_shape: tuple[int, ...], classes: int, channels: str) -> nn.Module:
    """The model cnn in channels-last layout, which a CPU runs faster."""
    key = Key(torch.initial_seed())  # the run's
    return models.build("cnn", {"channels": channels}, input_shape=input_shape, classes=classes, key=key).to(memory_format=torch.channels_last)


def row(model: str, engine: str, **engine_settings: Any) -> dict[str, Any]:
    settings = {**MODELS[model], "engine": engine, "engine_settings": engine_settings}
    return {"asked": "a table beside backprop", "settings": settings, "candidates": list(RATES), "tuning_seeds": (10,), "tuning_epochs": 1}


ROWS = {
    "mlp 3x2000, mono-forward": row("mlp 3x2000", "mono-forward"),
    "mlp 3x2000, backprop": row("mlp 3x2000", "backprop"),
    "mlp 3x2000, deep supervision": row("mlp 3x2000", "deep-supervision"),
    "cnn 40-80-160, channel goodness": row("cnn 40-80-160", "local", loss="channel-goodness", readout="last"),
    "cnn 40-80-160, mono-forward": row("cnn 40-80-160", "mono-forward"),
    "cnn 40-80-160, backprop": row("cnn 40-80-160", "backprop"),
    "cnn 40-80-160, deep supervision": row("cnn 40-80-160", "deep-supervision"),
}

if __name__ == "__main__":
    main(Table(ROWS, SHARED), __doc__)
