r"""σ over a run: schedules, which are functions of the step alone, and the adaptation of natural evolution strategies.

Adaptation. With x = μ + σz, z ~ N(0, I_n), the score of log σ and its Fisher information are

    ∂ log p / ∂ log σ = ‖z‖² - n,    E(‖z‖² - n)² = 2n,    so the natural gradient is (‖z‖² - n) / 2n = ½ (s - 1),  s = ‖z‖² / n,

and the step is log σ ← log σ + (η/2) Σ_k u_k (s_k - 1): xNES's σ, and with one σ for every coordinate SNES. u = -w for the weights w of
altgrad/shaping.py, which grow with the loss. With one σ for each tensor s is that tensor's mean square: the Fisher matrix is diagonal.

Low-rank noise E = ABᵀ/√r has no closed score. EGGROLL puts -E in its place, the Gaussian's, and the same is done here: s = ‖E‖² / mn,
which has mean 1 for every law, so nothing drifts without a signal. Its variance is larger than dense noise's (κ - 1) / mn: for rank 1 about
(κ - 1)(1/m + 1/n), κ the law's kurtosis, so log σ moves in longer steps.

What adapts what: only `nes` utilities make σ grow on a slope, for they favour both the luckiest and the longest; weights that are odd in the
fitness (z-score, centred-rank, raw) see no σ in a linear loss and follow its curvature alone; `sign` weights of a pair cancel, its members
having one s between them. Signs have s = 1 for dense noise and rank 1, for every member.

Source: Wierstra et al., "Natural Evolution Strategies", JMLR 15, 2014, xNES, SNES and table 1.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from altgrad.errors import SettingError, near_miss, require

SCHEDULES = ("constant", "cosine", "exponential", "linear")


@dataclass(frozen=True)
class Schedule:
    """σ at every step: with t the step, T = `steps` and f = `floor`,

    constant     σ
    linear       σ (f + (1 - f) (1 - t/T)),            σ f from step T on
    cosine       σ (f + (1 - f) (1 + cos πt/T) / 2),   σ f from step T on
    exponential  σ max(f, decayᵗ)

    Raises:
        SettingError: an unknown name, or a setting out of its range.
    """

    name: str = field(default="constant", metadata={"help": "how sigma changes: 'constant', 'linear', 'cosine' or 'exponential'"})
    sigma: float = field(default=0.01, metadata={"help": "noise scale at step 0, in units of the parameters, > 0"})
    decay: float = field(default=0.999, metadata={"help": "exponential: factor of a step, in (0, 1]; 0.999 as in OpenAI's and EvoJAX's strategies"})
    floor: float = field(default=0.1, metadata={"help": "the share of sigma never gone below, in (0, 1]: the estimate divides by sigma"})
    steps: int = field(default=0, metadata={"help": "linear and cosine: steps to come down to the floor, >= 1"})

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise SettingError(near_miss("sigma schedule", str(self.name), SCHEDULES))
        # Named as the engines' settings are: theirs is what a user has written.
        require(isinstance(self.sigma, (int, float)) and 0 < self.sigma < math.inf, "sigma", self.sigma, "a positive number")
        require(isinstance(self.decay, (int, float)) and 0 < self.decay <= 1, "sigma_decay", self.decay, "in (0, 1]")
        require(isinstance(self.floor, (int, float)) and 0 < self.floor <= 1, "sigma_floor", self.floor, "a share of sigma in (0, 1]")
        if self.name in ("linear", "cosine"):
            require(
                isinstance(self.steps, int) and self.steps >= 1,
                "sigma_steps",
                self.steps,
                f"a whole number >= 1 with the {self.name} schedule: the step at which sigma reaches its floor",
            )

    def at(self, step: int) -> float:
        """σ at `step`, counted from 0."""
        if self.name == "constant":
            return self.sigma
        if self.name == "exponential":
            return self.sigma * max(self.floor, self.decay**step)
        progress = min(step / self.steps, 1.0)
        left = 1 - progress if self.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.sigma * (self.floor + (1 - self.floor) * left)


def default_rate(dimension: int) -> float:
    """η = (3 + ln n) / (5 √n). Source: Wierstra et al. 2014, table 1, SNES."""
    require(dimension >= 1, "dimension", dimension, "at least 1")
    return (3 + math.log(dimension)) / (5 * math.sqrt(dimension))


def adapt(log_sigma: Tensor, weights: Tensor, squares: Tensor, *, dimension: int, rate: float | None = None) -> Tensor:
    """The next log σ: log σ - (η/2) Σ_p (w_p - w̄) (s_p - 1).

    The mean weight w̄ is taken off because E s = 1: it adds nothing but variance, and is zero for most shapings anyway.

    Args:
        log_sigma: [] for one σ, [T] for one a tensor.
        weights: [P] from shaping.shape, growing with the loss; the two members of a pair have a weight each.
        squares: mean squared noise entry of each member (before σ), [P] over all coordinates or [P, T] for each tensor. Leave out silent members.
        dimension: n, the number of coordinates of all tensors together, which sets the default rate.
        rate: η > 0; default_rate(n) where None. With weights in units of the loss (`raw`) the rate has the inverse unit.

    Source: the module's equation.
    """
    if rate is not None:
        require(0 < rate < math.inf, "rate", rate, "a positive number, or None for (3 + ln n) / (5 √n)")
    eta = default_rate(dimension) if rate is None else rate
    centred = (weights - weights.mean()).double()
    change = torch.tensordot(centred, squares.double() - 1, 1)  # [] or [T]
    return log_sigma - (0.5 * eta * change).to(log_sigma.dtype)


def low_rank_squares(a: Tensor, b: Tensor) -> Tensor:
    """‖A Bᵀ‖² / mn = tr((AᵀA)(BᵀB)) / mn of every member, [P], float64; no matrix is formed.

    Args: a [P, m, r] with 1/√r in it; b [P, n, r].
    """
    grams = [torch.matmul(factor.double().transpose(1, 2), factor.double()) for factor in (a, b)]  # [P, r, r] each
    return (grams[0] * grams[1]).sum((1, 2)) / (a.shape[1] * b.shape[1])


def check_adaptation(*, law: str, rank: int | None, shaping: str) -> None:
    """Raise SettingError where σ could never move: what is compared is the same for every member.

    Args: law of the noise; rank of the factors, None for dense; shaping, a name of altgrad/shaping.py.
    """
    if shaping == "sign":
        raise SettingError("sigma cannot adapt with shaping='sign': the weights of a pair cancel, and both have the same length; use shaping='nes'.")
    if law == "sign" and rank in (None, 1):
        kind = "dense" if rank is None else "rank 1"
        raise SettingError(f"sigma cannot adapt to {kind} noise='sign': all members have the same length; use noise='normal' or 'uniform'.")
