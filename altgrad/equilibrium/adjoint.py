r"""The exact gradient at a fixed point, by its linear system: the reference that equilibrium propagation is held to.

    u* = f(u*; θ),   ∂L/∂θ = (∂f/∂θ)ᵀ δ,   (I - ∂f/∂u)ᵀ δ = ∂L/∂u

solved densely, example by example: for tests and small nets.

Source: Almeida 1987; Pineda 1987, Phys. Rev. Lett. 59.
"""

import torch
from torch import Tensor

from altgrad.engine import Tree
from altgrad.equilibrium.fields import Step, settling_field
from altgrad.problem import Batch, Problem


def adjoint_gradient(problem: Problem, params: Tree, batch: Batch, *, steps: int = 2000, tolerance: float = 1e-15) -> Tree:
    """The gradient of the mean loss of a problem with rest, output and step, by name.

    Args:
        steps, tolerance: of the free relaxation.
    """
    step: Step = problem.step
    field = settling_field(step, params, problem.rest(params, batch.inputs), batch.inputs, problem.output, steps=steps, tolerance=tolerance)  # type: ignore[attr-defined]
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
    return {name: grad for name, grad in zip(field.leaves, found, strict=True) if grad is not None}


__all__ = ["adjoint_gradient"]
