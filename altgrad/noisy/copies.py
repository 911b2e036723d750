"""The copies of a step: cut into passes, run, and turned into gradients as soon as their coefficients are known."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from altgrad.credit import check
from altgrad.noisy import baselines
from altgrad.noisy.credited import Credit
from altgrad.noisy.draws import Draws
from altgrad.noisy.passes import losses_of, passing, together
from altgrad.noisy.probe import Facts
from altgrad.noisy.trace import NoisyTrace, Sums
from altgrad.population.evaluate import REFUSALS
from altgrad.problem import Batch, Problem
from altgrad.rng import Key

RUNG = "noisy copies by vmap"


@dataclass(frozen=True)
class Part:
    """The directions of one pass; `half`: of a pair only its first or second copy."""

    directions: range
    half: int | None = None

    def count(self, *, pairs: bool) -> int:
        return len(self.directions) * (2 if pairs and self.half is None else 1)


@dataclass
class Copies:
    """Everything a step's passes have in common.

    Args:
        params, chosen: the parameters, and the names of those that are noisy.
        sigma: noise scale by layer.
        chunk: directions in one pass; None for all.
        baseline: "loo", or the number or losses to subtract, or None.
        store: keep records; otherwise replay.
        scored: measure the scores of σ.
        credit: where losses are local, which of them each layer touches.
    """

    problem: Problem
    params: dict[str, Tensor]
    chosen: set[str]
    batch: Batch
    key: Key
    draws: Draws
    facts: Facts
    sigma: Callable[[str], float | Tensor]
    chunk: int | None
    baseline: Tensor | str | None
    store: bool
    scored: bool
    sums: Sums
    credit: Credit | None = None

    def __post_init__(self) -> None:
        self.forwards = 0.0
        self.looped = 0  # copies that were run one by one though they were to run together
        self.seen: list[Tensor] = []  # losses, for the mean over copies

    @property
    def count(self) -> int:
        return self.draws.total * (2 if self.draws.antithetic else 1)

    def parts(self) -> Iterator[Part]:
        size = self.chunk or self.draws.total
        for start in range(0, self.draws.total, size):
            part = Part(range(start, min(start + size, self.draws.total)))
            if part.count(pairs=self.draws.antithetic) == 1 or self.problem.facts.get(RUNG, True):
                yield part
            else:
                yield from self.single(part)

    def single(self, part: Part) -> Iterator[Part]:
        halves = (0, 1) if self.draws.antithetic else (None,)
        return (Part(range(direction, direction + 1), half) for half in halves for direction in part.directions)

    def run(self, *, focus: str | None = None, cache: dict[str, Tensor] | None = None) -> None:
        """All copies, with the one layer `focus` noisy or all of them; adds to `sums`."""
        waiting: list[tuple[Part, Tensor, NoisyTrace]] = []
        for part in self.parts():
            for piece, losses, trace in self.tried(part, focus, cache):
                self.seen.append(losses)
                if self.baseline == "loo":
                    waiting.append((piece, losses, trace))
                else:
                    assert not isinstance(self.baseline, str)
                    self.settle(piece, baselines.coefficients(losses, self.count, self.baseline), trace, focus, cache)
        if waiting:
            self.left_out(waiting, focus, cache)

    def left_out(self, waiting: list[tuple[Part, Tensor, NoisyTrace]], focus: str | None, cache: dict[str, Tensor] | None) -> None:
        """The leave-one-out baseline needs every loss first."""
        rows = torch.cat([self.rows(part) for part, _, _ in waiting])
        losses = torch.cat([found for _, found, _ in waiting])
        ordered = torch.empty_like(losses).index_copy_(0, rows.to(losses.device), losses)
        baseline = baselines.leave_one_out(ordered, pairs=self.draws.antithetic)
        for part, found, trace in waiting:
            own = baseline[self.rows(part).to(found.device)]
            self.settle(part, baselines.coefficients(found, self.count, own), trace, focus, cache)

    def rows(self, part: Part) -> Tensor:
        """The numbers of a part's copies among all: all first halves, then all second ones."""
        own = torch.tensor(list(part.directions))
        if not self.draws.antithetic:
            return own
        return torch.cat([own, own + self.draws.total]) if part.half is None else own + part.half * self.draws.total

    def tried(self, part: Part, focus: str | None, cache: dict[str, Tensor] | None) -> Iterator[tuple[Part, Tensor, NoisyTrace]]:
        """The losses of a part's copies, together or, where something in the model or the loss refuses, one by one."""
        many = part.count(pairs=self.draws.antithetic) > 1
        if many and self.problem.facts.get(RUNG, True):
            try:
                yield (part, *self.forward(part, focus, cache))
                return
            except REFUSALS as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.problem.facts[RUNG] = False
        for piece in self.single(part) if many else (part,):
            self.looped += many or piece.half is not None
            yield (piece, *self.forward(piece, focus, cache))

    def forward(self, part: Part, focus: str | None, cache: dict[str, Tensor] | None, coefficients: Tensor | None = None) -> tuple[Tensor, NoisyTrace]:
        """One pass: the losses [copies, N] (local ones: [copies, N, P]) of its copies, and its trace."""
        count = part.count(pairs=self.draws.antithetic)
        trace = NoisyTrace(
            self.draws,
            part.directions,
            half=part.half,
            sigma=self.sigma,
            independent=self.facts.independent,
            batched=count > 1,
            sums=self.sums,
            store=self.store and coefficients is None,
            coefficients=coefficients,
            focus=focus,
            cache=cache,
            scored=self.scored,
            credit=self.credit,
        )
        values = trace.parameters(self.params, self.chosen)

        def losses() -> Tensor:
            return losses_of(self.problem, values, self.batch, self.problem.fresh_buffers(), local=self.credit is not None)

        with passing(self.key, self.batch, self.draws.examples):
            found = together(count, losses) if count > 1 else losses()[None]
        if self.credit is not None:
            check(self.credit.influence, self.params, found[0])
        self.forwards += count * (trace.computed / max(1, self.facts.sites) if focus else 1)
        return found.detach(), trace

    def settle(self, part: Part, coefficients: Tensor, trace: NoisyTrace, focus: str | None, cache: dict[str, Tensor] | None) -> None:
        """Gradients from coefficients, one a loss."""
        if not self.store:
            _, trace = self.forward(part, focus, cache, coefficients)
        trace.collect_all(coefficients)

    def mean(self) -> Tensor:
        """The mean loss over all copies."""
        return torch.cat([losses.flatten() for losses in self.seen]).mean()
