r"""The perturbations of one step, drawn by address and forgotten: member p stands at θ + σ s_p E_d(p).

With antithetic pairs D directions serve 2 D members, signs s = +1 for the first D and -1 for the last D; without, s = 1 and D members.
A matrix gets E = A Bᵀ/√r (rank r) or a dense E, everything else a dense one; E has unit variance elementwise.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from altgrad.engine import Tree
from altgrad.kernels import scratch
from altgrad.perturb import Dense, LowRank, directions
from altgrad.rng import Key
from altgrad.sigma import low_rank_squares

RECENT = 6  # parameters whose perturbations stay at hand: a recurrent layer reads its four or five at every step
BLOCK = 1 << 20  # numbers: noise that is drawn at once where each element has a weight of its own
KEPT = 1 << 22  # numbers: noise of a step with one chunk that is kept, for its update and for another look; above it is drawn again


class Supply(Mapping[str, Any]):
    """What a chunk's parameters are made of, made when asked for; the last few stay, so that memory does not grow with depth."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Any], *, most: int, recent: dict[str, Any]):
        self.names, self.make, self.most, self.recent = list(names), make, most, recent

    def __getitem__(self, name: str) -> Any:
        found = self.recent.pop(name, None)
        if found is None:
            if name not in self.names:
                raise KeyError(name)
            if len(self.recent) >= self.most:
                del self.recent[next(iter(self.recent))]
            # Plain arithmetic on plain tensors: neither the pass's modes nor its vmap are to see it.
            with torch._C.DisableTorchFunction(), temporarily_clear_interpreter_stack():
                found = self.make(name)
        self.recent[name] = found  # the newest is last
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Chunk(NamedTuple):
    """Some directions and what their members' parameters are made of."""

    first: int  # number of the first direction
    directions: int
    thin: Mapping[str, tuple[Tensor, Tensor]]  # name -> L [P, m, r] (σ and sign in it) and R [P, n, r]
    full: Mapping[str, Tensor]  # name -> θ + σ s E, [P, *shape]
    pairs: Mapping[str, tuple[Tensor, Tensor, float]] | None = None  # name -> A [D, m, r], B [D, n, r] and σ, where that is what L and R are made of


