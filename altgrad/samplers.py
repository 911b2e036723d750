"""Dropout and other samplers served from a Key, so that a primal, its tangents, its members and a resumed run see one mask."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from altgrad.kernels import noise
from altgrad.rng import Key, tensor_id

ACTIVE: list["AddressedSamplers"] = []


class AddressedSamplers(TorchFunctionMode):
    """Within it, every random function of a model draws from `key`; the n-th call of a pass draws at address n.

    Args:
        key: the address of the pass.
        first: the global index of the batch's first example, and
        examples: how many there are: what is drawn with one row an example is then the same whichever rank or part of a batch draws it.
        copies: rows of one example in a run, which see the same draws; `first` and `examples` count rows then.
    """

    def __init__(self, key: Key, *, first: int = 0, examples: int | None = None, copies: int = 1):
        super().__init__()
        self.key, self.first, self.examples, self.copies, self.calls = key, first, examples, copies, 0

    def __enter__(self) -> "AddressedSamplers":
        ACTIVE.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        ACTIVE.pop()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        served = SERVED.get(func)
        if served is not None:
            result = served(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if func in UNSERVED:
            return with_own_generators(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@contextmanager
def replaying() -> Iterator[None]:
    """What runs inside draws the same numbers each time, and leaves the call count where the first run left it."""
    if not ACTIVE:
        yield
        return
    sampler = ACTIVE[-1]
    start, state = sampler.calls, torch.get_rng_state()  # the state matters inside with_own_generators
    try:
        yield
    finally:
        sampler.calls = start
        torch.set_rng_state(state)


def address() -> str:
    """The name of the next draw of the pass."""
    sampler = ACTIVE[-1]
    name, sampler.calls = f"sampler/{sampler.calls}", sampler.calls + 1
    return name


def draw(law: str, shape: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """The next draw of the pass: [*shape], by law "normal", "sign" or "uniform"."""
    sampler, size = ACTIVE[-1], torch.Size(shape)
    by_row = bool(sampler.examples and size and size[0] == sampler.examples)
    dtype, copies = dtype or torch.get_default_dtype(), sampler.copies
    low = sampler.first // copies if by_row else 0  # the first row's example
    start = low * size[1:].numel()
    if not by_row or copies == 1:
        return noise.draw(law, sampler.key, tensor_id(address()), range(1), size, start=start, dtype=dtype, device=device)[0]
    own = torch.arange(sampler.first, sampler.first + size[0], device=device) // copies - low  # each row's example
    count = (sampler.first + size[0] - 1) // copies - low + 1
    return noise.draw(law, sampler.key, tensor_id(address()), range(1), (count, *size[1:]), start=start, dtype=dtype, device=device)[0][own]


def with_own_generators(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A random function that has no rule here: PyTorch's default generators are set to an addressed state for the call, and then set back."""
    seed = ACTIVE[-1].key.fold(address()).seed % 2**63
    devices = sorted({leaf.device.index for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_cuda})
    with torch.random.fork_rng(devices):
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        for index in devices:
            torch.cuda.set_rng_state(torch.Generator(f"cuda:{index}").manual_seed(seed).get_state(), index)
        return func(*args, **kwargs)


def dropout(x: Tensor, p: float, *, shape: Any = None) -> Tensor:
    """x · mask / (1 - p), the mask addressed where a pass is active; `shape` is the mask's where it is not x's."""
    if not ACTIVE:
        return F.dropout(x, p, True) if shape is None else x * F.dropout(torch.ones(shape, dtype=x.dtype, device=x.device), p, True)
    if p >= 1:
        return x * 0
    keep = draw("uniform", x.shape if shape is None else shape, device=x.device) >= p
    return x * (keep.to(x.dtype) / (1 - p))


def serve_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or p == 0:
        return NotImplemented
    return dropout(x, p)


def serve_channel_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or p == 0:
        return NotImplemented
    return dropout(x, p, shape=(*x.shape[:2], *(1 for _ in x.shape[2:])))


