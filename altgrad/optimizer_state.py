"""An optimizer's state without pickle: any nest of Python values and tensors as tensors plus JSON, and back exactly."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad.engine import Tree
from altgrad.errors import AltgradError, CheckpointError

PLAIN = (bool, int, float, str, type(None))


def pack(value: Any, *, prefix: str = "") -> tuple[Tree, Any]:
    """`value` as (tensors by name, JSON).

    In the JSON a tensor is {"tensor": name}, a tuple {"tuple": [...]}, a dict {"dict": [[key, value], ...]} (so integer keys stay
    integers), a dtype {"dtype": "float32"}; lists, numbers, strings, booleans and None are themselves.

    Raises:
        AltgradError: a value of another kind, which only a pickle could hold.
    """
    tensors: Tree = {}

    def walk(item: Any, path: str) -> Any:
        if isinstance(item, Tensor):
            name = prefix + path
            while name in tensors:  # {"a": {"b": …}, "a.b": …}
                name += "'"
            tensors[name] = item.detach()
            return {"tensor": name}
        if type(item) in PLAIN:
            return item
        if isinstance(item, torch.dtype):
            return {"dtype": str(item).removeprefix("torch.")}
        if type(item) in (list, tuple):
            parts = [walk(part, f"{path}.{i}" if path else str(i)) for i, part in enumerate(item)]
            return parts if type(item) is list else {"tuple": parts}
        if isinstance(item, Mapping):
            return {"dict": [[walk(key, path), walk(part, f"{path}.{key}" if path else str(key))] for key, part in item.items()]}
        raise AltgradError(
            f"{path or 'the value'} is a {type(item).__name__}, which cannot be stored without pickle; allowed are tensors, numbers, "
            "strings, None, lists, tuples and dicts. Use another optimizer if it keeps such state."
        )

    return tensors, walk(value, "")


def unpack(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """The value that `pack` took apart."""
    if isinstance(skeleton, list):
        return [unpack(tensors, part) for part in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    kind, content = next(iter(skeleton.items()))
    if kind == "tensor":
        if content not in tensors:
            raise CheckpointError(f"the checkpoint lacks the tensor {content!r} that its own description names; resume from another checkpoint.")
        return tensors[content]
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "tuple":
        return tuple(unpack(tensors, part) for part in content)
    return {unpack(tensors, key): unpack(tensors, part) for key, part in content}


def restore(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Load `state_dict` exactly.

    Optimizer.load_state_dict casts floating-point state to its parameter's dtype, which rounds the float32 moments that some optimizers
    keep for bfloat16 parameters; the stored values are therefore put back afterwards, on the devices it chose.
    """
    optimizer.load_state_dict(state_dict)
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in zip(saved, own, strict=True):
        if index in state_dict["state"]:
            optimizer.state[parameter] = exact(state_dict["state"][index], optimizer.state[parameter])


def exact(value: Any, placed: Any) -> Any:
    """`value`, its tensors copied to the devices of their counterparts in `placed`."""
    if isinstance(value, Tensor):
        return value.detach().to(placed.device, copy=True)
    if isinstance(value, dict):
        return {key: exact(part, placed[key]) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(exact(part, other) for part, other in zip(value, placed, strict=True))
    return value
