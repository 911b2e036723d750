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
from functools import partial
from typing import Any

import torch
from torch import Tensor

from altgrad.alignment import exact_gradient
from altgrad.engine import Bias, Engine, Estimate, Needs, Split, Tree, describe
from altgrad.equilibrium.adjoint import recurrent_backprop
from altgrad.equilibrium.diagnostics import cosines, field_of
from altgrad.equilibrium.energies import Energy, descent
from altgrad.equilibrium.fields import Field, chain_field, settling_field
from altgrad.equilibrium.hardware import disturbed, mismatched
from altgrad.equilibrium.holomorphic import check_holomorphic
from altgrad.equilibrium.homeostasis import homeostasis, map_of, probes
from altgrad.equilibrium.nudges import NUDGES, around, nudges, order
from altgrad.equilibrium.online import online, phases
from altgrad.equilibrium.relaxation import ACCELERATIONS, State
from altgrad.equilibrium.settling import direct_gradient, refuse_kinks, starts
from altgrad.equilibrium.symmetry import pairs_of, same
from altgrad.equilibrium.warm import check_warm, first_states, kept, recalled
from altgrad.errors import CapabilityError, NumericsError, SettingError, near_miss, require
from altgrad.local.chain import hold_to_model, sampling
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.world import World

CORRECTIONS = ("none", "homeostasis", "asymmetric")
FORMS = {"auto": Needs.REVERSE, "energy": Needs.REVERSE | Needs.ENERGY, "field": Needs.REVERSE}
UPDATES = ("own", "same")
SWEEPS = {"alternating": "sweep", "together": "together"}  # what a problem calls them
REFERENCE = 2000  # the most sweeps where an answer is to be a reference
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
    relaxation: float | None = option(None, "alternating sweeps move a layer by so many times what would put it to rest, in (0, 2); none for the net's own")
    steps: int = option(200, "the most sweeps of a relaxation, >= 1")
    tolerance: float | None = option(None, "residual, relative to 1 + max |s|, at which an example is at rest; none for 32 roundings of its precision")
    damping: float = option(0.0, "share of the old state that a sweep keeps, in [0, 1); for systems that overshoot")
    acceleration: str = option("none", "'anderson': relaxations go on from a combination of their last sweeps; for systems that settle slowly")
    warm_start: bool = option(False, "begin every training example's relaxation at its free state of the epoch before, kept in the engine's state")
    noise: float = option(0.0, "standard deviation of the noise that every sweep adds to the state, >= 0; relaxations then take all of their steps")
    mismatch: float = option(0.0, "standard deviation of the share by which the device's weights are off, fixed and the same in all phases, >= 0")
    device: int = option(0, "which device: names its mismatch")
    online: int = option(0, "sweeps at each nudge while the nudge goes round and the state follows it; 0 for nudges one by one from the free state")
    periods: int = option(3, "online: how often the nudge goes round, >= 1; the first time does not count where there are more")
    update: str = option("own", "'same': weights up and down between the same units both get the mean of their gradients; nets with such pairs")
    diagnose: int = option(0, "every so many steps the log gets cosine/<parameter> to the exact gradient, by recurrent backprop; 0 for never")
    strict: bool = option(False, "an error, not a warning, where a relaxation has not come to rest")
    cut: str = option("", "names of the modules at which blocks start, separated by commas; none for a cut at every layer")

    def __post_init__(self) -> None:
        named = {"nudge": NUDGES, "correction": CORRECTIONS, "form": FORMS, "sweeps": SWEEPS, "update": UPDATES, "acceleration": ACCELERATIONS}
        for setting, allowed in named.items():
            if getattr(self, setting) not in allowed:
                raise SettingError(near_miss(setting, str(getattr(self, setting)), allowed))
        require(0 < self.beta < math.inf, "beta", self.beta, "a number > 0: without a nudge nothing is told")
        require(isinstance(self.points, int) and self.points >= 1, "points", self.points, "a whole number >= 1")
        require(0 <= self.homeostasis < math.inf, "homeostasis", self.homeostasis, "a number >= 0")
        require(isinstance(self.steps, int) and self.steps >= 1, "steps", self.steps, "a whole number >= 1")
        require(self.tolerance is None or 0 < self.tolerance < math.inf, "tolerance", self.tolerance, "None or a number > 0")
        require(self.relaxation is None or 0 < self.relaxation < 2, "relaxation", self.relaxation, "None or in (0, 2)")
        require(0 <= self.damping < 1, "damping", self.damping, "in [0, 1)")
        require(0 <= self.noise < math.inf, "noise", self.noise, "a number >= 0")
        require(0 <= self.mismatch < math.inf, "mismatch", self.mismatch, "a number >= 0")
        require(isinstance(self.device, int) and 0 <= self.device < 2**64, "device", self.device, "a whole number in [0, 2^64)")
        require(isinstance(self.online, int) and self.online >= 0, "online", self.online, "a whole number >= 0")
        require(isinstance(self.periods, int) and self.periods >= 1, "periods", self.periods, "a whole number >= 1")
        require(isinstance(self.diagnose, int) and self.diagnose >= 0, "diagnose", self.diagnose, "a whole number >= 0")
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
        """The power of β with which the distance from the exact gradient falls; 0 where something else keeps it apart."""
        kept = self.online or self.noise or self.mismatch or self.update == "same" or (self.correction != "asymmetric" and self.form != "energy")
        return 0 if kept else order(self.nudge, self.points)

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
        if self.update == "same":
            pairs_of(problem, describe(self))
        if self.relaxation not in (None, 1) and (self.sweeps == "together" or not hasattr(getattr(problem, "model", None), "relaxation")):
            raise CapabilityError(
                f"{describe(self)}: only alternating sweeps of a net whose sweep takes a relaxation (altgrad.equilibrium.nets) can overshoot. "
                "Use relaxation=None."
            )
        if kind != "blocks":
            starts(problem)
            if self.complex:
                refuse_kinks(problem, describe(self))
            if self.warm_start:
                check_warm(problem, describe(self))
            if kind == "energy" and self.correction == "homeostasis":
                raise CapabilityError(
                    f"{describe(self)}: the Jacobian of an energy is symmetric already, there is nothing for homeostasis to do. Use correction='none', or a "
                    "net whose ways up and down have weights of their own (recurrent-digits, altgrad.equilibrium.feedback)."
                )
            return
        if self.warm_start:
            raise CapabilityError(f"{describe(self)}: the free state of a chain of blocks is its forward pass, which starts nowhere. Use warm_start=False.")
        blocks = problem.blocks(self.cut)
        if self.correction == "homeostasis":
            raise CapabilityError(
                f"{describe(self)}: in a chain of blocks nothing goes back, so that only weights of zero would make its Jacobian symmetric. "
                "Use correction='asymmetric', or a net with feedback (altgrad.equilibrium.nets)."
            )
        if self.complex:
            check_holomorphic(problem, blocks, describe(self))

    def init(self, problem: Problem, params: Tree, key: Key) -> Tree:
        return first_states(problem, params) if self.warm_start else {}

    def shrunk(self, factor: float) -> "Equilibrium":
        """The same engine with a nudge `factor` times as strong, relaxed to rounding: its error falls by factor ** order."""
        return replace(self, beta=self.beta * factor, tolerance=None, steps=max(self.steps, REFERENCE))

    def limit(self, tensor: Tensor) -> float:
        """The residual at which an example is at rest."""
        return ROUNDINGS * torch.finfo(tensor.dtype).eps if self.tolerance is None else self.tolerance

    def sweep(self, problem: Problem) -> Any:
        """The problem's own sweeps in the order asked for, over-relaxed; none where it has none."""
        own, net = getattr(problem, SWEEPS[self.sweeps], None), getattr(problem, "model", None)
        factor = 1.0 if self.sweeps == "together" else getattr(net, "relaxation", 1.0) if self.relaxation is None else self.relaxation
        return own if own is None or factor == 1 else partial(own, relaxation=factor)

    def system(self, problem: Problem, params: Tree, batch: Batch, key: Key, buffers: Tree, begin: State | None = None) -> Energy | Field:
        """What is relaxed, at its free state; `buffers` are written where a model has some; `begin`: where the relaxation does, if not at rest."""
        kind, some = self.kind(problem), next(iter(params.values()))
        if kind == "blocks":
            blocks = problem.blocks(self.cut)
            hold_to_model(problem, self.cut, params, blocks, batch, key)
            return chain_field(blocks, params, batch.inputs, problem.fresh_buffers, lambda: sampling(problem, batch, key), buffers)
        rest, readout = starts(problem)
        start, inputs = rest(params, batch.inputs) if begin is None else begin, batch.inputs
        relaxing: dict[str, Any] = {"steps": self.steps, "tolerance": self.limit(some), "damping": self.damping, "acceleration": self.acceleration}
        relaxing |= {"disturb": disturbed(self.noise, key, "free", batch), "prepared": getattr(problem, "prepared", None)}
        sweep = self.sweep(problem)

        def outputs(state: State) -> Any:
            return readout(params, state, inputs)

        if kind == "energy":
            coupling = getattr(problem, "coupling", None)
            return Energy(problem.energy, sweep or descent(problem.energy), params, start, inputs, outputs, coupling=coupling, **relaxing)
        net = getattr(problem, "model", None)
        drive = None if self.correction == "asymmetric" else getattr(net, "drive", None)  # for a J that is symmetric where the weights are
        step = problem.step if drive is None else net.step  # type: ignore[union-attr]  # which takes a push
        return settling_field(step, params, start, inputs, outputs, sweep=sweep, drive=drive, **relaxing)

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        with torch.autocast(next(iter(params.values())).device.type, enabled=False):  # short floats cannot tell the nudged from the free
            return self.looked(problem, params, state, batch, key, world)

    def on_device(self, params: Tree) -> Tree:
        """The weights that take part in all relaxations."""
        return mismatched({name: value.detach() for name, value in params.items()}, self.mismatch, self.device)

    def pushes(self, problem: Problem, system: Energy | Field, batch: Batch) -> tuple[Tensor, State]:
        """(mean loss, what a nudge of 1 adds: -∂L/∂s of every example) at the free state."""
        with torch.enable_grad():
            loss = problem.score(system.outputs(system.point), batch.targets).mean()
        slopes = torch.autograd.grad(loss, system.point, allow_unused=True)
        count = system.point[0].shape[0]
        return loss, tuple(torch.zeros_like(own) if slope is None else -count * slope for own, slope in zip(system.point, slopes, strict=True))

    def looked(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        """`estimate`, in the parameters' own precision."""
        held, buffers = self.on_device(params), problem.fresh_buffers()
        system = self.system(problem, held, batch, key, buffers, recalled(state, batch))
        loss, force = self.pushes(problem, system, batch)
        tolerance = self.limit(system.point[0])
        relaxing: dict[str, Any] = {"corrected": self.correction == "asymmetric", "steps": self.steps, "tolerance": tolerance, "damping": self.damping}
        relaxing["acceleration"] = self.acceleration

        def noises(name: str) -> Any:
            return disturbed(self.noise, key, name, batch)

        residual = system.settled.residual.max()
        if self.online:
            told = online(system, around(self.nudge, self.beta, self.points, key), force, noises, periods=self.periods, sweeps=self.online, **relaxing)
        else:
            told = phases(system, nudges(self.nudge, self.beta, self.points, key), force, noises, **relaxing)
            residual = torch.stack([residual, *[found.residual.max() for _, found in told]]).max()
        grads = {**direct_gradient(problem, held, system.rest, batch), **system.gradient([(nudge, found.state) for nudge, found in told])}
        self.report(problem, residual, tolerance, loss, key)
        told_apart = self.diagnose and (key.step + 1) % self.diagnose == 0  # the row of that number in the log
        metrics = cosines(grads, self.exact(problem, params, batch, key)) if told_apart else {}
        metrics |= {"forwards": torch.tensor(float(system.passes)), "relaxations": torch.tensor(float(len(told))), "residual": residual.detach()}
        if isinstance(system, Field):
            metrics["asymmetry"] = system.asymmetry(probes(system.point, key, batch)).detach()
            weight = self.homeostasis if self.correction == "homeostasis" else getattr(problem, "homeostasis", 0.0)
            if weight:
                extra, metrics["homeostasis"] = self.homeostatic(problem, system, batch, key)
                grads = {name: grad + weight * extra[name] if name in extra else grad for name, grad in grads.items()}
        if self.update == "same":
            grads = same(grads, pairs_of(problem, describe(self)))
        return Estimate(loss.detach(), grads, kept(state, batch, system.rest, world), metrics, buffers)

    def exact(self, problem: Problem, params: Tree, batch: Batch, key: Key) -> Tree:
        """The gradient at the fixed point that the estimate is an estimate of, by recurrent backprop; of a chain of blocks that is backprop's own."""
        held = self.on_device(params)
        if self.kind(problem) == "blocks":
            return exact_gradient(problem, held, batch, key)[1]
        quiet = replace(self, noise=0.0, tolerance=None, steps=max(self.steps, REFERENCE))
        relaxing: dict[str, Any] = {"steps": quiet.steps, "tolerance": quiet.limit(next(iter(held.values())))}
        free = quiet.system(problem, held, batch, key, problem.fresh_buffers())
        rule = field_of(problem, held, free.rest, batch.inputs, free.outputs, **relaxing)
        _, force = quiet.pushes(problem, rule, batch)
        own = recurrent_backprop(rule, tuple(-part for part in force), damping=self.damping, **relaxing)
        return {**direct_gradient(problem, held, rule.rest, batch), **own}

    def homeostatic(self, problem: Problem, system: Field, batch: Batch, key: Key) -> tuple[Tree, Tensor]:
        """(gradient, value) of the homeostatic loss at the free state."""
        with torch.enable_grad():
            value = homeostasis(lambda state: map_of(problem)(system.leaves, state, batch.inputs), system.rest, probes(system.point, key, batch)).mean()
        found = torch.autograd.grad(value, list(system.leaves.values()), allow_unused=True)
        return {name: grad for name, grad in zip(system.leaves, found, strict=True) if grad is not None}, value.detach()

    def report(self, problem: Problem, residual: Tensor, tolerance: float, loss: Tensor, key: Key) -> None:
        """Say, once a problem, that a relaxation has not come to rest."""
        if self.noise or float(residual) <= tolerance or not bool(torch.isfinite(loss)) or (not self.strict and "not at rest" in problem.facts):
            return
        problem.facts["not at rest"] = True
        words = (
            f"{describe(self)}: after {self.steps} sweeps at step {key.step} an example still moves by {float(residual):.3g}, relative; {tolerance:.3g} counts "
            "as at rest. The gradient is off by about that much over beta. Take more steps, acceleration='anderson', or damping."
        )
        if self.strict:
            raise NumericsError(words)
        warnings.warn(words, stacklevel=4)

    def bake(self, problem: Problem, params: Tree, state: Tree) -> Tree:
        return {**params, **self.on_device(params)} if self.mismatch else params

    def predict(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> Any:
        """The read-out of the free state; of a chain of blocks that is the model's output."""
        if self.kind(problem) == "blocks":
            return super().predict(problem, self.on_device(params), state, inputs)
        system = self.system(problem, self.on_device(params), Batch(inputs, None), Key(0), {})
        return system.outputs(tuple(leaf.detach() for leaf in system.point))