class Draws:
    """Directions of all parameters at one key.

    Args:
        key: seed and step of the noise.
        params: what is perturbed, by name.
        count: directions, D.
        sigma: the scale of the noise: one number, or one a parameter.
        rank: of a matrix's perturbation; None for dense ones.
        law: "normal", "sign" or "uniform", each with unit variance.
        antithetic: two members a direction, θ ± σE.
        chunk: directions evaluated at once; None for all.
        silent: directions whose members stand at θ itself.
    """

    def __init__(
        self,
        key: Key,
        params: Tree,
        count: int,
        *,
        sigma: float | Tensor | Tree,
        rank: int | None,
        law: str,
        antithetic: bool,
        chunk: int | None = None,
        silent: Tensor | None = None,
    ):
        self.key, self.params, self.count, self.sigma, self.rank, self.law = key, params, count, sigma, rank, law
        self.antithetic, self.size, self.silent = antithetic, min(chunk or count, count), silent
        self.thin = {name for name, value in params.items() if isinstance(directions(key, name, value, range(1), law=law, rank=rank), LowRank)}
        numbers = sum(
            value.shape[0] + value.shape[1:].numel() if name in self.thin else value.numel() if value.ndim < 2 else 0 for name, value in params.items()
        )
        self.keeps = self.size == count and count * numbers * (rank or 1) <= KEPT
        self.kept: dict[str, Dense | LowRank] = {}  # of the only chunk
        self.thin_kept: dict[str, Any] = {}  # what that chunk's members are made of; the chunk itself refers to this object, so it is not kept
        self.full_kept: dict[str, Any] = {}
        self.pairs_kept: dict[str, Any] = {}

    @property
    def members(self) -> int:
        return self.count * (2 if self.antithetic else 1)

    def moves(self, name: str, first: int, count: int) -> Dense | LowRank:
        """The directions first … first + count - 1 of one parameter."""
        if name in self.kept:
            return self.kept[name]
        found = directions(self.key, name, self.params[name], range(first, first + count), law=self.law, rank=self.rank)
        if self.keeps and count == self.count:
            self.kept[name] = found
            if isinstance(found, Dense) and len(found.shape) < 2:
                found.kept = found.dense()  # a vector's noise is as small as a factor's
        return found

    def scale(self, name: str) -> float | Tensor:
        """σ of one parameter."""
        return self.sigma[name] if isinstance(self.sigma, dict) else self.sigma

    def signed(self, drawn: Tensor, name: str, first: int) -> Tensor:
        """σ s E for all members of a chunk: [D, …] -> [D, …] or, with pairs, [2 D, …]."""
        sigma = self.scale(name)
        if self.silent is not None:
            loud = ~self.silent[first : first + len(drawn)].to(drawn.device)
            drawn = drawn * loud.reshape(-1, *(1 for _ in drawn.shape[1:])).to(drawn.dtype)
        if not self.antithetic:
            return drawn * sigma
        both = scratch.empty((2 * len(drawn), *drawn.shape[1:]), drawn.dtype, drawn.device)
        torch.mul(drawn, sigma, out=both[: len(drawn)])
        torch.mul(drawn, -sigma, out=both[len(drawn) :])
        return both

    def twice(self, drawn: Tensor) -> Tensor:
        """[D, …] -> [2 D, …], for both members of every pair."""
        both = scratch.empty((2 * len(drawn), *drawn.shape[1:]), drawn.dtype, drawn.device)
        both.view(2, *drawn.shape).copy_(drawn)
        return both

    def chunks(self, within: range | None = None) -> Sequence[tuple[int, int]]:
        """(first direction, directions) of every chunk of `within`, all directions by default."""
        within = range(self.count) if within is None else within
        return [(first, min(self.size, within.stop - first)) for first in range(within.start, within.stop, self.size)]

    def chunk(self, first: int, count: int) -> Chunk:
        """What the members of these directions are made of."""

        def factors(name: str) -> tuple[Tensor, Tensor]:
            a, b = self.moves(name, first, count).factors()  # type: ignore[union-attr]
            return self.signed(a, name, first), self.twice(b) if self.antithetic else b

        def paired(name: str) -> tuple[Tensor, Tensor, float]:
            return *self.moves(name, first, count).factors(), self.scale(name)  # type: ignore[union-attr, return-value]

        def written_out(name: str) -> Tensor:
            return self.signed(self.moves(name, first, count).dense(), name, first).add_(self.params[name])

        names = [name for name in self.params if name in self.thin]
        rest = [name for name in self.params if name not in self.thin]
        kept = self.keeps and count == self.count
        thin, full, pairs = (self.thin_kept, self.full_kept, self.pairs_kept) if kept else ({}, {}, {})
        most = [len(self.params) if kept and all(self.params[name].ndim < 2 or name in self.thin for name in own) else RECENT for own in (names, rest)]
        return Chunk(
            first,
            count,
            Supply(names, factors, most=most[0], recent=thin),
            Supply(rest, written_out, most=most[1], recent=full),
            Supply(names, paired, most=most[0], recent=pairs) if self.antithetic and self.silent is None and isinstance(self.sigma, float) else None,
        )

    def squares(self, name: str) -> Tensor:
        """The mean squared entry of each direction's E, [D] in float64."""
        found = []
        for first, count in self.chunks():
            moves = self.moves(name, first, count)
            found.append(low_rank_squares(*moves.factors()) if isinstance(moves, LowRank) else moves.dense().double().square().flatten(1).mean(1))
        return torch.cat(found)

    def along(self, weights: Tensor) -> Tensor:
        """What each direction counts for, [D, …], of what each member does, [P, …]."""
        along = weights[: self.count] - weights[self.count :] if self.antithetic else weights
        if self.silent is not None:
            along = along.masked_fill(self.silent.to(along.device).reshape(-1, *(1 for _ in along.shape[1:])), 0.0)
        return along

    def combine(self, name: str, weights: Tensor) -> Tensor:
        """Σ_p w_p s_p E_p of one parameter; weights [P] laid out as the members are.

        Directions are drawn again chunk by chunk, so that the sum needs one chunk's memory.
        """
        along = self.along(weights)
        total: Tensor | None = None
        for first, count in self.chunks():
            part = self.moves(name, first, count).combine(along[first : first + count])
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            total = wide if total is None else total.add_(wide)
        assert total is not None
        return total.to(self.params[name].dtype)

    def combine_groups(self, name: str, weights: Tensor, index: Tensor) -> Tensor:
        """Σ_p w_pg(i) s_p E_pi of a parameter with dense noise whose elements have weights by group: weights [P, G], index [*shape] in [0, G)."""
        value = self.params[name]
        size, dtype = max(1, value.numel()), torch.promote_types(value.dtype, torch.float32)
        along, places = self.along(weights).to(dtype), index.to(weights.device).reshape(-1)
        total = torch.zeros(value.numel(), dtype=dtype, device=value.device)
        for first, count in self.chunks():
            block = max(1, BLOCK // size)
            for start in range(first, first + count, block):  # some directions at a time, so that noise and weights of one block are in memory
                some = min(block, first + count - start)
                whole = self.moves(name, first, count) if some == count else None
                moves = whole or directions(self.key, name, value, range(start, start + some), law=self.law, rank=self.rank)
                drawn = moves.dense().to(dtype).reshape(some, -1)
                total += torch.einsum("ki,ki->i", along[start : start + some][:, places], drawn)
        return total.reshape(value.shape).to(value.dtype)
