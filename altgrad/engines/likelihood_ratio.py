r"""Likelihood ratio: noise on what layers put out, and one loss; no derivative of anything is taken.

For every parametric layer l, with its output made y_l + σ ε_l, ε ~ N(0, I):

    ∂E L/∂W_l = E[(L - b) ∂⟨ε_l, y_l⟩/∂W_l] / σ,      linear layers: E[(L - b) ε_l x_lᵀ] / σ,

per example, over several copies of the noise. It is unbiased for the loss smoothed by the noise, whatever follows the layer: activations, losses
and programs need no derivative. With the clean loss as the baseline it is a finite difference in activation space, and its variance that of the
activation forward gradient. Where losses are local (altgrad.credit), a layer's coefficient sums those that it touches.
"""

import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from altgrad import sigma as sigmas
from altgrad.engine import Bias, Engine, Estimate, Needs, Split, Tree
from altgrad.errors import SettingError, near_miss, require
from altgrad.kernels import scratch
from altgrad.noisy import baselines
from altgrad.noisy.copies import Copies
from altgrad.noisy.credited import Credit
from altgrad.noisy.draws import Draws
from altgrad.noisy.passes import clean
from altgrad.noisy.probe import Facts, Look, examine, look
from altgrad.noisy.trace import Sums
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.world import World

STATE = "log_sigma"


