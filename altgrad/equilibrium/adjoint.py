r"""The exact gradient at a fixed point, by its linear system: the reference that equilibrium propagation is held to.

    u* = f(u*; θ),   ∂L/∂θ = (∂f/∂θ)ᵀ δ,   (I - ∂f/∂u)ᵀ δ = ∂L/∂u

solved densely, example by example: for tests and small nets.

Source: Almeida 1987; Pineda 1987, Phys. Rev. Lett. 59.
"""

import torch
from torch import Tensor

from altgrad.engine import Tree
from altgrad.equilibrium.fields import Field, Step, settling_field
from altgrad.equilibrium.relaxation import State, relax
from altgrad.equilibrium.settling import direct_gradient, starts
from altgrad.errors import NumericsError
from altgrad.problem import Batch, Problem

ALMOST = 1e-4  # a residual at which a relaxation in single precision that rounding keeps from resting is still a reference


def adjoint_gradient(problem: Problem, params: Tree, batch: Batch, *, steps: int = 2000, tolerance: float = 1e-15) -> Tree:
    """The gradient of the mean loss of a problem with rest, output and step, by name.

    Args:
        steps, tolerance: of the free relaxation.
    """
    step: Step = problem.step
    rest, readout = starts(problem)
    inputs = batch.inputs
    field = settling_field(step, params, rest(params, inputs), inputs, lambda state: readout(params, state, inputs), steps=steps, tolerance=tolerance)
    with torch.enable_grad():
        losses = problem.score(field.outputs(field.point), batch.targets)
    slopes = torch.autograd.grad(losses.mean(), field.point, allow_unused=True)
    flat = torch.cat([(torch.zeros_like(own) if slope is None else slope).flatten(1) for own, slope in zip(field.point, slopes, strict=True)], 1)  # [N, d]
    count, size = flat.shape
    sizes = [leaf[0].numel() for leaf in field.point]
    columns = []
    for unit in torch.eye(size, dtype=flat.dtype):
        vectors = tuple(part.expand(count, -1).reshape(leaf.shape) for part, leaf in zip(unit.split(sizes), field.point, strict=True))
        columns.append(torch.cat([part.flatten(1) for part in field.push(vectors)], 1))
    jacobian: Tensor = torch.stack(columns, 2)  # [N, d, d], ∂f_i/∂u_j
    delta = torch.linalg.solve(torch.eye(size, dtype=flat.dtype) - jacobian.transpose(1, 2), flat)
    cotangents = tuple(part.reshape(leaf.shape) for part, leaf in zip(delta.split(sizes, 1), field.image, strict=True))
    found = torch.autograd.grad(field.image, list(field.leaves.values()), cotangents, allow_unused=True)
    own = {name: grad for name, grad in zip(field.leaves, found, strict=True) if grad is not None}
    return {**direct_gradient(problem, params, field.rest, batch), **own}


def recurrent_backprop(field: Field, slopes: State, *, steps: int, tolerance: float, damping: float = 0.0) -> Tree:
    """The same gradient without a matrix: δ ← (∂f/∂u)ᵀ δ + ∂L/∂u until it stands still, as fast as the state itself settles.

    Args:
        field: at its free state; of a chain of blocks δ stands still after as many sweeps as there are blocks, and this is backprop.
        slopes: the losses' slopes there, each example's own (N times those of their mean).
        steps, tolerance, damping: of δ.

    Raises:
        NumericsError: δ does not stand still.
    """

    def sweep(delta: State) -> State:
        return tuple(back + own for back, own in zip(field.pull(delta), slopes, strict=True))

    found = relax(sweep, slopes, steps=steps, tolerance=tolerance, damping=damping)
    if not bool((found.residual <= max(tolerance, ALMOST)).all()):
        raise NumericsError(
            f"recurrent backprop is not at rest after {steps} sweeps: it still moves by {float(found.residual.max()):.3g}, relative. The net does not settle: "
            "make its weights smaller, or take damping."
        )
    count = len(slopes[0])
    live = [(own, part / count) for own, part in zip(field.image, found.state, strict=True) if own.requires_grad]
    grads = torch.autograd.grad([own for own, _ in live], list(field.leaves.values()), [part for _, part in live], retain_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(field.leaves, grads, strict=True) if grad is not None}


__all__ = ["adjoint_gradient", "recurrent_backprop"]
