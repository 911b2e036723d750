r"""Members' local losses, each parameter's groups told by those that they touch alone (altgrad.credit).

    c_pg = Σ_{o ∈ C(g)} ℓ_po / O,        ĝ_i = (1/σ) Σ_p w(c_·g(i))_p s_p E_pi

A chunk's losses [members, N, P] are summed at once into one row a member: its loss, then the sums of every group. Fitness, ranks and chunks see
those rows in place of losses.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from altgrad import credit, shaping
from altgrad.credit import Influence
from altgrad.errors import CapabilityError
from altgrad.population.draws import Draws

UNSCALED = frozenset({"raw", "baseline-pair"})  # shapings whose estimate is in the units of the gradient
SLAB = 1 << 20  # numbers that are shaped at once


class Credit:
    """The influence maps of a step, and where the sums of each stand in a member's row.

    Args:
        influence: the problem's maps, by parameter name; not empty.
        draws: the members' perturbations.
        shaping: of the sums. Those that give the gradient see sums over C(g); those that are free of the loss's scale see means over it, as the floor
            that they put under a deviation is made for losses.

    Raises:
        CapabilityError: several groups in a matrix whose noise is of low rank, where no element has noise of its own.
    """

    def __init__(self, influence: Mapping[str, Influence], draws: Draws, *, shaping: str):
        self.influence, self.params, self.shaping = influence, draws.params, shaping
        self.columns: dict[str, slice] = {}
        self.width = 1  # the first column is the loss
        for name, own in influence.items():
            if own.count > 1 and name in draws.thin:
                raise CapabilityError(
                    f"the influence map of {name!r} has {own.count} groups, but the parameter's noise is A Bᵀ of rank {draws.rank}, whose elements "
                    "have none of their own; use engine es (dense noise), rank=None, or one group for the whole tensor (Influence.whole)."
                )
            self.columns[name] = slice(self.width, self.width + own.count)
            self.width += own.count

    def rows(self, losses: Tensor) -> Tensor:
        """Local losses [members, N, P] -> [members, width].

        Raises:
            ShapeError: they are not, or a map does not fit them.
        """
        credit.check(self.influence, self.params, losses[0])
        told = [own.sums(losses) if self.shaping in UNSCALED else own.means(losses) for own in self.influence.values()]
        return torch.cat([losses.flatten(1).mean(1, keepdim=True), *told], 1)

    def shaped(self, rows: Tensor, *, pairs: bool, clean: Tensor | None, maximize: bool) -> dict[str, Tensor]:
        """The weights of every group's noise, [P, groups] by parameter: rows [P, width] shaped group by group; clean: a row [width]."""

        def one(values: Tensor, baseline: Tensor) -> Tensor:
            return shaping.shape(self.shaping, values, pairs=pairs, clean=None if clean is None else baseline, maximize=maximize)

        def some(columns: slice) -> Tensor:
            own = rows[:, columns].T.contiguous()  # [groups, P]
            levels = own[:, 0] if clean is None else clean[columns]
            size = max(1, SLAB // len(rows))
            return torch.cat([torch.func.vmap(one)(*part) for part in zip(own.split(size), levels.split(size), strict=True)]).T

        return {parameter: some(columns) for parameter, columns in self.columns.items()}


__all__ = ["Credit"]