def option(default: Any, meaning: str) -> Any:
    """A settings field with its meaning."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class LikelihoodRatio(Engine):
    """Noise on layers' outputs; the gradient of the smoothed loss from losses alone.

    Raises:
        SettingError: a setting out of range, two that exclude each other, or `layers` that match nothing.
        CapabilityError: a model that changes its output for the same input, or a layer whose output is not floating point.

    Source: Jiang, Zhang, Xu, Yu, Peng, ICLR 2024, arXiv 2305.08960.
    """

    copies: int = option(8, "noisy copies of the batch a step; even with antithetic pairs")
    sigma: float = option(0.1, "noise scale in units of the layers' outputs, > 0")
    baseline: str = option("clean", "subtracted from the losses: 'clean' (one more pass), 'loo' (the other copies), 'mean' (of past steps) or 'none'")
    antithetic: bool = option(False, "copies in pairs of opposite noise")
    qmc: bool = option(False, "stratify each unit's noise over the copies (digitally shifted Sobol points)")
    layerwise: bool = option(False, "noise on one layer at a time; the layers before it are not computed again")
    memory: str = option("store", "'store' layer inputs and noise, or 'replay' the noisy pass")
    chunk: int | None = option(None, "directions (copies, or pairs) in memory at once; does not change the result")
    layers: str = option("*", "which layers are trained: patterns of parameter or layer names, separated by commas")
    sigma_schedule: str = option("constant", "'constant', 'linear', 'cosine' or 'exponential'")
    sigma_decay: float = option(0.999, "exponential: factor of a step")
    sigma_floor: float = option(0.1, "share of sigma that neither a schedule nor learning goes below")
    sigma_steps: int = option(0, "linear and cosine: steps down to the floor")
    sigma_rate: float = option(0.0, "learn each layer's sigma by its own score at this rate; 0 leaves it")

    def __post_init__(self) -> None:
        least = 2 if self.antithetic else 1
        require(isinstance(self.copies, int) and self.copies >= least, "copies", self.copies, f"a whole number >= {least}")
        require(not (self.antithetic and self.copies % 2), "copies", self.copies, "even with antithetic=True")
        if self.baseline not in baselines.BASELINES:
            raise SettingError(near_miss("baseline", self.baseline, baselines.BASELINES))
        require(self.memory in {"store", "replay"}, "memory", self.memory, "'store' or 'replay'")
        require(self.chunk is None or self.chunk >= 1, "chunk", self.chunk, "None or a whole number >= 1")
        self.schedule  # noqa: B018 - checks its settings
        require(0 <= self.sigma_rate < math.inf, "sigma_rate", self.sigma_rate, "a number >= 0")
        if self.sigma_rate:
            require(self.sigma_schedule == "constant", "sigma_schedule", self.sigma_schedule, "'constant' where sigma is learned")
        if self.baseline == "loo":
            require(self.directions >= 2, "copies", self.copies, f"at least {2 * least} with baseline='loo', which leaves a copy or a pair out")
            require(not self.qmc, "qmc", self.qmc, "False with baseline='loo': the copies of a stratified sample are not independent")
        if self.layerwise:
            require(self.memory == "store", "memory", self.memory, "'store' with layerwise=True, which keeps the clean outputs of all layers")
        require(bool(self.layers.strip(", ")), "layers", self.layers, "patterns such as '*' or 'body.*,head'")

    @property
    def name(self) -> str:
        return "likelihood-ratio"

    @property
    def needs(self) -> Needs:
        return Needs.VALUE

    @property
    def bias(self) -> Bias:
        return Bias.SMOOTHED

    @property
    def split(self) -> Split:
        return Split.DATA

    @property
    def source(self) -> str:
        return "Jiang et al. 2024, arXiv 2305.08960, theorem 1"

    @property
    def directions(self) -> int:
        return self.copies // 2 if self.antithetic else self.copies

    @property
    def schedule(self) -> sigmas.Schedule:
        return sigmas.Schedule(self.sigma_schedule, sigma=self.sigma, decay=self.sigma_decay, floor=self.sigma_floor, steps=self.sigma_steps)

    def init(self, problem: Problem, params: Tree, key: Key) -> Tree:
        self.chosen(params)
        device = next(iter(params.values())).device
        state: Tree = {}
        if self.sigma_rate:
            state[STATE] = torch.full((len(params),), math.log(self.sigma), dtype=torch.float64, device=device)
        if self.baseline == "mean":
            state.update(baselines.first_state(device))
        return state

    def chosen(self, params: Tree) -> set[str]:
        """The names of the parameters that `layers` matches, by their own name or by that of their layer."""
        patterns = [part.strip() for part in self.layers.split(",") if part.strip()]
        found: set[str] = set()
        for pattern in patterns:
            own = {name for name in params if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)}
            if not own:
                raise SettingError(f"layers={self.layers!r}: " + near_miss("layer", pattern, {name.rpartition(".")[0] or name for name in params}))
            found |= own
        return found

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        scratch.turn()  # buffers of steps before the last one
        params = {name: value.detach() for name, value in params.items()}
        chosen, examples = self.chosen(params), problem.batch_size_of(batch)
        facts = self.facts(problem, params, chosen, batch, key, examples)
        buffers = problem.fresh_buffers()
        credit = self.credit(problem, params, batch)
        unperturbed = clean(problem, params, batch, key, buffers, local=credit is not None) if self.baseline == "clean" or buffers else None
        names = list(params)

        def sigma(name: str) -> float | Tensor:
            return state[STATE][names.index(name)].exp() if self.sigma_rate else self.schedule.at(key.step)

        copies = Copies(
            problem,
            params,
            chosen,
            batch,
            key,
            Draws(key.fold("likelihood ratio"), examples, batch.first, self.antithetic, self.qmc, self.directions),
            facts,
            sigma,
            self.chunk,
            self.subtracted(unperturbed, state),
            self.memory == "store",
            self.sigma_rate > 0,
            Sums({name: value.dtype for name, value in params.items()}),
            credit,
        )
        if self.layerwise:
            self.one_by_one(copies, facts)
        else:
            copies.run()
        loss = copies.mean() if unperturbed is None else unperturbed.mean()
        mean_sigma = float(self.schedule.at(key.step)) if not self.sigma_rate else state[STATE].exp().mean()
        counts = {
            "forwards": float(copies.forwards + (unperturbed is not None) + self.layerwise),
            "backwards": 0,
            "sigma": mean_sigma,
            "coefficient_per_batch": copies.sums.by_batch,
            "fallback_weight_noise": len(facts.loose),
            "fallback_copy_loop": copies.looped,
        }
        metrics = {name: torch.as_tensor(count, device=loss.device) for name, count in counts.items()}
        return Estimate(loss.detach(), copies.sums.grads, self.next_state(state, names, copies), metrics, buffers)

    def facts(self, problem: Problem, params: Tree, chosen: set[str], batch: Batch, key: Key, examples: int) -> Facts:
        """What the first pass of this kind found out."""
        training = getattr(getattr(problem, "model", None), "training", True)  # batch norm mixes examples in one mode and not in the other
        address = ("noisy layers", training, examples, self.layers)
        if address in problem.facts:
            return problem.facts[address]
        facts, finite = examine(problem, params, chosen, batch, key)
        if finite:
            problem.facts[address] = facts
        return facts

    def credit(self, problem: Problem, params: Tree, batch: Batch) -> Credit | None:
        """What each layer touches, where the problem's losses are local."""
        with torch.no_grad():
            influence = problem.influence(params, batch)
        return Credit(influence) if influence else None

    def subtracted(self, unperturbed: Tensor | None, state: Tree) -> Tensor | str | None:
        """The baseline: losses [N] or [1], a number, the name of one that needs all losses first, or nothing."""
        if self.baseline == "clean":
            return unperturbed
        if self.baseline == "mean":
            return baselines.running(state)
        return "loo" if self.baseline == "loo" else None

    def one_by_one(self, copies: Copies, facts: Facts) -> None:
        """Noise on one layer at a time; what lies before it comes from one clean pass."""
        trace = Look(copies.draws, keep=True)
        look(copies.problem, copies.params, copies.chosen, copies.batch, copies.key, trace)
        for name in (*facts.layers, *([""] if facts.loose else [])):
            copies.run(focus=name, cache=trace.outputs)

    def next_state(self, state: Tree, names: list[str], copies: Copies) -> Tree:
        r"""log σ_l ← log σ_l - η/2 Σ c (ε² - 1) / units: the score over the Fisher information 2 · units, within [σ · floor, σ / floor]."""
        found = dict(state)
        if self.baseline == "mean":
            found.update(baselines.followed(state, copies.mean()))
        if self.sigma_rate:
            score = torch.zeros_like(state[STATE])
            for name, value in copies.sums.scores.items():
                score[names.index(name)] = value
            low, high = math.log(self.sigma * self.sigma_floor), math.log(self.sigma / self.sigma_floor)
            found[STATE] = (state[STATE] - 0.5 * self.sigma_rate * score).clamp(low, high)
        return found
