"""The operators torch.ops.altgrad.*: the plain forms for every device, Triton's on CUDA, and what vmap, torch.compile and opcheck ask of them.

A kernel is registered beside its plain form and takes over for CUDA tensors of the types it knows; Triton is imported when the first one
arrives. There is no backward rule: where a derivative is being taken, plain functions of PyTorch stand in.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType, _add_batch_dim, _unwrap_batched, peek_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from altgrad.inner import differentiated
from altgrad.kernels import noise
from altgrad.kernels.lowrank_plain import check, plain_linear, plain_member, plain_update
from altgrad.kernels.perturbations import factors, plain_addressed_update, plain_axpy_
from altgrad.rng import Key

OPS: Any = torch.ops.altgrad
KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
ADDRESS = "Tensor members, int seed, int step, int tensor, str law"


def words_of(key: Key) -> tuple[int, int]:
    """Seed and step as an operator takes them: int64, the seed in two's complement."""
    return key.seed - 2**64 if key.seed >= 2**63 else key.seed, key.step


def ids_of(members: Sequence[int], device: torch.device) -> Tensor:
    """Ids as an operator takes them, int64 [P]."""
    if isinstance(members, range):
        return torch.arange(members.start, members.stop, members.step, device=device)
    return torch.tensor(list(members), dtype=torch.int64, device=device)


@cache
def _kernels() -> ModuleType | None:
    try:
        from altgrad.kernels import launch
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        warnings.warn("triton is not installed: CUDA tensors take the plain PyTorch forms of altgrad's kernels", RuntimeWarning, stacklevel=4)
        return None
    return launch


def _known(arg: Any) -> bool:
    """Whether kernels take this argument: double precision is left to plain PyTorch."""
    dtype = arg.dtype if isinstance(arg, Tensor) else arg
    return not isinstance(dtype, torch.dtype) or dtype in KERNEL_TYPES


def _define(name: str, arguments: str, plain: Callable[..., Any], fake: Callable[..., Any] | None, returns: str = "Tensor") -> None:
    """Register one operator; its kernel is launch.py's function of the same name, where `_known` holds for all arguments."""
    torch.library.define(f"altgrad::{name}", f"({arguments}) -> {returns}")
    torch.library.impl(f"altgrad::{name}", "default", plain)

    def on_cuda(*args: Any) -> Any:
        kernels = _kernels() if all(map(_known, args)) else None
        return plain(*args) if kernels is None else getattr(kernels, name)(*args)

    torch.library.impl(f"altgrad::{name}", "cuda", on_cuda)
    if fake is not None:
        torch.library.register_fake(f"altgrad::{name}", fake)


# ---------------------------------------------------------------------------------------------------------------- plain forms


def _addressed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    members: Tensor,
    seed: int,
    step: int,
    tensor: int,
    law: str,
    rank: int,
    scale: float,
    shared: bool,
    pairs: bool,
) -> Tensor:
    a, b = factors(law, Key(seed, step), tensor=tensor, members=members.tolist(), rank=rank, shape=weight.shape, dtype=x.dtype, device=x.device)
    return plain_linear(x, weight, bias, a, b, scale, shared, pairs)


def _addressed_update(
    coefficients: Tensor,
    members: Tensor,
    seed: int,
    step: int,
    tensor: int,
    law: str,
    rank: int,
    rows: int,
    width: int,
    chunk: int | None,
    dtype: torch.dtype,
) -> Tensor:
    return plain_addressed_update(
        coefficients, Key(seed, step), tensor=tensor, members=members.tolist(), law=law, rank=rank, shape=(rows, width), chunk=chunk, dtype=dtype
    )


def _addressed_axpy(out: Tensor, coefficients: Tensor, members: Tensor, seed: int, step: int, tensor: int, law: str, chunk: int | None) -> None:
    plain_axpy_(out, coefficients, Key(seed, step), tensor=tensor, members=members.tolist(), law=law, chunk=chunk)


def _addressed_fill(out: Tensor, members: Tensor, seed: int, step: int, tensor: int, law: str, start: int) -> None:
    key, ids, shape = Key(seed, step), members.tolist(), out.shape[1:]
    if law == "integers":
        out.copy_(noise.integers(key, tensor, ids, shape, start=start, device=out.device))
    else:
        out.copy_(noise.draw(law, key, tensor, ids, shape, start=start, dtype=out.dtype, device=out.device))


# ---------------------------------------------------------------------------------------------------------------- shapes


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, shared: bool, pairs: bool) -> Tensor:
    return x.new_empty(check(x, weight, bias, a, b, shared, pairs))


def _fake_member(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_update(coefficients: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[1], b.shape[1], dtype=torch.promote_types(a.dtype, torch.float32))


def _fake_addressed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, members: Tensor, *rest: Any) -> Tensor:
    shared, pairs = rest[-2:]
    return x.new_empty(*((len(members) * (2 if pairs else 1),) if shared else ()), *x.shape[:-1], weight.shape[0])


def _fake_addressed_update(coefficients: Tensor, members: Tensor, *rest: Any) -> Tensor:
    rows, width, _, dtype = rest[-4:]
    return coefficients.new_empty(rows, width, dtype=torch.promote_types(dtype, torch.float32))


def _fake_nothing(*args: Any) -> None:
    return None


