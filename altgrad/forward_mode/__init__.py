"""Forward mode with many tangents: one primal shared by K directions, on unmodified models, with no reverse graph.

`Dual` is a tensor that carries its K tangents; parameters are handed to the model as Duals. Each torch function a Dual meets climbs
down a ladder: a rule of ours (rules.py, layers.py) → PyTorch's own forward formula (vmap of jvp) → a decomposition
(decompositions.py) → a central difference of that function (ladder.py). What is not native is counted on the `Trace`.
"""

from altgrad.forward_mode import attention, decompositions, layers, losses, recurrent, rules
from altgrad.forward_mode.custom import following_custom_functions
from altgrad.forward_mode.dual import Dual, Trace, apply, primal_of, tangent_of

__all__ = [
    "Dual",
    "Trace",
    "apply",
    "attention",
    "decompositions",
    "following_custom_functions",
    "layers",
    "losses",
    "primal_of",
    "recurrent",
    "rules",
    "tangent_of",
]
