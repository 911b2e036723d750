r"""The plain PyTorch forms of lowrank.py: the default on the CPU, the fallback everywhere, and what the kernels are held against.

    y_p = x_p Wᵀ + bias + scale · (x_p B_p) A_pᵀ

x Wᵀ is one matrix product over all rows. The term is written first and the product added into it (beta = 1, what a bias costs anyway), so
it takes no pass of its own over the output.
"""

import torch
from torch import Tensor

from altgrad.errors import ShapeError
from altgrad.kernels import scratch


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, shared: bool, pairs: bool) -> Tensor:
    check(x, weight, bias, a, b, shared, pairs)
    with torch.no_grad():
        return (_shared if shared else _own)(x, weight, bias, a, b, scale, pairs)


def plain_member(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return plain_linear(x[None], weight, bias, a[None], b[None], scale, False, False)[0]


def _own(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, pairs: bool) -> Tensor:
    """Members with rows of their own."""
    outputs, inputs = weight.shape
    groups, count, rank = 2 if pairs else 1, a.shape[0], a.shape[2]
    members = groups * count
    flat = x.reshape(-1, inputs)
    each = len(flat) // members if members else 0
    rows = flat.view(members, each, inputs)
    if rank == 1 and each == 1:
        return _single(flat, weight, bias, a[:, :, 0], b[:, :, 0], scale, groups).view(members, *x.shape[1:-1], outputs)
    out = scratch.empty((members, each, outputs), x.dtype, x.device)
    inner = rows.new_empty(members, each, rank)  # x b
    # A batched product is quick where each b_p, seen as [r, n], has ordinary strides; for one row a copy to get that costs more than it saves.
    tall = b[:, None, :, 0].mT if rank == 1 else b if each == 1 else b.mT.contiguous().mT
    for half in range(groups):
        part = slice(half * count, (half + 1) * count)
        torch.bmm(rows[part], tall, out=inner[part])
    if scale != 1:
        inner.mul_(scale)
    if pairs:
        inner[count:].neg_()
    start = None if bias is None else bias if bias.ndim == 1 else bias.view(groups, count, 1, outputs)
    if rank == 1:  # out = bias + (x b) aᵀ in one pass
        left, right = inner.view(groups, count, each, 1), a[:, None, :, 0]
        spread = out.view(groups, count, each, outputs)
        torch.mul(left, right, out=spread) if start is None else torch.addcmul(start, left, right, out=spread)
    else:
        for half in range(groups):
            part = slice(half * count, (half + 1) * count)
            if start is None:
                torch.bmm(inner[part], a.mT, out=out[part])
            else:
                torch.baddbmm(start if start.ndim == 1 else start[half], inner[part], a.mT, out=out[part])
    total = out.view(-1, outputs)
    torch.addmm(total, flat, weight.t(), out=total)  # as addmm_, which operation counters do not know
    return out.view(members, *x.shape[1:-1], outputs)


def _single(flat: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, groups: int) -> Tensor:
    """One row a member, rank 1: x b is a dot product each, for which a batched product would pay a call each."""
    outputs, count = weight.shape[0], len(a)
    thin = (flat.view(groups, count, -1) * b).sum(2, keepdim=True)
    if scale != 1:
        thin.mul_(scale)
    thin[1:].neg_()  # the second half of the pairs, where there are pairs
    start = None if bias is None else bias if bias.ndim == 1 else bias.view(groups, count, outputs)
    out = scratch.empty((groups, count, outputs), flat.dtype, flat.device)
    torch.mul(thin, a, out=out) if start is None else torch.addcmul(start, thin, a, out=out)
    return out.view(groups * count, outputs).addmm_(flat, weight.t())


def _shared(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, pairs: bool) -> Tensor:
    """All members on the same rows: everything but the outer product is computed once, for a pair the outer product too."""
    outputs, inputs = weight.shape
    groups, count, rank = 2 if pairs else 1, a.shape[0], a.shape[2]
    rows = x.reshape(-1, inputs)
    single = bias is None or bias.ndim == 1
    base = torch.nn.functional.linear(rows, weight, bias if single else None)  # [rows, m]
    inner = torch.mm(b.mT.reshape(count * rank, inputs), rows.t()).view(count, rank, len(rows)).mT  # x b, [pairs, rows, r]
    if scale != 1:
        inner = inner * scale
    out = scratch.empty((groups, count, len(rows), outputs), x.dtype, x.device)
    if rank == 1:  # bound by writing the output: one pass each, the term never stored
        for half in range(groups):
            torch.addcmul(base, inner, a[:, None, :, 0], value=-1 if half else 1, out=out[half])
    else:
        term = torch.bmm(inner, a.mT, out=out[-1])
        if pairs:
            torch.add(base, term, out=out[0])
            torch.sub(base, term, out=out[1])
        else:
            term.add_(base)
    out = out.view(groups * count, len(rows), outputs)
    if not single:
        out.add_(bias[:, None])  # type: ignore[index]
    return out.view(groups * count, *x.shape[:-1], outputs)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, shared: bool, pairs: bool) -> torch.Size:
    """The shape of the result, or ShapeError."""
    outputs, inputs = weight.shape
    if a.ndim != 3 or b.ndim != 3 or a.shape[1] != outputs or b.shape[1] != inputs or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2]:
        raise ShapeError(
            f"factors a {list(a.shape)} and b {list(b.shape)} do not fit a weight {[outputs, inputs]}; "
            f"a must be [members, {outputs}, rank] and b [members, {inputs}, rank]."
        )
    members = a.shape[0] * (2 if pairs else 1)
    if x.ndim < (1 if shared else 2) or x.shape[-1] != inputs or not (shared or x.shape[0] == members):
        wanted = f"[..., {inputs}]" if shared else f"[{members}, ..., {inputs}]"
        raise ShapeError(f"x {list(x.shape)} does not fit; it must be {wanted}: {members} members, a weight {[outputs, inputs]}.")
    if bias is not None and bias.shape not in ((outputs,), (members, outputs)):
        raise ShapeError(f"bias {list(bias.shape)} does not fit; it must be [{outputs}] or, a row per member, [{members}, {outputs}].")
    return torch.Size((members, *x.shape[:-1], outputs) if shared else (*x.shape[:-1], outputs))


def plain_update(coefficients: Tensor, a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        left, right = columns(coefficients, a, b)
        return torch.mm(left.t(), right)


def columns(coefficients: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """[P · r, m] and [P · r, n] in float32 or wider, the coefficients in the shorter one."""
    wide = torch.promote_types(a.dtype, torch.float32)
    each = coefficients.to(wide).repeat_interleave(a.shape[2])[:, None]
    left, right = (factor.mT.reshape(-1, factor.shape[1]).to(wide) for factor in (a, b))
    return (left * each, right) if left.shape[1] <= right.shape[1] else (left, right * each)
