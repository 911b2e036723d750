"""A model's forward as a graph (torch.fx), in pieces between the points where exactly one value is alive."""

import builtins
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn


class Follower(fx.Tracer):
    """Traces through the user's modules; one that cannot be traced (its flow depends on the data) is a single step."""

    proxy_buffer_attributes = True  # a buffer that is written in place would be written by the trace itself, once and for all

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = [""]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        hooked = bool(m._forward_hooks or m._forward_pre_hooks)
        return hooked or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before = set(self.graph.nodes)
        self.inside.append(self.path_of_module(m))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # whatever the module's own code makes of a proxy
            for node in reversed([node for node in self.graph.nodes if node not in before]):
                self.graph.erase_node(node)
            return self.create_proxy("call_module", self.inside[-1], args, kwargs)
        finally:
            self.inside.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["module"] = self.inside[-1]
        return node


@contextmanager
def lengths_followed() -> Iterator[None]:
    """Within it `len` of a traced value is a step of the graph; Python itself insists on an int. All other things have the length they have."""
    length = builtins.len

    def followed(thing: Any) -> Any:
        return thing.tracer.create_proxy("call_function", length, (thing,), {}) if isinstance(thing, fx.Proxy) else length(thing)

    builtins.len = followed
    try:
        yield
    finally:
        builtins.len = length


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """What a forward assigns (self.mean = …, self.seen = x) is a stand-in of the tracer's: it is taken off the modules again."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for name in [name for name, value in vars(module).items() if isinstance(value, fx.Proxy)]:
                vars(module).pop(name)
                if name in attributes:
                    vars(module)[name] = attributes[name]
            module._buffers.clear()
            module._buffers.update(buffers)


class Traced:
    """A traced model and where it can be cut; `constants` are tensors that its forward makes of nothing."""

    def __init__(self, model: nn.Module, graph: fx.Graph, constants: Mapping[str, Any]):
        self.model, self.constants = model, constants
        self.nodes = [node for node in graph.nodes if node.op != "get_attr"]  # a parameter is at hand everywhere: it is not carried along
        place = {node: number for number, node in enumerate(self.nodes)}
        last = {node: max((place[user] for user in node.users), default=-1) for node in self.nodes}
        inputs = sum(node.op == "placeholder" for node in self.nodes)
        self.carried: list[fx.Node] = []  # the value that is alive at each edge between pieces
        self.edges = [0]
        for number in range(inputs, len(self.nodes) - 1):
            alive = [node for node in self.nodes[: number + 1] if last[node] > number]
            if len(alive) == 1:
                self.edges.append(number + 1)
                self.carried.append(alive[0])
        self.edges[1:] = [edge for edge in self.edges[1:] if edge < len(self.nodes) - 1]  # the end is no cut
        self.carried = self.carried[: len(self.edges) - 1]
        self.edges.append(len(self.nodes))

    def pieces(self) -> list[tuple[tuple[str, ...], tuple[Tensor, ...]]]:
        """(modules that run in it, parameters it uses) of every piece."""
        return [self.piece(self.nodes[start:stop]) for start, stop in zip(self.edges[:-1], self.edges[1:], strict=True)]

    def piece(self, nodes: Sequence[fx.Node]) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
        names: dict[str, None] = {}
        tensors: list[Tensor] = []
        for node in nodes:
            if node.op == "call_module":
                tensors += self.model.get_submodule(str(node.target)).parameters()
            for source in node.all_input_nodes:
                found = attribute(self.model, str(source.target)) if source.op == "get_attr" and source.target not in self.constants else None
                if isinstance(found, nn.Parameter):
                    tensors.append(found)
            if node.op not in {"placeholder", "output"}:
                names[node.meta.get("module", "")] = None
        held = {name: None for name in names if name}
        return tuple(held or names), tuple(tensors)

    def module(self, part: slice) -> fx.GraphModule:
        """What runs the pieces of `part`: the model's inputs, or the one value that is alive before it, to the value alive after it."""
        first, last = part.start, part.stop
        graph, made = fx.Graph(), {}
        if first:
            made[self.carried[first - 1]] = graph.placeholder("input")

        def known(node: fx.Node) -> fx.Node:
            if node not in made and node.op == "get_attr":
                made[node] = graph.node_copy(node, known)
            return made[node]

        for node in self.nodes[self.edges[first] : self.edges[last]]:
            made[node] = graph.node_copy(node, known)
        if last < len(self.edges) - 1:
            graph.output(made[self.carried[last - 1]])
        targets = {str(node.target) for node in graph.nodes if node.op in {"call_module", "get_attr"}}
        return fx.GraphModule({target: self.constants[target] if target in self.constants else attribute(self.model, target) for target in targets}, graph)


def attribute(model: nn.Module, target: str) -> Any:
    """The attribute "a.b.c" of a model."""
    found: Any = model
    for part in target.split("."):
        found = getattr(found, part)
    return found


def write_buffers(model: nn.Module, graph: fx.Graph) -> None:
    """Have the graph write into the buffers what the traced forward has put in their place."""
    for prefix, module in model.named_modules():
        for name, found in module._buffers.items():
            target = f"{prefix}.{name}" if prefix else name
            if isinstance(found, fx.Proxy) and found.node.target != target:
                with graph.inserting_after(found.node):
                    buffer = graph.get_attr(target)
                with graph.inserting_after(buffer):
                    graph.call_method("copy_", (buffer, found.node)).meta = dict(found.node.meta)


def left_out(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """The defaults of the forward's arguments that a call with `inputs` (a tuple, a dict, anything else as one argument) does not give."""
    signature = inspect.signature(model.forward)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    given = signature.bind_partial(*args, **kwargs).arguments
    return {name: one.default for name, one in signature.parameters.items() if one.default is not one.empty and name not in given}


def followed(model: nn.Module, fixed: Mapping[str, Any]) -> fx.Graph:
    """The graph of the forward with the arguments `fixed` at these values, of which it no longer speaks."""
    graph = Follower().trace(model, dict(fixed))
    write_buffers(model, graph)
    for node in [node for node in graph.nodes if node.op == "placeholder" and str(node.target).rpartition("_")[0] in fixed]:  # fx numbers them
        erase(graph, node)
    return graph


def erase(graph: fx.Graph, node: fx.Node) -> None:
    """A node and what uses it: the checks of a fixed argument."""
    for user in list(node.users):
        erase(graph, user)
    graph.erase_node(node)


def trace(model: nn.Module, inputs: Any = None) -> Traced | str:
    """The model's graph in its present mode, for calls that give the arguments that `inputs` gives; or why there is none.

    An argument that is not given and is None by default stays None, since a stand-in for it would not be; others stay open where the forward lets them.
    """
    own, reason = set(vars(model)), ""
    for settled in (lambda value: value is None, lambda value: True):
        try:
            with torch.no_grad(), lengths_followed(), left_alone(model), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Was not able to add assertion")  # a default that is neither None nor a number
                graph = followed(model, {name: value for name, value in left_out(model, inputs).items() if settled(value)})
        except Exception as error:  # whatever the model's own code makes of a proxy
            reason = reason or f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0].rstrip('.')}"
            continue
        finally:
            constants = {name: vars(model).pop(name) for name in set(vars(model)) - own}  # the tracer keeps tensors that a forward makes on the model
        return Traced(model, graph, constants)
    return reason


__all__ = ["Traced", "trace"]
