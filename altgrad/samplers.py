"""Dropout and other samplers served from a Key, so that a primal, its tangents, its members and a resumed run see one mask."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from altgrad.kernels import noise
from altgrad.rng import Key, tensor_id

ACTIVE: list["AddressedSamplers"] = []


class AddressedSamplers(TorchFunctionMode):
    """Within it, every random function of a model draws from `key`; the n-th call of a pass draws at address n."""

    def __init__(self, key: Key):
        super().__init__()
        self.key, self.calls = key, 0

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
        return func(*args, **(kwargs or {}))


@contextmanager
def replaying() -> Iterator[None]:
    """What runs inside draws the same numbers each time, and leaves the call count where the first run left it."""
    if not ACTIVE:
        yield
        return
    sampler = ACTIVE[-1]
    start = sampler.calls
    try:
        yield
    finally:
        sampler.calls = start


def draw(law: str, shape: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """The next draw of the pass: [*shape], by law "normal", "sign" or "uniform"."""
    sampler = ACTIVE[-1]
    name, sampler.calls = f"sampler/{sampler.calls}", sampler.calls + 1
    size = torch.Size(shape)
    return noise.draw(law, sampler.key, tensor_id(name), range(1), size, dtype=dtype or torch.get_default_dtype(), device=device)[0]


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
    if not training or p == 0:
        return NotImplemented
    alpha = -1.7580993408473766  # -scale·alpha of SELU, the value dropped units take (Klambauer et al. 2017)
    keep = (draw("uniform", x.shape, device=x.device) >= p).to(x.dtype)
    a = ((1 - p) * (1 + p * alpha**2)) ** -0.5
    return a * (x * keep + alpha * (1 - keep)) - a * alpha * p


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
