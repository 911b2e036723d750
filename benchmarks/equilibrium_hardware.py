"""Equilibrium propagation on devices that are off, and on nets without symmetry: digits, rows tuned alike (see tuned.py).

    python benchmarks/equilibrium_hardware.py --tune --out benchmarks/records/equilibrium_hardware.json
    python benchmarks/equilibrium_hardware.py --seeds 0 1 2 3 4 --out benchmarks/records/equilibrium_hardware.json

nudges       a 64-64-10 Hopfield net (an energy) whose states are disturbed by N(0, 0.04²) after every sweep, and whose weights are each off by a share from
             N(0, 0.03²), the same in all phases: one-sided and symmetric nudges of 0.02, the same of 0.4, and four points on a circle of 0.4
asymmetric   a 64-64-64-10 net whose first weights up and down are 120 degrees apart, without correction: plain, with the homeostatic loss, with the same update
             both ways and weight decay; beside the correction, and backprop through 30 sweeps, with the homeostatic loss and without

Rates, and the weights of the homeostatic loss and of the decay, are chosen on a sixth of the training set, held out, by one seed; three epochs for the
nudges, six for the nets without symmetry. About ten minutes in all on one core.
"""

from typing import Any

import tuned
from tuned import Table

from altgrad.training import Training

DEVICE: dict[str, Any] = {"noise": 0.04, "mismatch": 0.03, "steps": 20}
RATES = (1e-3, 3e-3, 1e-2)
NUDGES: dict[str, dict[str, Any]] = {
    "one-sided 0.02": {"nudge": "one-sided", "beta": 0.02},
    "symmetric 0.02": {"nudge": "symmetric", "beta": 0.02},
    "one-sided 0.4": {"nudge": "one-sided", "beta": 0.4},
    "symmetric 0.4": {"nudge": "symmetric", "beta": 0.4},
    "holomorphic 0.4": {"nudge": "holomorphic", "beta": 0.4, "points": 4},
}
HOPFIELD = {"problem": "hopfield-digits", "problem_settings": {"hidden": "64"}}
APART = {"hidden": "64-64", "angle": 120.0}
FIELD = {"tolerance": 1e-3, "correction": "none"}


def nudged(settings: dict[str, Any], device: dict[str, Any], *, asked: str) -> dict[str, Any]:
    return {
        "asked": asked,
        "settings": {
            "problem": "hopfield-digits",
            "problem_settings": {"hidden": "64"},
            "engine": "equilibrium",
            "engine_settings": {**settings, **device},
            "epochs": 3,  # every sweep draws its noise, and all are taken
        },
        "candidates": [{"lr": rate} for rate in RATES],
        "tuning_seeds": [10],
    }


def apart(engine: str, candidates: list[dict[str, Any]], *, asked: str, **more: Any) -> dict[str, Any]:
    return {
        "asked": asked,
        "settings": {"problem": "recurrent-digits", "problem_settings": APART, "engine": engine, "epochs": 6, **more},
        "candidates": candidates,
        "tuning_seeds": [10],
    }


ROWS: dict[str, dict[str, Any]] = {
    "hopfield, backprop": {**nudged({}, {}, asked="the figure beside which the others stand")},
    **{f"ideal, {name}": nudged(settings, {"tolerance": 1e-4}, asked="without noise or mismatch") for name, settings in NUDGES.items()},
    **{f"device, {name}": nudged(settings, DEVICE, asked="one-sided 0.02 collapses, holomorphic 0.4 does not") for name, settings in NUDGES.items()},
    "apart, backprop": apart("backprop", [{"lr": rate} for rate in RATES], asked="the figure beside which the others stand"),
    "apart, backprop with homeostasis": apart(
        "backprop",
        [{"lr": rate, "problem_settings": {**APART, "homeostasis": weight}} for rate in RATES[1:] for weight in (0.1, 1.0)],
        asked="the loss under another rule",
    ),
    "apart, correction": apart("equilibrium", [{"lr": rate} for rate in RATES], asked="exact without symmetry", engine_settings={"tolerance": 1e-3}),
    "apart, plain": apart("equilibrium", [{"lr": rate} for rate in RATES], asked="the documented bias", engine_settings=FIELD),
    "apart, homeostasis": apart(
        "equilibrium",
        [{"lr": rate, "engine_settings": {**FIELD, "correction": "homeostasis", "homeostasis": weight}} for rate in RATES[1:] for weight in (1.0, 10.0)],
        asked="less asymmetry and more accuracy than plain",
    ),
    "apart, same update": apart(
        "equilibrium",
        [{"lr": rate, "optimizer": "AdamW", "optimizer_settings": {"weight_decay": decay}} for rate in RATES[1:] for decay in (1.0, 10.0)],
        asked="weight decay takes the difference away",
        engine_settings={**FIELD, "update": "same"},
    ),
}
ROWS["hopfield, backprop"]["settings"] |= {"engine": "backprop", "engine_settings": {}}


def asymmetry(name: str, training: Training) -> dict[str, Any]:
    """‖W - B‖ / ‖W + B‖ of the weights up and down at the end of the run."""
    pairs = getattr(getattr(training.problem, "model", None), "pairs", ())
    values = training.values()
    if not pairs:
        return {}
    odd = sum(float((values[up] - values[down]).square().sum()) for up, down in pairs)
    even = sum(float((values[up] + values[down]).square().sum()) for up, down in pairs)
    return {"weights": {"asymmetry": (odd / even) ** 0.5}}


TABLE = Table(rows=ROWS, shared={}, more=asymmetry)

if __name__ == "__main__":
    tuned.main(TABLE, __doc__)
