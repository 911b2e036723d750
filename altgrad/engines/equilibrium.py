r"""Equilibrium propagation: a system settles, is nudged towards a lower loss, settles again, and the change of its state is the gradient.

    energy   E(θ, s, x):          ∂L/∂θ = d/dβ ∂E/∂θ (s_β),   s_β at rest under the force -β ∂L/∂s
    field    F(u) = f(u; θ, x) - u:   ∂L/∂θ = -(∂F/∂θ)ᵀ d u_β/dβ

with the derivative at β = 0 taken from a few nudges of finite strength. An energy needs nothing else. A field must have a symmetric Jacobian J, or
the correction - (J - Jᵀ)(u - u₀) while it is nudged, with which the derivative is the exact adjoint's: so any chain of blocks, a plain nn.Sequential
among them, is such a field, at rest after its forward pass. The nudge is the loss's gradient at the free state, a constant force.
"""

import math
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from altgrad.engine import Bias, Engine, Estimate, Needs, Split, Tree, describe
from altgrad.equilibrium.energies import Energy, descent
from altgrad.equilibrium.fields import Field, chain_field, settling_field
from altgrad.equilibrium.holomorphic import check_holomorphic
from altgrad.equilibrium.homeostasis import homeostasis
from altgrad.equilibrium.nudges import NUDGES, nudges, order
from altgrad.equilibrium.relaxation import Disturb, Settled, State
from altgrad.equilibrium.settling import starts
from altgrad.errors import CapabilityError, NumericsError, SettingError, near_miss, require
from altgrad.kernels import noise
from altgrad.local.chain import hold_to_model, sampling
from altgrad.problem import Batch, Problem
from altgrad.rng import Key, tensor_id
from altgrad.world import World

CORRECTIONS = ("none", "homeostasis", "asymmetric")
FORMS = {"auto": Needs.REVERSE, "energy": Needs.REVERSE | Needs.ENERGY, "field": Needs.REVERSE}
SWEEPS = {"alternating": "sweep", "together": "together"}  # what a problem calls them
ROUNDINGS = 32  # machine epsilons of the default tolerance: a sweep's own rounding