LINEAR = "Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale"
_define("population_linear", f"{LINEAR}, bool shared, bool pairs", plain_linear, _fake_linear)
_define("member_linear", LINEAR, plain_member, _fake_member)
_define("lowrank_update", "Tensor coefficients, Tensor a, Tensor b", plain_update, _fake_update)
_define(
    "addressed_linear",
    f"Tensor x, Tensor weight, Tensor? bias, {ADDRESS}, int rank, float scale, bool shared, bool pairs",
    _addressed_linear,
    _fake_addressed_linear,
)
_define(
    "addressed_update",
    f"Tensor coefficients, {ADDRESS}, int rank, SymInt rows, SymInt width, int? chunk, ScalarType dtype",
    _addressed_update,
    _fake_addressed_update,
)
_define("addressed_axpy_", f"Tensor(a!) out, Tensor coefficients, {ADDRESS}, int? chunk", _addressed_axpy, _fake_nothing, "()")
_define("addressed_fill_", f"Tensor(a!) out, {ADDRESS}, int start", _addressed_fill, _fake_nothing, "()")


# ---------------------------------------------------------------------------------------------------------------- vmap


def _one_by_one(operator: Callable[..., Tensor], size: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> tuple[Tensor, int]:
    """Where nothing is shared that a rule could use."""
    parts = [[arg] * size if axis is None else arg.unbind(axis) for arg, axis in zip(args, in_dims, strict=True)]
    return torch.stack([operator(*part) for part in zip(*parts, strict=True)]), 0


def _first(value: Tensor, axis: int | None) -> Tensor:
    """`value` with a batch axis, if it has one, in front."""
    return value.movedim(axis, 0) if axis else value


def _member_rule(size: int, in_dims: Sequence[int | None], args: Sequence[Any], population: Callable[..., Tensor]) -> tuple[Tensor, int]:
    """Members become one `population`; what they have in common is written once."""
    x, weight, bias, a, b, scale = args
    over_x, over_weight, over_bias, over_a, over_b = in_dims[:5]
    if over_weight is not None:
        return _one_by_one(OPS.member_linear, size, in_dims, args)
    x, bias = _first(x, over_x), None if bias is None else _first(bias, over_bias)
    a = a.expand(size, *a.shape) if over_a is None else _first(a, over_a)
    b = b.expand(size, *b.shape) if over_b is None else _first(b, over_b)
    return population(x, weight, bias, a, b, scale, over_x is None, False), 0


def _population_rule(info: Any, in_dims: Any, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    """A batch around a population lengthens its rows; anything else goes one by one."""
    if in_dims[0] is None or any(axis is not None for axis in in_dims[1:]):
        return _one_by_one(OPS.population_linear, info.batch_size, in_dims, (x, *rest))
    shared = rest[-2]
    return OPS.population_linear(x.movedim(in_dims[0], 0 if shared else 1), *rest), 1


def _member_rule_for(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    return _member_rule(info.batch_size, in_dims, args, OPS.population_linear)


torch.library.register_vmap("altgrad::member_linear", _member_rule_for)
torch.library.register_vmap("altgrad::population_linear", _population_rule)


def only_vmap() -> bool:
    """Whether one vmap and nothing else is active: then its rules are applied by hand, as the way there costs 0.2 ms, a layer's work."""
    interpreter = peek_interpreter_stack()
    return not torch.compiler.is_compiling() and interpreter is not None and interpreter.level() == 1 and interpreter.key() == TransformType.Vmap


def taken_out(values: Sequence[Tensor | None]) -> tuple[list[Any], list[int | None]]:
    """The tensors behind those of a vmap, and their batch axes."""
    found = [(None, None) if value is None else _unwrap_batched(value, 1) for value in values]
    return [part for part, _ in found], [axis for _, axis in found]


def member_under_vmap(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """member_linear under vmap; where a derivative is taken too, by functions that have one."""
    if differentiated():
        return F.linear(x, weight, bias) + torch.matmul(scale * torch.matmul(x, b), a.mT)
    if not only_vmap():
        return OPS.member_linear(x, weight, bias, a, b, scale)
    parts, in_dims = taken_out((x, weight, bias, a, b))
    size = next((part.shape[axis] for part, axis in zip(parts, in_dims, strict=True) if part is not None and axis is not None), None)
    with temporarily_clear_interpreter_stack():
        if size is None:
            return OPS.member_linear(*parts, scale)
        out, axis = _member_rule(size, (*in_dims, None), (*parts, scale), _population_for(x))
    return _add_batch_dim(out, axis, 1)


def paired_under_vmap(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Callable[[], tuple[Tensor, Tensor, float]]) -> Tensor | None:
    """The same where members are pairs; None where the vmap is not the only one, or the weight differs between members."""
    if not only_vmap():
        return None
    (x, weight, bias), (over_x, over_weight, over_bias) = taken_out((x, weight, bias))
    if over_weight is not None:
        return None
    with temporarily_clear_interpreter_stack():
        a, b, scale = pairs()
        bias = None if bias is None else _first(bias, over_bias)
        out = _population_for(x)(_first(x, over_x), weight, bias, a, b, scale, over_x is None, True)
    return _add_batch_dim(out, 0, 1)


def _population_for(x: Tensor) -> Callable[..., Tensor]:
    return plain_linear if x.device.type == "cpu" else OPS.population_linear
