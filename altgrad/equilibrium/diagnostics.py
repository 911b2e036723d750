r"""How far an estimate points from the exact gradient at the fixed point, layer by layer: numbers for the log.

cosine/<name> = ⟨ĝ, g⟩ / (‖ĝ‖ ‖g‖) of every parameter, and `cosine` of all together; g by recurrent backprop (adjoint.py)
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from altgrad.alignment import products
from altgrad.attention import unfused
from altgrad.engine import Needs, Tree
from altgrad.equilibrium.energies import EnergyOf
from altgrad.equilibrium.fields import Field, Step, settling_field
from altgrad.equilibrium.relaxation import State
from altgrad.problem import Problem


def cosines(found: Mapping[str, Tensor], exact: Tree) -> dict[str, Tensor]:
    """Metrics [] by name."""
    return {f"cosine/{name}" if name else "cosine": row[0] for name, row in products(found, exact).items()}


def field_of(problem: Problem, params: Tree, rest: State, inputs: object, outputs: Callable[[State], object], *, steps: int, tolerance: float) -> Field:
    """The field of the problem's own step, or of the way down its energy, from `rest`."""
    step = problem.step if Needs.FIXED_POINT in problem.provides else downwards(problem.energy)
    return settling_field(step, params, rest, inputs, outputs, steps=steps, tolerance=tolerance)


def downwards(energy: EnergyOf) -> Step:
    """s ↦ s - ∂E/∂s, differentiable."""

    def step(params: Tree, state: State, inputs: object) -> State:
        with torch.enable_grad(), unfused():
            leaves = tuple(leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in state)
            slopes = torch.autograd.grad(energy(params, leaves, inputs).sum(), leaves, create_graph=True)
            return tuple(leaf - slope for leaf, slope in zip(leaves, slopes, strict=True))

    return step


__all__ = ["cosines", "field_of"]
