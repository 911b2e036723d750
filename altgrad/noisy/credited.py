r"""The coefficients of a layer where losses are local, [copies, N, P]: they sum what the layer's parameter touches (altgrad.credit).

    ∂W_l = Σ_kn c_knl ε_klnu x_lnᵀ / σ_l,      c_knl = Σ_{p ∈ C(l)} (ℓ_knp - b_np) / (K N P),

and where the units u of the layer's output touch different losses, c_knu takes the place of c_knl.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from altgrad.credit import Influence
from altgrad.errors import CapabilityError
from altgrad.noisy.parameters import Noisy

if TYPE_CHECKING:
    from altgrad.noisy.trace import Record

ALLOWED = (
    "likelihood-ratio puts noise on layers' outputs, so it takes maps that are the same for every example (Influence.whole, Influence.grouped) with one "
    "group for the whole tensor, or with groups of output units: `index` constant along all axes of the weight but the first, in linear layers and "
    "convolutions. For anything finer use engine es or spsa."
)


class Credit:
    """The influence maps of a step, seen by layers."""

    def __init__(self, influence: Mapping[str, Influence]):
        self.influence = influence
        self.known: dict[tuple[str, int], Tensor | None] = {}  # (layer @ call, weight or bias) -> its mask

    def masks(self, record: "Record") -> list[tuple[Tensor | None, list[int]]]:
        """Which losses the layer's weight (0) and bias (1) touch, those of one mask together: [P], [units, P], or None for all of them."""
        found: list[tuple[Tensor | None, list[int]]] = []
        for place, owner in enumerate((record.weight, record.bias)):
            if not isinstance(owner, Noisy):
                continue
            address = (record.site, place)
            if address not in self.known:
                self.known[address] = self.mask(owner, record)
            mask = self.known[address]
            beside = next((places for other, places in found if alike(mask, other)), None)
            if beside is None:
                found.append((mask, [place]))
            else:
                beside.append(place)
        return found

    def mask(self, owner: Any, record: "Record") -> Tensor | None:
        """What one parameter of a layer touches.

        Raises:
            CapabilityError: its map is finer than the layer's noise.
        """
        own = self.influence.get(owner.parameter)
        if own is None:
            return None
        mask = own.mask
        if mask is not None and own.count == 1:
            return mask[0]
        index = own.index if owner.through is None else owner.through(own.index)
        rows = index.reshape(len(index), -1) if index.ndim else index.reshape(1, 1)
        if mask is None or record.units is None or not bool((rows == rows[:, :1]).all()):
            kind = "of pairs that differ between examples" if mask is None else f"of {own.count} groups in a tensor of shape {tuple(own.index.shape)}"
            raise CapabilityError(f"the influence map of {owner.parameter!r} is one {kind}; {ALLOWED}")
        return mask[rows[:, 0]]

    def loose(self, name: str, coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of a parameter that is perturbed itself: c [copies, groups] and the group of each element, or c [copies] and None."""
        own = self.influence.get(name)
        if own is None:
            return coefficients.flatten(1).sum(1), None
        return own.sums(coefficients) * coefficients[0].numel(), own.index


def alike(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def touched(coefficients: Tensor, mask: Tensor | None) -> Tensor:
    """Coefficients [copies, N, P] -> [copies, N], or [copies, N, units] for a mask [units, P]."""
    return coefficients.sum(-1) if mask is None else coefficients @ mask.to(coefficients).movedim(0, -1)


__all__ = ["Credit", "touched"]
