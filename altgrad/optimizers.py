"""Optimizers by name: torch.optim first, then the package pytorch_optimizer; those that no given gradient can feed are refused with the reason."""

import ast
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from altgrad.engine import Tree
from altgrad.errors import SettingError, UsageError, near_miss, require

GRAPH = "it differentiates the gradient again through the autograd graph, and an altgrad gradient has none"
REFUSED = {
    "AdaHessian": GRAPH,
    "SophiaH": GRAPH,
    "LOMO": "it updates inside the backward pass of the model, and there is none",
    "AdaLOMO": "it updates inside the backward pass of the model, and there is none",
    "SparseAdam": "it takes sparse gradients only, and an altgrad gradient is dense",
    "DeMo": "it sends its own gradients between processes, which altgrad's ranks do themselves",
    "DistributedMuon": "it sends its own gradients between processes, which altgrad's ranks do themselves",
}
SPLIT_BY_SHAPE = {"AdaGO", "AdaMuon", "MuonClip", "NorMuon"}  # pytorch_optimizer's: matrices go to the rule, the rest to its Adam
CLOSURE = {"AliG"}  # asks for a closure at its first step, though the signature of `step` says it is optional


def table() -> dict[str, type[torch.optim.Optimizer]]:
    """name -> class of every optimizer that is installed; torch.optim's wins where both have one."""
    found = dict(classes(torch.optim))
    for name, cls in classes(extra_package()).items():
        found.setdefault(name, cls)
    return found


def names() -> list[str]:
    """Every optimizer that `build` takes."""
    return sorted(name for name, cls in table().items() if refusal(name, cls) is None)


def find(name: str) -> type[torch.optim.Optimizer]:
    """The class behind `name` (upper and lower case, "-" and "_" do not matter).

    Raises:
        UsageError: no such optimizer (the nearest is suggested), or one that altgrad gradients cannot feed (the reason is given).
    """
    known: dict[str, type[torch.optim.Optimizer]] = classes(torch.optim)
    if plain(name) not in {plain(candidate) for candidate in [*REFUSED, *known]}:
        known = table()  # slow: it imports the other package
    spelled = {plain(candidate): candidate for candidate in [*REFUSED, *known]}
    match = spelled.get(plain(name))
    reason = None if match is None else refusal(match, known.get(match))
    if reason:
        raise UsageError(f"optimizer {match} cannot be used: {reason}. Use one of: {', '.join(usable(known))}.")
    if match is None:
        more = "" if extra_package() else " Over a hundred more come with: pip install 'altgrad[optim]'."
        raise UsageError(near_miss("optimizer", name, usable(known)) + more)
    return known[match]


def build(name: str, params: Tree, *, lr: float | None = None, settings: Mapping[str, Any] | None = None) -> torch.optim.Optimizer:
    """The optimizer `name` over `params`, in their order.

    Args:
        params: leaf tensors by name.
        lr: learning rate, 0 or more; None leaves the optimizer's own default.
        settings: keyword arguments of its constructor; strings are parsed ("(0.9, 0.99)", "true", "1e-8").

    Raises:
        UsageError: unknown or refused name. SettingError: unknown setting, missing setting, or a value the optimizer refuses.
    """
    cls = find(name)
    require(lr is None or lr >= 0, "lr", lr, "0 or more")
    values = {key.replace("-", "_"): literal(value) for key, value in (settings or {}).items()}
    if lr is not None:
        values["lr"] = lr
    accepted = {key: parameter for key, parameter in list(signature(cls).items())[1:] if parameter.kind is not parameter.VAR_KEYWORD}
    for key in values:
        if key not in accepted:
            raise SettingError(f"optimizer {cls.__name__}: " + near_miss("setting", key, accepted))
    missing = [key for key, parameter in accepted.items() if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL]
    if lacking := [key for key in missing if key not in values]:
        raise SettingError(f"optimizer {cls.__name__} has no default for {', '.join(lacking)}; give it, for instance {lacking[0]}=1.")
    try:
        return cls(grouped(cls, params), **values)
    except (ValueError, TypeError, AttributeError) as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in values.items()) or "its defaults"
        raise SettingError(f"optimizer {cls.__name__} refuses {shown} for these parameters: {error}") from error


def wants_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step evaluates the loss itself, several times perhaps (LBFGS)."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    required = closure is not None and closure.default is closure.empty
    return required or type(optimizer).__name__ in CLOSURE


def grouped(cls: type, params: Tree) -> list[Any]:
    """The parameters as `cls` takes them: a list, or matrices and the rest apart."""
    if cls.__name__ not in SPLIT_BY_SHAPE:
        return list(params.values())
    matrices = [tensor for tensor in params.values() if tensor.ndim >= 2]
    others = [tensor for tensor in params.values() if tensor.ndim < 2]
    return [{"params": part, "use_muon": flag} for part, flag in ((matrices, True), (others, False)) if part]


def refusal(name: str, cls: type | None) -> str | None:
    """Why the optimizer cannot be used, or None."""
    if name in REFUSED:
        return REFUSED[name]
    parameters = signature(cls) if cls else {}
    wrapped = {"optimizer", "base_optimizer", "model"} & {key for key, p in parameters.items() if p.default is p.empty}
    if wrapped or next(iter(parameters), "params") != "params":
        return f"its constructor wants {' and '.join(sorted(wrapped)) or 'something other than parameters'}, which a name cannot carry"
    return None


def usable(known: Mapping[str, type]) -> list[str]:
    """The names that are not refused."""
    return sorted(name for name, cls in known.items() if refusal(name, cls) is None)


def signature(cls: type) -> Mapping[str, inspect.Parameter]:
    """The constructor's parameters; torch wraps constructors in ways that keep it."""
    return inspect.signature(cls).parameters


def classes(module: Any) -> dict[str, type[torch.optim.Optimizer]]:
    """The public optimizer classes of `module` (None has none)."""
    base = torch.optim.Optimizer
    found = {name: cls for name, cls in vars(module).items() if isinstance(cls, type)} if module else {}
    return {name: cls for name, cls in found.items() if issubclass(cls, base) and cls is not base and not name.startswith("_") and name != "BaseOptimizer"}


def extra_package() -> Any:
    """pytorch_optimizer, or None where it is not installed."""
    try:
        return importlib.import_module("pytorch_optimizer")
    except ModuleNotFoundError:
        return None


def plain(name: str) -> str:
    """`name` without case and separators."""
    return name.lower().replace("-", "").replace("_", "")


def literal(value: Any) -> Any:
    """A string as the Python value it spells, if it spells one."""
    if not isinstance(value, str):
        return value
    if value.lower() in {"true", "false", "none"}:
        return {"true": True, "false": False, "none": None}[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
