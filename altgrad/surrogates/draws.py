"""Where stochastic estimators have their noise from: an address, never the global generator."""

import torch
from torch import Tensor

from altgrad import samplers
from altgrad.errors import ShapeError, UsageError
from altgrad.kernels import noise
from altgrad.rng import Key, tensor_id


def uniform(name: str, like: Tensor, key: Key | None, given: Tensor | None) -> Tensor:
    """u in (0, 1), in the shape of `like`: `given`; or that of `key`; or within an engine's pass the pass's next draw.

    Raises:
        UsageError: none of the three. ShapeError: `given` has another shape.
    """
    if given is not None:
        if given.shape != like.shape:
            raise ShapeError(f"the noise given to {name} has shape {tuple(given.shape)}; it must have the shape of the input, {tuple(like.shape)}.")
        return given
    dtype = torch.promote_types(like.dtype, torch.float32)  # in half precision u may be 1
    if key is not None:
        return noise.draw("uniform", key, tensor_id(f"surrogate/{name}"), [0], like.shape, dtype=dtype, device=like.device)[0]
    if samplers.ACTIVE:
        return samplers.draw("uniform", like.shape, dtype=dtype, device=like.device)
    raise UsageError(f"surrogate {name} draws at random and needs an address: give key=altgrad.Key(seed, step). (Engines give one themselves.)")


def gumbel(u: Tensor) -> Tensor:
    """-ln(-ln u)."""
    return -torch.log(-torch.log(u))
