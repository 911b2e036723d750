"""Do the examples of a batch see one another? Change one, run again, and look at the others, module by module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Rows = list[Tensor]


def find_mixing(model: nn.Module, run: Callable[[Any], Any], inputs: Any, examples: int, tolerance: float) -> list[str]:
    """The innermost modules that carry a change of example 0 into other rows of axis 0; [] where none does.

    Args:
        run: inputs -> outputs, the same random draws each time.
        examples: rows of the batch, >= 2.
        tolerance: relative, of a value that counts as unchanged.
    """
    first, outputs = watched(model, run, inputs, examples)
    second, changed = watched(model, run, with_other_first(inputs, examples), examples)
    found = [name for name in first if any(mixes(a, b, tolerance) for a, b in zip(first[name], second.get(name, []), strict=False))]
    innermost = [name for name in found if not any(other != name and (not name or other.startswith(f"{name}.")) for other in found)]
    if not innermost and changed_elsewhere(rows_of(outputs, examples), rows_of(changed, examples), tolerance):
        innermost = [""]
    kinds = dict(model.named_modules())
    return [f"{name or 'the model'} ({type(kinds[name]).__name__})" for name in innermost]


def watched(model: nn.Module, run: Callable[[Any], Any], inputs: Any, examples: int) -> tuple[dict[str, list[tuple[Rows, Rows]]], Any]:
    """(what every module got and gave, call by call; the outputs)."""
    seen: dict[str, list[tuple[Rows, Rows]]] = {}
    waiting: list[Rows] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        waiting.append(rows_of((args, kwargs), examples))

    def leave(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.setdefault(name, []).append((waiting.pop(), rows_of(output, examples)))

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave(name))]
    try:
        return seen, run(inputs)
    finally:
        for handle in handles:
            handle.remove()


def rows_of(tree: Any, examples: int) -> Rows:
    """Copies of the tensors whose axis 0 counts examples."""
    return [leaf.detach().clone() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == examples]


def with_other_first(inputs: Any, examples: int) -> Any:
    """The batch with example 0 replaced: by noise where it is made of floats, by example 1 where it is made of indices."""
    drawn = torch.Generator().manual_seed(17)

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != examples:
            return leaf
        leaf = leaf.clone()
        leaf[0] = leaf[0] + torch.randn(leaf.shape[1:], generator=drawn).to(leaf) if leaf.is_floating_point() else leaf[1]
        return leaf

    return tree_map(change, inputs)


def mixes(first: tuple[Rows, Rows], second: tuple[Rows, Rows], tolerance: float) -> bool:
    """The same rows but the first went in, and other rows came out."""
    return not changed_elsewhere(first[0], second[0], tolerance) and changed_elsewhere(first[1], second[1], tolerance)


def changed_elsewhere(first: Rows, second: Rows, tolerance: float) -> bool:
    """Whether rows other than the first differ."""
    if [a.shape for a in first] != [b.shape for b in second]:
        return True
    return any(
        not (torch.allclose(a[1:], b[1:], rtol=tolerance, atol=tolerance, equal_nan=True) if a.is_floating_point() else torch.equal(a[1:], b[1:]))
        for a, b in zip(first, second, strict=True)
    )
