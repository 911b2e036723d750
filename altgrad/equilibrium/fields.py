r"""Vector fields F(u) = f(u; θ, x) - u, nudged, and their gradient by one vector-Jacobian product.

    free         0 = F(u₀)
    nudged       0 = F(u) - β ∂L/∂u                                  correction "none":        du/dβ = J⁻¹ ∂L/∂u
    corrected    0 = F(u) - (J - Jᵀ)(u - u₀) - β ∂L/∂u               correction "asymmetric":  du/dβ = J⁻ᵀ ∂L/∂u
    gradient     ∂L/∂θ = -(∂F/∂θ)ᵀ du/dβ,     J = ∂F/∂u and ∂L/∂u at u₀

A net whose units have activations ρ, and that tells its drive z (nets.py), is the field F(u) = z(u) - ρ⁻¹(u): of the same rest, nudged within ρ as a device
is, and with a Jacobian that is symmetric where its weights are.

So with the correction the derivative is the exact adjoint's, whatever J is; without it J must be symmetric. A chain of blocks is such a field,
u_k ← f_k(u_{k-1}), with its forward pass for free state and nothing at all that goes back down without the correction.

Source: Laborieux and Zenke 2023, arXiv 2309.02214; Scurria et al. 2026, arXiv 2602.03670 (the form above is derived from its abstract).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from altgrad.attention import unfused
from altgrad.blocks import Block
from altgrad.engine import Tree
from altgrad.equilibrium.nudges import Nudge
from altgrad.equilibrium.relaxation import Disturb, Settled, State, as_complex, relax
from altgrad.errors import CapabilityError
from altgrad.samplers import AddressedSamplers

Step = Callable[..., State]  # (params, state, inputs)
Sampling = Callable[[], AddressedSamplers]
INSTEAD = "Use nudge='symmetric', or holomorphic layers (Tanh, Sigmoid, and others without kinks or absolute values; pooling by means)."


class Field:
    """A field at its free state, with the graph of one application of f there: J and Jᵀ as products with vectors.

    Args:
        free: where the free relaxation came to; `point` are its tensors, which require grad.
        image: f(point), with its graph.
        leaves: the parameters in that graph.
        again: one application of f elsewhere, without a graph; real or complex.
        outputs: what is read out of a state.
        forced: (state, push) -> the state one sweep later under a push within the activations, of a net whose `image` is its drive.
    """

    def __init__(
        self,
        free: Settled,
        point: State,
        image: State,
        leaves: Tree,
        again: Callable[[State], State],
        outputs: Callable[[State], Any],
        forced: Callable[[State, State], State] | None = None,
    ):
        self.settled, self.point, self.image, self.leaves, self.again, self.outputs, self.forced = free, point, image, leaves, again, outputs, forced
        self.rest = tuple(leaf.detach() for leaf in point)
        self.passes = 0  # applications of f
        self.transposes: tuple[list[Tensor], list[Tensor], list[int]] | None = None  # w, (∂f/∂u)ᵀ w, and of which layers

    def pull(self, vectors: State) -> State:
        """(∂f/∂u)ᵀ v at the free state."""
        live = [(own, vector) for own, vector in zip(self.image, vectors, strict=True) if own.requires_grad]
        return gradients([own for own, _ in live], self.point, [vector for _, vector in live])

    def push(self, vectors: State) -> State:
        """(∂f/∂u) v at the free state: the derivative of w ↦ (∂f/∂u)ᵀ w, which is linear in w."""
        if self.transposes is None:
            live = [own for own in self.image if own.requires_grad]
            weights = [torch.zeros_like(own).requires_grad_() for own in live]
            with torch.enable_grad():
                back = torch.autograd.grad(live, self.point, weights, create_graph=True, allow_unused=True) if live else ()
            reached = [number for number, part in enumerate(back) if part is not None and part.requires_grad]
            self.transposes = weights, [back[number] for number in reached], reached
        wanted, transposed, reached = self.transposes
        found = iter(gradients(transposed, wanted, [vectors[number] for number in reached]))
        return tuple(next(found) if own.requires_grad else torch.zeros_like(own) for own in self.image)

    def turned(self, vectors: State) -> State:
        """(J - Jᵀ) v; complex vectors part by part, since J is real."""
        if vectors[0].is_complex():
            parts = [self.turned(tuple(part(vector) for vector in vectors)) for part in (torch.real, torch.imag)]
            return tuple(torch.complex(one, other) for one, other in zip(*parts, strict=True))
        return tuple(one - other for one, other in zip(self.push(vectors), self.pull(vectors), strict=True))

    def nudged(
        self,
        nudge: Nudge,
        force: State,
        *,
        corrected: bool,
        steps: int,
        tolerance: float,
        damping: float,
        disturb: Disturb | None = None,
        start: State | None = None,
        acceleration: str = "none",
    ) -> Settled:
        """The state under β · force, force = -∂L/∂u; relaxed from `start`, the free state unless told otherwise."""
        if nudge.beta == 0 and start is None:
            return self.settled
        rest = tuple(as_complex(leaf) for leaf in self.rest) if isinstance(nudge.beta, complex) else self.rest

        def update(state: State) -> State:
            self.passes += 1
            push = tuple(nudge.beta * part for part in force)
            if corrected:
                away = tuple(here - there for here, there in zip(state, rest, strict=True))
                push = tuple(part - turn for part, turn in zip(push, self.turned(away), strict=True))
            return self.forced(state, push) if self.forced else tuple(image + part for image, part in zip(self.again(state), push, strict=True))

        with torch.no_grad(), holomorphic():
            return relax(
                update,
                rest if start is None else start,
                steps=steps,
                tolerance=tolerance,
                damping=damping,
                disturb=disturb,
                acceleration=acceleration,
            )

    def gradient(self, told: Sequence[tuple[Nudge, State]]) -> Tree:
        """-(∂f/∂θ)ᵀ Σ Re(weight · (u - u₀)) / N, for forces that push the loss down."""
        moves = []
        for number, rest in enumerate(self.rest):
            parts = [(nudge.weight * (state[number] - rest)) for nudge, state in told]
            moves.append(sum((part.real if part.is_complex() else part for part in parts[1:]), parts[0].real if parts[0].is_complex() else parts[0]))
        live = [(own, -move.to(own.dtype) / len(move)) for own, move in zip(self.image, moves, strict=True) if own.requires_grad]
        names = list(self.leaves)
        found = torch.autograd.grad(
            [own for own, _ in live], [self.leaves[name] for name in names], [move for _, move in live], retain_graph=True, allow_unused=True
        )
        return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}

    def asymmetry(self, probe: State) -> Tensor:
        """‖(J - Jᵀ) ε‖ / ‖(J + Jᵀ) ε‖ of one probe, J with the units' own decay -1: 0 where J is symmetric."""
        pushed, pulled = self.push(probe), self.pull(probe)
        odd = torch.cat([(a - b).flatten() for a, b in zip(pushed, pulled, strict=True)])
        even = torch.cat([(a + b - 2 * own).flatten() for a, b, own in zip(pushed, pulled, probe, strict=True)])
        return odd.norm() / even.norm()


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> State:
    """Vector-Jacobian products of a graph that is kept; zeros where there is no path."""
    found = torch.autograd.grad(outputs, inputs, vectors, retain_graph=True, allow_unused=True) if outputs else [None] * len(inputs)
    return tuple(torch.zeros_like(given) if grad is None else grad.detach() for grad, given in zip(found, inputs, strict=True))


