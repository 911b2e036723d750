r"""Deep equilibrium layers: what an iteration of a module would come to after infinitely many steps, as one layer.

    z* = cell(z*, x)

The layer keeps x, z* and the cell's weights for the backward pass, however many steps the solver took, and differentiates z* by the implicit function
theorem (altgrad.implicit.fixed_point). Batch normalisation mixes examples: put it before or after the layer, or set batch_dims=0.

Source: Bai, Kolter, Koltun 2019, arXiv 1909.01377.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from altgrad.errors import require
from altgrad.fixed_point import Method, method
from altgrad.implicit.adjoints import parse
from altgrad.implicit.calls import fixed_point
from altgrad.implicit.equation import Info
from altgrad.implicit.masks import OneMask
from altgrad.implicit.watch import current
from altgrad.implicit.wellposed import jacobian_penalty, spectral_radius
from altgrad.problem import first_tensor


class DEQ(nn.Module):
    """The fixed point of `cell(z, *inputs)`, a module like any other; the cell's parameters are this module's.

    `info` holds the last solve's residual, iterations and convergence, and the adjoint's once backward has run.

    Args:
        cell: (z, *inputs) -> z, any nn.Module; dropout inside draws one mask a solve, and running statistics move once.
        shape: of one example's z; None: that of the first input. Or a function inputs -> z0, which may give a pytree.
        solver, adjoint, tol, max_steps, adjoint_tol, adjoint_steps, batch_dims, strict: as in `altgrad.implicit.fixed_point`; the engine `implicit` may put
            others in their place.

    Raises:
        SettingError: no such solver or adjoint. ShapeError: the cell does not return what it is given.
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        shape: tuple[int, ...] | Callable[..., Any] | None = None,
        solver: str | Method = "anderson",
        adjoint: str = "auto",
        tol: float | None = None,
        max_steps: int = 100,
        adjoint_tol: float | None = None,
        adjoint_steps: int | None = None,
        batch_dims: int = 1,
        strict: bool = False,
    ):
        super().__init__()
        method(solver), parse(adjoint)
        require(isinstance(max_steps, int) and max_steps >= 1, "max_steps", max_steps, "a whole number, 1 or more")
        self.cell, self.shape = cell, shape
        self.settings: dict[str, Any] = {
            "solver": solver,
            "adjoint": adjoint,
            "tol": tol,
            "max_steps": max_steps,
            "adjoint_tol": adjoint_tol,
            "adjoint_steps": adjoint_steps,
            "strict": strict,
        }
        self.batch_dims = batch_dims
        self.info: Info | None = None

    def start(self, *inputs: Any) -> Any:
        """Where the solve begins: zeros."""
        if callable(self.shape):
            return self.shape(*inputs)
        first = first_tensor(inputs)
        return first.new_zeros(first.shape if self.shape is None else (*first.shape[: self.batch_dims], *self.shape))

    def forward(self, *inputs: Any) -> Any:
        # Captured now: under functional_call the cell holds others by the time of the backward pass.
        weights, buffers, mask = dict(self.cell.named_parameters()), dict(self.cell.named_buffers()), OneMask(self.cell)

        def applied(z: Any, values: Mapping[str, Tensor], inputs: tuple[Any, ...]) -> Any:
            with mask:
                held = {name: value.clone() for name, value in buffers.items()}  # statistics move once a solve, not once a step
                return torch.func.functional_call(self.cell, {**values, **held}, (z, *inputs))

        def step(z: Any) -> Any:
            return applied(z, weights, inputs)

        watch = current()
        settings = self.settings if watch is None else {**self.settings, **watch.settings}
        start = tree_map(torch.Tensor.detach, self.start(*inputs))
        z, info = fixed_point(applied, start, weights, inputs, batch_dims=self.batch_dims, info=True, **settings)  # handed over: nothing to close over
        self.info = info
        if buffers and self.training:
            with torch.no_grad(), mask:
                torch.func.functional_call(self.cell, {**weights, **buffers}, (tree_map(torch.Tensor.detach, z), *inputs))
        if watch is not None:
            number = len(watch.infos)
            watch.infos.append(info)
            if watch.penalty:
                key = watch.key.fold("penalty", number)
                watch.penalties.append(jacobian_penalty(step, z, key, batch_dims=self.batch_dims, first=watch.first))
            if watch.radius:
                held, key = tree_map(torch.Tensor.detach, z), watch.key.fold("radius", number)
                watch.radii.append(spectral_radius(step, held, key, products=watch.radius, batch_dims=self.batch_dims, first=watch.first))
        mask.done()
        return z

    def extra_repr(self) -> str:
        given = {name: value for name, value in self.settings.items() if value is not None and value is not False}
        return ", ".join(f"{name}={value}" for name, value in given.items())
