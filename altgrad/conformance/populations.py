"""Claims about engines that evaluate a population: what ranks divide, chunks, and members that fail."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from altgrad.conformance import probes
from altgrad.conformance.claim import Bench, Subject, claim, hold, same_bits, same_tree
from altgrad.engine import Engine, Estimate, Split
from altgrad.world import World

DIFFERENCES = 1e-6  # relative, in float64: rounding of the losses, divided by the size of a step
ROUNDS = 100  # of meetings before ranks are taken to wait for each other


def over_a_population(engine: Engine) -> bool:
    return engine.split is Split.POPULATION


class Waiting(Exception):
    """Another rank has not sent its part yet."""


@dataclass(frozen=True)
class Meeting(World):
    """A rank whose fellows run one after the other in this process: what each sends is kept, and who came too early begins again."""

    sent: dict[int, list[Tensor]] = field(default_factory=dict)  # by rank, in the order of its calls; common to all
    calls: list[Tensor] = field(default_factory=list)  # of this attempt

    def gather(self, tensor: Tensor) -> list[Tensor]:
        number, own = len(self.calls), self.sent.setdefault(self.rank, [])
        self.calls.append(tensor)
        if number == len(own):
            own.append(tensor)
        if any(len(self.sent.get(rank, ())) <= number for rank in range(self.size)):
            raise Waiting
        return [self.sent[rank][number] for rank in range(self.size)]


def on_ranks(estimate: Callable[[World], Estimate], size: int) -> list[Estimate]:
    """What each of `size` ranks finds; estimates are pure, so that one may be begun again."""
    sent: dict[int, list[Tensor]] = {}
    for _ in range(ROUNDS):
        found = []
        for rank in range(size):
            try:
                found.append(estimate(Meeting(rank, size, sent)))
            except Waiting:
                continue
        if len(found) == size:
            return found
    hold(False, f"{size} ranks wait for each other; all must send the same things in the same order.")
    return []


def apart(bench: Bench, one: Estimate, other: Estimate) -> float:
    """The relative distance of two estimates' gradients."""
    first, second = (bench.flat(dict(found.grads), bench.params) for found in (one, other))
    return float((first - second).norm() / second.norm().clamp_min(1e-30))


@claim(applies=over_a_population)
def ranks_that_divide_the_population_find_the_same_bits(subject: Subject) -> None:
    bench = subject.bench(probes.network(torch.float64)).warm()
    alone = bench.estimate()
    for size in (2, 3):
        found = on_ranks(lambda world: bench.estimate(world=world), size)
        for rank, other in enumerate(found):
            same = same_bits(other.loss, found[0].loss) and same_tree(dict(other.grads), dict(found[0].grads)) and same_tree(other.state, found[0].state)
            hold(same, f"ranks 0 and {rank} of {size} have different losses, gradients or states; gather the losses, and compute alike from all of them.")
        distance = apart(bench, found[0], alone)
        hold(distance <= DIFFERENCES, f"{size} ranks are {distance:.2g} away from one process, relative; {DIFFERENCES} is rounding.")


@claim(applies=lambda engine: over_a_population(engine) and engine.settings().get("chunk") is not None)
def chunks_change_nothing_but_rounding(subject: Subject) -> None:
    parts = subject.bench(probes.network(torch.float64)).warm()
    whole = Bench(replace(subject.engine, chunk=None), parts.problem)  # type: ignore[call-arg]
    whole.state = parts.state
    distance = apart(parts, parts.estimate(), whole.estimate())
    hold(distance <= DIFFERENCES, f"with chunk={subject.engine.settings()['chunk']} the estimate is {distance:.2g} away from that of the whole, relative.")


@claim(applies=over_a_population)
def members_that_are_not_finite_are_survived(subject: Subject) -> None:
    plain = subject.bench(probes.network())
    highest = float(plain.problem.loss(plain.params, plain.batch, {}).detach()) * (1 + 1e-6)

    def breaks(outputs: Tensor, targets: Tensor) -> Tensor:
        value = F.cross_entropy(outputs, targets)
        return torch.where(value > highest, torch.nan, value)

    problem = probes.network()
    problem.loss_function = breaks
    found = subject.bench(problem).estimate()
    hold(bool(torch.isfinite(found.loss)), f"with some members NaN the loss is {float(found.loss)}; leave them out of it.")
    for name, grad in found.grads.items():
        hold(bool(torch.isfinite(grad).all()), f"with some members NaN the gradient of {name} is not finite; give them the worst rank.")
