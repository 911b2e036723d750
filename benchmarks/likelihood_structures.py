r"""Likelihood ratio where structure hurts backprop: a GRU without backpropagation through time, a graph network, a spiking network.

    OMP_NUM_THREADS=1 python benchmarks/likelihood_structures.py [--rows gru graph] [--out benchmarks/records/likelihood_structures.json]

Every entry of ROWS is one problem; its `rules` are trained on it with the same network, optimizer, schedule, batch and length. Each rule has at most as
many `candidates` as backprop: they are tried on seed 10 with part of the training data held out (`held_out`), the one of the highest accuracy
there (the lower loss among equals) is taken, and it is trained anew on all training data, seeds 0 to 2, and scored on the test data after the last step.
Times are of one processor, which other work may have shared; the first run of a process includes what is compiled for drawing noise.
"""

import argparse
import json
import pathlib
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from recording import record

from altgrad import trainer
from altgrad.kernels import noise
from altgrad.problems.digits_graph import NodeClassification
from altgrad.training import Training, TrainSettings, build

RATES = (1e-2, 2e-2, 4e-2)


def over(rates: tuple[float, ...], engine: str, **settings: object) -> list[tuple]:
    """One candidate a learning rate."""
    return [(engine, settings, lr) for lr in rates]


# Spiking networks: six candidates a rule. Of surrogate gradients the slope is chosen too, of the likelihood ratio sigma.
SPIKING = {
    "backprop": [("backprop", {}, lr, {"slope": slope}) for slope in (2.0, 5.0, 25.0) for lr in (3e-3, 1e-2)],
    "likelihood-ratio": [("likelihood-ratio", {"copies": 32, "sigma": sigma}, lr) for sigma in (0.3, 0.5, 1.0) for lr in (3e-3, 1e-2)],
}

# row -> what is asked, what all its rules share, and rule -> candidates: (engine, its settings, learning rate[, settings of the model])
ROWS = {
    "gru": {
        "asked": "likelihood-ratio within 3 points of backpropagation through time",
        "shared": {"problem": "row-digits", "model_settings": {"hidden": 32}, "epochs": 30},
        "rules": {
            "backprop": over(RATES, "backprop"),
            "likelihood-ratio": over(RATES, "likelihood-ratio", copies=64, sigma=0.05),
            "likelihood-ratio, layer-wise": over(RATES[1:2], "likelihood-ratio", copies=32, sigma=0.05, layerwise=True),
        },
    },
    "graph": {
        "asked": "trains; backprop beside it",
        "shared": {"problem": "digits-graph", "epochs": 100},
        "rules": {
            "backprop": over(RATES[:2], "backprop"),
            "likelihood-ratio": over(RATES[:2], "likelihood-ratio", copies=16),
            "forward": over(RATES[:2], "forward", tangents=16),
            "eggroll": over(RATES[:2], "eggroll", population=64),
        },
    },
    "graph, all nodes at once": {
        "asked": "what one coefficient a copy costs, where the layers' rows are not examples",
        "shared": {"problem": "digits-graph", "problem_settings": {"whole": True}, "epochs": 100},
        "rules": {"likelihood-ratio": over(RATES[1:2], "likelihood-ratio", copies=16)},
    },
    "spiking": {
        "asked": "likelihood-ratio within 3 points of surrogate gradients",
        "shared": {"problem": "spiking-digits", "model_settings": {"hidden": "64-64", "steps": 8}, "epochs": 30},
        "rules": SPIKING,
    },
    "spiking, latency code": {
        "asked": "the same where every input spikes once",
        "shared": {"problem": "spiking-digits", "model_settings": {"hidden": "64-64", "steps": 8, "code": "latency"}, "epochs": 30},
        "rules": SPIKING,
    },
}