def settling_field(
    step: Step,
    params: Tree,
    start: State,
    inputs: Any,
    outputs: Callable[[State], Any],
    *,
    sweep: Step | None = None,
    prepared: Callable[[Tree, Any], Any] | None = None,
    drive: Step | None = None,
    **relaxing: Any,
) -> Field:
    """The field of a map s ← step(params, s, inputs), relaxed from `start`.

    Args:
        sweep: another map of the same rest, by which the free relaxation goes.
        prepared: (params, inputs) -> what step and sweep take in place of the inputs.
        drive: z with step = ρ(z); step then takes (params, state, inputs, push), ρ(z + push).
    """
    with torch.no_grad():
        given, free_sweep = inputs if prepared is None else prepared(params, inputs), sweep or step
        free = relax(lambda state: free_sweep(params, state, given), start, **relaxing)
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    point = tuple(leaf.detach().requires_grad_() for leaf in free.state)
    with torch.enable_grad(), unfused():
        image = (drive or step)(leaves, point, inputs)
    wide: list[tuple[Tree, Any]] = []

    def again(state: State, *push: State) -> State:
        if not any(leaf.is_complex() for leaf in state):
            return step(params, state, given, *push)
        if not wide:
            wide.append((tree_map(as_complex, dict(params)), tree_map(as_complex, given)))
        return step(wide[0][0], state, wide[0][1], *push)

    field = Field(free, point, image, leaves, again, outputs, again if drive else None)
    field.passes = free.ran + 1
    return field