def option(default: Any, meaning: str) -> Any:
    """A settings field with its meaning."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Equilibrium(Engine):
    """Free and nudged relaxations of an energy, or of a vector field, which any chain of blocks is.

    Raises:
        SettingError: a setting out of its range.
        CapabilityError: nothing to relax; layers that are not holomorphic under complex nudges; homeostasis without feedback.
        NumericsError: strict=True, and an example that has not come to rest.

    Source: Scellier and Bengio 2017, arXiv 1602.05179; Laborieux and Zenke 2022, arXiv 2209.00530; Scurria et al. 2026, arXiv 2602.03670.
    """

    nudge: str = option("symmetric", "'one-sided', 'random-sign', 'symmetric', or 'holomorphic' (points on a circle in the complex plane)")
    beta: float = option(0.1, "strength |β| of the nudge, > 0; smaller has less bias and less signal over rounding and noise")
    points: int = option(4, "holomorphic: points N on the circle, >= 1; the error falls as |β|^N, N // 2 + 1 relaxations are run")
    correction: str = option("asymmetric", "fields: 'asymmetric' (exact for any Jacobian), 'homeostasis' (a loss that makes it symmetric) or 'none'")
    homeostasis: float = option(1.0, "correction='homeostasis': weight of that loss, >= 0")
    form: str = option("auto", "'energy', 'field', or 'auto': the energy where the problem has one")
    sweeps: str = option("alternating", "energies with sweeps of their own: 'alternating' (every second layer, then the others) or 'together'")
    steps: int = option(200, "the most sweeps of a relaxation, >= 1")
    tolerance: float | None = option(None, "residual, relative to 1 + max |s|, at which an example is at rest; none for 32 roundings of its precision")
    damping: float = option(0.0, "share of the old state that a sweep keeps, in [0, 1); for systems that overshoot")
    noise: float = option(0.0, "standard deviation of the noise that every sweep adds to the state, >= 0; relaxations then take all of their steps")
    strict: bool = option(False, "an error, not a warning, where a relaxation has not come to rest")
    cut: str = option("", "names of the modules at which blocks start, separated by commas; none for a cut at every layer")

    def __post_init__(self) -> None:
        for setting, allowed in (("nudge", NUDGES), ("correction", CORRECTIONS), ("form", FORMS), ("sweeps", SWEEPS)):
            if getattr(self, setting) not in allowed:
                raise SettingError(near_miss(setting, str(getattr(self, setting)), allowed))
        require(0 < self.beta < math.inf, "beta", self.beta, "a number > 0: without a nudge nothing is told")
        require(isinstance(self.points, int) and self.points >= 1, "points", self.points, "a whole number >= 1")
        require(0 <= self.homeostasis < math.inf, "homeostasis", self.homeostasis, "a number >= 0")
        require(isinstance(self.steps, int) and self.steps >= 1, "steps", self.steps, "a whole number >= 1")
        require(self.tolerance is None or 0 < self.tolerance < math.inf, "tolerance", self.tolerance, "None or a number > 0")
        require(0 <= self.damping < 1, "damping", self.damping, "in [0, 1)")
        require(0 <= self.noise < math.inf, "noise", self.noise, "a number >= 0")
        require(isinstance(self.cut, str), "cut", self.cut, "text such as 'stem,layer1.0'")

    @property
    def name(self) -> str:
        return "equilibrium"

    @property
    def needs(self) -> Needs:
        return FORMS[self.form]

    @property
    def bias(self) -> Bias:
        return Bias.LIMIT

    @property
    def split(self) -> Split:
        return Split.DATA

    @property
    def source(self) -> str:
        return "Scellier and Bengio 2017, arXiv 1602.05179; Laborieux and Zenke 2022, arXiv 2209.00530"

    @property
    def order(self) -> int:
        """The power of β with which the distance from the exact gradient falls; 0 where a Jacobian that is not symmetric keeps it apart."""
        return order(self.nudge, self.points) if self.correction == "asymmetric" or self.form == "energy" else 0

    @property
    def complex(self) -> bool:
        """Whether some nudges are complex."""
        return self.nudge == "holomorphic" and self.points > 2

    def kind(self, problem: Problem) -> str:
        """ "energy", "step" or "blocks": what of the problem is relaxed."""
        if self.form != "field" and Needs.ENERGY in problem.provides:
            return "energy"
        if Needs.FIXED_POINT in problem.provides:
            return "step"
        if Needs.BLOCKS in problem.provides:
            return "blocks"
        raise CapabilityError(
            f"{describe(self)} needs ENERGY, FIXED_POINT or BLOCKS, and {type(problem).__name__} provides none of them. Implement energy(params, s, x), "
            "step(params, s, x) or blocks(), or use backprop."
        )

    def check(self, problem: Problem) -> None:
        kind = self.kind(problem)
        for name, value in problem.params().items():
            if torch.finfo(value.dtype).bits < 32:
                raise CapabilityError(f"{describe(self)}: {name} is {value.dtype}, which cannot tell a nudged state from a free one; train in float32.")
        if kind != "blocks":
            starts(problem)
            return
        blocks = problem.blocks(self.cut)
        if self.correction == "homeostasis":
            raise CapabilityError(
                f"{describe(self)}: in a chain of blocks nothing goes back, so that only weights of zero would make its Jacobian symmetric. "
                "Use correction='asymmetric', or a net with feedback (altgrad.equilibrium.nets)."
            )
        if self.complex:
            check_holomorphic(problem, blocks, describe(self))

    def shrunk(self, factor: float) -> "Equilibrium":
        """The same engine with a nudge `factor` times as strong, relaxed to rounding: its error falls by factor ** order."""
        return replace(self, beta=self.beta * factor, tolerance=None, steps=max(self.steps, 2000))

    def limit(self, tensor: Tensor) -> float:
        """The residual at which an example is at rest."""
        return ROUNDINGS * torch.finfo(tensor.dtype).eps if self.tolerance is None else self.tolerance

    def system(self, problem: Problem, params: Tree, batch: Batch, key: Key, buffers: Tree) -> Energy | Field:
        """What is relaxed, at its free state; `buffers` are written where a model has some."""
        kind, some = self.kind(problem), next(iter(params.values()))
        if kind == "blocks":
            blocks = problem.blocks(self.cut)
            hold_to_model(problem, self.cut, params, blocks, batch, key)
            return chain_field(blocks, params, batch.inputs, problem.fresh_buffers, lambda: sampling(problem, batch, key), buffers)
        rest, output = starts(problem)
        start = rest(params, batch.inputs)
        relaxing: dict[str, Any] = {"steps": self.steps, "tolerance": self.limit(some), "damping": self.damping, "disturb": self.disturbed(key, "free", batch)}
        if kind == "energy":
            return Energy(
                problem.energy, getattr(problem, SWEEPS[self.sweeps], None) or descent(problem.energy), params, start, batch.inputs, output, **relaxing
            )
        return settling_field(problem.step, params, start, batch.inputs, output, **relaxing)

    def disturbed(self, key: Key, label: str, batch: Batch) -> Disturb | None:
        """The noise of a relaxation, an example's own at every sweep, whichever rank draws it."""
        if not self.noise:
            return None

        def disturb(sweep: int, state: State) -> State:
            drawn = [probes(state, key.fold("noise", label, sweep, part), batch) for part in ("real", "imaginary")[: 1 + state[0].is_complex()]]
            noises = [torch.complex(*pair) for pair in zip(*drawn, strict=True)] if len(drawn) == 2 else drawn[0]
            return tuple(leaf + self.noise * own for leaf, own in zip(state, noises, strict=True))

        return disturb

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        with torch.autocast(next(iter(params.values())).device.type, enabled=False):  # short floats cannot tell the nudged from the free
            return self.looked(problem, params, state, batch, key)

    def looked(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key) -> Estimate:
        """`estimate`, in the parameters' own precision."""
        params = {name: value.detach() for name, value in params.items()}
        buffers = problem.fresh_buffers()
        system = self.system(problem, params, batch, key, buffers)
        with torch.enable_grad():
            loss = problem.score(system.outputs(system.point), batch.targets).mean()
        count = system.point[0].shape[0]
        slopes = torch.autograd.grad(loss, system.point, allow_unused=True)
        force = tuple(torch.zeros_like(own) if slope is None else -count * slope for own, slope in zip(system.point, slopes, strict=True))
        tolerance, corrected = self.limit(system.point[0]), self.correction == "asymmetric"
        told: list[tuple[Any, Settled]] = []
        for nudge in nudges(self.nudge, self.beta, self.points, key):
            told.append(
                (
                    nudge,
                    system.nudged(
                        nudge,
                        force,
                        corrected=corrected,
                        steps=self.steps,
                        tolerance=tolerance,
                        damping=self.damping,
                        disturb=self.disturbed(key, f"{nudge.beta:.6g}", batch),
                    ),
                )
            )
        grads = system.gradient([(nudge, found.state) for nudge, found in told])
        residual = torch.stack([system.settled.residual.max(), *[found.residual.max() for _, found in told]]).max()
        self.report(problem, residual, tolerance, loss, key)
        metrics = {"forwards": torch.tensor(float(system.passes)), "relaxations": torch.tensor(float(len(told))), "residual": residual.detach()}
        if isinstance(system, Field):
            metrics["asymmetry"] = system.asymmetry(probes(system.point, key, batch)).detach()
            if self.correction == "homeostasis":
                extra, value = self.homeostatic(problem, system, batch, key)
                grads = {name: grad + self.homeostasis * extra[name] if name in extra else grad for name, grad in grads.items()}
                metrics["homeostasis"] = value
        return Estimate(loss.detach(), grads, state, metrics, buffers)

    def homeostatic(self, problem: Problem, system: Field, batch: Batch, key: Key) -> tuple[Tree, Tensor]:
        """(gradient, value) of the homeostatic loss at the free state."""
        with torch.enable_grad():
            value = homeostasis(lambda state: problem.step(system.leaves, state, batch.inputs), system.rest, probes(system.point, key, batch)).mean()
        found = torch.autograd.grad(value, list(system.leaves.values()), allow_unused=True)
        return {name: grad for name, grad in zip(system.leaves, found, strict=True) if grad is not None}, value.detach()

    def report(self, problem: Problem, residual: Tensor, tolerance: float, loss: Tensor, key: Key) -> None:
        """Say, once a problem, that a relaxation has not come to rest."""
        if self.noise or float(residual) <= tolerance or not bool(torch.isfinite(loss)) or (not self.strict and "not at rest" in problem.facts):
            return
        problem.facts["not at rest"] = True
        words = (
            f"{describe(self)}: after {self.steps} sweeps at step {key.step} an example still moves by {float(residual):.3g}, relative; {tolerance:.3g} counts "
            "as at rest. The gradient is off by about that much over beta. Take more steps, damping, or a smaller beta."
        )
        if self.strict:
            raise NumericsError(words)
        warnings.warn(words, stacklevel=4)

    def predict(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> Any:
        """The read-out of the free state; of a chain of blocks that is the model's output."""
        if self.kind(problem) == "blocks":
            return super().predict(problem, params, state, inputs)
        system = self.system(problem, {name: value.detach() for name, value in params.items()}, Batch(inputs, None), Key(0), {})
        return system.outputs(tuple(leaf.detach() for leaf in system.point))


def probes(point: State, key: Key, batch: Batch) -> State:
    """Standard normal probes shaped like the state, an example's own whichever rank draws them."""
    return tuple(
        noise.draw(
            "normal",
            key.fold("probes"),
            tensor_id(f"layer {number}"),
            [0],
            leaf.shape,
            start=batch.first * leaf[0].numel(),
            dtype=leaf.real.dtype,
            device=leaf.device,
        )[0]
        for number, leaf in enumerate(point)
    )
