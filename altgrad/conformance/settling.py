"""Claims about engines on a net that settles: unrolled far enough, and solved, it has one gradient."""

import torch
import torch.nn.functional as F

from altgrad.conformance import probes
from altgrad.conformance.claim import Subject, claim
from altgrad.conformance.gradients import exact_on
from altgrad.engine import Bias
from altgrad.equilibrium.nets import GraphNet
from altgrad.equilibrium.settling import Settling
from altgrad.problem import Batch
from altgrad.rng import Key
from altgrad.world import World

SWEEPS = 120  # at gain ½ enough for rounding in float64


class SettlingProbe(Settling):
    """Eight units that act on one another, on one fixed batch, which ranks divide among themselves."""

    def batch(self, step: int, world: World) -> Batch:
        share = world.share(probes.EXAMPLES)
        inputs = probes.data("settling", 4).to(next(self.model.parameters()).dtype)
        targets = torch.arange(probes.EXAMPLES) % probes.CLASSES
        return Batch(inputs[share.start : share.stop], targets[share.start : share.stop], share.start)


def settling(dtype: torch.dtype = torch.float32) -> SettlingProbe:
    """tanh(W s + U x + b), ‖W‖ below 1."""
    net = GraphNet(4, 8, probes.CLASSES, key=Key(1), gain=0.5, sweeps=SWEEPS).to(dtype)
    return SettlingProbe(net, F.cross_entropy, name="settling probe", key=Key(1))


@claim(applies=lambda engine: engine.bias is Bias.EXACT)
def is_exact_on_a_net_that_settles(subject: Subject) -> None:
    """Against autograd through its sweeps."""
    exact_on(settling)(subject)
