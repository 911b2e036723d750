r"""Gradients through solutions: the state at a fixed point, or the implicit layers of a model, differentiated by the implicit function theorem.

    z* = step(θ, z*, x),   L(θ) = mean score(output(z*), y):      ∂L/∂θ = (∂step/∂θ)ᵀ u,   (1 - Jᵀ) u = ∂L/∂z*,   J = ∂step/∂z

What a problem with FIXED_POINT must have; this is the whole contract:

    rest(params, x) -> z          where the solve begins: a pytree (a tensor, tuple, dict) of float32 or float64 tensors of one dtype. Called without gradients
                                  and never differentiated, so it may be anything, an inner torch.optim optimizer too (with solver="rest" it is the solution).
    step(params, z, x) -> z       the map, of z's structure, shapes and dtype, in PyTorch operations (a gradient inside by torch.func.grad). Pure; called often.
    output(z), or instead         what is read out of the state. `readout` is taken where there is one; it may use the params, whose direct derivative is
    readout(params, z, x)         then added.
    score(outputs, targets)       losses [N], or [1] for the whole batch; the loss is their mean.
    remember(z) -> buffers        optional: buffers that a solution leaves behind, such as where the next solve is to begin.
    losses(params, batch, buffers)  as every problem; engines that know nothing of the state use it.
    batch_dims                    an int, 1 where absent: how many first axes of every tensor in z are examples that `step` does not mix; 0 for a state that
                                  the whole batch shares, such as the weights of an inner training.

A parameter that neither step nor read-out uses gets no gradient. Any other problem is a model and a loss: its gradient is autograd's, through the implicit
layers in the model (altgrad.implicit.layers), whose residuals are reported and whose settings those given here replace. Memory does not grow with the
iterations of a solve, unless the adjoint traces them (unroll).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from altgrad.engine import Bias, Engine, Estimate, Needs, Split, Tree, describe
from altgrad.errors import CapabilityError, SettingError, near_miss, require
from altgrad.fixed_point import METHODS
from altgrad.implicit.adjoints import parse
from altgrad.implicit.calls import DEFAULT_TOL, fixed_point
from altgrad.implicit.equation import Info
from altgrad.implicit.masks import OneMask
from altgrad.implicit.watch import SETTINGS, Watch, watching
from altgrad.implicit.wellposed import jacobian_penalty, spectral_radius
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers
from altgrad.world import World

Read = Callable[[Tree, Any, Any], Any]


def option(default: Any, meaning: str) -> Any:
    """A settings field with its meaning."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Implicit(Engine):
    """Exact adjoints of fixed points, or the approximation that `adjoint` names.

    What a problem must have is said at the head of this file.

    Raises:
        SettingError: a setting out of its range.
        CapabilityError: a problem with a step that does not say where it starts or what is read out.
        NotConvergedError: strict=True, and a solve that stopped before its tolerance; otherwise that is a warning.
        SingularError: 1 - J is singular.

    Source: Bai, Kolter, Koltun 2019, arXiv 1909.01377, theorem 1; Blondel et al., arXiv 2105.15183; Lorraine et al., arXiv 1911.02590 (hyper-gradients).
    """

    solver: str | None = option(None, "anderson, broyden, iteration, newton, newton-krylov, or rest (a problem's own start); none: a layer's own, or anderson")
    adjoint: str | None = option(
        None, "auto, lu, cholesky, cg, gmres, bicgstab, normal-cg: exact; neumann(k), phantom(k,tau), jfb, truncated(k), unroll, checkpoint; none: own, or auto"
    )
    tol: float | None = option(None, "of the solver, relative, > 0; none: a layer's own, or 1e-6 in float32 and 1e-10 in float64")
    max_steps: int | None = option(None, "of the solver, >= 1; none: a layer's own, or 1000")
    adjoint_tol: float | None = option(None, "relative residual of the adjoint's linear system, > 0; none: tol")
    adjoint_steps: int | None = option(None, "iterations of a linear system, >= 1; none: ten times the unknowns, and 100")
    strict: bool = option(False, "an error, not a warning, where a solver stops before its tolerance")
    jacobian: float = option(0.0, "weight of the penalty ‖J‖_F² / n, >= 0, estimated by one probe; it is in the gradient, not in the loss reported")
    radius: int = option(0, "products of the power iteration that reports the spectral radius of J, >= 4; 0 for no report")
    compare: bool = option(False, "also take the exact adjoint, and report the cosine of the gradient to its gradient")

    def __post_init__(self) -> None:
        if self.solver is not None and self.solver not in (*METHODS, "rest"):
            raise SettingError(near_miss("solver", str(self.solver), [*METHODS, "rest"]))
        if self.adjoint is not None:
            parse(self.adjoint)
        for label in ("tol", "adjoint_tol"):
            value = getattr(self, label)
            require(value is None or 0 < value < math.inf, label, value, "none or a number > 0")
        for label in ("max_steps", "adjoint_steps"):
            value = getattr(self, label)
            require(value is None or (isinstance(value, int) and value >= 1), label, value, "none or a whole number >= 1")
        require(0 <= self.jacobian < math.inf, "jacobian", self.jacobian, "a number >= 0")
        require(isinstance(self.radius, int) and (self.radius == 0 or self.radius >= 4), "radius", self.radius, "0, or a whole number >= 4")

    @property
    def name(self) -> str:
        return "implicit"

    @property
    def needs(self) -> Needs:
        return Needs.REVERSE

    @property
    def bias(self) -> Bias:
        return Bias.EXACT if self.adjoint is None or parse(self.adjoint).exact else Bias.LIMIT

    @property
    def order(self) -> int:
        """Of an approximate adjoint: its error vanishes as its terms and steps grow, not with a power of a setting."""
        return 0

    @property
    def split(self) -> Split:
        return Split.DATA

    @property
    def source(self) -> str:
        return "Bai, Kolter, Koltun 2019, arXiv 1909.01377, theorem 1"

    def check(self, problem: Problem) -> None:
        if Needs.FIXED_POINT in problem.provides:
            contract(problem)
        elif self.solver == "rest":
            raise CapabilityError(f"{describe(self)}: solver='rest' takes a problem's own start as the solution, and {type(problem).__name__} has none.")

    @property
    def given(self) -> dict[str, Any]:
        """The settings of solves that are not left to others."""
        found = {name: getattr(self, name) for name in SETTINGS if getattr(self, name) is not None}
        return {name: value for name, value in found.items() if name != "strict" or value}

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        buffers = problem.fresh_buffers()
        look = self.settled if Needs.FIXED_POINT in problem.provides else self.modelled
        watch = Watch(self.given, self.jacobian > 0, self.radius, key.fold("implicit"), batch.first)
        with torch.enable_grad():
            loss, forwards, solved = look(problem, leaves, batch, key, buffers, watch)
            total = loss + self.jacobian * sum(watch.penalties, loss.new_zeros(()))
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        grads = {name: grad.detach() for name, grad in zip(leaves, found, strict=True) if grad is not None}
        if solved is not None and hasattr(problem, "remember"):
            buffers = {**buffers, **problem.remember(solved)}
        metrics = {"forwards": torch.tensor(float(forwards())), "backwards": torch.tensor(1.0), **told(watch)}
        if self.compare:
            metrics["cosine"] = self.cosine(problem, leaves, batch, key, watch, grads, solved)
        return Estimate(loss.detach(), grads, state, metrics, buffers)

    def modelled(
        self, problem: Problem, leaves: Tree, batch: Batch, key: Key, buffers: Tree, watch: Watch, start: Any = None
    ) -> tuple[Tensor, Callable[[], int], Any]:
        """(loss, passes, nothing) of a model: autograd goes through its implicit layers."""
        with AddressedSamplers(key.fold("samplers"), first=batch.first, examples=problem.batch_size_of(batch)), watching(watch):
            loss = problem.loss(leaves, batch, buffers)
        return loss, lambda: 1, None

    def settled(
        self, problem: Problem, leaves: Tree, batch: Batch, key: Key, buffers: Tree, watch: Watch, start: Any = None
    ) -> tuple[Tensor, Callable[[], int], Any]:
        """(loss, calls of `step`, the state) of a problem with a fixed point; from the solution `start` where it is known."""
        _, read = contract(problem)
        calls = 0
        samplers = AddressedSamplers(key.fold("samplers"), first=batch.first, examples=problem.batch_size_of(batch))
        with torch.autocast(next(iter(leaves.values())).device.type, enabled=False), samplers:
            mask = OneMask()

            def step(z: Any) -> Any:
                nonlocal calls
                calls += 1
                with mask:
                    return problem.step(leaves, z, batch.inputs)

            z, info = self.solved(problem, leaves, batch.inputs, step, watch, start)
            mask.done()
            outputs = read(leaves, z, batch.inputs)
            loss = problem.score(outputs, batch.targets).mean()
            dims = getattr(problem, "batch_dims", 1)
            if watch.penalty:
                watch.penalties.append(jacobian_penalty(step, z, watch.key.fold("penalty"), batch_dims=dims, first=batch.first))
            if watch.radius:
                held = tree_map(torch.Tensor.detach, z)
                watch.radii.append(spectral_radius(step, held, watch.key.fold("radius"), products=watch.radius, batch_dims=dims, first=batch.first))
        watch.infos.append(info)
        return loss, lambda: calls, tree_map(torch.Tensor.detach, z)

    def solved(self, problem: Problem, leaves: Tree, x: Any, step: Callable[[Any], Any], watch: Watch, start: Any) -> tuple[Any, Info]:
        """(the state, how it was found)."""
        rest, _ = contract(problem)
        settings = dict(watch.settings)
        if start is None:
            with torch.no_grad():
                start = tree_map(torch.Tensor.detach, rest({name: value.detach() for name, value in leaves.items()}, x))
        if settings.get("solver") == "rest":
            settings["solver"] = lambda _, z: z
        return fixed_point(step, start, batch_dims=getattr(problem, "batch_dims", 1), info=True, **settings)  # type: ignore[no-any-return]

    def cosine(self, problem: Problem, leaves: Tree, batch: Batch, key: Key, watch: Watch, grads: Tree, start: Any) -> Tensor:
        """The cosine between `grads` and the gradient by the exact adjoint at the same state."""
        settings = {**watch.settings, "adjoint": "auto"}
        if start is not None:  # the state is taken as it is, however far it came
            precise = DEFAULT_TOL[tree_leaves(start)[0].dtype]
            settings.update(solver="rest", tol=math.inf, adjoint_tol=self.adjoint_tol or self.tol or precise)
        again = Watch(settings, watch.penalty, 0, watch.key, watch.first)
        look = self.modelled if start is None else self.settled
        with torch.enable_grad():
            loss, _, _ = look(problem, leaves, batch, key, problem.fresh_buffers(), again, start)
            total = loss + self.jacobian * sum(again.penalties, loss.new_zeros(()))
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        exact = {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None and name in grads}
        own, other = (torch.cat([tree[name].double().flatten() for name in exact]) for tree in (grads, exact))
        return torch.nn.functional.cosine_similarity(own, other, dim=0)

    def predict(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> Any:
        """The read-out at the fixed point; of a model, its outputs."""
        with watching(Watch(self.given)):
            if Needs.FIXED_POINT not in problem.provides:
                return super().predict(problem, params, state, inputs)
        held = {name: value.detach() for name, value in params.items()}
        with torch.no_grad():
            z, _ = self.solved(problem, held, inputs, lambda z: problem.step(held, z, inputs), Watch(self.given), None)
            return contract(problem)[1](held, z, inputs)


def contract(problem: Problem) -> tuple[Callable[[Tree, Any], Any], Read]:
    """(rest, readout) of a problem with a step.

    Raises:
        CapabilityError: it does not say where the solve begins, or what is read out.
    """
    rest, readout, output = (getattr(problem, name, None) for name in ("rest", "readout", "output"))
    if rest is None or (readout is None and output is None):
        raise CapabilityError(
            f"{type(problem).__name__} has a step; it must also say where the solve begins and what is read out: implement rest(params, x) -> state, and "
            "output(state) or readout(params, state, x)."
        )
    return rest, readout if readout is not None else lambda params, z, x: output(z)  # type: ignore[misc]


def told(watch: Watch) -> dict[str, Tensor]:
    """What the solves reported, the worst of all layers and examples; nothing where there was none."""
    found: dict[str, Tensor] = {}
    solves = [info for info in watch.infos if info.residual is not None]
    if solves:
        found["residual"] = worst([info.residual for info in solves])
        found["iterations"] = worst([info.iterations for info in solves])
        found["converged"] = torch.stack([info.converged.double().mean() for info in solves]).mean()  # type: ignore[union-attr]
    adjoints = [info.adjoint for info in watch.infos if info.adjoint is not None]
    if adjoints:
        found["adjoint_residual"] = worst([info.residual for info in adjoints])
        found["adjoint_products"] = torch.tensor(float(sum(info.products for info in adjoints)))
        found["adjoint_converged"] = torch.stack([info.converged.double().mean() for info in adjoints]).mean()
    if watch.penalties:
        found["jacobian"] = torch.stack([penalty.detach() for penalty in watch.penalties]).sum()
    if watch.radii:
        rates, errors = (torch.stack(part) for part in zip(*watch.radii, strict=True))
        found["radius"], found["radius_error"] = rates.max(), errors[rates.argmax()]
    return found


def worst(parts: list[Any]) -> Tensor:
    return torch.cat([part.detach().double().flatten() for part in parts]).max()
