"""The claim about engines whose estimate is a move: SGD with lr=1, nothing else, takes the loss down."""

import warnings

import torch

from altgrad.conformance import probes
from altgrad.conformance.claim import KEY, Subject, claim, hold
from altgrad.engine import Bias

STEPS = 80
FALLEN = 0.1  # of the first loss; a hundredth of every move, or the move turned round, does not get there


@claim(applies=lambda engine: engine.bias is Bias.DISPLACEMENT)
def whole_moves_lower_a_quadratic_loss(subject: Subject) -> None:
    bench = subject.bench(probes.quadratic(torch.float64))
    bench.params = {name: value.detach().clone() for name, value in bench.params.items()}
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(STEPS):
            found = bench.estimate(KEY.fold("moves").at(step))
            losses.append(float(found.loss))
            bench.state = found.state
            bench.params = {name: value - found.grads[name] if name in found.grads else value for name, value in bench.params.items()}
    hold(
        losses[-1] <= FALLEN * losses[0],
        f"{STEPS} moves, each made whole, took a quadratic's loss from {losses[0]:.3g} to {losses[-1]:.3g}; at most {FALLEN * losses[0]:.3g} is expected. "
        "The parameters minus the estimate must be where the rule wants them.",
    )
