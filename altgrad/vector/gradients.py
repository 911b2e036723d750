r"""Stand-in derivatives of "the nearest code", q(e): what an encoder's output e is told where the true derivative is 0 almost everywhere.

    straight-through   ē = g                    as if q = e
    rotation           ē = λ Rᵀ g               R the rotation of e to q within their plane, λ = |q| / |e|, both constants:
                                                |ē| / |g| = λ, and ē lies to e as g lies to q

Each is q + A (e - sg e) with a constant matrix A and the stop-gradient sg: the value is q to the last bit, and one expression serves reverse and forward
mode, vmap and perturbed parameters.

Source: straight-through: van den Oord, Vinyals, Kavukcuoglu 2017, arXiv 1711.00937; rotation: Fifty et al., ICLR 2025, arXiv 2410.06424.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def straight_through(e: Tensor, q: Tensor) -> Tensor:
    """q with the derivative of e.

    Args:
        e: the encoder's output [..., D].
        q: its code [..., D]; a constant here.
    """
    return q.detach() + carried(e)


def rotation(e: Tensor, q: Tensor) -> Tensor:
    r"""q with the derivative of λ R e.

    R = H_r H_ê with reflections H_v = I - 2 v vᵀ, r = (ê + q̂)/|ê + q̂|: what I - 2 r rᵀ + 2 q̂ êᵀ is, and to rounding orthogonal however near q̂ is to
    -ê. At q̂ = -ê, where no plane is given, it is H_ê; at e = 0 it is the identity.

    Args:
        e: the encoder's output [..., D].
        q: its code [..., D]; a constant here.
    """
    start, end = e.detach(), q.detach()
    kinds = torch.finfo(start.dtype)
    size, wanted = (torch.linalg.vector_norm(vector, dim=-1, keepdim=True) for vector in (start, end))
    there = size > kinds.tiny**0.5  # below it squares run under
    before, after = unit(start, kinds.tiny**0.5), unit(end, kinds.tiny**0.5)
    between = torch.where(there, unit(before + after, kinds.eps), 0.0)
    factor = torch.where(there, wanted / size.clamp_min(kinds.tiny), 1.0)
    return end + factor * reflected(between, reflected(before, carried(e)))


def carried(e: Tensor) -> Tensor:
    """0 with the derivative of e."""
    return e - e.detach()


def unit(vector: Tensor, least: float) -> Tensor:
    """vector / |vector| over the last axis; 0 where the length is at most `least`."""
    size = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    return torch.where(size > least, vector / size.clamp_min(least), 0.0)


def reflected(mirror: Tensor, vector: Tensor) -> Tensor:
    """H_mirror vector; `mirror` is of length 1, or 0 for no reflection."""
    return vector - 2 * mirror * (mirror * vector).sum(-1, keepdim=True)


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"straight-through": straight_through, "rotation": rotation}
