"""Equilibrium propagation on a device whose weights are off and whose states are noisy: which nudge still learns. Takes a few minutes; --epochs 1 is short.

Every weight of the device differs from the one that is asked for by a share of its own, some per cent, the same in all phases; after every sweep the state is
disturbed. A difference over a small β is then mostly noise. A large β keeps the signal, and several nudges on a circle take away the bias it has.
"""

import argparse

import torch

from altgrad import trainer
from altgrad.training import TrainSettings

NUDGES = {
    "one-sided, small": {"nudge": "one-sided", "beta": 0.02},
    "symmetric, small": {"nudge": "symmetric", "beta": 0.02},
    "symmetric, large": {"nudge": "symmetric", "beta": 0.4},
    "holomorphic, large": {"nudge": "holomorphic", "beta": 0.4, "points": 4},
}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--hidden", default="64")
parser.add_argument("--noise", type=float, default=0.04, help="standard deviation of what every sweep adds to the state, which lies in [0, 1]")
parser.add_argument("--mismatch", type=float, default=0.03, help="standard deviation of the share by which a weight is off")
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--nudges", nargs="+", default=list(NUDGES), choices=list(NUDGES))
arguments = parser.parse_args()
torch.set_num_threads(1)

print(f"{'nudge':20} {'ideal device':>14} {'this device':>14}   test accuracy on digits")
for name in arguments.nudges:
    found = []
    for device in ({"tolerance": 1e-4}, {"noise": arguments.noise, "mismatch": arguments.mismatch, "steps": 20}):
        settings = TrainSettings(
            problem="hopfield-digits",
            problem_settings={"hidden": arguments.hidden},
            engine="equilibrium",
            engine_settings={**NUDGES[name], **device},
            epochs=arguments.epochs,
            lr=arguments.lr,
            log_every=1000,
        )
        found.append(trainer.fit(trainer.build(settings)).test_accuracy or 0.0)
    print(f"{name:20} {100 * found[0]:12.1f} % {100 * found[1]:12.1f} %", flush=True)
