"""What one engine of a comparison came to."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """What one engine came to: means over seeds, and what every seed gave."""

    label: str
    engine: str
    settings: dict[str, Any]
    baseline: bool
    accuracy: float | None  # in [0, 1]; none where the problem has no classes
    accuracy_spread: float | None  # standard deviation over seeds; none for a single seed
    accuracies: list[float]
    loss: float | None
    loss_spread: float | None
    losses: list[float]
    steps: float
    forwards: float
    backwards: float
    seconds: float
    peak_memory_bytes: int
    saved_bytes: int
    cosine: float | None
    lr: float
    tuning: dict[str, float | None]  # learning rate -> validation accuracy (loss where there is none); none: diverged
    diverged: int  # seeds whose run ended early, in NaN or infinity
    curves: list[list[dict[str, Any]]]  # of every seed: step, forwards, backwards, seconds, test_accuracy, test_loss
    fgsm: dict[str, list[float | None]] = field(default_factory=dict)  # epsilon -> accuracy under FGSM of every seed; none: it had no direction
    readouts: dict[str, list[float | None]] = field(default_factory=dict)  # read-out, block or probe -> test accuracy of every seed; none: not read out
    cosines: dict[str, float] = field(default_factory=dict)  # parameter -> cosine of its estimate to its gradient, at the first weights
    metrics: dict[str, float] = field(default_factory=dict)  # what the rule says of its first estimate, its cost aside
    best_readout: str | None = None  # what "best" stands for: chosen on held-out training data; none where nothing was tuned

    @property
    def equivalents(self) -> float:
        """forwards + 2 × backwards."""
        return self.forwards + 2 * self.backwards

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate was the least or the greatest tried."""
        tried = [float(lr) for lr in self.tuning]
        return len(tried) > 2 and self.lr in {min(tried), max(tried)}


__all__ = ["Row"]
