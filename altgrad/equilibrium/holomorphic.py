r"""Whether blocks can be run on complex numbers, and are holomorphic: f(u + ih e) - f(u - ih e) = i (f(u + h e) - f(u - h e)) + O(h³)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from altgrad.blocks import Block
from altgrad.equilibrium.fields import INSTEAD
from altgrad.errors import CapabilityError
from altgrad.kernels import noise
from altgrad.problem import Problem
from altgrad.rng import Key, tensor_id
from altgrad.samplers import AddressedSamplers

SMOOTH = "Tanh or Sigmoid"
REPLACEMENTS: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish), SMOOTH),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d), "pooling by means, AvgPool"),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), "no norm"),
}
STEP = 1e-4  # of the difference, in float64: its error is O(h²) = 1e-8, the rounding 1e-12
DIFFERENCE = 1e-5  # relative: between the two and any function with a kink or an absolute value


def check_holomorphic(problem: Problem, blocks: Sequence[Block], who: str) -> None:
    """Refuse layers that complex nudges cannot pass; the first block, which sees inputs and no state, may be anything.

    Raises:
        CapabilityError: names the layer, and what may stand in its place.
    """
    model = getattr(problem, "model", None)
    names = {id(module): name for name, module in model.named_modules()} if isinstance(model, nn.Module) else {}
    for block in blocks[1:]:
        for name, module in block.module.named_modules():
            if type(module) in REPLACEMENTS:
                raise CapabilityError(
                    f"{who} nudges with complex numbers, and {type(module).__name__} ({names.get(id(module), name)!r}) is not holomorphic; "
                    f"use {REPLACEMENTS[type(module)]} there, or nudge='symmetric'."
                )
    try:
        carried = tree_map(lambda leaf: leaf[:2] if isinstance(leaf, Tensor) and leaf.ndim else leaf, problem.example())
    except CapabilityError:
        return  # shapes are not known yet: the first step will tell
    params, buffers = ({name: widest(value.detach()) for name, value in tree.items()} for tree in (problem.params(), problem.fresh_buffers()))
    with torch.no_grad(), AddressedSamplers(Key(0)):
        for position, block in enumerate(blocks):
            if position and not agrees(block, {name: params[name] for name in block.parameters}, carried, buffers):
                raise CapabilityError(f"{who} nudges with complex numbers, and block {block.name!r} is not holomorphic. {INSTEAD}")
            carried = block.apply(problem.params(), carried, problem.fresh_buffers())


def agrees(block: Block, params: dict[str, Tensor], carried: Tensor, buffers: dict[str, Tensor]) -> bool:
    """Whether the block's derivative along i is i times that along 1."""
    own = {name: widest(tensor.detach()) for name, tensor in [*block.module.named_parameters(), *block.module.named_buffers()] if tensor.is_floating_point()}
    frozen = {model: own[name] for name, model in block.names.items() if name in own and model not in params and model not in buffers}
    centre = widest(carried)
    along = noise.draw("normal", Key(0), tensor_id("holomorphic"), [0], carried.shape, dtype=torch.float64, device=carried.device)[0]

    def at(step: complex) -> Tensor:
        return block.apply({**params, **frozen}, centre + step * along, {name: value.clone() for name, value in buffers.items()})

    try:
        real, turned = at(STEP) - at(-STEP), at(1j * STEP) - at(-1j * STEP)
    except RuntimeError:
        return False
    return real.is_complex() and bool((turned - 1j * real).abs().max() <= DIFFERENCE * real.abs().max().clamp_min(1e-30))


def widest(value: Tensor) -> Tensor:
    return value.to(torch.complex128) if value.is_floating_point() else value


__all__ = ["check_holomorphic"]