def serve_alpha_dropout(x: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Any:
    return NotImplemented if not training or p == 0 else alpha_dropout(x, p, x.shape)


def serve_channel_alpha_dropout(x: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Any:
    return NotImplemented if not training or p == 0 else alpha_dropout(x, p, (*x.shape[:2], *(1 for _ in x.shape[2:])))


def alpha_dropout(x: Tensor, p: float, shape: Any) -> Tensor:
    """a (x m + α (1 - m)) - a α p with the mask m of `shape`: mean 0 and variance 1 stay as they are (Klambauer et al. 2017)."""
    if p >= 1:
        return x * 0
    alpha = -1.7580993408473766  # -scale·alpha of SELU, the value dropped units take
    keep = (draw("uniform", shape, device=x.device) >= p).to(x.dtype)
    a = ((1 - p) * (1 + p * alpha**2)) ** -0.5
    return a * (x * keep + alpha * (1 - keep)) - a * alpha * p


def serve_rrelu(x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False) -> Any:
    """x where x >= 0, else r x with r uniform on (lower, upper)."""
    if not training:
        return NotImplemented
    slope = lower + (upper - lower) * draw("uniform", x.shape, dtype=x.dtype, device=x.device)
    return torch.where(x >= 0, x, x * slope)


def serve_gumbel_softmax(logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> Tensor:
    """softmax((logits + g)/τ) with g = -ln(-ln u); hard: its one-hot argmax, whose derivative is the soft one's (Jang et al. 2017)."""
    uniform = draw("uniform", logits.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)  # in half precision u may be 1
    gumbels = -torch.log(-torch.log(uniform))
    soft = torch.softmax((logits + gumbels.to(logits.dtype)) / tau, dim)
    if not hard:
        return soft
    best = soft.detach().argmax(dim, keepdim=True)
    return torch.zeros_like(soft.detach()).scatter_(dim, best, 1.0) - soft.detach() + soft


def serve_fractional_pool(func: Callable[..., Any], dims: int) -> Callable[..., Any]:
    """The pool with addressed `_random_samples` [N, C, dims]."""

    def serve(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(args) > 4 or kwargs.get("_random_samples") is not None:
            return NotImplemented
        batch = 1 if x.ndim == dims + 1 else x.shape[0]
        samples = draw("uniform", (batch, x.shape[-dims - 1], dims), dtype=x.dtype, device=x.device)
        return func(x, *args, **{**kwargs, "_random_samples": samples})

    return serve


def serve_rand(*size: Any, **kwargs: Any) -> Any:
    return serve_factory("uniform", size, kwargs)


def serve_randn(*size: Any, **kwargs: Any) -> Any:
    return serve_factory("normal", size, kwargs)


def serve_factory(law: str, size: Any, kwargs: dict[str, Any]) -> Any:
    if kwargs.get("generator") is not None or kwargs.get("out") is not None:
        return NotImplemented
    shape = kwargs.get("size", size[0] if size and not isinstance(size[0], int) else size)
    return draw(law, shape, dtype=kwargs.get("dtype"), device=kwargs.get("device"))


def serve_like(law: str) -> Callable[..., Any]:
    def serve(x: Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
        return draw(law, x.shape, dtype=dtype or x.dtype, device=device or x.device)

    return serve


def serve_bernoulli(x: Tensor, p: float | None = None, *, generator: Any = None, out: Any = None) -> Any:
    if generator is not None or out is not None:
        return NotImplemented
    chance = x.detach() if p is None else p
    return (draw("uniform", x.shape, device=x.device) < chance).to(x.dtype)


def serve_fill(transform: Callable[..., Tensor], law: str) -> Callable[..., Any]:
    def serve(x: Tensor, *args: float, generator: Any = None, **kwargs: float) -> Any:
        if generator is not None:
            return NotImplemented
        return x.copy_(transform(draw(law, x.shape, device=x.device), *args, **kwargs))

    return serve


def uniform_to(u: Tensor, a: float = 0.0, b: float = 1.0, **named: float) -> Tensor:
    a, b = named.get("from", a), named.get("to", b)
    return a + (b - a) * u


SERVED: dict[Any, Callable[..., Any]] = {
    F.dropout: serve_dropout,
    F.dropout1d: serve_channel_dropout,
    F.dropout2d: serve_channel_dropout,
    F.dropout3d: serve_channel_dropout,
    F.alpha_dropout: serve_alpha_dropout,
    F.feature_alpha_dropout: serve_channel_alpha_dropout,
    F.rrelu: serve_rrelu,
    F.gumbel_softmax: serve_gumbel_softmax,
    **{pool: serve_fractional_pool(pool, 2) for pool in (F.fractional_max_pool2d, F.fractional_max_pool2d_with_indices)},
    **{pool: serve_fractional_pool(pool, 3) for pool in (F.fractional_max_pool3d, F.fractional_max_pool3d_with_indices)},
    torch.dropout: serve_dropout,
    torch.rand: serve_rand,
    torch.randn: serve_randn,
    torch.rand_like: serve_like("uniform"),
    torch.randn_like: serve_like("normal"),
    torch.bernoulli: serve_bernoulli,
    torch.Tensor.bernoulli: serve_bernoulli,
    torch.Tensor.uniform_: serve_fill(uniform_to, "uniform"),
    torch.Tensor.normal_: serve_fill(lambda z, mean=0.0, std=1.0: mean + std * z, "normal"),
    torch.Tensor.exponential_: serve_fill(lambda u, lambd=1.0: -torch.log(u) / lambd, "uniform"),
    torch.Tensor.bernoulli_: serve_fill(lambda u, p=0.5: (u < p).to(torch.get_default_dtype()), "uniform"),
}

# Random functions without a rule above (torch.distributions draws through some of them), as functions and as methods.
NAMES = (
    "alpha_dropout alpha_dropout_ feature_alpha_dropout feature_alpha_dropout_ feature_dropout feature_dropout_ dropout_ rrelu rrelu_ native_dropout "
    "multinomial normal poisson binomial randint randint_like randperm random_ log_normal_ cauchy_ geometric_ _standard_gamma _sample_dirichlet"
)
UNSERVED = {getattr(owner, name) for name in NAMES.split() for owner in (torch, torch.Tensor) if hasattr(owner, name)} - set(SERVED)
