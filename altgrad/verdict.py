"""What a comparison shows, in sentences made from its rows: where backprop wins, where it does not, and how it was measured."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from altgrad.budget import BUDGETS
from altgrad.compare_row import Row
from altgrad.compare_settings import REFERENCE, CompareSettings

ATTACK = (
    "FGSM: accuracy when every test input takes one step, that share of the inputs' range long, along the sign of its own loss gradient (white box, "
    "by autograd on the trained model; - where it has no derivative). It is one weak attack: to stand it is no proof of robustness."
)
SHOWN = 6  # blocks whose heads are told one by one; all are in the JSON
LEVEL = 0.1  # costs closer than this share are not told apart: wall time wavers by as much


def sentences(rows: Sequence[Row], settings: Mapping[str, Any], skipped: Mapping[str, str]) -> list[str]:
    """The sentences under the table; arguments as the fields of a Comparison."""
    reference = next((row for row in rows if row.label == REFERENCE), None)
    rules = [row for row in rows if not row.baseline]
    found = []
    if reference is None:
        found.append("Backprop could not be run on this problem, so there is nothing to hold these figures against.")
    elif not rules:
        found.append("Only backprop and its variants were run.")
    else:
        found += quality(reference, rules)
        kind = settings["budget"].partition("=")[0].strip()
        costs = {
            "wall time": {row.label: row.seconds for row in [reference, *rules]} if kind != "seconds" else {},
            "forward-equivalents": {row.label: row.equivalents for row in [reference, *rules]} if kind != "forwards" else {},
            "peak memory": {row.label: float(row.peak_memory_bytes) for row in [reference, *rules]},
        }
        found += [sentence for name, values in costs.items() for sentence in cost(name, values)]
        least = min((row for row in rows if row.baseline), key=lambda row: row.peak_memory_bytes)
        if least is not reference and any(row.peak_memory_bytes < reference.peak_memory_bytes for row in rules):
            still = [row.label for row in rules if row.peak_memory_bytes < least.peak_memory_bytes]
            found.append(f"Below the leanest form of backprop ({least.label}) in peak memory: {', '.join(still) or 'none'}.")
    for row in rows:
        if row.diverged:
            found.append(f"{row.label}: {row.diverged} of {len(row.curves)} runs diverged; their figures are those of the last step made.")
    found += [sentence for row in rows for sentence in read_out(row)]
    edge = [f"{row.label} ({row.lr:g})" for row in rows if row.at_edge]
    if edge:
        found.append(f"The best learning rate was at the edge of the grid for {', '.join(edge)}; a wider grid might serve them better.")
    return found + [f"{label} was not run: {reason}" for label, reason in skipped.items()]


def quality(reference: Row, rules: Sequence[Row]) -> list[str]:
    """Accuracy (loss where there is none) against backprop's; a difference within the spread of the seeds is called level."""
    by_accuracy = reference.accuracy is not None
    name = "test accuracy" if by_accuracy else "test loss"
    behind: list[str] = []
    level: list[str] = []
    ahead: list[str] = []
    for row in rules:
        mine, theirs = (row.accuracy, reference.accuracy) if by_accuracy else (row.loss, reference.loss)
        if mine is None or theirs is None:
            behind.append(f"{row.label} (no finite figure)")
            continue
        gain = mine - theirs if by_accuracy else theirs - mine
        told = f"{row.label} ({100 * gain:+.1f} points)" if by_accuracy else f"{row.label} ({mine:.3g} against {theirs:.3g})"
        spreads = [(r.accuracy_spread if by_accuracy else r.loss_spread) or 0.0 for r in (row, reference)]
        (level if abs(gain) <= math.hypot(*spreads) else ahead if gain > 0 else behind).append(told)
    lines = [
        behind and f"Backprop wins on {name} against {', '.join(behind)}.",
        level and f"Level with backprop on {name}, within the spread of the seeds: {', '.join(level)}.",
        ahead and f"Ahead of backprop on {name}: {', '.join(ahead)}.",
        len(reference.curves) == 1 and "One seed tells nothing about the spread: run several before believing a difference.",
    ]
    return [line for line in lines if line]


