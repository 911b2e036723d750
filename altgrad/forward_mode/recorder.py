"""Which function ran on which rung, in which module of a model."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from altgrad.forward_mode.dual import CONSTANT, RULES, Dual, Trace, label
from altgrad.samplers import SERVED

RUNGS = ("rule", "native", "decomposition", "difference")  # from the best to the last resort


class Recorder(TorchFunctionMode):
    """Counts (module, function, rung) for every function that tangents pass through; enter it after the samplers."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace
        self.stack: list[str] = [""]
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.failed: tuple[str, str] | None = None  # the module and function in which an error arose

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = dict(self.trace.fallbacks)
        try:
            result = func(*args, **(kwargs or {}))
        except Exception:
            self.failed = self.failed or (self.stack[-1], label(func))
            raise
        name = getattr(func, "__name__", "")
        met = torch.is_grad_enabled() and any(isinstance(leaf, Dual) for leaf in tree_leaves((args, kwargs)))
        if met and name not in CONSTANT and name != "__get__":
            self.counts[self.stack[-1], label(func), self.rung(func, before)] += 1
        return result

    def rung(self, func: Any, before: dict[str, int]) -> str:
        """The last resort that was taken since `before`."""
        taken = {name.split(":")[0] for name, count in self.trace.fallbacks.items() if count > before.get(name, 0)}
        for rung in reversed(RUNGS):
            if rung in taken:
                return rung
        return "rule" if func in RULES or func in SERVED else "native"

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Know, meanwhile, which module is running."""

        def enter(name: str) -> Any:
            return lambda module, args: self.stack.append(name)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()

        handles = []
        for name, module in model.named_modules():
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave, always_call=True)]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()
