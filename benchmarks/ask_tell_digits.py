"""Strategies of altgrad.es on digits with a 64-32-10 network (2,410 parameters), beside `eggroll` and backprop at the same number of evaluations.

    OMP_NUM_THREADS=1 nice -n 10 python benchmarks/ask_tell_digits.py --out benchmarks/records/ask_tell_digits.json

Every row but backprop's may evaluate the loss EVALUATIONS times (members; the pass at the mean is counted in `forwards`). An evaluation sees all
1,437 training examples, so that generations share one objective and their ranks are no accident of the batch. On the held-out data batches of 64
were 1.7 (sep-CMA-ES) and 2.5 (SNES) points behind at the same number of evaluations, each of which is 22 times as cheap; sigma did not suffer.
The objective is the cross entropy, which tells any two members apart; accuracy on 1,437 examples has ties.

Sigma, population and learning rate were chosen with --tune: seed 10, 240 training examples held out, five sixths of the evaluations. The test set is
scored once, after the last step, on seeds 0 to 2.
"""

import argparse
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from recording import record

from altgrad import trainer
from altgrad.compare import CompareSettings, held_out
from altgrad.kernels import noise
from altgrad.training import TrainSettings, build

EVALUATIONS = 40_000
EXAMPLES = 1437
HELD_OUT = CompareSettings()  # a sixth of the training data: 240 examples


def search(strategy: str, population: int, sigma: float) -> dict:
    return {
        "engine": "ask-tell",
        "engine_settings": {"strategy": strategy, "population": population, "sigma": sigma},
        "optimizer": "SGD",
        "lr": 1.0,
    }


def smoothed(population: int, sigma: float, lr: float) -> dict:
    shaping = {"population": population, "sigma": sigma, "shaping": "centred-rank"}
    return {"engine": "eggroll", "engine_settings": shaping, "optimizer": "Adam", "lr": lr, "schedule": "cosine"}


ROWS = {
    "ask-tell, sep-cma-es": search("sep-cma-es", 64, 0.05),
    "ask-tell, snes": search("snes", 64, 0.05),
    "eggroll": smoothed(256, 0.05, 3e-2),
    "backprop": {"engine": "backprop", "optimizer": "Adam", "lr": 1e-2, "schedule": "cosine", "epochs": 30, "batch": 64},
}
GRID = {
    **{f"{name} {population} {sigma}": search(name, population, sigma) for name in ("snes", "sep-cma-es") for population in (24, 64) for sigma in (0.05, 0.15)},
    **{f"eggroll 256 {sigma} {lr}": smoothed(256, sigma, lr) for sigma in (0.05, 0.1) for lr in (1e-2, 3e-2)},
    **{f"eggroll {population} 0.05 {lr}": smoothed(population, 0.05, lr) for population, lr in ((256, 1e-1), (64, 3e-2))},
    **{f"backprop {lr}": {**ROWS["backprop"], "lr": lr} for lr in (1e-3, 3e-3, 1e-2)},
}


def run(label: str, chosen: dict, seed: int, evaluations: int, *, tuning: bool = False) -> dict:
    """One run; its figures on the test set, or on what was held out."""
    torch.set_num_threads(1)
    settings = dict(chosen)
    examples = EXAMPLES - round(EXAMPLES * HELD_OUT.validation) if tuning else EXAMPLES
    batch = settings.pop("batch", examples)
    steps = {} if "epochs" in settings else {"steps": max(1, evaluations // settings["engine_settings"]["population"])}
    made = TrainSettings(problem="digits", problem_settings={"batch_size": batch}, model="mlp", model_settings={"hidden": "32"}, seed=seed, **settings, **steps)
    training = build(replace(made, log_every=1_000_000))
    if tuning:
        training.problem = held_out(training.problem, HELD_OUT)
    started = time.time()
    curve = []

    def note(now: trainer.Training, row: dict) -> None:
        if now.step % max(1, now.total_steps // 10) == 0:
            curve.append({"forwards": now.count("forwards"), "loss": row["loss"], "sigma": row.get("sigma")})

    with noise.compiled(settings["engine"] == "eggroll"):
        result = trainer.fit(training, on_step=note)
    return {
        "row": label,
        "seed": seed,
        "accuracy": result.test_accuracy,
        "loss": result.test_loss,
        "steps": result.steps,
        "forwards": result.forwards,
        "backwards": result.backwards,
        "seconds": time.time() - started,
        "peak_memory_bytes": result.peak_memory_bytes,
        "parameters": sum(parameter.numel() for parameter in training.params.values()),
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", help="which rows; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, help=f"in place of {EVALUATIONS}, to see that it runs")
    parser.add_argument("--tune", action="store_true", help="the grid on held-out training data, in place of the figure")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out")
    options = parser.parse_args()
    rows = GRID if options.tune else ROWS
    names = options.rows or list(rows)
    seeds = [10] if options.tune else options.seeds
    evaluations = options.evaluations or (EVALUATIONS * 5 // 6 if options.tune else EVALUATIONS)
    found = []
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(run, name, rows[name], seed, evaluations, tuning=options.tune) for name in names for seed in seeds]:
            found.append(future.result())
            print({key: value for key, value in found[-1].items() if key != "curve"}, flush=True)
    summary = []
    for name in names:
        own = [entry for entry in found if entry["row"] == name]
        means = {key: statistics.mean(entry[key] for entry in own) for key in ("accuracy", "loss", "forwards", "backwards", "seconds")}
        summary.append({"row": name, **rows[name], **means, "accuracies": [entry["accuracy"] for entry in own]})
        print(f"{name:28} accuracy {means['accuracy']:.4f}  forwards {means['forwards']:.0f}  backwards {means['backwards']:.0f}", flush=True)
    record(options.out, {"evaluations": evaluations, "summary": summary, "rows": found})


if __name__ == "__main__":
    main()
