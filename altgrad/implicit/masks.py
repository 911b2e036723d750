"""One mask a solve: what a map draws (dropout) must be the same at every step, and in the backward pass too, or it has no fixed point to differentiate."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from altgrad.rng import Key
from altgrad.samplers import ACTIVE, AddressedSamplers

RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU)


class OneMask:
    """A context, entered for every application of a map, in which it draws the same numbers as the first time.

    The addresses are those of the samplers at work where this is made (altgrad's engines). Without any, and where `module` holds dropout in training mode,
    they come from one number of PyTorch's global generator.
    """

    def __init__(self, module: nn.Module | None = None):
        drawing = module is not None and any(part.training and isinstance(part, RANDOM) for part in module.modules())
        self.given = bool(ACTIVE)
        self.sampler = ACTIVE[-1] if ACTIVE else AddressedSamplers(Key(int(torch.randint(2**62, ())))) if drawing else None
        self.start = self.end = 0 if self.sampler is None else self.sampler.calls
        self.outer: list[Any] = []

    def __enter__(self) -> None:
        if self.sampler is None:
            return
        entered = nullcontext() if ACTIVE and ACTIVE[-1] is self.sampler else self.sampler
        self.outer.append((entered, self.sampler.calls))
        entered.__enter__()
        self.sampler.calls = self.start

    def __exit__(self, *error: Any) -> None:
        if self.sampler is None:
            return
        entered, calls = self.outer.pop()
        self.end = max(self.end, self.sampler.calls)
        self.sampler.calls = calls
        entered.__exit__(*error)

    def done(self) -> None:
        """What is drawn after the solve has addresses of its own."""
        if self.sampler is not None and self.given:
            self.sampler.calls = max(self.sampler.calls, self.end)
