"""What a claim is, and one engine set up on one problem to be looked at."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from altgrad.alignment import exact_gradient
from altgrad.engine import Engine, Estimate, Tree, fit_check
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.world import World

KEY = Key(20, 3)
Factory = Callable[[], Problem]


class Violation(AssertionError):
    """A claim that the engine does not keep: what was seen, and what is claimed."""


def hold(condition: bool, message: str) -> None:
    """Raise Violation unless `condition`."""
    if not condition:
        raise Violation(message)


@dataclass(frozen=True)
class Subject:
    """The engine under test and the problem it is to be tested on where a claim holds on any problem."""

    engine: Engine
    factory: Factory

    def bench(self, problem: Problem | None = None) -> "Bench":
        """The engine on `problem`, or on a fresh one from the factory."""
        return Bench(self.engine, self.factory() if problem is None else problem)


@dataclass(frozen=True)
class Claim:
    """A claim: its name, for which engines it is made, and the check, which raises Violation.

    `anywhere`: it holds on any problem, so it is checked on the caller's; otherwise on probes of ours, which feed engines that need no
    more than a model and a loss provide.
    """

    name: str
    check: Callable[[Subject], None]
    applies: Callable[[Engine], bool]
    anywhere: bool


CLAIMS: dict[str, Claim] = {}


def claim(
    *, applies: Callable[[Engine], bool] = lambda engine: True, anywhere: bool = False, name: str = ""
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Enter a check in the list, under its function's name or `name`."""

    def enter(check: Callable[[Subject], None]) -> Callable[[Subject], None]:
        label = name or check.__name__
        CLAIMS[label] = Claim(label, check, applies, anywhere)
        return check

    return enter


class Bench:
    """One engine on one problem, with the parameters it trains, its state and a batch."""

    def __init__(self, engine: Engine, problem: Problem):
        fit_check(engine, problem)
        self.engine, self.problem = engine, problem
        self.aux = {name: value.requires_grad_() for name, value in engine.aux(problem, KEY).items()}
        self.params: Tree = {**problem.params(), **self.aux}
        self.state: Tree = engine.init(problem, self.params, KEY)
        self.batch: Batch = problem.batch(0, World())

    def estimate(self, key: Key = KEY, *, batch: Batch | None = None, world: World | None = None) -> Estimate:
        """One estimate, with lazy gradients made now."""
        found = self.engine.estimate(self.problem, self.params, self.state, batch or self.batch, key, world or World())
        return found._replace(grads=dict(found.grads))

    def warm(self, steps: int = 3) -> "Bench":
        """The state after some steps, for rules whose first state is empty."""
        for step in range(steps if self.state else 0):
            self.state = self.estimate(KEY.fold("warm").at(step)).state
        return self

    def exact(self, key: Key = KEY) -> Tree:
        """Backprop's gradient at the same place, with respect to what the engine trains: coordinates of its own where it has some."""
        inside = getattr(self.engine, "inside", None)
        if inside is None:
            return exact_gradient(self.problem, self.params, self.batch, key)[1]
        seen = inside(self.problem, self.params, self.state)
        return exact_gradient(seen, seen.params(), self.batch, key)[1]

    def flat(self, grads: Tree, like: Tree) -> Tensor:
        """The gradients of the names in `like`, zeros for those left out, as one vector [d] in float64."""
        return torch.cat([(grads[name] if name in grads else torch.zeros_like(value)).double().flatten() for name, value in like.items()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit; NaN equals NaN."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.detach().contiguous().view(-1).view(torch.uint8), b.detach().contiguous().view(-1).view(torch.uint8))
    )


def same_tree(a: Tree, b: Tree) -> bool:
    """`same_bits` for every name, and the same names."""
    return set(a) == set(b) and all(same_bits(a[name], b[name]) for name in a)
