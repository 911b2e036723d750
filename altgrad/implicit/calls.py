"""`root` and `fixed_point`: solve, and differentiate the solution rather than the solver."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from altgrad.errors import SettingError, ShapeError, require
from altgrad.fixed_point import Goal, Method, method
from altgrad.implicit.adjoints import SERIES, parse
from altgrad.implicit.closing import closed, inside_another, own
from altgrad.implicit.equation import Equation, Info, Solved, Theta
from altgrad.implicit.layout import Layout
from altgrad.implicit.rule import Solution, nested_forward_refused
from altgrad.implicit.traced import replayed, series, watch

DEFAULT_TOL = {torch.float64: 1e-10, torch.float32: 1e-6}


def root(
    function: Callable[..., Any],
    x0: Any,
    *params: Any,
    solver: str | Method | Callable[..., Any] = "newton",
    adjoint: str = "auto",
    tol: float | None = None,
    max_steps: int = 100,
    adjoint_tol: float | None = None,
    adjoint_steps: int | None = None,
    batch_dims: int = 0,
    has_aux: bool = False,
    strict: bool = False,
    info: bool = False,
) -> Any:
    """x with F(x, *params) = 0, differentiable in params and in every tensor that F closes over (module weights too).

    dx/dθ = −(dF/dx)⁻¹ dF/dθ, in reverse and forward mode, under vmap, and to any order in reverse.

    Args:
        function: F(x, *params), of x's structure and shapes; (F, aux) with has_aux.
        x0: the first guess, a float32 or float64 tensor or a pytree of them; its gradient is zero.
        params: pytrees; what is not a tensor is left alone.
        solver: newton, newton-krylov, broyden, anderson, iteration (x ← x + F), one of altgrad.fixed_point's methods with settings of its own,
            or a function (F, x0, *params) -> x, or -> Solved(x, lu=...) where it has factors of dF/dx, which serve the adjoint.
        adjoint: how the linear system is solved: auto (LU up to 512 unknowns an example, GMRES beyond), lu, cholesky, cg, gmres, bicgstab, normal-cg;
            or what stands in for it: unroll, checkpoint, truncated(k).
        tol: of the solver, ‖F(x)‖ ≤ tol ‖F(x₀)‖ (Newton and Broyden: or a step of tol ‖x‖); 1e-10 in float64, 1e-6 in float32.
        max_steps: of the solver, 1 or more.
        adjoint_tol: relative residual of the linear system; None: tol.
        adjoint_steps: iterations of each linear system at most; None: 10 n + 100.
        batch_dims: how many first axes of x are examples that F does not mix; each stops by itself.
        has_aux: F returns (F, aux); aux at the solution is returned, differentiable.
        strict: raise NotConvergedError where a solver did not converge; otherwise it is a NotConvergedWarning.
        info: also return an Info: residual, iterations, converged, and `adjoint` once a derivative has been taken.

    Returns:
        x, or (x, aux), (x, info), (x, aux, info).

    Errors: ShapeError, SettingError; SingularError with a condition estimate; NotConvergedError; CapabilityError where forward mode is nested.
    """
    return called(
        function, x0, params, fixed=False, solver=solver, adjoint=adjoint, tol=tol, max_steps=max_steps, adjoint_tol=adjoint_tol,
        adjoint_steps=adjoint_steps, batch_dims=batch_dims, has_aux=has_aux, strict=strict, info=info,
    )  # fmt: skip


def fixed_point(
    function: Callable[..., Any],
    x0: Any,
    *params: Any,
    solver: str | Method | Callable[..., Any] = "anderson",
    adjoint: str = "auto",
    tol: float | None = None,
    max_steps: int = 1000,
    adjoint_tol: float | None = None,
    adjoint_steps: int | None = None,
    batch_dims: int = 0,
    has_aux: bool = False,
    strict: bool = False,
    info: bool = False,
) -> Any:
    """x with x = f(x, *params), differentiable as in `root`: dx/dθ = (1 − df/dx)⁻¹ df/dθ.

    Args are those of `root`, except:
        function: f(x, *params), of x's structure and shapes.
        solver: as there, with the residual F = f − x; a function of your own is called (f, x0, *params).
        adjoint: also jfb, neumann(k) and phantom(k,tau), which are exact only as k grows and df/dx shrinks.
        tol: ‖f(x) − x‖ ≤ tol max(‖x‖, ‖f(x₀) − x₀‖).
    """
    return called(
        function, x0, params, fixed=True, solver=solver, adjoint=adjoint, tol=tol, max_steps=max_steps, adjoint_tol=adjoint_tol,
        adjoint_steps=adjoint_steps, batch_dims=batch_dims, has_aux=has_aux, strict=strict, info=info,
    )  # fmt: skip


def called(function: Callable[..., Any], x0: Any, params: tuple[Any, ...], *, fixed: bool, solver: Any, adjoint: str, tol: float | None, max_steps: int,
           adjoint_tol: float | None, adjoint_steps: int | None, batch_dims: int, has_aux: bool, strict: bool, info: bool) -> Any:  # fmt: skip
    """`root` or `fixed_point`: close F over nothing, solve, attach the derivative."""
    layout, way = Layout(x0, batch_dims), parse(adjoint)
    if way.name in SERIES and not fixed:
        raise SettingError(f"adjoint={adjoint!r} is a series in df/dx of a fixed point x = f(x); with root use adjoint='auto', or call fixed_point.")
    tol = DEFAULT_TOL[layout.dtype] if tol is None else tol
    require(adjoint_tol is None or adjoint_tol > 0, "adjoint_tol", adjoint_tol, "above 0")
    require(adjoint_steps is None or adjoint_steps >= 1, "adjoint_steps", adjoint_steps, "1 or more")
    label = "f(x, *params)" if fixed else "F(x, *params)"

    plain = all(isinstance(param, Tensor) for param in params)
    leaves, spec = (list(params), None) if plain else tree_flatten(params)
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def arguments(theta: Theta) -> Any:
        if spec is None:
            return theta[: len(places)]
        full = list(leaves)
        for index, value in zip(places, theta, strict=False):
            full[index] = value
        return tree_unflatten(full, spec)

    guess = layout.flat(x0).detach()
    held = [param.detach() for param in params] if plain else tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, params)
    result, outside, swap = closed(function, layout.tree(guess), *held)
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise ShapeError(f"{label} returned {type(result).__name__}; with has_aux=True it must return (value, aux).")
    first = result[0] if has_aux else result
    layout.check(first, label)
    first = layout.flat(first).detach()
    del result

    def value(x: Any, *args: Any) -> Any:
        return function(x, *args)[0] if has_aux else function(x, *args)

    def residual(x: Tensor, theta: Theta) -> Tensor:
        with swap(theta[len(places) :]):
            found = layout.flat(value(layout.tree(x), *arguments(theta)))
        return found - x if fixed else found

    def own_solver(x: Tensor, theta: Theta) -> Tensor | tuple[Tensor, str, tuple[Tensor, ...]]:
        with swap(theta[len(places) :], whole=False):
            found = solver(value, layout.tree(x), *arguments(theta))
        if isinstance(found, Solved):
            layout.check(found.x, "the solver")
            return layout.flat(found.x), *found.factors(layout.flat_shape, layout.dtype, fixed=fixed)
        layout.check(found, "the solver")
        return layout.flat(found)

    report = Info()
    equation = Equation(
        function=residual,
        solver=own_solver if callable(solver) and not isinstance(solver, Method) else method(solver),
        goal=Goal(tol, max_steps, fixed),
        adjoint=way,
        adjoint_tol=tol if adjoint_tol is None else adjoint_tol,
        adjoint_steps=adjoint_steps,
        strict=strict,
        info=report,
        first=None if torch._C._are_functorch_transforms_active() else first - guess if fixed else first,
    )
    theta = tuple([leaves[index] for index in places] + outside)
    if way.exact:
        x = differentiable(equation, guess, theta)
    else:
        theta = seen(theta)
        held = differentiable(equation, guess, tuple(tensor.detach() for tensor in theta))
        x = series(equation, held, theta) if way.name in SERIES else replayed(equation, guess, held, theta)
        if info:
            watch(equation, x, held, theta)
    solution = layout.tree(x)
    outputs = [solution, *([function(solution, *params)[1]] if has_aux else []), *([report] if info else [])]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def seen(theta: Theta) -> Theta:
    """θ through an operation, inside the F of an outer call: let it see, and swap, what this one uses."""
    return tuple(tensor.view_as(tensor) for tensor in theta) if inside_another() else theta


def differentiable(equation: Equation, guess: Tensor, theta: Theta) -> Tensor:
    """x(θ) of an equation, with its derivative.

    Errors: CapabilityError where forward mode is nested.
    """
    theta = seen(theta)
    nested_forward_refused(*theta)
    x = Solution.run(equation, guess, *theta)
    own(x)
    return x


def custom_root(function: Callable[..., Any], **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for a solver (x0, *params) -> x of F(x, *params) = 0: its result is differentiated by the implicit function theorem.

    Args:
        function: F.
        settings: those of `root`, except solver.
    """
    return decorator(root, function, settings)


def custom_fixed_point(function: Callable[..., Any], **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for a solver (x0, *params) -> x of x = f(x, *params); `settings` are those of `fixed_point`, except solver."""
    return decorator(fixed_point, function, settings)


def decorator(call: Callable[..., Any], function: Callable[..., Any], settings: dict[str, Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    if "solver" in settings:
        raise SettingError("solver= is not allowed in a decorator: the decorated function is the solver.")

    def decorate(solver: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(solver)
        def solved(x0: Any, *params: Any) -> Any:
            return call(function, x0, *params, solver=lambda _, x0, *params: solver(x0, *params), **settings)

        return solved

    return decorate
