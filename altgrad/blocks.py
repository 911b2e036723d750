"""A model cut into blocks that run one after another: h₀ = x, h_k = f_k(h_{k-1}), and f_n(… f_1(x)) is the model, unmodified.

nn.Sequential (nested ones too) is cut at its children; any other module is traced by torch.fx and cut where exactly one tensor is alive, so never
inside a residual branch. A block starts at every layer with a trainable tensor of two or more axes: activations, norms, pooling, dropout and
frozen layers belong to the block before them, and what stands before the first layer to the first block.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from altgrad.calling import called
from altgrad.engine import Tree
from altgrad.errors import CapabilityError, near_miss
from altgrad.tracing import Traced, trace

ROUNDING = 100  # machine epsilons, relative: the same operations in the same order


@dataclass(frozen=True)
class Block:
    """A part of a model: f(params, h, buffers).

    Args:
        name: the qualified name of its first layer.
        parameters: its trainable tensors, by their names in the model.
        buffers: its buffers, by their names in the model.
        module: what runs it; shares its layers with the model.
        names: the module's own name of a tensor -> the model's.
    """

    name: str
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    module: nn.Module = field(repr=False)
    names: Mapping[str, str] = field(repr=False)

    def apply(self, params: Tree, inputs: Any, buffers: Tree) -> Any:
        """The block's output.

        Args:
            params: by the model's names, others among them; the model's own tensor stands in for one that is missing.
            inputs: of the first block what the model takes (a tensor, a tuple or a dict); of the others the output of the one before.
            buffers: as params; they may be written in place, so hand in clones.
        """
        given = {own: params[name] for own, name in self.names.items() if name in params}
        spare = {own: buffers[name] for own, name in self.names.items() if name in buffers and name not in params}
        return called(self.module, given, spare, inputs, tie_weights=False)


class Piece(NamedTuple):
    """The least that a block can be made of."""

    name: str  # qualified
    modules: tuple[str, ...]  # qualified names of everything that runs in it
    tensors: tuple[Tensor, ...]  # parameters


class Chain(nn.Module):
    """Layers one after another; the argument is called `input` as in nn.Sequential, which callers may use."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, input: Any) -> Any:
        for layer in self.layers:
            input = layer(input)
        return input


def cut_model(model: nn.Module, cut: str = "", *, inputs: Any = None) -> list[Block]:
    """The blocks of `model` in its present mode.

    Args:
        model: any nn.Module.
        cut: names of modules, separated by commas: a block starts at each of them and nowhere else. Where torch.fx cannot follow the model, they
            are taken for the whole of it, one after another (`replay` finds out whether they are).
        inputs: such as the model is called with, or None for one argument: other arguments keep their defaults.

    Raises:
        CapabilityError: the model cannot be cut, or not there; says why.
    """
    wanted = [part.strip() for part in cut.split(",") if part.strip()]
    known = dict(model.named_modules())
    for name in wanted:
        if name not in known:
            raise CapabilityError(f"cut={cut!r}: " + near_miss("module", name, [name for name in known if name]))
    if is_plain_sequential(model):
        layers = flat_layers(model)
        pieces = [Piece(name, (name,), tuple(layer.parameters())) for name, layer in layers]
        return [made(model, label, Chain(layer for _, layer in layers[part])) for label, part in grouped(pieces, wanted)]
    with torch.random.fork_rng(devices=[]):  # a forward that draws draws while it is traced
        traced = trace(model, inputs)
    if isinstance(traced, Traced):
        pieces = [Piece(common(names), names, tensors) for names, tensors in traced.pieces()]
        return [made(model, label, traced.module(part)) for label, part in grouped(pieces, wanted)]
    if not wanted:
        raise CapabilityError(
            f"{type(model).__name__} cannot be cut into blocks: torch.fx cannot follow its forward ({traced}). Name the modules that it runs one after "
            "another, cut='first,second.third', or make it an nn.Sequential."
        )
    return [made(model, name, Chain([known[name]])) for name in wanted]


def grouped(pieces: Sequence[Piece], wanted: Sequence[str]) -> list[tuple[str, slice]]:
    """(name, pieces) of every block."""
    heavy = [any(tensor.requires_grad and tensor.ndim >= 2 for tensor in piece.tensors) for piece in pieces]
    if not any(heavy):
        heavy = [any(tensor.requires_grad for tensor in piece.tensors) for piece in pieces]
    starts = [number for number, own in enumerate(heavy) if own]
    if wanted:
        firsts = {name: first_of(name, pieces) for name in wanted}
        for one, other in itertools.combinations(firsts, 2):
            if firsts[one] == firsts[other]:
                raise CapabilityError(f"cut={','.join(wanted)!r}: the model cannot be cut between {one!r} and {other!r}: more than one tensor is alive there.")
        starts = sorted(firsts.values())
    labels = {firsts[name]: name for name in wanted} if wanted else {number: pieces[number].name for number in starts}
    starts = starts or [0]
    edges = [0, *starts[1:], len(pieces)]
    found: dict[str, slice] = {}
    for number, start in enumerate(starts):
        label = labels.get(start) or f"block {number}"
        found[f"{label} again ({number})" if label in found else label] = slice(edges[number], edges[number + 1])  # a layer that runs twice
    return list(found.items())


