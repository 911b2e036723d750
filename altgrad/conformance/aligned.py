r"""Claims about engines that carry errors down through other matrices than the transposed weights.

The last layer's gradient is backprop's; feedback stays as it was drawn; and while the network learns, what the layers below are given turns
towards the gradient: cos(ĝ, g) over them, 0 on average at the start, is positive then, though the feedback never moves.
"""

import torch
from torch import Tensor

from altgrad.conformance import probes
from altgrad.conformance.claim import KEY, Subject, claim, hold, same_tree
from altgrad.conformance.contract import keeps_its_feedback
from altgrad.engine import Bias, Engine
from altgrad.rng import Key

ROUNDING = 1e-9  # relative, in float64
DRAWS = 4  # of feedback, which are averaged over
STEPS, RATE, LOOKS = 150, 0.5, range(100, 150, 5)  # plain SGD on the network of the probes; steps at whose cosine is looked
TURNED = 0.15  # the mean cosine there; random directions of the 39 numbers below the head have 0 ± 0.08
FALLEN = 0.5  # the share of the first loss that may be left


def aligned(engine: Engine) -> bool:
    return engine.bias is Bias.ALIGNED


@claim(applies=aligned)
def the_last_layers_gradient_is_backprops(subject: Subject) -> None:
    bench = subject.bench(probes.network(torch.float64))
    exact, found = bench.exact(), bench.estimate().grads
    for name in list(exact)[-2:]:
        hold(name in found, f"{name}, of the last layer, got no gradient.")
        distance = float((found[name] - exact[name]).norm() / exact[name].norm())
        hold(distance <= ROUNDING, f"the gradient of {name}, of the last layer, is {distance:.2g} away from autograd's, relative; no feedback is on its way.")


@claim(applies=keeps_its_feedback)
def feedback_stays_as_it_was_drawn(subject: Subject) -> None:
    bench = subject.bench(probes.network())
    first, later = (bench.estimate(KEY.at(step)).grads for step in (3, 400))
    hold(same_tree(dict(first), dict(later)), "one batch gave other gradients at a later step; feedback is drawn once, or nothing can align with it.")


@claim(applies=aligned)
def learning_turns_the_weights_towards_the_feedback(subject: Subject) -> None:
    bench = subject.bench(probes.network(torch.float64))
    start, shares, cosines = dict(bench.params), [], []
    for draw in range(DRAWS):
        bench.params = {name: value.detach().clone() for name, value in start.items()}
        losses = []
        for step in range(STEPS):
            found = bench.estimate(Key(KEY.seed + draw, step))
            losses.append(float(found.loss))
            if step in LOOKS:
                below = dict(list(bench.exact().items())[:-2])
                cosines.append(cosine(bench.flat(dict(found.grads), below), bench.flat(below, below)))
            for name, grad in found.grads.items():
                bench.params[name] = bench.params[name] - RATE * grad
        shares.append(losses[-1] / losses[0])
    left, turned = sum(shares) / DRAWS, sum(cosines) / len(cosines)
    hold(left <= FALLEN, f"{STEPS} steps left {left:.2f} of the loss; {FALLEN} of it at most was expected.")
    hold(turned >= TURNED, f"below the last layer the cosine with backprop's gradient is {turned:.2f} after {STEPS} steps; {TURNED} was expected.")


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()).clamp_min(1e-30))
