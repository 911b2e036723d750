"""Claims about rules that judge an input together with a label."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from altgrad.conformance import probes
from altgrad.conformance.claim import KEY, Subject, claim, hold
from altgrad.engine import Engine, Needs

STEPS, RATE, WIDTH = 100, 0.01, 32


def wide_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, probes.CLASSES))


class Watched(probes.Probe):
    """Notes every label that is put into its inputs."""

    def __init__(self, build: Callable[[], nn.Module] = probes.network_model) -> None:
        super().__init__(build, probes.data("network", 3))
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


@claim(applies=lambda engine: labels_inputs(engine) and getattr(engine, "schedule", "joint") == "joint")
def training_lifts_right_labels_above_wrong_ones(subject: Subject) -> None:
    bench = subject.bench(Watched(wide_model))
    trained = [value for value in bench.params.values() if value.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=RATE)
    for step in range(STEPS):
        found = bench.estimate(KEY.at(step))
        bench.state = found.state
        for name, value in bench.params.items():
            value.grad = found.grads.get(name)
        optimizer.step()
    with torch.no_grad():
        scores = bench.engine.predict(bench.problem, bench.params, bench.state, bench.batch.inputs)
    right = int((scores.argmax(1) == bench.batch.targets).sum())
    hold(
        2 * right > len(scores), f"after {STEPS} steps on {len(scores)} examples the right label has the highest score for {right} of them; a third is chance."
    )
