"""Claims about rules that judge an input together with a label."""

from typing import Any

import torch
from torch import Tensor

from altgrad.conformance import probes
from altgrad.conformance.claim import KEY, Subject, claim, hold
from altgrad.engine import Engine, Needs

STEPS, RATE = 60, 0.02


class Watched(probes.Probe):
    """3-5-4-3, tanh; notes every label that is put into its inputs."""

    def __init__(self) -> None:
        super().__init__(probes.network_model, probes.data("network", 3))
        self.seen: list[Tensor] = []

    def with_label(self, x: Any, y: Tensor) -> Any:
        self.seen.append(y)
        return super().with_label(x, y)


def labels_inputs(engine: Engine) -> bool:
    return Needs.LABELS in engine.needs


@claim(applies=labels_inputs)
def wrong_labels_are_never_right(subject: Subject) -> None:
    bench = subject.bench(Watched())
    problem, right = bench.problem, bench.batch.targets
    rights = wrongs = 0
    for step in range(8):
        problem.seen.clear()  # type: ignore[attr-defined]
        bench.estimate(KEY.at(step))
        for marks in problem.seen:  # type: ignore[attr-defined]
            told = marks.argmax(1) == right if marks.ndim > 1 else marks == right
            if marks.ndim > 1 and bool((marks == marks[:, :1]).all()):
                continue  # no label
            rights, wrongs = rights + bool(told.all()), wrongs + (not bool(told.any()))
            hold(bool(told.all()) or not bool(told.any()), f"{int(told.sum())} of {len(told)} inputs got their right label among the wrong ones.")
    hold(rights > 0 and wrongs > 0, "inputs must be seen with their right labels and with wrong ones.")


@claim(applies=labels_inputs)
def training_lifts_right_labels_above_wrong_ones(subject: Subject) -> None:
    bench = subject.bench(Watched())
    trained = [value for value in bench.params.values() if value.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=RATE)
    before = lead(bench)
    for step in range(STEPS):
        found = bench.estimate(KEY.at(step))
        bench.state = found.state
        for name, value in bench.params.items():
            value.grad = found.grads.get(name)
        optimizer.step()
    after = lead(bench)
    hold(
        after > before and after > 0, f"the right label's score was {before:.3g} above the mean of the others, and is {after:.3g} above it after {STEPS} steps."
    )


def lead(bench: Any) -> float:
    """By how much the engine's score of the right label exceeds the mean of the others', on average."""
    with torch.no_grad():
        scores = bench.engine.predict(bench.problem, bench.params, bench.state, bench.batch.inputs)
    own = scores.gather(1, bench.batch.targets[:, None])[:, 0]
    return float((own - (scores.sum(1) - own) / (scores.shape[1] - 1)).mean())
