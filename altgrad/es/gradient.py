r"""Strategies that estimate a gradient from pairs m ± ε: OpenES, ARS and guided ES.

    OpenES  g = (1/(λ σ)) Σ F_i ε_i, with ε ~ N(0, I) and F the centered ranks of the fitness
    ARS     g = (1/(b · std)) Σ_{k≤b} (f⁺_k - f⁻_k) ε_k over the b pairs with the best member, std over their 2b values
    guided  ε ~ N(0, σ² (a I + (1 - a)(n/k) U Uᵀ)), U an orthonormal basis [n, k] of surrogate gradients; g = (β/(2 σ² P)) Σ ε_k (f⁺_k - f⁻_k)

and m ← m - step(g + l2 m) by one of the rules in `steps`. σ and the learning rate decay together, since neither adapts by itself.

Sources: Salimans et al., arXiv 1703.03864; Mania, Guy, Recht, arXiv 1803.07055; Maheswaranathan et al., arXiv 1806.10230.
"""

from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any, ClassVar, TypeVar

import numpy as np

from altgrad.errors import SettingError, ShapeError, near_miss, require
from altgrad.es import draws, ranking, steps
from altgrad.es.base import State, Strategy, is_number, is_whole, numbers


@dataclass(frozen=True, eq=False)
class GradientState(State):
    """What the step rule remembers."""

    first: np.ndarray  # [n] Adam's mean of gradients, or ClipUp's velocity
    second: np.ndarray  # [n] Adam's mean of their squares
    updates: int


G = TypeVar("G", bound=GradientState)


