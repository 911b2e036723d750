r"""Several rules on one model: every parameter has one rule, which sees the others' parameters as constants.

    θ = (θ_1, …, θ_m),   ĝ = (ĝ_1, …, ĝ_m),   ĝ_i = rule i's estimate of ∂f/∂θ_i at θ, with θ_j, j ≠ i, held

One optimizer moves all of them; rates of their own are its parameter groups. Where a rule trains something beside the model (a random subspace),
the others see the parameters that this makes of the model (`bake`).

A step costs what its parts cost: every rule makes its own passes. All draw at the addresses of one key, so that every pass of a step meets the
same dropout masks. The reported loss and the buffers are those of one part, the one nearest to backprop, whose loss is the unperturbed one where
any part's is; so running statistics move once a step.

What backpropagates cannot lie behind what has no derivative: a head after a black box can use backprop, what is before the box needs a rule
without REVERSE and TANGENT.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad.engine import Bias, Engine, Estimate, Needs, Split, Tree, describe, over_ranks
from altgrad.engines.backprop import cut
from altgrad.engines.shares import shared_out
from altgrad.engines.spelling import engine_of, part_of, parts_of, spelled
from altgrad.errors import CapabilityError, SettingError
from altgrad.problem import Batch, Problem
from altgrad.problems.held import Held
from altgrad.rng import Key
from altgrad.world import World

PREFIX = "mixed."  # before a part's number, before the names of its state and of its own trainables
REST = "the rest"
SUMMED = ("forwards", "backwards")
DERIVATIVES = Needs.TANGENT | Needs.REVERSE

# From the strongest promise to the weakest; a mix promises no more than its weakest part. The estimate is the gradient; its mean is; its mean comes
# as near as one likes; its mean is the gradient of a loss near by; it only never points away; it is the derivative of something else than the loss;
# of many things; of none, though it comes to point the gradient's way; it is none.
WEAKER = (Bias.EXACT, Bias.UNBIASED, Bias.LIMIT, Bias.SMOOTHED, Bias.GUIDED, Bias.SURROGATE, Bias.LOCAL, Bias.ALIGNED, Bias.DISPLACEMENT)


class Part(NamedTuple):
    """A rule of the mix, and its share."""

    label: str  # its pattern
    rule: Engine
    names: tuple[str, ...]  # parameters of the problem
    prefix: str

    def mine(self, tree: Tree) -> Tree:
        """What is the part's own in a tree of the mix, under the part's names."""
        return {name.removeprefix(self.prefix): value for name, value in tree.items() if name.startswith(self.prefix)}

    def trained(self, params: Tree) -> Tree:
        """All that the rule trains."""
        return {**{name: params[name] for name in self.names}, **self.mine(params)}

    def outside(self, name: str) -> str:
        """The mix's name of a trainable."""
        return name if name in self.names else self.prefix + name

    def stored(self, state: Tree) -> Tree:
        """The part's state under the mix's names."""
        return {self.prefix + name: value for name, value in state.items()}

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors say which part they come from."""
        try:
            yield
        except (SettingError, CapabilityError) as error:
            raise type(error)(f"in the part {self.label!r} of the mix: {error}") from error
        except RuntimeError as error:
            if not re.search(r"requires? grad", str(error)):
                raise
            raise CapabilityError(f"{self.unreached()} ({str(error).strip().splitlines()[0].rstrip('.')}).") from error

    def unreached(self) -> str:
        return (
            f"in the part {self.label!r} of the mix: no derivative gets from the loss to {self.names[0]!r}, so that {describe(self.rule)} cannot train it. "
            "What lies before something without a derivative needs a rule that only looks at losses, for instance likelihood-ratio or es"
        )


@dataclass(frozen=True)
class Mixed(Engine):
    """An engine for each block: parameters go to the first of `parts` whose pattern matches, the others to `rest`.

    Patterns (fnmatch: `*`, `?`, `[ab]`) match a parameter's name or that of a module above it: `head` and `head.*` both take head.0.weight.
    On the command line: --engine REST --at PATTERN=ENGINE[,NAME=VALUE…], repeatable.

    Raises:
        SettingError: two parts of one pattern, a pattern that matches nothing, a part or a rest without parameters, or a rule that is made for an
        optimizer of its own (ask-tell).
        CapabilityError: a rule whose read-out is not the model's, or a part that no derivative reaches.

    Source: that of its parts.
    """

    rest: Engine = field(default="forward", metadata={"help": "the engine of all parameters that no pattern matches, as likelihood-ratio,copies=16"})  # type: ignore[assignment]
    parts: tuple[tuple[str, Engine], ...] = field(default=(), metadata={"help": "PATTERN=ENGINE,NAME=VALUE,… with ; between them: head=backprop;body.*=spsa"})

    def __post_init__(self) -> None:
        rest, parts = engine_of(self.rest), parts_of(self.parts)
        if isinstance(rest, Mixed):
            parts, rest = (*parts, *rest.parts), rest.rest
        object.__setattr__(self, "rest", rest)
        object.__setattr__(self, "parts", parts)
        patterns = [pattern for pattern, _ in parts]
        for pattern in patterns:
            if patterns.count(pattern) > 1:
                raise SettingError(f"two parts of the mix have the pattern {pattern!r}; the first takes all that it matches, so leave one out.")
        for label, rule in self.rules() if parts else ():
            if rule.defaults or rule.bias is Bias.DISPLACEMENT:
                made = " with ".join(f"{name}={value}" for name, value in rule.defaults.items())
                raise SettingError(
                    f"{rule.name} (part {label!r}) cannot be mixed: it gives moves{f', made for {made}' if made else ''}, and one optimizer "
                    "serves all parts. Use es or eggroll there."
                )
            if type(rule).predict is not Engine.predict and type(rule).bake is Engine.bake:
                raise CapabilityError(
                    f"{rule.name} (part {label!r}) cannot be mixed: it reads out in a way of its own, in which the other parts have no place."
                )

    def rules(self) -> list[tuple[str, Engine]]:
        """(label, rule), the rest last."""
        return [*self.parts, (REST, self.rest)]

    @property
    def name(self) -> str:
        return "mixed"

    @property
    def needs(self) -> Needs:
        return reduce(or_, (rule.needs for _, rule in self.rules()))

    @property
    def bias(self) -> Bias:
        return max((rule.bias for _, rule in self.rules()), key=WEAKER.index)

    @property
    def split(self) -> Split:
        """POPULATION if any part's is: every rank then has the whole batch, and the other parts take a share of it (`look`)."""
        return Split.POPULATION if any(rule.split is Split.POPULATION for _, rule in self.rules()) else Split.DATA

    @property
    def source(self) -> str:
        return "; ".join(f"{label}: {rule.source}" for label, rule in self.rules()) if self.parts else self.rest.source

    def settings(self) -> dict[str, Any]:
        return {"rest": spelled(self.rest), "parts": tuple((pattern, *spelled(rule)) for pattern, rule in self.parts)}

    def at(self, pattern: str, other: Any) -> Engine:
        return Mixed(self.rest, (*self.parts, part_of((pattern, other))))

    def split_up(self, problem: Problem) -> list[Part]:
        """The parts and their shares of the problem's parameters, the rest last."""
        names = tuple(problem.params())
        patterns = tuple(pattern for pattern, _ in self.parts)
        shares = problem.recall(("shares of a mix", patterns, names), lambda: shared_out(names, patterns))
        return [Part(label, rule, share, f"{PREFIX}{number}.") for number, ((label, rule), share) in enumerate(zip(self.rules(), shares, strict=True))]

    def members(self, problem: Problem) -> list[tuple[str, Engine, Problem]]:
        values = problem.params()
        return [(f"in the part {part.label!r} of the mix, ", part.rule, Held(problem, part.names, values)) for part in self.split_up(problem)]

    def aux(self, problem: Problem, key: Key) -> Tree:
        values, found = problem.params(), {}
        for part in self.split_up(problem):
            with part.named():
                own = part.rule.aux(Held(problem, part.names, values), key.fold(part.prefix))
            found.update(part.stored(own))
        return found

    def init(self, problem: Problem, params: Tree, key: Key) -> Tree:
        found: Tree = {}
        for part in self.split_up(problem):
            with part.named():
                own = part.rule.init(Held(problem, part.names, of_problem(problem, params)), part.trained(params), key.fold(part.prefix))
            found.update(part.stored(own))
        return found

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        with torch.no_grad():
            values = of_problem(problem, self.bake(problem, params, state))
        parts, found = self.split_up(problem), []
        for part in parts:
            own = part.trained(params)
            view = Held(problem, part.names, {**values, **{name: own[name] for name in part.names}})
            with part.named():
                estimate = self.look(part, view, own, part.mine(state), batch, key, world)
            refuse_unreached(part, view, estimate)
            found.append(estimate)
        lead = min(range(len(parts)), key=lambda number: WEAKER.index(parts[number].rule.bias))
        following = {name: value for part, estimate in zip(parts, found, strict=True) for name, value in part.stored(estimate.state).items()}
        return Estimate(found[lead].loss, Merged(parts, found).plain(), following, told(parts, found), found[lead].buffers)

    def look(self, part: Part, view: Problem, own: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        """One part's estimate; where another part divides a population among ranks, one that divides data takes its share of the batch here."""
        if world.size == 1 or part.rule.split is self.split:
            return part.rule.estimate(view, own, state, batch, key, world)
        pieces = [piece for piece, _ in cut(batch, world.size, view.batch_size_of(batch))]
        piece = pieces[world.rank] if len(pieces) == world.size else batch  # fewer examples than ranks: all look at all of them
        found = part.rule.estimate(view, own, state, piece, key, world)
        return over_ranks(part.rule, found._replace(grads=dict(found.grads)), world, view.batch_size_of(piece))

    def predict(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> Any:
        return problem.forward(self.bake(problem, params, state), inputs, problem.buffers())

    def bake(self, problem: Problem, params: Tree, state: Tree) -> Tree:
        """The parameters with which the model alone computes what the parts have made of it."""
        found = dict(params)
        for part in self.split_up(problem):
            if type(part.rule).bake is not Engine.bake:
                view = Held(problem, part.names, of_problem(problem, params))
                made = part.rule.bake(view, part.trained(params), part.mine(state))
                found.update({part.outside(name): value for name, value in made.items()})
        return found


def of_problem(problem: Problem, params: Tree) -> Tree:
    """The problem's own parameters among all that is trained."""
    return {name: params[name] for name in problem.params()}


def refuse_unreached(part: Part, view: Problem, estimate: Estimate) -> None:
    """At a share's first look: an error where a rule that follows derivatives found none, a warning where all of them are zero."""
    if not part.rule.needs & DERIVATIVES or "derivatives arrive" in view.facts:
        return
    grads = [estimate.grads[name] for name in estimate.grads]
    if not grads:
        raise CapabilityError(f"{part.unreached()}.")
    view.facts["derivatives arrive"] = True
    if not any(bool(grad.any()) for grad in grads):
        warnings.warn(f"{part.unreached()}: at the first look all of its derivatives are zero.", stacklevel=2)


def told(parts: list[Part], found: list[Estimate]) -> dict[str, Tensor]:
    """The passes of all parts; of each part its other metrics, as sigma@head, those of the rest under their own names."""
    metrics: dict[str, Tensor] = {}
    for name in SUMMED:
        counts = [estimate.metrics[name] for estimate in found if name in estimate.metrics]
        if counts:
            metrics[name] = sum(counts[1:], counts[0])
    for part, estimate in zip(parts, found, strict=True):
        suffix = "" if part.label == REST else f"@{part.label}"
        metrics.update({name + suffix: value for name, value in estimate.metrics.items() if name not in SUMMED})
    return metrics


class Merged(Mapping[str, Tensor]):
    """The gradients of all parts, one tensor at a time where a part makes them so."""

    def __init__(self, parts: list[Part], found: list[Estimate]):
        self.places = {part.outside(name): (estimate.grads, name) for part, estimate in zip(parts, found, strict=True) for name in estimate.grads}
        self.lazy = any(not isinstance(estimate.grads, dict) for estimate in found)

    def plain(self) -> Mapping[str, Tensor]:
        """A dict where every part gave one."""
        return self if self.lazy else dict(self)

    def __getitem__(self, name: str) -> Tensor:
        grads, own = self.places[name]
        return grads[own]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
