"""The derivative of a solution, as two custom rules that call each other: right in any order, direction and under vmap.

F(x, θ) = 0, A = dF/dx:    reverse  Aᵀ u = x̄,  θ̄ = −(dF/dθ)ᵀ u        forward  A ẋ = −(dF/dθ) θ̇
y = A⁻¹ b:                 reverse  b̄ = A⁻ᵀ ȳ,  −b̄ᵀ dA y              forward  ẏ = A⁻¹ (ḃ − Ȧ y)

`Solution` is x(θ), `Inverse` is A⁻¹ b or A⁻ᵀ b. The saved x is the output itself, so it depends on θ when the reverse pass is differentiated again; every
linear system goes through `Inverse`, whose derivative is again `Inverse`. Products with derivatives of F are reverse passes only: nothing nests forward mode.

Source: the implicit function theorem; Blondel et al., arXiv 2105.15183, for decoupling it from the solver.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from altgrad.errors import CapabilityError
from altgrad.implicit.closing import levels
from altgrad.implicit.equation import Equation, Theta, filled
from altgrad.linearised import first_order, no_saved_hooks, pullback, pushforward


def nested_forward_refused(*tensors: Tensor) -> None:
    """Raise where a tangent of a tangent would flow: PyTorch loses it in a custom rule, silently (pytorch#197867).

    Errors: CapabilityError.
    """
    if torch._C._functorch.maybe_current_level() is None:
        return
    from torch._functorch.pyfunctorch import TransformType, retrieve_all_functorch_interpreters

    forward = {interpreter.level() for interpreter in retrieve_all_functorch_interpreters() if interpreter.key() == TransformType.Jvp}
    forward &= {level for tensor in tensors for level in levels(tensor)}
    if len(forward) > 1:
        raise CapabilityError(
            f"forward mode is nested {len(forward)} deep around an implicit solution (jacfwd of jacfwd, jvp of jvp); PyTorch would return zero for it. "
            "Use reverse mode inside or outside: jacfwd(jacrev(f)), which is torch.func.hessian, or jacrev(jacrev(f))."
        )


def nesting_explained(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule whose failure inside PyTorch, where a root's function holds another root under two torch.func transforms, is an error that says what to do."""

    @functools.wraps(rule)
    def explained(*args: Any) -> Any:
        try:
            return rule(*args)
        except RuntimeError as error:
            if "INTERNAL ASSERT FAILED" not in str(error):
                raise
            raise CapabilityError(
                "PyTorch cannot take this second derivative: a root inside another root's function, under nested torch.func transforms, stops it with an "
                "internal error. Use torch.autograd.grad(..., create_graph=True), whose second derivative is right there, or solve both equations as one."
            ) from error

    return explained


def floats(theta: Theta) -> list[int]:
    return [index for index, tensor in enumerate(theta) if tensor.is_floating_point()]


def in_parameters(equation: Equation, x: Tensor, theta: Theta, which: list[int]) -> Callable[..., Tensor]:
    """θ at `which` -> F(x, θ)."""
    return lambda *values: touched(equation.function(x, filled(theta, which, values)), *values)


def touched(result: Tensor, *values: Tensor) -> Tensor:
    """`result`, which now depends on each value, if only by nothing: torch.func makes the zero of an unused one at a level that may be gone."""
    return sum((value.reshape(-1)[:0].sum() for value in values), result)


def to_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def mapped(equation: Equation, size: int, dims: tuple[int | None, ...], theta: Theta) -> tuple[Equation, Theta]:
    """The equation under vmap, and θ with mapped axes in front."""
    moved = tuple(tensor if dim is None else tensor.movedim(dim, 0) for tensor, dim in zip(theta, dims, strict=True))
    return equation.batched(size, [None if dim is None else 0 for dim in dims]), moved


APPLY = torch.autograd.Function.__dict__["apply"]


class Rule(torch.autograd.Function):
    """A custom rule; `run` is `apply` without binding the arguments to forward's signature, which takes as long as a small solve."""

    @classmethod
    def run(cls, *args: Any) -> Tensor:
        watched = torch.autograd.Function.__dict__["apply"] is not APPLY  # altgrad's forward mode follows its tangents through it
        if watched or torch._C._are_functorch_transforms_active():
            return cls.apply(*args)  # type: ignore[no-any-return]
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[no-any-return, misc]


class Solution(Rule):
    """(equation, x₀, *θ) -> x; the derivative in x₀ is zero."""

    @staticmethod
    def forward(equation: Equation, start: Tensor, *theta: Tensor) -> Tensor:  # type: ignore[override]
        with no_saved_hooks():
            return equation.solved(start, theta).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.equation = inputs[0]
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    @nesting_explained
    def backward(ctx: Any, bar: Tensor) -> Any:  # type: ignore[override]
        x, *rest = ctx.saved_tensors
        theta = tuple(rest)
        bars: list[Tensor | None] = [None] * len(theta)
        which = [index for index in floats(theta) if ctx.needs_input_grad[2 + index]]
        if which and first_order():
            with no_saved_hooks():
                found = ctx.equation.pulled(bar, x, theta, which)
            for index, value in zip(which, found, strict=True):
                bars[index] = value
        elif which:
            u = Inverse.run(ctx.equation, True, bar, x, *theta)
            _, pull = pullback(in_parameters(ctx.equation, x, theta, which), *(theta[index] for index in which))
            for index, found in zip(which, pull(-u), strict=True):
                bars[index] = found
        return None, torch.zeros_like(bar) if ctx.needs_input_grad[1] else None, *bars

    @staticmethod
    @nesting_explained
    def jvp(ctx: Any, _: Any, start_dot: Tensor | None, *theta_dot: Tensor | None) -> Tensor:  # type: ignore[override]
        x, *rest = ctx.saved_tensors
        theta = tuple(rest)
        which = [index for index in floats(theta) if theta_dot[index] is not None]
        if not which:
            return torch.zeros_like(x)
        _, push = pushforward(in_parameters(ctx.equation, x, theta, which), *(theta[index] for index in which))
        return -Inverse.run(ctx.equation, False, push(*(theta_dot[index] for index in which)), x, *theta)

    @staticmethod
    def vmap(info: Any, in_dims: Any, equation: Equation, start: Tensor, *theta: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        batched, moved = mapped(equation, info.batch_size, in_dims[2:], theta)
        return Solution.run(batched, to_front(start, in_dims[1], info.batch_size), *moved), 0


class Inverse(Rule):
    """(equation, transpose, b, x, *θ) -> A⁻¹ b, or A⁻ᵀ b, for b [*columns, *batch, n]."""

    @staticmethod
    def forward(equation: Equation, transpose: bool, b: Tensor, x: Tensor, *theta: Tensor) -> Tensor:  # type: ignore[override]
        with no_saved_hooks():
            return equation.inverse(b.detach(), x.detach(), tuple(tensor.detach() for tensor in theta), transpose=transpose).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.equation, ctx.transpose = inputs[:2]
        ctx.save_for_backward(output, *inputs[3:])
        ctx.save_for_forward(output, *inputs[3:])

    @staticmethod
    @nesting_explained
    def backward(ctx: Any, bar: Tensor) -> Any:  # type: ignore[override]
        y, x, *rest = ctx.saved_tensors
        equation, theta = ctx.equation, tuple(rest)
        b_bar = Inverse.run(equation, not ctx.transpose, bar, x, *theta)
        left, right = (y, b_bar) if ctx.transpose else (b_bar, y)
        which = [index for index in floats(theta) if ctx.needs_input_grad[4 + index]]

        def form(x: Tensor, *values: Tensor) -> Tensor:  # −⟨left, A(x, θ) right⟩, which is −⟨b̄, A y⟩ or −⟨b̄, Aᵀ y⟩
            return touched(-(equation.tangent(x, filled(theta, which, values)).transposed(left) * right).sum(), x, *values)

        bars: list[Tensor | None] = [None] * len(theta)
        x_bar = None
        if which or ctx.needs_input_grad[3]:
            _, pull = pullback(form, x, *(theta[index] for index in which))
            x_bar, *found = pull(torch.ones_like(bar.sum()))
            for index, value in zip(which, found, strict=True):
                bars[index] = value
        return None, None, b_bar if ctx.needs_input_grad[2] else None, x_bar, *bars

    @staticmethod
    @nesting_explained
    def jvp(ctx: Any, _equation: Any, _transpose: Any, b_dot: Tensor | None, x_dot: Tensor | None, *theta_dot: Tensor | None) -> Tensor:  # type: ignore[override]
        y, x, *rest = ctx.saved_tensors
        equation, theta = ctx.equation, tuple(rest)
        which = [index for index in floats(theta) if theta_dot[index] is not None]

        def image(x: Tensor, *values: Tensor) -> Tensor:
            tangent = equation.tangent(x, filled(theta, which, values))
            return touched(tangent.transposed(y) if ctx.transpose else tangent.product(y), x, *values)

        right = torch.zeros_like(y) if b_dot is None else b_dot
        if which or x_dot is not None:
            _, push = pushforward(image, x, *(theta[index] for index in which))
            right = right - push(torch.zeros_like(x) if x_dot is None else x_dot, *(theta_dot[index] for index in which))
        return Inverse.run(equation, ctx.transpose, right, x, *theta)

    @staticmethod
    def vmap(info: Any, in_dims: Any, equation: Equation, transpose: bool, b: Tensor, x: Tensor, *theta: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        front = to_front(b, in_dims[2], info.batch_size)
        if all(dim is None for dim in in_dims[3:]):
            return Inverse.run(equation.with_columns(), transpose, front, x, *theta), 0
        batched, moved = mapped(equation, info.batch_size, in_dims[4:], theta)
        front = front.movedim(0, equation.columns)
        return Inverse.run(batched, transpose, front, to_front(x, in_dims[3], info.batch_size), *moved), equation.columns