def first_of(name: str, pieces: Sequence[Piece]) -> int:
    """The first piece in which the module `name`, or something inside it, runs."""
    for number, piece in enumerate(pieces):
        if any(module == name or module.startswith(f"{name}.") for module in piece.modules):
            return number
    raise CapabilityError(f"cut: module {name!r} is not run by the model's forward, or only inside a layer that is one piece; name another.")


def made(model: nn.Module, name: str, module: nn.Module) -> Block:
    """The block that runs `module`, with its tensors' names in `model`."""
    canonical = {id(tensor): label for label, tensor in [*model.named_parameters(), *model.named_buffers()]}
    names: dict[str, str] = {}
    parameters: dict[str, None] = {}
    buffers: dict[str, None] = {}
    for prefix, layer in module.named_modules():  # every layer once, though it may run twice
        for label, tensor in [*layer.named_parameters(prefix, recurse=False), *layer.named_buffers(prefix, recurse=False)]:
            if id(tensor) in canonical:  # not a constant that tracing put there
                names[label] = canonical[id(tensor)]
                kept = parameters if isinstance(tensor, nn.Parameter) else buffers
                if not isinstance(tensor, nn.Parameter) or tensor.requires_grad:
                    kept[names[label]] = None
    return Block(name, tuple(parameters), tuple(buffers), module, names)


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether a module runs its children one after another and does nothing else."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not hooked


def flat_layers(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """(qualified name, module) of the children of nested nn.Sequentials, in order."""
    found: list[tuple[str, nn.Module]] = []
    for label, child in model._modules.items():  # named_children leaves out a child that is there twice
        if child is not None:
            found += flat_layers(child, f"{prefix}{label}.") if is_plain_sequential(child) else [(f"{prefix}{label}", child)]
    return found


def common(names: Sequence[str]) -> str:
    """The innermost module that holds all of `names`, or the first name where that is the model itself."""
    paths = [name.split(".") for name in names if name]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared) or next((name for name in names if name), "")


def check_shared(blocks: Sequence[Block], who: str) -> None:
    """Raise CapabilityError if two blocks use one parameter; names it and them."""
    owner: dict[str, str] = {}
    for block in blocks:  # whose names differ
        for name in block.parameters:
            other = owner.setdefault(name, block.name)
            if other != block.name:
                raise CapabilityError(
                    f"{who} trains every block by its own loss, but the blocks {other!r} and {block.name!r} share the parameter {name!r}. "
                    "Untie it, freeze it, or name fewer cuts (cut='…') so that one block holds both uses."
                )


def chained(blocks: Sequence[Block], params: Tree, inputs: Any, buffers: Tree) -> Any:
    """What the blocks give one after another."""
    for block in blocks:
        inputs = block.apply(params, inputs, buffers)
    return inputs


def replay(model: nn.Module, blocks: Sequence[Block], whole: Callable[[], Any], chain: Callable[[], Any]) -> None:
    """Hold the blocks to the model: `whole()` and `chain()` give the outputs on the same inputs, buffers and random draws.

    Raises:
        CapabilityError: they differ; says at which module first.
    """
    expected, problem = whole(), ""
    try:
        same = alike(expected, chain())
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        same, problem = False, f" ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    if same:
        return
    first, second = watched(model, whole), watched(model, chain)
    place = next((number for number, (one, other) in enumerate(zip(first, second, strict=False)) if not (one[0] == other[0] and alike(one[1], other[1]))), None)
    if place is None:
        missing = first[len(second)][0] if len(first) > len(second) else ""
        where = f"{missing!r} is not run by them" if missing else "what differs is computed outside the model's modules"
    else:
        name = first[place][0]
        before = f" after {first[place - 1][0]!r}" if place else ""
        where = f"the first difference is at {name!r}{before}"
    raise CapabilityError(
        f"the blocks {', '.join(repr(block.name) for block in blocks)} do not give the model's output: {where}{problem}. Something between them is left out, "
        "or the forward takes another way each time. Cut elsewhere (cut='…' names the modules at which blocks start), or make the model an nn.Sequential."
    )


def watched(model: nn.Module, run: Callable[[], Any]) -> list[tuple[str, Any]]:
    """(name, output) of every call of a layer without children, in order."""
    seen: list[tuple[str, Any]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.append((name, [leaf.detach().clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]))

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name and not list(module.children())]
    try:
        run()
    except Exception:  # what came before the failure is what is looked for
        return seen
    finally:
        for handle in handles:
            handle.remove()
    return seen


def alike(one: Any, other: Any) -> bool:
    """Equal tensors, up to rounding."""
    first, second = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (one, other))
    if [a.shape for a in first] != [b.shape for b in second]:
        return False
    for a, b in zip(first, second, strict=True):
        tolerance = ROUNDING * torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
        size = float(a.detach().abs().nan_to_num(posinf=0.0).max()) if a.numel() and a.is_floating_point() else 0.0
        if a.dtype != b.dtype or not torch.allclose(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True):
            return False
    return True


__all__ = ["Block", "chained", "check_shared", "cut_model", "replay"]