def held_out(training: Training, count: int = 287) -> None:
    """Score on the last `count` training examples, and train on the others; on a graph score on training nodes whose labels training does not see."""
    problem = training.problem
    if isinstance(problem, NodeClassification):
        nodes = problem.unlabelled[-count:]
        problem.dataset = problem.dataset._replace(test_inputs=nodes, test_targets=problem.labels[nodes])
        return
    data, length = problem.dataset, training.total_steps / problem.steps_per_epoch
    kept = data._replace(train_inputs=data.train_inputs[:-count], train_targets=data.train_targets[:-count])
    problem.dataset = kept._replace(test_inputs=data.train_inputs[-count:], test_targets=data.train_targets[-count:])
    problem.orders, problem.steps_per_epoch = {}, max(1, len(kept.train_inputs) // problem.batch_size)
    training.total_steps = round(length * problem.steps_per_epoch)


def run(row: str, rule: str, candidate: int, seed: int, choosing: bool, epochs: int | None) -> dict:
    """One run: its figures on the test data, or, where the candidate is being chosen, on data held out from training."""
    torch.set_num_threads(1)
    engine, settings, lr, *own = ROWS[row]["rules"][rule][candidate]
    shared = ROWS[row]["shared"] | ({"epochs": epochs} if epochs else {})
    shared = shared | {"model_settings": {**shared.get("model_settings", {}), **(own[0] if own else {})}}
    training = build(TrainSettings(engine=engine, engine_settings=settings, lr=lr, schedule="cosine", seed=seed, log_every=1000000, **shared))
    if choosing:
        held_out(training)
    started, spent = time.time(), time.process_time()
    with noise.compiled(True):
        result = trainer.fit(training)
    return {
        "row": row,
        "rule": rule,
        "candidate": candidate,
        "seed": seed,
        "held_out": choosing,
        "accuracy": training.figures["test_accuracy"],
        "loss": training.figures["test_loss"],
        "steps": result.steps,
        "forwards": result.forwards,
        "backwards": result.backwards,
        "seconds": time.time() - started,
        "processor_seconds": time.process_time() - spent,
        "parameters": sum(parameter.numel() for parameter in training.params.values()),
    }


def chosen(entries: list[dict]) -> int:
    """The candidate that did best on held-out data; the only one, where there was nothing to choose."""
    return max(entries, key=lambda entry: (entry["accuracy"], -entry["loss"]))["candidate"] if entries else 0


def summary(found: list[dict]) -> list[dict]:
    """Every row's rules with their chosen candidate and its mean accuracy."""
    rows = []
    for row, content in ROWS.items():
        for rule, candidates in content["rules"].items():
            tried = [entry for entry in found if (entry["row"], entry["rule"], entry["held_out"]) == (row, rule, True)]
            own = [entry for entry in found if (entry["row"], entry["rule"], entry["held_out"]) == (row, rule, False)]
            if not own:
                continue
            engine, settings, lr, *model = candidates[own[0]["candidate"]]
            accuracies = [entry["accuracy"] for entry in own]
            rows.append(
                {
                    "row": row,
                    "rule": rule,
                    "asked": content["asked"],
                    "shared": content["shared"],
                    "engine": engine,
                    "engine_settings": settings,
                    "lr": lr,
                    "model_settings": model[0] if model else {},
                    "candidates_tried": len(tried),
                    "accuracy": statistics.mean(accuracies),
                    "spread": statistics.pstdev(accuracies),
                    "seeds": len(own),
                    "forwards": statistics.mean(entry["forwards"] for entry in own),
                    "backwards": statistics.mean(entry["backwards"] for entry in own),
                    "processor_seconds": statistics.mean(entry["processor_seconds"] for entry in own),
                }
            )
    return rows


def write(path: str | None, found: list[dict], pairs: list[tuple[str, str]]) -> None:
    """The record with what is found so far; it keeps the runs of other rows and rules that are in it."""
    before = json.loads(pathlib.Path(path).read_text())["runs"] if path and pathlib.Path(path).exists() else []
    runs = [entry for entry in before if (entry["row"], entry["rule"]) not in pairs] + found
    record(path, {"summary": summary(runs), "runs": runs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="which rows; all by default")
    parser.add_argument("--rules", nargs="+", help="which of a row's rules; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="in place of the stated length, to see that it runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out")
    options = parser.parse_args()
    pairs = [(row, rule) for row in options.rows for rule in ROWS[row]["rules"] if not options.rules or rule in options.rules]
    found: list[dict] = []
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        numbers = {(row, rule): range(len(ROWS[row]["rules"][rule])) for row, rule in pairs}
        tries = {pair: [pool.submit(run, *pair, number, 10, True, options.epochs) for number in own if len(own) > 1] for pair, own in numbers.items()}
        finals = []
        for pair, futures in tries.items():
            own = [future.result() for future in futures]
            found += own
            finals += [pool.submit(run, *pair, chosen(own), seed, False, options.epochs) for seed in options.seeds]
        for future in finals:
            found.append(future.result())
            print(found[-1], flush=True)
            write(options.out, found, pairs)


if __name__ == "__main__":
    main()
