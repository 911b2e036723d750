"""The contenders of the implicit benchmarks: a gradient through the solution of an equation by altgrad's root and by its peers'.

Each is (residual's parts) -> gradient; a peer that cannot be imported is named in the record and skipped.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from altgrad.implicit import custom_root, root

PEERS = ("torchopt", "jaxopt")
Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]  # (A, b, bar) -> d⟨bar, A⁻¹ b⟩ / db


def installed() -> dict[str, str]:
    """Every peer's version, or why it does not take part."""
    found = {}
    for name in PEERS:
        try:
            import_module(name)
            found[name] = version(name)
        except Exception as error:  # a peer may fail to import in any way
            reason = "not installed" if isinstance(error, ModuleNotFoundError) and error.name == name else "cannot be imported"
            found[name] = f"{reason}: {error}"
            print(f"{name} skipped, {reason}: {error}", flush=True)
    return found


def missing(peers: dict[str, str], name: str) -> bool:
    return ":" in peers[name]


def ours(adjoint: str = "auto", **settings: Any) -> Gradient:
    """altgrad's root by Newton, or, with an iterative adjoint, around an exact solution."""

    def gradient(matrix: Tensor, b: Tensor, bar: Tensor) -> Tensor:
        b = b.clone().requires_grad_()
        start = torch.zeros_like(b)
        if adjoint == "auto":
            x = root(lambda x, b: matrix @ x - b, start, b, **settings)
        else:
            x = custom_root(lambda x, b: matrix @ x - b, adjoint=adjoint, **settings)(lambda start, b: torch.linalg.solve(matrix, b))(start, b)
        return torch.autograd.grad(x, b, bar)[0]

    return gradient


def torchopts(name: str | None = None, **settings: Any) -> Gradient:
    """TorchOpt's custom_root around an exact solution; None: its default linear solver."""
    import torchopt

    solver = {} if name is None else {"solve": getattr(torchopt.linear_solve, f"solve_{name}")(**settings)}

    def gradient(matrix: Tensor, b: Tensor, bar: Tensor) -> Tensor:
        b = b.clone().requires_grad_()

        @torchopt.diff.implicit.custom_root(lambda x, b: matrix @ x - b, argnums=1, **solver)
        def solved(start: Tensor, b: Tensor) -> Tensor:
            return torch.linalg.solve(matrix, b)

        return torch.autograd.grad(solved(torch.zeros_like(b), b), b, bar)[0]

    return gradient


def jaxopts(name: str | None = None) -> Gradient:
    """jaxopt's custom_root around an exact solution; None: its default linear solver."""
    import jax
    import jax.numpy as jnp
    import jaxopt

    jax.config.update("jax_enable_x64", True)
    solver = {} if name is None else {"solve": getattr(jaxopt.linear_solve, f"solve_{name}")}

    def gradient(matrix: Tensor, b: Tensor, bar: Tensor) -> Tensor:
        a, weights = jnp.asarray(matrix.numpy()), jnp.asarray(bar.numpy())

        @jaxopt.implicit_diff.custom_root(lambda x, b: a @ x - b, **solver)
        def solved(start: Any, b: Any) -> Any:
            return jnp.linalg.solve(a, b)

        found = jax.grad(lambda b: weights @ solved(None, b))(jnp.asarray(b.numpy()))
        return torch.tensor(jax.device_get(found))

    return gradient
