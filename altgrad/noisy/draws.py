r"""The noise of copies, by address: (layer name @ call, copy, example). Whatever rank, chunk or replay asks for it gets the same numbers.

antithetic    copies come in pairs ±ε.
qmc           u_kd = Sobol_kd XOR s_d, ε = Φ⁻¹(u): over the copies k every unit d sees a stratified sample, with a digital shift s_d addressed
              by the example and the unit. One copy alone is exactly as random as without; the variance falls where few units matter.

Source: Owen, "Randomly permuted (t, m, s)-nets and (t, s)-sequences", 1995 (scrambling); the digital shift is its simplest form.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from altgrad.kernels import noise
from altgrad.rng import Key, tensor_id

BITS = 23  # of a uniform number: what float32 holds on (0, 1)
WIDEST = torch.quasirandom.SobolEngine.MAXDIM


@dataclass(frozen=True)
class Draws:
    """Where the noise of a step comes from.

    Args:
        key: seed and step.
        examples: N, in this rank's part of the batch; first: the global index of the first of them.
        antithetic: copies in pairs.
        qmc: stratified over `total` directions.
    """

    key: Key
    examples: int
    first: int
    antithetic: bool
    qmc: bool
    total: int  # directions of the step: pairs, or copies

    def site(self, site: str, directions: Sequence[int], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """ε of one layer's output for some directions, [copies, *shape]; with pairs all +, then all -."""
        size = torch.Size(shape)
        start = self.first * (size.numel() // self.examples) if size and size[0] == self.examples else 0
        return self.copies(self.drawn(site, directions, size, start, dtype, device))

    def weights(self, name: str, directions: Sequence[int], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """ε of a parameter that no layer takes, [copies, *shape]: the same for all examples and ranks."""
        return self.copies(noise.draw("normal", self.key, tensor_id(f"{name} itself"), directions, torch.Size(shape), dtype=dtype, device=device))

    def copies(self, drawn: Tensor) -> Tensor:
        return torch.cat([drawn, -drawn]) if self.antithetic else drawn

    def drawn(self, site: str, directions: Sequence[int], size: torch.Size, start: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = tensor_id(site)
        if not self.qmc:
            return noise.draw("normal", self.key, tensor, directions, size, start=start, dtype=dtype, device=device)
        units = size[1:].numel() if start or (size and size[0] == self.examples) else size.numel()
        dimension = min(units, WIDEST)
        points = torch.quasirandom.SobolEngine(dimension).draw(self.total, dtype=torch.float64)[list(directions)]  # [k, dimension]
        base = (points * 2**BITS).to(torch.int64).to(device)
        base = base[:, torch.arange(size.numel(), device=device) % units % dimension]  # beyond the widest engine dimensions come again, shifted anew
        shift = noise.integers(self.key, tensor, [0], size, start=start, device=device).reshape(1, -1).to(torch.int64) >> (32 - BITS) & (2**BITS - 1)
        uniform = ((base ^ shift).double() + 0.5) * 2.0**-BITS
        return (torch.special.erfinv(2 * uniform - 1) * math.sqrt(2)).to(dtype).reshape(len(directions), *size)