def chain_field(blocks: Sequence[Block], params: Tree, inputs: Any, buffers: Callable[[], Tree], sampling: Sampling, written: Tree) -> Field:
    """The field of a chain of blocks, at rest after its forward pass.

    Args:
        buffers: gives fresh ones for a pass to write; `written` are those of the forward pass, which are kept.
        sampling: the random draws of a pass, the same each time.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    point: list[Tensor] = []
    image: list[Tensor] = []
    starts: list[int] = []  # how many draws the blocks before have made
    carried = inputs
    with torch.enable_grad(), unfused(), sampling() as sampler:
        for block in blocks:
            starts.append(sampler.calls)
            found = block.apply(leaves, carried, written)
            if not isinstance(found, Tensor) or found.ndim == 0 or not found.is_floating_point():
                kind = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise CapabilityError(f"block {block.name!r} gives {kind}; the state of a field must be floating-point tensors [N, …]. Cut elsewhere, cut='…'.")
            image.append(found)
            carried = found.detach().requires_grad_()
            point.append(carried)
    wide: list[Tree] = []

    def again(state: State) -> State:
        complex_state = any(leaf.is_complex() for leaf in state)
        if complex_state and not wide:
            wide.append(tree_map(as_complex, dict(params)))
        found = [as_complex(image[0].detach()) if complex_state else image[0].detach()]  # the first block sees no state
        spare = tree_map(as_complex, buffers()) if complex_state else buffers()
        with sampling() as sampler:
            for block, calls, below in zip(blocks[1:], starts[1:], state, strict=False):
                sampler.calls = calls
                found.append(block.apply(wide[0] if complex_state else params, below, spare))
        return tuple(found)

    count = point[0].shape[0]
    zeros = torch.zeros(count, dtype=point[0].dtype, device=point[0].device)
    rest = Settled(tuple(leaf.detach() for leaf in point), zeros, zeros.long(), 0)
    field = Field(rest, tuple(point), tuple(image), leaves, again, lambda state: state[-1])
    field.passes = 1
    return field


@contextmanager
def holomorphic() -> Iterator[None]:
    """PyTorch's complaints about complex numbers, said in terms of the engine's settings."""
    try:
        yield
    except RuntimeError as error:
        if "omplex" not in str(error):
            raise
        raise CapabilityError(
            f"nudge='holomorphic' runs the model on complex numbers, and it has an operation that is not holomorphic: {str(error).splitlines()[0]}. {INSTEAD}"
        ) from error


__all__ = ["INSTEAD", "Field", "chain_field", "holomorphic", "settling_field"]
