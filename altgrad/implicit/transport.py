r"""Entropic optimal transport as a layer: the plan of least cost between two marginals, differentiated at its fixed point.

    P = argmin_P ⟨P, C⟩ + λ Σ P (log P - 1),   P 1 = a,   Pᵀ 1 = b
    P_ij = exp((f_i + g_j - C_ij) / λ),   f = λ log a - λ LSE_j((g - C) / λ),   g = λ log b - λ LSE_i((f - C) / λ)

One round, f -> g -> f, is a map of f alone; shifting f by a constant shifts g back, so f is held to f_last = λ, which makes the fixed point one point, and no
smaller than rounding can tell. The backward pass solves a linear system of the size of a, and no round is traced.

Source: Sinkhorn and Knopp 1967; Cuturi 2013, arXiv 1306.0895; Eisenberger et al. 2022, arXiv 2205.06688 (implicit differentiation).
"""

import torch
from torch import Tensor

from altgrad.errors import DataError, NumericsError, ShapeError, require
from altgrad.fixed_point import Method
from altgrad.implicit.calls import fixed_point
from altgrad.implicit.watch import current

functorch = torch._C._functorch


def holds(condition: Tensor) -> bool:
    """Whether all of a bool tensor is true, under torch.func transforms too."""
    while functorch.is_functorch_wrapped_tensor(condition):
        condition = functorch.get_unwrapped(condition)
    return bool(condition.all())


def checked(cost: Tensor, a: Tensor, b: Tensor) -> None:
    """Refuse what has no plan.

    Raises:
        ShapeError: marginals that do not fit the cost. NumericsError: NaN or infinity. DataError: marginals that are not positive, or sum to other totals.
    """
    if cost.ndim < 2 or not cost.is_floating_point() or a.shape != cost.shape[:-1] or b.shape != (*cost.shape[:-2], cost.shape[-1]):
        raise ShapeError(
            f"cost is {tuple(cost.shape)} {cost.dtype}, a {tuple(a.shape)} and b {tuple(b.shape)}; they must be floats [..., m, n], [..., m] and [..., n]."
        )
    for name, value in (("cost", cost), ("a", a), ("b", b)):
        if not holds(value.detach().isfinite()):
            raise NumericsError(f"{name} holds NaN or infinity; a transport plan needs finite numbers. For a pair that must not meet use a large cost.")
    for name, value in (("a", a), ("b", b)):
        if not holds(value.detach() > 0):
            raise DataError(f"the marginal {name} holds a number that is not above 0; leave out rows and columns without mass, and use no negative ones.")
    total, other = a.detach().sum(-1), b.detach().sum(-1)
    slack = 64 * torch.finfo(cost.dtype).eps * max(cost.shape[-2:])
    if not holds((total - other).abs() <= slack * total):
        raise DataError("the marginals a and b do not sum alike, so that no plan has both; scale one of them: b = b * a.sum(-1, keepdim=True) / b.sum(-1, …).")


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    regularisation: float,
    solver: str | Method = "anderson",
    adjoint: str = "auto",
    tol: float | None = None,
    max_steps: int = 1000,
    strict: bool = False,
) -> Tensor:
    """The plan P [..., m, n], differentiable in cost, a and b to any order, in both modes and under vmap.

    Columns sum to b up to rounding, rows to a up to `tol`. Derivatives in a and b are meant along changes that leave the two sums alike.

    Args:
        cost: C [..., m, n], finite; each matrix is a problem of its own.
        a: [..., m] > 0, or None for ones.
        b: [..., n] > 0 of the same sum, or None for equal parts of it.
        regularisation: λ > 0, in the unit of C; the smaller, the nearer the plan is to an assignment, and the more rounds it takes.
        solver, adjoint, tol, max_steps, strict: as in `altgrad.implicit.fixed_point`.

    Raises:
        ShapeError, NumericsError, DataError: see `checked`; otherwise as `fixed_point`.
    """
    require(isinstance(regularisation, (int, float)) and regularisation > 0, "regularisation", regularisation, "a number above 0")
    a = cost.new_ones(cost.shape[:-1]) if a is None else a
    b = (a.sum(-1, keepdim=True) / cost.shape[-1]).expand(*cost.shape[:-2], cost.shape[-1]) if b is None else b
    checked(cost, a, b)
    scaled, log_a, log_b = cost / regularisation, a.log(), b.log()  # potentials are in units of λ from here on

    def columns(f: Tensor) -> Tensor:
        return log_b - torch.logsumexp(f.unsqueeze(-1) - scaled, -2)

    def rounds(f: Tensor) -> Tensor:
        fresh = log_a - torch.logsumexp(columns(f).unsqueeze(-2) - scaled, -1)
        return fresh - fresh[..., -1:] + 1

    settings = {"solver": solver, "adjoint": adjoint, "tol": tol, "max_steps": max_steps, "strict": strict}
    watch = current()
    if watch is not None:
        settings.update(watch.settings)
    f, info = fixed_point(rounds, torch.ones_like(log_a.detach()), batch_dims=cost.ndim - 2, info=True, **settings)  # type: ignore[arg-type]
    if watch is not None:
        watch.infos.append(info)
    return torch.exp(f.unsqueeze(-1) + columns(f).unsqueeze(-2) - scaled)


__all__ = ["sinkhorn"]
