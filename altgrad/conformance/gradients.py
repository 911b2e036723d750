r"""Claims about bias: how an estimate stands to backprop's gradient, on every probe.

EXACT     ‖ĝ - g‖ ≤ rounding.
UNBIASED  |mean ĝ - g| ≤ 4 standard errors along g, and √(16 + 2 ln n) for the worst of n parameters or elements.
GUIDED    0 < mean ⟨ĝ, g⟩ ≤ ‖g‖² up to 4 standard errors; SMOOTHED and LIMIT: the first half.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from altgrad.conformance.claim import KEY, Bench, Subject, claim, hold
from altgrad.conformance.probes import GRADIENT_PROBES, parallel
from altgrad.engine import Bias, Engine
from altgrad.problem import Problem

KEYS = 48  # estimates a statistical claim looks at; all from fixed addresses
ROUNDING = 1e-9  # relative, in float64
ERRORS = 4.0  # standard errors


def samples(bench: Bench, like: dict[str, Tensor], count: int = KEYS) -> Tensor:
    """Estimates at consecutive steps, [count, d]."""
    return torch.stack([bench.flat(dict(bench.estimate(KEY.fold("samples").at(step)).grads), like) for step in range(count)])


def hold_mean(drawn: Tensor, target: Tensor, label: str, sizes: list[int] | None = None) -> None:
    """The mean of `drawn` [n, d] is `target` [d] up to standard errors: along the target, along each part of it (`sizes`), element by element."""
    hold(bool(torch.isfinite(drawn).all()), f"{label}: an estimate is not finite.")
    count, size = drawn.shape
    parts = list(zip(drawn.split(sizes or [size], 1), target.split(sizes or [size]), strict=True))
    for number, (part, goal) in enumerate([(drawn, target), *parts] if sizes else parts):
        if not bool(goal.any()):
            continue
        along = part @ goal / goal.square().sum()  # 1 on average
        off, error = float(along.mean()) - 1, float(along.std()) / math.sqrt(count)
        limit = (ERRORS if number == 0 else chance(len(parts))) * error + 1e-6
        where = "the gradient" if number == 0 else f"parameter {number - 1}'s gradient"
        hold(abs(off) <= limit, f"{label}: along {where} the mean estimate is {1 + off:.3f} times it; {limit:.3f} more or less is chance.")
    distance = (drawn.mean(0) - target).abs()
    limits = chance(size) * drawn.std(0) / math.sqrt(count) + 1e-6 * target.norm() / math.sqrt(size)
    worst = int((distance - limits).argmax())
    hold(
        bool(distance[worst] <= limits[worst]),
        f"{label}: element {worst} of the mean estimate is {float(distance[worst]):.3g} off; up to {float(limits[worst]):.3g} is chance.",
    )


def chance(tests: int) -> float:
    """√(16 + 2 ln n) standard errors: the worst of n tests exceeds them about as seldom as one test exceeds 4."""
    return math.sqrt(ERRORS**2 + 2 * math.log(tests))


def exact_on(build: Callable[[torch.dtype], Problem]) -> Callable[[Subject], None]:
    def check(subject: Subject) -> None:
        bench = subject.bench(build(torch.float64))
        exact, found = bench.exact(), bench.estimate().grads
        for name, grad in exact.items():
            hold(name in found, f"{name} got no gradient, though the loss depends on it.")
            distance = float((found[name] - grad).norm() / grad.norm().clamp_min(1e-30))
            hold(distance <= ROUNDING, f"the gradient of {name} is {distance:.2g} away from autograd's, relative; {ROUNDING} is rounding.")

    return check


def unbiased_on(build: Callable[[torch.dtype], Problem]) -> Callable[[Subject], None]:
    def check(subject: Subject) -> None:
        bench = subject.bench(build(torch.float64)).warm()
        exact = bench.exact()
        hold_mean(samples(bench, exact), bench.flat(exact, exact), f"{KEYS} keys", [value.numel() for value in exact.values()])

    return check


def not_reversed_on(build: Callable[[torch.dtype], Problem]) -> Callable[[Subject], None]:
    def check(subject: Subject) -> None:
        bench = subject.bench(build(torch.float64)).warm()
        exact = bench.exact()
        target = bench.flat(exact, exact)
        along = samples(bench, exact, KEYS // 4) @ target / target.square().sum()
        mean, error = float(along.mean()), float(along.std()) / math.sqrt(len(along))
        hold(mean > 0, f"along the gradient the mean estimate is {mean:.3f} times it; it must not be reversed.")
        if subject.engine.bias is Bias.GUIDED:
            hold(mean <= 1 + ERRORS * error + 1e-6, f"along the gradient the mean estimate is {mean:.3f} ± {error:.3f} times it; a projection shrinks.")

    return check


def unscaled(engine: Engine) -> bool:
    """Whether a smoothed engine's estimate is in units of the gradient: weights made from losses by rank or deviation are not."""
    rules = [rule for _, rule in engine.rules()] if hasattr(engine, "rules") else [getattr(engine, "rule", engine)]  # the engines inside a wrapper
    return engine.bias is Bias.SMOOTHED and all(rule.settings().get("shaping", "raw") == "raw" for rule in rules)


@claim(applies=unscaled)
def is_unbiased_for_the_smoothed_loss(subject: Subject) -> None:
    """On a quadratic loss, whose smoothed gradient is its gradient; its two layers have one gradient, so that noise they share would show."""
    bench = subject.bench(parallel(torch.float64)).warm()
    exact = bench.exact()
    hold_mean(samples(bench, exact), bench.flat(exact, exact), f"{KEYS} keys", [value.numel() for value in exact.values()])


for probe, factory in GRADIENT_PROBES.items():
    claim(name=f"is_exact_on_{probe}", applies=lambda engine: engine.bias is Bias.EXACT)(exact_on(factory))
    claim(name=f"is_unbiased_on_{probe}", applies=lambda engine: engine.bias is Bias.UNBIASED)(unbiased_on(factory))
    claim(name=f"is_not_reversed_on_{probe}", applies=lambda engine: engine.bias in {Bias.GUIDED, Bias.SMOOTHED, Bias.LIMIT})(not_reversed_on(factory))
