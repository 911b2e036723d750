"""The command line's small models: plain nn.Modules whose first weights are addressed noise, never drawn from the global generator."""

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from altgrad import registry, rng
from altgrad.binary import BinaryMLP
from altgrad.errors import SettingError, UsageError, near_miss
from altgrad.implicit.networks import ConvergentGraph, DeepEquilibrium
from altgrad.networks import CNN, GRU, LSTM, MLP, Positions, ResNet, Transformer, Window
from altgrad.rng import Key
from altgrad.spiking import Spiking

TABLE: dict[str, Any] = {
    "mlp": MLP,
    "cnn": CNN,
    "resnet": ResNet,
    "gru": GRU,
    "lstm": LSTM,
    "transformer": Transformer,
    "window": Window,
    "spiking": Spiking,
    "binary-mlp": BinaryMLP,
    "deq": DeepEquilibrium,
    "graph-solver": ConvergentGraph,
}

OPEN = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def build(name: str, settings: Mapping[str, Any] | None = None, *, input_shape: Iterable[int] | None, classes: int, key: Key) -> nn.Module:
    """The model `name` with `settings`, its first weights a function of `key`.

    Args:
        name: one of TABLE, or "package.module:callable". A callable is given input_shape and classes if it takes them, and `settings`;
            an nn.Module is taken as it is.
        settings: values, or strings to be parsed.
        input_shape: of one example, without the batch axis; None where it is not known, for a callable that does not take it.
        classes: number of outputs.
        key: the address of the first weights.

    Raises:
        UsageError: no such model, a callable that gives no nn.Module or takes what nobody gives it, or an input that the model cannot read.
        SettingError: no such setting, or out of its range.
    """
    shape, settings = None if input_shape is None else tuple(int(length) for length in input_shape), settings or {}
    if ":" in name:
        return foreign(name, settings, {"classes": classes} if shape is None else {"input_shape": shape, "classes": classes}, key)
    if name not in TABLE:
        raise UsageError(near_miss("model", name, TABLE) + " Or give package.module:callable.")
    if shape is None:
        raise UsageError(f"model {name} is made for an input's shape; give input_shape, for instance (1, 28, 28).")
    chosen = registry.build(TABLE[name], settings, f"model {name}")
    with torch.random.fork_rng(devices=[]):  # PyTorch's constructors draw from the global generator: what they draw is overwritten
        model = chosen.build(shape, classes)
    initialise(model, key)
    return model


def foreign(name: str, settings: Mapping[str, Any], offered: Mapping[str, Any], key: Key) -> nn.Module:
    """The user's own model: called with what it takes of `offered`, the generator seeded from `key` and put back afterwards."""
    found = registry.locate(name, "model")
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UsageError(f"model {name!r} is a {type(found).__name__}; it must be an nn.Module or a callable that returns one.")
    try:
        taken = inspect.signature(found).parameters
    except (TypeError, ValueError):  # builtins have no signature
        taken = {}  # type: ignore[assignment]
    for label in settings:
        if label not in taken:
            raise SettingError(f"model {name}: " + near_miss("setting", label, set(taken) - set(offered)))
    for label, parameter in taken.items():
        needed = parameter.default is parameter.empty and parameter.kind not in OPEN
        if needed and label not in settings and label not in offered:
            remedy = "--input-shape, for instance 1,28,28" if label == "input_shape" else f"it a default, or --model-setting {label}=VALUE"
            raise UsageError(f"model {name!r} takes {label!r}, which has no value; give {remedy}.")
    values = {label: number(value) if isinstance(value, str) else value for label, value in settings.items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key.fold("model").seed)
        model = found(**{label: value for label, value in offered.items() if label in taken} | values)
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {name!r} returned a {type(model).__name__}; it must return an nn.Module.")
    return model


def number(text: str) -> Any:
    """`text` as an int or a float where it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@torch.no_grad()
def initialise(model: nn.Module, key: Key) -> None:
    r"""Overwrite every parameter with addressed noise under PyTorch's default laws.

    Linear and convolution: uniform on ±1/√fan_in, weight and bias. GRU and LSTM: uniform on ±1/√hidden. Embedding (normal in PyTorch) and
    Positions: uniform with standard deviation 1 and 0.02. Norms: 1 and 0. Each parameter's stream is named by the parameter, so a layer added
    leaves the others' values alone.
    """
    for prefix, module in model.named_modules():
        bound = init_bound(module)
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if bound is not None:
                unit = rng.uniform(key.fold("model"), rng.tensor_id(name), [0], parameter.numel())  # [1, elements] in (0, 1)
                parameter.copy_(torch.from_numpy(unit).view(parameter.shape).mul_(2 * bound).sub_(bound))


def init_bound(module: nn.Module) -> float | None:
    """The half width of the uniform law of a module's own parameters; None where they start from constants."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        return 1 / math.sqrt(module.weight[0].numel())
    if isinstance(module, ParametrizationList):  # the trained tensor of a weight that is made of it
        return 1 / math.sqrt(module.original[0].numel())
    if isinstance(module, nn.RNNBase):
        return 1 / math.sqrt(module.hidden_size)
    if isinstance(module, nn.Embedding):
        return math.sqrt(3)
    return 0.02 * math.sqrt(3) if isinstance(module, Positions) else None


def listing() -> list[dict[str, Any]]:
    """name, description and settings of every model."""
    return [{"name": name, "description": inspect.getdoc(cls), "settings": registry.describe_settings(cls)} for name, cls in TABLE.items()]
