"""Rows of a benchmark whose settings are chosen on held-out training data, run over seeds, and kept in a record that grows run by run.

--tune tries every candidate of a row on a sixth of the training set, held out (the test set is not read), at the row's full number of steps, or for
`tuning_epochs` where a full run is long; the best mean over the row's tuning seeds is kept, loss deciding between equals, and the runs that follow
take it from the record. A run that is in the record is not made again with --tune; without it, it is replaced.
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from recording import record

from altgrad import compare, trainer
from altgrad.errors import NumericsError
from altgrad.training import Training, TrainSettings, build

Row = Mapping[str, Any]  # asked, settings, candidates, tuning_seeds, and where a full run is long tuning_epochs
More = Callable[[str, Training], dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """`rows` by name, all with the settings `shared`; `more` gives further figures of a finished run."""

    rows: Mapping[str, Row]
    shared: Mapping[str, Any]
    more: More = lambda name, training: {}

    def prepared(self, name: str, candidate: Row, seed: int, steps: int | None) -> Training:
        """The run before its first step."""
        settings = {**self.shared, **self.rows[name]["settings"], **candidate}
        if steps is not None:
            settings = {key: value for key, value in settings.items() if key != "epochs"} | {"steps": steps}
        return build(TrainSettings(seed=seed, log_every=1000000, evaluate_every=1000000, **settings))

    def tune(self, name: str, candidate: Row, seed: int, steps: int | None) -> dict[str, Any]:
        """One run on five sixths of the training set; its figures on the rest."""
        short = {"epochs": self.rows[name]["tuning_epochs"]} if "tuning_epochs" in self.rows[name] else {}
        training = self.prepared(name, {**candidate, **short}, seed, steps)
        training.problem = compare.held_out(training.problem, compare.CompareSettings(tuning_seed=seed))
        started = time.time()
        try:
            trainer.fit(training)
        except NumericsError:
            training.figures = {}
        return {
            "row": name,
            "candidate": candidate,
            "seed": seed,
            "steps": training.step,
            "held_out": {key.removeprefix("test_"): value for key, value in training.figures.items()} or None,  # none: diverged
            "seconds": time.time() - started,
        }

    def run(self, name: str, candidate: Row, seed: int, steps: int | None) -> dict[str, Any]:
        """One run; its figures on the test set."""
        training = self.prepared(name, candidate, seed, steps)
        result = trainer.fit(training)
        return {
            "row": name,
            "candidate": candidate,
            "seed": seed,
            "steps": result.steps,
            "batch_size": training.problem.batch_size,
            "parameters": sum(parameter.numel() for parameter in training.params.values()),
            "figures": training.figures,
            "forwards": result.forwards,
            "backwards": result.backwards,
            "seconds": result.seconds,
            **self.more(name, training),
        }

    def tried(self, name: str, candidate: Row, seed: int, tuning: list[dict[str, Any]]) -> bool:
        return any(entry["row"] == name and entry["candidate"] == candidate and entry["seed"] == seed for entry in tuning)

    def best(self, name: str, tuning: list[dict[str, Any]]) -> Row | None:
        """The row's candidate with the greatest mean accuracy held out, then the least loss; none before all of them were tried."""

        def merit(candidate: Row) -> tuple[float, float]:
            own = [entry["held_out"] for entry in tuning if entry["row"] == name and entry["candidate"] == candidate]
            if None in own:
                return -1.0, 0.0
            return statistics.mean(figures["accuracy"] for figures in own), -statistics.mean(figures["loss"] for figures in own)

        row = self.rows[name]
        whole = all(self.tried(name, candidate, seed, tuning) for candidate, seed in product(row["candidates"], row["tuning_seeds"]))
        return max(row["candidates"], key=merit) if whole else None

    def summary(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Means and spreads over seeds of every row that was run; figures of a kind ("figures", or one that `more` gave) by their names."""
        found = []
        for name, row in self.rows.items():
            own = [entry for entry in rows if entry["row"] == name]
            if not own:
                continue
            figures: dict[str, list[float]] = {}
            for kind in (key for key, value in own[0].items() if isinstance(value, dict) and key != "candidate"):
                for figure in own[0][kind]:
                    figures[figure if kind == "figures" else f"{kind}_{figure}"] = [entry[kind][figure] for entry in own]
            found.append(
                {
                    "row": name,
                    "asked": row["asked"],
                    "settings": {**self.shared, **row["settings"], **own[-1]["candidate"]},
                    "candidates_tried": len(row["candidates"]),
                    "tuning_seeds": list(row["tuning_seeds"]),
                    "tuning_epochs": row.get("tuning_epochs", row["settings"].get("epochs")),
                    "seeds": sorted(entry["seed"] for entry in own),
                    "mean": {key: statistics.mean(values) for key, values in figures.items()},
                    "spread": {key: statistics.pstdev(values) for key, values in figures.items()},
                    "forwards": statistics.mean(entry["forwards"] for entry in own),
                    "seconds": statistics.mean(entry["seconds"] for entry in own),
                }
            )
        return found


def main(table: Table, description: str | None, arguments: Sequence[str] | None = None) -> None:
    """The command line of a benchmark that is such a table; `arguments` where some of them were read already."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(table.rows), choices=list(table.rows), help="which rows; all by default")
    parser.add_argument("--tune", action="store_true", help="try the candidates, held out, in place of the runs themselves")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="in place of the stated length, to see that it runs")
    parser.add_argument("--out", required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    def add(kind: str, entry: dict[str, Any]) -> None:
        # Read again before every write: another process may be adding rows of its own.
        found = kept(options.out)
        same = ("row", "seed", "candidate") if kind == "tuning" else ("row", "seed")
        found[kind] = [old for old in found[kind] if any(old[key] != entry[key] for key in same)] + [entry]
        print(entry, flush=True)
        record(options.out, {"summary": table.summary(found["rows"]), **found})

    for name in options.rows:
        if options.tune:
            for seed, candidate in product(table.rows[name]["tuning_seeds"], table.rows[name]["candidates"]):
                if not table.tried(name, candidate, seed, kept(options.out)["tuning"]):
                    add("tuning", table.tune(name, candidate, seed, options.steps))
            continue
        chosen = table.best(name, kept(options.out)["tuning"])
        if chosen is None:
            parser.error(f"{name!r} is not tuned in {options.out}; run the same command with --tune first")
        for seed in options.seeds:
            add("rows", table.run(name, chosen, seed, options.steps))


def kept(path: str) -> dict[str, list[dict[str, Any]]]:
    """The runs in a record that is there already."""
    found = json.loads(pathlib.Path(path).read_text()) if pathlib.Path(path).exists() else {}
    return {"rows": found.get("rows", []), "tuning": found.get("tuning", [])}
