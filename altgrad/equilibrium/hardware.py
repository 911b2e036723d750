r"""What a device does to a net: weights that are off by a fixed share, and states that are noisy.

    weights    θ (1 + mismatch · δ),   δ ~ N(0, 1), each weight's own and fixed: the same in the free and in the nudged phases, and when predicting
    states     s ← update(s) + noise · ε,   ε ~ N(0, 1), anew after every sweep

The rule does not know δ: what it finds is the gradient with respect to the weights that the device has.
"""

import torch
from torch import Tensor

from altgrad.engine import Tree
from altgrad.equilibrium.homeostasis import probes
from altgrad.equilibrium.relaxation import Disturb, State
from altgrad.kernels import noise
from altgrad.problem import Batch
from altgrad.rng import Key, tensor_id


def mismatched(params: Tree, mismatch: float, device: int) -> Tree:
    """The weights that the device has; tensors of fewer than two axes (biases) are as they are.

    Args:
        mismatch: standard deviation of the share by which a weight is off, >= 0.
        device: which device: addresses δ.
    """
    key = Key(device).fold("mismatch")

    def off(name: str, value: Tensor) -> Tensor:
        return value * (1 + mismatch * noise.draw("normal", key, tensor_id(name), [0], value.shape, dtype=value.dtype, device=value.device)[0])

    return {name: off(name, value) if mismatch and value.ndim >= 2 else value for name, value in params.items()}


def disturbed(deviation: float, key: Key, label: str, batch: Batch) -> Disturb | None:
    """The noise of one relaxation, an example's own at every sweep, whichever rank draws it; none at deviation 0.

    Args:
        deviation: standard deviation, of the real and of the imaginary part, >= 0.
        label: the relaxation's name.
    """
    if not deviation:
        return None

    def disturb(sweep: int, state: State) -> State:
        drawn = [probes(state, key.fold("noise", label, sweep, part), batch) for part in ("real", "imaginary")[: 1 + state[0].is_complex()]]
        noises = [torch.complex(*pair) for pair in zip(*drawn, strict=True)] if len(drawn) == 2 else drawn[0]
        return tuple(leaf + deviation * own for leaf, own in zip(state, noises, strict=True))

    return disturb


__all__ = ["disturbed", "mismatched"]
