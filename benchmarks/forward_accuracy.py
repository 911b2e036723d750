"""Figures 5 and 6: what forward gradients reach on real data, beside three kinds of backprop, equally tuned.

    OMP_NUM_THREADS=1 python benchmarks/forward_accuracy.py digits --out benchmarks/records/forward_digits.json
    OMP_NUM_THREADS=1 python benchmarks/forward_accuracy.py digits --schedule cosine --seeds 5 --lrs 1e-3,3e-3,8e-3 \\
        --rules "activations K=16" --rules "activations K=1" --out benchmarks/records/forward_digits_cosine.json
    OMP_NUM_THREADS=1 python benchmarks/forward_accuracy.py fashion-mnist --out benchmarks/records/forward_fashion_mnist.json

Every rule tries the same learning rates once, on a sixth of the training set held out for that; then three seeds on the whole training set,
scored on the test set at the end of the last epoch. With --schedule the rate falls along the run, for every rule alike.
"""

import argparse
import sys
import time

from recording import record

from altgrad import compare
from altgrad.kernels import noise
from altgrad.tables import markdown

RULES = {
    "digits": (
        compare.Choice("activations K=16", "forward", {"space": "activations", "tangents": 16}),
        compare.Choice("activations K=1", "forward", {"space": "activations", "tangents": 1}),
        compare.Choice("activations K=1, signs", "forward", {"space": "activations", "tangents": 1, "noise": "sign"}),
        compare.Choice("activations, local guess alone", "forward", {"space": "activations", "guess": "local", "tangents": 0}),
        compare.Choice("weights K=16", "forward", {"space": "weights", "tangents": 16}),
        compare.Choice("weights K=16, rank 1", "forward", {"space": "weights", "tangents": 16, "rank": 1}),
        compare.Choice("weights K=16, momentum guess", "forward", {"space": "weights", "tangents": 16, "guess": "momentum"}),
    ),
    "fashion-mnist": (
        compare.Choice("activations K=16", "forward", {"space": "activations", "tangents": 16}),
        compare.Choice("local guess, K=4", "forward", {"space": "activations", "guess": "local", "tangents": 4}),
    ),
}
# On Fashion-MNIST checkpointing and accumulation are left out: they follow backprop's own path (see digits) at up to five times the hours.
BASELINES = {"digits": ("backprop", "backprop + checkpointing", "backprop + accumulation"), "fashion-mnist": ("backprop",)}
EPOCHS = {"digits": 30, "fashion-mnist": 20}
RATES = {"digits": (1e-3, 3e-3), "fashion-mnist": (3e-4, 1e-3)}
ASKED = {
    "digits": {"backprop": 97.0, "activations K=16": 96.0, "activations K=1": 91.5, "weights K=16": 90.5},
    "fashion-mnist": {"backprop": 88.5, "activations K=16": "within 2.0 of backprop", "local guess, K=4": "within 2.0 of backprop"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=sorted(RULES))
    parser.add_argument("--out", default=None)
    parser.add_argument("--epochs", type=int, default=None, help="fewer epochs, for a short form")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--schedule", default="constant", help="of the learning rate, the same for every rule")
    parser.add_argument("--lrs", default=None, help="learning rates to try, with commas between")
    parser.add_argument("--rules", action="append", default=None, help="only these beside backprop; repeatable")
    arguments = parser.parse_args()
    problem = arguments.problem
    chosen = tuple(rule for rule in RULES[problem] if arguments.rules is None or rule.label in arguments.rules)
    settings = compare.CompareSettings(
        problem=problem,
        engines=chosen,
        baselines=BASELINES[problem] if arguments.rules is None else ("backprop",),
        seeds=tuple(range(arguments.seeds)),
        budget=f"epochs={arguments.epochs or EPOCHS[problem]}",
        lrs=tuple(float(lr) for lr in arguments.lrs.split(",")) if arguments.lrs else RATES[problem],
        schedule=arguments.schedule,
        points=arguments.epochs or EPOCHS[problem],
    )
    start, last = time.time(), [""]

    def progress(at: compare.Progress) -> None:
        told = f"{at.stage} {at.label} seed {at.seed} lr {at.lr}"
        if told != last[0]:
            last[0] = told
            print(f"{time.time() - start:7.0f} s  {told}", file=sys.stderr, flush=True)

    with noise.compiled(True):
        result = compare.compare(settings, progress=progress)
    print(markdown(result.rows))
    record(arguments.out, {"asked_percent": ASKED[problem], "comparison": result.as_dict()})


if __name__ == "__main__":
    main()
