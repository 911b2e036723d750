"""Which layers of a model are quantised: those with a weight and an input of their own, without the first and the last unless told otherwise."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from altgrad.errors import CapabilityError, UsageError, near_miss
from altgrad.quantisation.quantisers import KINDS

LAYERS: dict[type[nn.Module], int] = {nn.Linear: 1, nn.Conv1d: 2, nn.Conv2d: 3, nn.Conv3d: 4}  # class -> trailing axes of one example's input
RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Softplus, nn.Sigmoid, nn.Hardsigmoid)  # whose output is never negative
PLACES = ("first-last", "first", "last", "none")
WEIGHT, INPUT = "weight", "input_quantiser"
Layers = dict[str, nn.Module]


def axes_of(layer: nn.Module) -> int:
    """How many trailing axes of its input are one example's (one token's, for a linear layer)."""
    return next(axes for kind, axes in LAYERS.items() if isinstance(layer, kind))


def named(model: nn.Module) -> Layers:
    """The layers that can be quantised, in the order in which the model registers them; "" is the model itself."""
    kinds: tuple[type[nn.Module], ...] = tuple(LAYERS)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def own_part(layer: nn.Module) -> nn.Module | None:
    """The quantiser of a layer's weight, if there is one."""
    chain = layer.parametrizations[WEIGHT] if parametrize.is_parametrized(layer, WEIGHT) else ()  # type: ignore[index]
    return next((part for part in chain if isinstance(part, KINDS)), None)


def quantised(model: nn.Module) -> Layers:
    """The layers that have a quantiser for weight or input."""
    return {name: layer for name, layer in named(model).items() if own_part(layer) is not None or hasattr(layer, INPUT)}


def selected(model: nn.Module, *, layers: str | Sequence[str] | None, exempt: str | Sequence[str]) -> Layers:
    """The layers to quantise.

    Args:
        layers: patterns of names, a sequence or text with commas: these layers and no others; None for all.
        exempt: "first-last", "first", "last", "none", patterns of names, or several of these.

    Raises:
        CapabilityError: none is left, or a named module has no weight that could be quantised. UsageError: a pattern that no module matches.
    """
    found, who = named(model), type(model).__name__
    if not found:
        kinds = ", ".join(kind.__name__ for kind in LAYERS)
        raise CapabilityError(f"{who} has no layer with a weight that can be quantised; there must be one of {kinds}.")
    chosen = found
    if layers is not None:
        chosen = {name: layer for name, layer in found.items() if any(fnmatchcase(name, pattern) for pattern in patterns("layers", layers))}
        for pattern in patterns("layers", layers):
            hold_to_names(model, "layers", pattern)
            if not any(fnmatchcase(name, pattern) for name in found):
                other = next(f"{name!r} is {type(module).__name__}" for name, module in model.named_modules() if fnmatchcase(name, pattern))
                raise CapabilityError(f"layers={pattern!r} is not allowed: {other}, which has no weight to quantise. Those that have: {', '.join(found)}.")
    order = list(found)
    spared = set()
    for pattern in patterns("exempt", exempt):
        if pattern in PLACES:
            spared |= {"first-last": {order[0], order[-1]}, "first": {order[0]}, "last": {order[-1]}, "none": set()}[pattern]
        else:
            hold_to_names(model, "exempt", pattern)
            spared |= {name for name in found if fnmatchcase(name, pattern)}
    left = {name: layer for name, layer in chosen.items() if name not in spared}
    if not left:
        raise CapabilityError(
            f"nothing of {who} is left to quantise: its layers are {', '.join(map(repr, found))}, and exempt={exempt!r} spares "
            f"{', '.join(repr(name) for name in chosen)}. Give exempt='none', or a deeper model."
        )
    return left


def rectifiers_before(model: nn.Module, layers: Layers) -> list[nn.Module]:
    """The rectifiers of which the next layer, in the order of registration, is one of `layers`."""
    members = set(map(id, layers.values()))
    found: list[nn.Module] = []
    waiting: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, RECTIFIERS):
            waiting.append(module)
        elif isinstance(module, tuple(LAYERS)):
            found += waiting if id(module) in members else []
            waiting = []
    return found


def patterns(setting: str, given: str | Sequence[str]) -> list[str]:
    """The patterns in a sequence, or in text with commas."""
    parts: Any = given.split(",") if isinstance(given, str) else given
    found = [part.strip() for part in parts if isinstance(part, str)]
    if not found or len(found) != len(parts) or not all(found):
        raise UsageError(f"{setting}={given!r} is not allowed; it must be one or more names of modules, or patterns of them such as 'body.*'.")
    return found


def hold_to_names(model: nn.Module, setting: str, pattern: str) -> None:
    """Refuse a pattern that no module of the model matches."""
    names = [name for name, _ in model.named_modules() if name]
    if not any(fnmatchcase(name, pattern) for name in names):
        raise UsageError(f"{setting}: " + near_miss("module", pattern, [*names, *(PLACES if setting == "exempt" else ())]))
