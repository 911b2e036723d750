r"""How near an iteration is to losing its fixed point: the size and the spectral radius of J = df/dz.

    penalty   ‖J‖_F² / n ≈ ‖Jᵀ ε‖² / n,   ε standard normal                     (Hutchinson)
    radius    ρ(J) = lim ‖J^k v‖^(1/k), from the growth of a power iteration

Source: Bai, Koltun, Kolter, "Stabilizing equilibrium models by Jacobian regularization", arXiv 2106.14342, equation 7.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from altgrad.errors import require
from altgrad.kernels import noise
from altgrad.linearised import Linearised
from altgrad.rng import Key, tensor_id


def probes(leaves: Sequence[Tensor], key: Key, *, first: int = 0) -> list[Tensor]:
    """Standard normal tensors of the leaves' shapes; row r of the first axis is that of example first + r, whichever rank draws it."""
    return [
        noise.draw(
            "normal",
            key,
            tensor_id(f"state {number}"),
            [0],
            leaf.shape,
            start=first * (leaf[0].numel() if leaf.ndim else 0),
            dtype=leaf.dtype,
            device=leaf.device,
        )[0]
        for number, leaf in enumerate(leaves)
    ]


def jacobian_penalty(function: Callable[..., object], state: object, key: Key, *, batch_dims: int = 1, first: int = 0) -> Tensor:
    """‖Jᵀ ε‖² / n, a scalar, the mean over examples; its expectation is ‖J‖_F² / n. Differentiable in the state and in what f closes over.

    Args:
        function: z -> f(z), of z's structure.
        state: z, a pytree of tensors.
        key: addresses ε.
        batch_dims: first axes that are examples; n counts the others.
        first: the global index of the first example.
    """
    leaves, spec = tree_flatten(state)

    def flat(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_flatten(function(tree_unflatten(list(values), spec)))[0])

    found = torch.func.vjp(flat, *leaves)[1](tuple(probes(leaves, key, first=first)))
    examples = leaves[0].shape[:batch_dims].numel()
    size = sum(leaf.numel() for leaf in leaves) // examples
    return sum((part.square().sum() for part in found), leaves[0].new_zeros(())) / (size * examples)


def spectral_radius(
    function: Callable[..., object], state: object, key: Key, *, products: int = 40, batch_dims: int = 1, first: int = 0
) -> tuple[Tensor, Tensor]:
    """(estimate of the largest ρ(J) among the examples, its error), both scalars, from `products` products with J.

    The estimate is the mean growth of ‖J^k v‖ over the last half of a power iteration, which also holds where the largest eigenvalues are a complex pair. The
    error is the difference between the two quarters of that half: it tells how far the iteration is from settling, and bounds nothing.

    Args:
        function, state, key, batch_dims, first: as in `jacobian_penalty`.
        products: 4 or more.
    """
    require(isinstance(products, int) and products >= 4, "products", products, "a whole number, 4 or more")
    leaves, spec = tree_flatten(state)
    shapes, lead = [leaf.shape for leaf in leaves], leaves[0].shape[:batch_dims]
    sizes = [leaf.shape[batch_dims:].numel() for leaf in leaves]

    def flat(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([value.reshape(*lead, size) for value, size in zip(values, sizes, strict=True)], -1)

    def residual(z: Tensor) -> Tensor:
        parts = [part.reshape(shape) for part, shape in zip(z.split(sizes, -1), shapes, strict=True)]
        return flat(tree_flatten(function(tree_unflatten(parts, spec)))[0])

    tangent = Linearised(residual, flat([leaf.detach() for leaf in leaves]))
    v = flat(probes(leaves, key, first=first))
    v = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    growths = []
    for _ in range(products):
        v = tangent.product(v)
        size = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        growths.append(size.squeeze(-1).clamp_min(torch.finfo(v.dtype).tiny).log())
        v = torch.where(size > 0, v / torch.where(size > 0, size, 1.0), v)
    quarter = products // 4
    before, last = (torch.stack(part).mean(0).exp() for part in (growths[-2 * quarter : -quarter], growths[-quarter:]))
    rate = torch.stack(growths[-2 * quarter :]).mean(0).exp().flatten()
    worst = rate.argmax()
    return rate[worst].detach(), (last - before).abs().flatten()[worst].detach()
