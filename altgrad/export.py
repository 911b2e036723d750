"""A trained model as a plain nn.Module, with copies of its tensors, and as a file of torch.export. How the blocks and heads of local rules are joined
into one is in local/joining.py.
"""

import copy
import inspect
import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from altgrad.engine import Engine, Tree
from altgrad.errors import CapabilityError, SettingError
from altgrad.problem import Problem


def reading(engine: Engine, readout: str | None) -> Engine:
    """`engine` with another read-out; itself for None.

    Raises:
        SettingError: it has one read-out only, or none of that name.
    """
    if readout is None:
        return engine
    if "readout" not in engine.settings():
        raise SettingError(f"readout={readout!r} is not allowed: engine {engine.name} has one read-out, the model's own outputs; leave it out.")
    return replace(engine, readout=readout)  # type: ignore[call-arg]


def captured(module: nn.Module, inputs: Any, *, batch: int | None = None) -> bytes:
    """The file that torch.export.load reads: `module` as a graph with its tensors, for any number of examples, or for `batch` of them alone.

    Args:
        module: what `engine.export` gives.
        inputs: a few examples: a tensor or a tuple of them, whose first axes count examples.
        batch: the only number of examples that it shall take; for modules that torch.export cannot capture otherwise.

    Raises:
        CapabilityError: torch.export cannot follow the module.
    """
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    rows = batch or max(2, len(given[0]))  # a size of 1 would be taken for a constant
    given = tuple(leaf[:1].expand(rows, *leaf.shape[1:]).contiguous() for leaf in given)
    axes: Any = tuple({0: torch.export.Dim("batch", min=1)} for _ in given)
    if any(entry.kind is inspect.Parameter.VAR_POSITIONAL for entry in inspect.signature(module.forward).parameters.values()):
        axes = (axes,)
    file = io.BytesIO()
    try:
        program = torch.export.export(module, given, dynamic_shapes=None if batch else axes)
        torch.export.save(program, file)
    except Exception as error:  # whatever torch.export meets in somebody's model
        advice = "Give batch (--batch N), the number of examples it shall take." if batch is None else "Use another read-out, or readout='own'."
        raise CapabilityError(f"torch.export cannot follow this module ({type(error).__name__}: {str(error).strip().splitlines()[0]}). {advice}") from error
    return file.getvalue()


def whole(problem: Problem, params: Tree) -> nn.Module:
    """A copy of the problem's model with `params`, in evaluation mode.

    Raises:
        CapabilityError: the problem has no model.
    """
    model = getattr(problem, "model", None)
    if not isinstance(model, nn.Module):
        raise CapabilityError(f"{type(problem).__name__} has no model to export; its parameters are {', '.join(problem.params())}.")
    found = copy.deepcopy(model).eval()
    loaded(found, {name: name for name in params}, params)
    return found


def loaded(module: nn.Module, names: Mapping[str, str], params: Tree) -> None:
    """Copy values into a module: its own name of a tensor -> the one in `params`."""
    own: dict[str, Tensor] = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    with torch.no_grad():
        for label, name in names.items():
            if name in params and label in own:
                own[label].copy_(params[name])


__all__ = ["captured", "loaded", "reading", "whole"]
