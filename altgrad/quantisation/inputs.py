"""The quantised input of a layer: a submodule of the layer, called by a forward pre-hook, so that models are run as they are.

Hooks are functions of this module, found again by what they are: a deep copy of a model has its own quantisers, and removal needs no handles.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from altgrad.errors import CapabilityError
from altgrad.quantisation.layers import INPUT, axes_of, quantised
from altgrad.quantisation.quantisers import Learned, of_input
from altgrad.quantisation.specs import Spec
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers
from altgrad.surrogates.modules import SignActivation

SPEC = "spec"


def quantise_input(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook."""
    part = getattr(layer, INPUT)
    if inputs:
        return (part(inputs[0]), *inputs[1:]), named
    first = next(iter(named))
    return inputs, {**named, first: part(named[first])}


def pass_over(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    """A forward hook: what went in comes out."""
    return inputs[0] if inputs else next(iter(named.values()))


def put(layer: nn.Module, spec: Spec) -> None:
    """Quantise what the layer is given."""
    like = next(iter(layer.parameters()))
    part = of_input(spec, axes=axes_of(layer), like=like.detach())
    part.spec = str(spec)  # type: ignore[assignment]
    layer.add_module(INPUT, part)
    layer.register_forward_pre_hook(quantise_input, with_kwargs=True)


def silence(module: nn.Module) -> None:
    """Make a module hand on what it is given."""
    if getattr(module, "inplace", False):  # it would have changed what is handed on
        module.inplace, module.was_inplace = False, True  # type: ignore[assignment]
    module.register_forward_hook(pass_over, with_kwargs=True)


def is_silent(module: nn.Module) -> bool:
    """Whether `silence` was called on it."""
    return pass_over in module._forward_hooks.values()


def take_off(layer: nn.Module) -> None:
    """Undo `put`."""
    delattr(layer, INPUT)
    unhook(layer._forward_pre_hooks, layer._forward_pre_hooks_with_kwargs, quantise_input)


def wake(module: nn.Module) -> None:
    """Undo `silence`."""
    unhook(module._forward_hooks, module._forward_hooks_with_kwargs, pass_over)
    if getattr(module, "was_inplace", False):
        module.inplace = True  # type: ignore[assignment]
        del module.was_inplace


def unhook(hooks: Any, with_kwargs: Any, hook: Any) -> None:
    """Take a hook out of a module's."""
    for number in [number for number, other in hooks.items() if other is hook]:
        del hooks[number], with_kwargs[number]


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Any) -> None:
    """Run the model once, in its present mode: learned steps of inputs are set from what arrives there, and inputs that would not be quantised are refused.

    The model's buffers stay as they are.

    Args:
        inputs: some examples: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        CapabilityError: the sign is taken of numbers none of which is negative, so that it is +1 whatever they are; or a layer is not called.
    """
    size = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0] if isinstance(inputs, tuple) else inputs)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with watching(model) as unseen, AddressedSamplers(Key(0).fold("calibrate"), examples=size):
        if isinstance(inputs, dict):
            torch.func.functional_call(model, buffers, (), inputs)
        else:
            torch.func.functional_call(model, buffers, inputs if isinstance(inputs, tuple) else (inputs,))
    if unseen:
        names = ", ".join(repr(name) for name in sorted(unseen))
        raise CapabilityError(
            f"{names}: not called on the example, so the input would stay as it is. Where another module reads the weight (nn.MultiheadAttention that of its "
            f"out_proj), leave the layer out: exempt='first-last,{','.join(sorted(unseen))}'; otherwise hand in an example that reaches it."
        )


@contextmanager
def watching(model: nn.Module) -> Iterator[set[str]]:
    """`look` at the inputs of every quantised layer, before they are quantised; gives the names of layers that none came to."""
    parts = {name: getattr(layer, INPUT) for name, layer in quantised(model).items() if hasattr(layer, INPUT)}
    unseen, handles = set(parts), []
    for name, part in parts.items():

        def see(part: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
            unseen.discard(name)
            look(name, part, given[0])

        handles.append(part.register_forward_pre_hook(see))
    try:
        yield unseen
    finally:
        for handle in handles:
            handle.remove()


def look(name: str, part: nn.Module, x: Tensor) -> None:
    """Set a learned step; refuse a sign that is always +1."""
    if isinstance(part, Learned):
        part.calibrate(x)
    elif isinstance(part, SignActivation) and part.estimator.operation == "sign" and x.numel() and bool((x >= 0).all()):
        raise CapabilityError(
            f"the input of layer {name!r} is never negative, so its sign is +1 whatever it is. Modules such as nn.ReLU in front of it are passed over; write "
            "the activation as such a module, or leave this layer out (exempt), or take activations='uniform' or 'ternary'."
        )


__all__ = ["calibrate", "is_silent", "pass_over", "put", "quantise_input", "silence", "take_off", "wake"]
