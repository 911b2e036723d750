"""Credit on a rasteriser: the variance from 10^3 to 10^5 parameters, the PSNR of the shipped scene, and the time to 25 dB beside spsa without credit.

    python benchmarks/rasterizer.py --out benchmarks/records/rasterizer.json

variance   relative variance E|g - mean|² / |mean|² of one antithetic pair, over DRAWS fixed keys, the image staying as it is and its texture getting
           finer. At the start (grey: there no vertex has a gradient) and half way (grey and the painted texture mixed, vertices still off). The means
           of both estimates are one, so both variances are over the |mean|² found with credit.
credit     `altgrad train --problem rasterizer` as it is, seeds 0 to 2; the image is judged every EVERY steps, off the clock.
without    the same with credit=false: every rate of RATES for TRIAL times the seconds that credit took to 25 dB, then the one with the highest PSNR
           from the start for CAP times as long, or until 25 dB. Seed 0; constant rates, as no length of the run is known. Both by the same clock: a run
           with credit up to 25 dB comes first.
The command line's lr, sigma and unit were chosen on seed 0's PSNR after 150 to 300 steps; there is one image, and fitting it is the task.
"""

import argparse
import json
import pathlib
import statistics

import torch
from recording import record

from altgrad import registry, trainer
from altgrad.problem import Batch
from altgrad.raster.scene import painted
from altgrad.rng import Key
from altgrad.training import TrainSettings, build
from altgrad.world import World

GOAL = 25.0  # dB
TEXTURES = (16, 57, 192)
DRAWS, EVERY = 40, 5
RATES = [("Adam", 2e-2), ("Adam", 2e-3), ("Adam", 2e-4), ("SGD", 3.0), ("SGD", 1.0), ("SGD", 0.1)]
TRIAL, CAP = 2, 25
PARTS = ["variance", "credit", "without"]


def run_of(seed: int, *, credit: bool = True, texture: int = 192, **rest) -> trainer.Training:
    """A run of the shipped scene as the command line would make it."""
    own = {**registry.preferred("rasterizer"), **rest}
    return build(TrainSettings(problem="rasterizer", problem_settings={"credit": credit, "texture": texture}, seed=seed, **own))


def variance(texture: int, *, halfway: bool) -> dict:
    """Relative variances of one pair, with and without credit."""
    found, squares, level = {}, {}, {}
    for credit in (True, False):
        training = run_of(0, credit=credit, texture=texture)
        params = training.values()
        if halfway:
            params["texture"] = (params["texture"] + painted(texture)) / 2
        batch: Batch = training.problem.batch(0, World())
        totals = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in params.items()}
        seen = dict.fromkeys(params, 0.0)
        for draw in range(DRAWS):
            grads = training.engine.estimate(training.problem, params, {}, batch, Key(0).fold("draw", draw), World()).grads
            for name in params:
                totals[name] += grads[name]
                seen[name] += float(grads[name].double().square().sum())
        squares[credit] = {name: total / DRAWS for name, total in seen.items()}
        if credit:  # |Σ g|² - Σ |g|² has no term of one draw twice: its mean is that of |E g|²
            level = {name: (float(totals[name].square().sum()) - seen[name]) / (DRAWS * (DRAWS - 1)) for name in params}
    found["parameters"] = sum(value.numel() for value in params.values())
    for credit, label in ((True, "with credit"), (False, "without")):
        found[label] = (sum(squares[credit].values()) - sum(level.values())) / sum(level.values())
    found["vertices' share of the squared gradient"] = level["vertices"] / sum(level.values())
    found["texture alone, with credit"] = (squares[True]["texture"] - level["texture"]) / level["texture"]
    if found["vertices' share of the squared gradient"] > 0.1:  # else it drowns in its own noise
        found["vertices alone, with credit"] = (squares[True]["vertices"] - level["vertices"]) / level["vertices"]
    return found


def followed(training: trainer.Training, *, seconds: float = float("inf"), goal: float = float("inf")) -> list[dict]:
    """PSNR along a run, until its end, `seconds` spent in steps, or `goal` decibels."""
    curve = []

    def look() -> float:
        curve.append({"step": training.step, "seconds": round(training.seconds, 2), "forwards": training.count("forwards")})
        curve[-1]["psnr"] = round(training.problem.evaluate(training.predict)["psnr"], 3)
        return curve[-1]["psnr"]

    look()
    every = EVERY if goal == float("inf") or seconds == float("inf") else 10 * EVERY
    trainer.fit(training, on_step=lambda *_: training.step % every == 0 and (look() >= goal or training.seconds >= seconds))
    return curve


def reached(curve: list[dict]) -> dict | None:
    """The first point at GOAL or above."""
    return next((point for point in curve if point["psnr"] >= GOAL), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trial", type=float, default=TRIAL)
    parser.add_argument("--cap", type=float, default=CAP)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(1)

    def keep(name: str, value: dict) -> None:
        """Into the record, beside the parts that are there."""
        print(name, {key: part for key, part in value.items() if "curve" not in key}, flush=True)
        before = json.loads(pathlib.Path(options.out).read_text()) if options.out and pathlib.Path(options.out).exists() else {}
        found = {**{part: before[part] for part in PARTS if part in before}, name: value}
        record(options.out, {part: found[part] for part in PARTS if part in found})

    if "variance" in options.parts:
        tables = {}
        for label, halfway in (("at the start", False), ("half way", True)):
            rows = [variance(texture, halfway=halfway) for texture in TEXTURES]
            growth = max(row["with credit"] for row in rows) / min(row["with credit"] for row in rows)
            tables[label] = {"rows": rows, "greatest over least, with credit": growth}
        keep("variance", {"asked": "within 2 x from 10^3 to 10^5 parameters", "draws": DRAWS, **tables})
    if "credit" in options.parts:
        curves = [followed(run_of(seed)) for seed in options.seeds]
        finals = [curve[-1]["psnr"] for curve in curves]
        summary = {"final psnr": {"mean": statistics.mean(finals), "spread": statistics.pstdev(finals), "each": finals}}
        keep("credit", {"asked": "final PSNR >= 25 dB", **summary, "to 25 dB": [reached(curve) for curve in curves], "curves": curves})
    if "without" in options.parts:
        credited = followed(run_of(0), goal=GOAL)[-1]  # on the machine as it is now
        goal = credited["seconds"]
        trials = []
        for optimizer, lr in RATES:
            curve = followed(run_of(0, credit=False, optimizer=optimizer, lr=lr, schedule="constant", steps=10**6), seconds=options.trial * goal, goal=GOAL)
            trials.append({"optimizer": optimizer, "lr": lr, "psnr": curve[-1]["psnr"], "start": curve[0]["psnr"], "seconds": curve[-1]["seconds"]})
            print(trials[-1], flush=True)
        best = max(trials, key=lambda trial: trial["psnr"])
        chosen = {"optimizer": best["optimizer"], "lr": best["lr"], "schedule": "constant", "steps": 10**6}
        curve = followed(run_of(0, credit=False, **chosen), seconds=options.cap * goal, goal=GOAL)
        end = reached(curve)
        told = f"reached in {end['seconds'] / goal:.1f} x the time" if end else f"not reached in {curve[-1]['seconds'] / goal:.0f} x the time"
        figures = {"to 25 dB with credit": credited, "best rate": best, "25 dB": told, "psnr at the end": curve[-1]["psnr"]}
        keep("without", {"asked": ">= 20 x the time of credit", **figures, "trials": trials, "curve": curve})


if __name__ == "__main__":
    main()