@dataclass(frozen=True, eq=False)
class GradientStrategy(Strategy[G]):
    """Base of the three: the settings of the step."""

    learning_rate: float | None = field(default=None, metadata={"help": "first step of the rule, in units of x; σ/2 where none is given"})
    rule: str = field(default="adam", metadata={"help": "how a gradient becomes a step: adam, clipup or sgd"})
    decay: float = field(default=0.998, metadata={"help": "of σ and of the learning rate, a generation"})
    l2: float = field(default=0.0, metadata={"help": "weight decay: l2 · mean is added to the gradient"})

    state_class: ClassVar[type[State]] = GradientState
    antithetic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        rate = self.learning_rate
        require(rate is None or (is_number(rate) and 0 < rate < np.inf), "learning_rate", rate, "a number above 0")
        if self.rule not in steps.RULES:
            raise SettingError(near_miss("rule", str(self.rule), steps.RULES))
        require(is_number(self.decay) and 0 < self.decay <= 1, "decay", self.decay, "in (0, 1]")
        require(is_number(self.l2) and 0 <= self.l2 < np.inf, "l2", self.l2, "a number ≥ 0")

    def extras(self, mean: np.ndarray) -> dict[str, Any]:
        zeros = np.zeros(len(mean))
        return {"first": zeros, "second": zeros, "updates": 0}

    def sample(self, state: G, members: int) -> np.ndarray:
        return draws.fill(state.key, state.mean, state.sigma, members, antithetic=True)

    def update(self, state: G, population: np.ndarray, fitness: np.ndarray) -> G:
        gradient = self.gradient(state, population, fitness)
        gradient = gradient + self.l2 * state.mean if self.l2 else gradient
        rate = (self.sigma / 2 if self.learning_rate is None else self.learning_rate) * (state.sigma / self.sigma)
        first, second = state.first, state.second
        if self.rule == "adam":
            move, first, second = steps.adam(gradient, first, second, state.updates, rate)
        elif self.rule == "clipup":
            move = first = steps.clipup(gradient, first, rate, 2 * rate)
        else:
            move = rate * gradient
        return replace(state, mean=state.mean - move, sigma=state.sigma * self.decay, first=first, second=second, updates=state.updates + 1)

    def gradient(self, state: G, population: np.ndarray, fitness: np.ndarray) -> np.ndarray:
        """The estimate, [n]; it points to larger fitness."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class OpenES(GradientStrategy[GradientState]):
    """OpenES: the gradient of the ranks, smoothed; a fixed isotropic σ."""

    name: ClassVar[str] = "openes"
    source: ClassVar[str] = "Salimans, Ho, Chen, Sidor, Sutskever, Evolution strategies as a scalable alternative to RL, arXiv 1703.03864"

    def gradient(self, state: GradientState, population: np.ndarray, fitness: np.ndarray) -> np.ndarray:
        weights = ranking.centered_ranks(fitness) / (len(fitness) * state.sigma)
        return draws.weighted_sum(weights / state.sigma, population, state.mean)


@dataclass(frozen=True, eq=False)
class ARS(GradientStrategy[GradientState]):
    """Augmented random search: the best pairs only, steps divided by the spread of their fitness."""

    rule: str = field(default="sgd", metadata={"help": "how a gradient becomes a step: adam, clipup or sgd"})
    elite: float = field(default=1.0, metadata={"help": "share of the pairs that are used, those with the best member first"})

    name: ClassVar[str] = "ars"
    source: ClassVar[str] = "Mania, Guy, Recht, Simple random search provides a competitive approach to RL, arXiv 1803.07055"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.elite) and 0 < self.elite <= 1, "elite", self.elite, "in (0, 1]")

    def gradient(self, state: GradientState, population: np.ndarray, fitness: np.ndarray) -> np.ndarray:
        pairs = ranking.finite_scores(fitness).reshape(-1, 2)  # [pairs, 2] f⁺, f⁻
        chosen = ranking.order(pairs.min(1))[: max(1, round(self.elite * len(pairs)))]
        spread = float(pairs[chosen].std())
        weights = np.zeros((len(pairs), 2))
        if spread > 0:
            differences = (pairs[chosen, 0] - pairs[chosen, 1]) / (len(chosen) * spread * 2 * state.sigma)
            weights[chosen, 0], weights[chosen, 1] = differences, -differences  # ε = (x⁺ - x⁻)/(2σ)
        return draws.weighted_sum(weights.reshape(-1), population, state.mean)


@dataclass(frozen=True, eq=False)
class GuidedState(GradientState):
    """The subspace noise is drawn from beside the whole space."""

    subspace: np.ndarray  # [k, n] the latest surrogate gradients, newest first; zero rows are not in use


@dataclass(frozen=True, eq=False)
class GuidedES(GradientStrategy[GuidedState]):
    """Guided ES: more noise along surrogate gradients: those given to `guide`, else its own latest estimates.

    The fitness is divided by its standard deviation within a generation, so that a learning rate means the same at every scale of f.
    """

    guides: int = field(default=1, metadata={"help": "k, directions of the subspace"})
    whole: float = field(default=0.5, metadata={"help": "a, share of the variance that goes to the whole space"})
    beta: float = field(default=1.0, metadata={"help": "β, factor of the gradient"})

    name: ClassVar[str] = "guided-es"
    source: ClassVar[str] = "Maheswaranathan, Metz, Tucker, Choi, Sohl-Dickstein, Guided evolutionary strategies, arXiv 1806.10230"
    state_class: ClassVar[type[State]] = GuidedState

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_whole(self.guides) and self.guides >= 1, "guides", self.guides, "a whole number ≥ 1")
        require(is_number(self.whole) and 0 < self.whole <= 1, "whole", self.whole, "in (0, 1]")
        require(is_number(self.beta) and 0 < self.beta < np.inf, "beta", self.beta, "a number above 0")

    def extras(self, mean: np.ndarray) -> dict[str, Any]:
        return {**super().extras(mean), "subspace": np.zeros((self.guides, len(mean)))}

    def guide(self, state: GuidedState, gradients: np.ndarray) -> GuidedState:
        """`state` with surrogate gradients [j, n] or [n] at the head of its subspace; give them before ask.

        Raises:
            ShapeError: another shape, or not finite.
        """
        rows = np.atleast_2d(numbers(gradients, "gradients"))
        if rows.ndim != 2 or rows.shape[1] != len(state.mean) or not np.isfinite(rows).all():
            raise ShapeError(f"guide got gradients of shape {rows.shape}; they must be finite and of shape (directions, {len(state.mean)}).")
        return replace(state, subspace=np.concatenate([rows, state.subspace])[: self.guides])

    def sample(self, state: GuidedState, members: int) -> np.ndarray:
        n = len(state.mean)
        used = state.subspace[np.any(state.subspace != 0, axis=1)]
        if not len(used):
            return super().sample(state, members)
        basis, _ = np.linalg.qr(used.T)  # [n, k] U
        pairs, k = members // 2, basis.shape[1]
        z = draws.normals(state.key, pairs, n)
        inside = draws.normals(state.key.fold("subspace"), pairs, k)
        moves = state.sigma * (sqrt(self.whole) * z + sqrt((1 - self.whole) * n / k) * inside @ basis.T)
        return np.stack([state.mean + moves, state.mean - moves], axis=1).reshape(members, n)

    def update(self, state: GuidedState, population: np.ndarray, fitness: np.ndarray) -> GuidedState:
        estimate = self.gradient(state, population, fitness)
        return self.guide(super().update(state, population, fitness), estimate)

    def gradient(self, state: GuidedState, population: np.ndarray, fitness: np.ndarray) -> np.ndarray:
        scores = ranking.finite_scores(fitness)
        spread = float(scores.std())
        if spread == 0:
            return np.zeros_like(state.mean)
        differences = (scores[0::2] - scores[1::2]) / spread
        weights = np.repeat(differences, 2) * np.tile([0.5, -0.5], len(differences))  # ε = (x⁺ - x⁻)/2
        return draws.weighted_sum(self.beta / (2 * state.sigma**2 * len(differences)) * weights, population, state.mean)
