r"""A linear layer for a whole population: one shared product, and a low-rank term of each member's own.

    y_p = x_p Wᵀ + bias + scale · (x_p B_p) A_pᵀ          A_p [m, r], B_p [n, r]: the factors of member p's perturbation of W [m, n]
    G   = Σ_p c_p A_p B_pᵀ                                the update, no member's matrix ever formed

Antithetic pairs lie [all +, all -] and share their factors. The `addressed_` forms draw the factors themselves. Nothing here records a
graph: engines that perturb weights run detached.

Eager calls on the CPU go straight to the plain PyTorch forms; under vmap, under torch.compile and on other devices they go through the
operators of operators.py, which cost microseconds more.

Source: Sarkar et al. 2025 (EGGROLL), section 4.2 and equation 6.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level

from altgrad.errors import require
from altgrad.kernels import operators
from altgrad.kernels.lowrank_plain import plain_linear, plain_member, plain_update
from altgrad.kernels.perturbations import check_members, factors, plain_addressed_update, plain_axpy_, unit_noise
from altgrad.rng import LAWS, Key

__all__ = [
    "addressed_axpy_",
    "addressed_linear",
    "addressed_update",
    "factors",
    "lowrank_update",
    "member_linear",
    "paired_linear",
    "population_linear",
    "unit_noise",
]


def _direct(tensor: Tensor) -> bool:
    """Whether the plain form may be called as it is."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu" and maybe_current_level() is None


def population_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, shared: bool = False, pairs: bool = False, scale: float = 1.0
) -> Tensor:
    """Every member's linear layer, y_p = x_p Wᵀ + bias + scale · (x_p b_p) a_pᵀ -> [P, ..., m]; detached.

    Args:
        x: [P, ..., n], rows of each member's own; with `shared` [..., n], the same rows for all.
        weight: [m, n].
        bias: [m], one row per member [P, m], or None.
        a, b: [P, m, r] and [P, n, r], any strides; with `pairs` [P/2, ...]: members 0 … P/2 - 1 take +a, members P/2 … P - 1 take -a.
        scale: a factor of the term (σ/√r where a does not hold it).

    Raises:
        ShapeError: the shapes do not fit one another.
    """
    if _direct(x):
        return plain_linear(x, weight, bias, a, b, scale, shared, pairs)
    return operators.OPS.population_linear(x, weight, bias, a, b, scale, shared, pairs)


def member_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, scale: float = 1.0) -> Tensor:
    """One member's layer, x [..., n], a [m, r], b [n, r] -> [..., m]; under vmap over members it is `population_linear`."""
    if _direct(x):
        return plain_member(x, weight, bias, a, b, scale)
    return operators.member_under_vmap(x, weight, bias, a, b, scale)


def paired_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Callable[[], tuple[Tensor, Tensor, float]]) -> Tensor | None:
    """`member_linear` under one vmap over antithetic pairs whose factors A [D, m, r] and B [D, n, r] lie there once, with their scale; None elsewhere."""
    return operators.paired_under_vmap(x, weight, bias, pairs)


def lowrank_update(coefficients: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ_p c_p a_p b_pᵀ as one product over all P · r columns -> [m, n], in float32 or wider.

    Args:
        coefficients: [P].
        a, b: [P, m, r] and [P, n, r], any strides; 16-bit factors are widened first.
    """
    if _direct(a):
        return plain_update(coefficients, a, b)
    return operators.OPS.lowrank_update(coefficients, a, b)


def addressed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key: Key,
    *,
    tensor: int,
    members: Sequence[int],
    law: str,
    rank: int,
    shared: bool = False,
    pairs: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """`population_linear` that draws its factors: y_p = x_p Wᵀ + bias ± scale · (x_p B_p)(A_p/√r)ᵀ -> [P, ..., m].

    Args:
        key, tensor, members, law, rank: the address, law and rank of the noise; with `pairs` one id for each pair.
        scale: σ.
    """
    if _direct(x):
        a, b = factors(law, key, tensor=tensor, members=members, rank=rank, shape=weight.shape, dtype=x.dtype)
        return plain_linear(x, weight, bias, a, b, scale, shared, pairs)
    ids = operators.ids_of(members, x.device)
    return operators.OPS.addressed_linear(x, weight, bias, ids, *operators.words_of(key), tensor, law, rank, scale, shared, pairs)


def addressed_update(
    coefficients: Tensor,
    key: Key,
    *,
    tensor: int,
    members: Sequence[int],
    law: str,
    rank: int,
    shape: Sequence[int],
    chunk: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Σ_p c_p A_p B_pᵀ/√r with the factors drawn again, `chunk` members at a time -> [*shape], in float32 or wider.

    Args:
        coefficients: [P]; with pairs, one for each pair: c₊ - c₋.
        key, tensor, members, law, rank: the address, law and rank of the noise, as the forward pass drew it.
        shape: of the parameter, two axes or more, taken as [m, rest].
        chunk: members whose factors are held at once; 32 MiB of them by default. The result depends on it by the order of a sum only.
        dtype: what the forward pass rounded the factors to.
    """
    check_members(coefficients, members, chunk)
    require(len(shape) >= 2, "shape", tuple(shape), "of two axes or more; noise of a vector is dense, see addressed_axpy_")
    if _direct(coefficients):
        return plain_addressed_update(coefficients, key, tensor=tensor, members=members, law=law, rank=rank, shape=shape, chunk=chunk, dtype=dtype)
    ids, width = operators.ids_of(members, coefficients.device), math.prod(shape[1:])
    flat = operators.OPS.addressed_update(coefficients, ids, *operators.words_of(key), tensor, law, rank, shape[0], width, chunk, dtype)
    return flat.view(*shape)


def addressed_axpy_(out: Tensor, coefficients: Tensor, *, key: Key, tensor: int, members: Sequence[int], law: str, chunk: int | None = None) -> Tensor:
    """out += Σ_p c_p noise_p, in place, for dense noise: updates only, a perturbation is never added to weights and taken off again.

    Args:
        out: any shape and float type; the sum is made in float32 or wider and rounded once.
        coefficients: [P]; one coefficient and one member is w += c · noise.
        key, tensor, members, law: the address and law, as the forward pass drew the noise.
        chunk: elements of noise held at once for all members; 32 MiB by default.
    """
    check_members(coefficients, members, chunk)
    if _direct(out):
        return plain_axpy_(out, coefficients, key, tensor=tensor, members=members, law=law, chunk=chunk)
    operators.OPS.addressed_axpy_(out, coefficients, operators.ids_of(members, out.device), *operators.words_of(key), tensor, law, chunk)
    return out


def addressed_fill_(out: Tensor, *, key: Key, tensor: int, members: Sequence[int], law: str, start: int = 0) -> Tensor:
    """Write the noise of `members` into `out` [P, ...], as noise.draw gives it (uniform on (0, 1)); on CUDA by a kernel. Law "integers": int64 words."""
    require(law in (*LAWS, "integers"), "law", law, "one of " + ", ".join((*LAWS, "integers")))
    require(len(out) == len(members), "out", tuple(out.shape), f"[{len(members)}, ...]")
    operators.OPS.addressed_fill_(out, operators.ids_of(members, out.device), *operators.words_of(key), tensor, law, start)
    return out
