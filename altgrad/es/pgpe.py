r"""PGPE: policy gradients with parameter-based exploration, symmetric, with ClipUp.

    ε ~ N(0, diag(s²)), members m ± ε with centered ranks F±, b their mean
    g_m = mean over pairs of ½ (F⁺ - F⁻) ε,   g_s = mean over pairs of (½ (F⁺ + F⁻) - b)(ε² - s²)/s
    m ← m - clipup(g_m),   s ← clip(s - lr_s g_s, (1 - c) s, (1 + c) s)

The largest step is a fifteenth of the radius ‖s‖, and shrinks with it.

Sources: Sehnke et al., "Parameter-exploring policy gradients", Neural Networks 23 (2010); Toklu et al., arXiv 2008.02387.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from altgrad.errors import require
from altgrad.es import draws, ranking, steps
from altgrad.es.base import RANGE, State, Strategy, is_number


@dataclass(frozen=True, eq=False)
class PGPEState(State):
    """Standard deviations and the velocity; `sigma` is the root mean square of the deviations."""

    scales: np.ndarray  # [n] s
    velocity: np.ndarray  # [n]


@dataclass(frozen=True, eq=False)
class PGPE(Strategy[PGPEState]):
    """PGPE with ClipUp: a gradient for the mean and for a scale of every coordinate; linear in n."""

    radius: float = field(default=15.0, metadata={"help": "‖s‖ / the largest step: how far the search moves in a generation"})
    step: float = field(default=0.75, metadata={"help": "ClipUp's learning rate in units of the largest step"})
    scale_rate: float = field(default=0.1, metadata={"help": "learning rate of the deviations"})
    change: float = field(default=0.2, metadata={"help": "largest relative change of a deviation in a generation"})

    name: ClassVar[str] = "pgpe"
    source: ClassVar[str] = "Sehnke et al., Parameter-exploring policy gradients, 2010; ClipUp: Toklu et al., arXiv 2008.02387"
    state_class: ClassVar[type[State]] = PGPEState
    antithetic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("radius", "step", "scale_rate"):
            require(is_number(getattr(self, name)) and 0 < getattr(self, name) < np.inf, name, getattr(self, name), "a number above 0")
        require(is_number(self.change) and 0 < self.change < 1, "change", self.change, "in (0, 1)")

    def extras(self, mean: np.ndarray) -> dict[str, Any]:
        return {"scales": np.full(len(mean), float(self.sigma)), "velocity": np.zeros(len(mean))}

    def sample(self, state: PGPEState, members: int) -> np.ndarray:
        return draws.fill(state.key, state.mean, state.scales, members, antithetic=True)

    def update(self, state: PGPEState, population: np.ndarray, fitness: np.ndarray) -> PGPEState:
        ranks = ranking.centered_ranks(fitness).reshape(-1, 2)  # [pairs, 2] F⁺, F⁻; their mean b is 0
        half, together = 0.5 * (ranks[:, 0] - ranks[:, 1]) / len(ranks), ranks.mean(1) / len(ranks)
        moves, squares = np.empty(len(state.mean)), np.empty(len(state.mean))
        for part in draws.blocks(len(population), len(state.mean)):
            noise = 0.5 * (population[0::2, part] - population[1::2, part])  # [pairs, width] ε
            moves[part] = half @ noise
            squares[part] = together @ np.square(noise, out=noise)
        velocity = self.moved(state, moves)
        wanted = state.scales - self.scale_rate * squares / state.scales  # Σ together = 0, so that the s² of ε² - s² drops out
        scales = np.clip(np.clip(wanted, (1 - self.change) * state.scales, (1 + self.change) * state.scales), *RANGE)
        return replace(state, mean=state.mean - velocity, scales=scales, velocity=velocity, sigma=float(np.sqrt(np.mean(np.square(scales)))))

    def moved(self, state: PGPEState, gradient: np.ndarray) -> np.ndarray:
        """The new velocity."""
        greatest = float(np.linalg.norm(state.scales)) / self.radius
        return steps.clipup(gradient, state.velocity, self.step * greatest, greatest)

    def deviations(self, state: PGPEState) -> np.ndarray:
        return state.scales
