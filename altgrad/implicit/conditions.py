"""Optimality conditions: an objective becomes the F of `root` or the f of `fixed_point`, whose solution is its minimum.

Every function takes (x, *params) and passes the same params to each part; tensors that a part closes over get their gradients too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from altgrad.errors import SettingError, ShapeError, require
from altgrad.implicit.closing import own

Objective = Callable[..., Tensor]


def gradient(objective: Objective, x: Any, params: tuple[Any, ...]) -> Any:
    """df/dx of the sum of f(x, *params): where f returns one value an example, each example's own."""

    def total(x: Any) -> Tensor:
        value = objective(x, *params)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ShapeError(f"the objective returned {type(value).__name__}; it must return a float tensor: one value, or one for each example.")
        return value.sum()

    return owned(torch.func.grad(total)(x))


def owned(tree: Any) -> Any:
    """`tree`, whose tensors came out of torch.func.grad, which no mode sees: F made them, and closes over none of them."""
    for leaf in tree_leaves(tree):
        own(leaf)
    return tree


def stationary(objective: Objective) -> Callable[..., Any]:
    """F(x, *params) = df/dx, for `root`: a minimum without constraints. Also the way to take a gradient inside an F of your own that goes on from it.

    Args:
        objective: f(x, *params), one value, or with batch_dims one for each example; x a tensor or a pytree of them.
    """
    return lambda x, *params: gradient(objective, x, params)


def kkt(objective: Objective, *, equality: Callable[..., Tensor] | None = None, inequality: Callable[..., Tensor] | None = None) -> Callable[..., Any]:
    """F of min f(x) with g(x) = 0 and h(x) ≤ 0, for `root`: the conditions of Karush, Kuhn and Tucker.

    F = (df/dx + νᵀ dg/dx + λᵀ dh/dx,  g(x),  λ ∘ h(x))

    The unknown is a dict {"x": x, "equality": ν, "inequality": λ}, with only those of ν and λ that there are constraints for. F is also zero at points with
    h > 0 or λ < 0: hand it a solution, solver=lambda F, x0, *params: ..., or start near one. Where some λ and its h are both zero the minimum has a kink
    there, dF/dx is singular, and SingularError says so.

    Args:
        objective: f(x, *params) -> scalar.
        equality: g(x, *params), of ν's shape.
        inequality: h(x, *params), of λ's shape.

    Source: Karush 1939; Kuhn and Tucker 1951; Blondel et al., arXiv 2105.15183, for differentiating them.
    """
    parts = {name: part for name, part in (("equality", equality), ("inequality", inequality)) if part is not None}
    if not parts:
        raise SettingError("kkt got neither equality nor inequality; without constraints use stationary(objective).")
    names = ["x", *parts]

    def conditions(unknown: Any, *params: Any) -> dict[str, Any]:
        if not isinstance(unknown, dict) or sorted(unknown) != sorted(names):
            seen = f"the keys {sorted(unknown)}" if isinstance(unknown, dict) else type(unknown).__name__
            raise ShapeError(f"the unknown of these conditions has {seen}; it must be a dict with the keys {', '.join(names)}.")
        values: dict[str, Tensor] = {}

        def lagrangian(x: Any) -> tuple[Tensor, dict[str, Tensor]]:
            total = objective(x, *params).sum()
            for name, part in parts.items():
                value = part(x, *params)
                if value.shape != unknown[name].shape:
                    raise ShapeError(f"{name} returned {tuple(value.shape)}; its multiplier in the unknown is {tuple(unknown[name].shape)}: make them equal.")
                values[name] = value
                total = total + (unknown[name] * value).sum()
            return total, dict(values)

        slope, found = owned(torch.func.grad(lagrangian, has_aux=True)(unknown["x"]))
        if "inequality" in found:
            found["inequality"] = unknown["inequality"] * found["inequality"]
        return {name: slope if name == "x" else found[name] for name in unknown}

    return conditions


def checked_step(step: float | Tensor) -> float | Tensor:
    if not isinstance(step, Tensor):
        require(step > 0, "step", step, "above 0")
    return step


def descended(objective: Objective, x: Any, step: float | Tensor, params: tuple[Any, ...]) -> Any:
    """x − step df/dx."""
    return tree_map(lambda value, slope: value - step * slope, x, gradient(objective, x, params))


def proximal_gradient(objective: Objective, prox: Callable[..., Any], step: float | Tensor) -> Callable[..., Any]:
    """f(x, *params) = prox(x − step df/dx, step, *params), for `fixed_point`: a minimum of f + g.

    prox(v, step) = argmin_x ‖x − v‖² / 2 + step g(x); the fixed point does not depend on step, only how fast it is reached.

    Args:
        objective: the smooth f(x, *params).
        prox: (v, step, *params) -> x, of g scaled by step.
        step: above 0; iteration converges up to 2 over the largest curvature of f.
    """
    step = checked_step(step)
    return lambda x, *params: prox(descended(objective, x, step, params), step, *params)


def projected_gradient(objective: Objective, projection: Callable[..., Any], step: float | Tensor) -> Callable[..., Any]:
    """f(x, *params) = projection(x − step df/dx, *params), for `fixed_point`: a minimum of f over a convex set.

    Args:
        objective: f(x, *params).
        projection: (v, *params) -> the nearest point of the set.
        step: as in `proximal_gradient`.
    """
    step = checked_step(step)
    return lambda x, *params: projection(descended(objective, x, step, params), *params)


def mirror_descent(objective: Objective, projection: Callable[..., Any], mapping: Callable[[Any], Any], step: float | Tensor) -> Callable[..., Any]:
    """f(x, *params) = projection(mapping(x) − step df/dx, *params), for `fixed_point`: a minimum of f over a convex set, in a geometry that fits it.

    On the simplex: mapping torch.log and projection torch.softmax keep x inside; a minimum on the boundary is reached only in the limit.

    Args:
        objective: f(x, *params).
        projection: (v, *params) -> x, from the mirror space back into the set.
        mapping: x -> the gradient of the geometry's convex function at x.
        step: above 0.

    Source: Nemirovski and Yudin 1983; Beck and Teboulle 2003.
    """
    step = checked_step(step)

    def moved(x: Any, *params: Any) -> Any:
        image = mapping(x)
        if len(tree_leaves(image)) != len(tree_leaves(x)):
            raise ShapeError(f"mapping returned {len(tree_leaves(image))} tensors for an unknown of {len(tree_leaves(x))}; it must keep x's structure.")
        return projection(tree_map(lambda value, slope: value - step * slope, image, gradient(objective, x, params)), *params)

    return moved