def read_out(row: Row) -> list[str]:
    """What the other read-outs of a rule would have given: the mean over seeds."""
    means = {name: statistics.fmean(known) for name, values in row.readouts.items() if (known := [value for value in values if value is not None])}
    if not means:
        return []
    own, told = row.settings.get("readout"), {"best": f"best on held-out data ({row.best_readout})", "linear-probe": "linear probe of all blocks"}
    blocks = [name for name in means if f"linear-probe.{name}" in means]
    kinds = [name for name in means if name not in blocks and not name.startswith("linear-probe.")]
    words = [f"{told.get(name, name)}{' (the one in the table)' * (name == own)} {100 * means[name]:.2f} %" for name in kinds]
    words += [f"block {name} alone {100 * means[name]:.2f} %" for name in blocks] if len(blocks) <= SHOWN else []
    return [f"Test accuracy of {row.label} by read-out: {', '.join(words)}."]


def cost(name: str, values: Mapping[str, float]) -> list[str]:
    """A cost against backprop's, as multiples of it; differences under LEVEL are not mentioned."""
    theirs = values.get(REFERENCE, 0.0)
    if theirs <= 0:
        return []
    more = [f"{label} took {value / theirs:.3g} × as much" for label, value in values.items() if value > theirs * (1 + LEVEL)]
    less = [f"{label} ({value / theirs:.2g} × as much)" for label, value in values.items() if value < theirs * (1 - LEVEL)]
    return [line for line in (more and f"Backprop wins on {name}: {', '.join(more)}.", less and f"Less {name} than backprop: {', '.join(less)}.") if line]


def method(settings: CompareSettings, grid: Sequence[float], *, draws: int) -> list[str]:
    """How the figures were measured."""
    kind, _, amount = settings.budget.partition("=")
    seeds = f"{len(settings.seeds)} seeds" if len(settings.seeds) > 1 else "1 seed"
    if grid:
        tuning = (
            f"Equal tuning: every engine tried the learning rates {', '.join(f'{lr:g}' for lr in grid)} with {settings.optimizer}, one run of the full budget "
            f"each, on {100 * settings.validation:.0f} % of the training data held out; the most accurate was kept. No tuning run reads the test data."
        )
    elif settings.lr is not None:
        tuning = f"No tuning: every engine used {settings.optimizer} with lr={settings.lr:g}, which may suit one better than another."
    else:
        tuning = f"No tuning: every engine used {settings.optimizer} with the problem's default learning rate."
    if settings.rates:
        tuning += f" Set by hand, not tuned: {', '.join(f'{label} lr={lr:g}' for label, lr in settings.rates.items())}."
    if own := settings.made_for():
        shown = ", ".join(f"{label} {found['optimizer']} lr={found['lr']:g}" for label, found in own.items())
        tuning += f" Made for an optimizer of their own, neither tuned nor scheduled: {shown}."
    return [
        f"Equal budget: every run stopped with the first step that reached {amount.strip()} {BUDGETS[kind.strip()]}; {seeds}.",
        tuning,
        "Forwards and backwards are those the engine reports; a forward-equivalent is a forward, and a backward counts as two.",
        "Seconds are wall time inside steps, without evaluation; every engine had taken a first estimate before its clock started.",
        "Peak memory is measured on one estimate of one batch: bytes of tensors alive at once beyond parameters, batch and gradients "
        "(on CUDA, allocated bytes). The optimizer's state, the same for all, is not in it.",
        f"Cosine is that of the estimate to backprop's gradient at the first weights of the first seed, the mean over {draws} draws of the noise.",
        "± is the standard deviation over seeds.",
        *([ATTACK] if settings.fgsm else []),
    ]
