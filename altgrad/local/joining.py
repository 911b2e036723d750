r"""Blocks and heads as one nn.Module that gives what a local rule reads out: copies of the layers, the heads and what joins them, and nothing of altgrad.

    blocks h_k = f_k(bridge(h_{k-1})), heads G_k = scores(h_k; V_k), output = read(G_1 … G_n, h_n)

is written down as a torch.fx graph, so the module runs, is scripted, traced, exported and loaded where there is only PyTorch. What the read-out does not
look at is left out.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import fx, nn

from altgrad.blocks import Block, Chain
from altgrad.engine import Tree, describe
from altgrad.errors import CapabilityError
from altgrad.export import loaded, whole
from altgrad.local import readouts
from altgrad.local.prefix import evaluating
from altgrad.local.step import by_block, heads_trained
from altgrad.problem import Problem
from altgrad.problems.supervised import Supervised

if TYPE_CHECKING:
    from altgrad.engines.blockwise import Blockwise

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def joined(engine: "Blockwise", problem: Problem, params: Tree, state: Tree) -> nn.Module:
    """The blocks of a model and the heads that `engine.readout` looks at, in evaluation mode.

    Raises:
        CapabilityError: the rule's scores or what it puts between blocks cannot be written as a graph, or the model takes a number of inputs that it
            does not name.
    """
    with evaluating(problem):
        blocks, sites = problem.blocks(engine.cut), engine.sites(problem)
        held: dict[str, Any] = {f"block{number}": standalone(block, params) for number, block in enumerate(blocks)}
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    given = placeholders(graph, held["block0"], describe(engine))
    heads, trained = by_block(params), heads_trained(state, len(sites))
    scores: dict[str, Any] = {}
    carried: Any = fx.Proxy(graph.call_module("block0", tuple(given)), tracer)
    try:
        for site in sites:
            if site.position:
                carried = fx.Proxy(graph.call_module(f"block{site.position}", (carried.node,)), tracer)
            head: dict[str, Any] = {}
            for short, name in heads.get(site.name, {}).items():
                held[f"head{site.position}.{short}"] = nn.Parameter(params[name].detach().clone())
                head[short] = fx.Proxy(graph.get_attr(f"head{site.position}.{short}"), tracer)
            told = trained[site.position] and engine.readout != readouts.OWN
            found = engine.rule.scores(carried, head, site) if told else None
            if found is not None:
                scores[site.name] = found
            carried = engine.rule.bridge(carried)
        own: Any = fx.Proxy(graph.call_module(f"block{len(sites)}", (carried.node,)), tracer)
        result: Any = readouts.read(engine.readout, scores, own)
        graph.output(result.node)
    except (fx.proxy.TraceError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CapabilityError(
            f"{describe(engine)}: what {type(engine.rule).__name__} computes cannot be written as a graph ({type(error).__name__}: {error}). Its scores and "
            "bridge must decide by site.shape, not by the shape of what they are given; or export the model itself, readout='own'."
        ) from error
    return pruned(fx.GraphModule(Held(held), graph))


class Reading(nn.Module):
    """A read-out that takes more than one pass through the blocks, as forward-forward's: copies of everything it needs, run by the rule itself.

    It is saved and loaded as any module is, by its state_dict or whole. Unlike `joined`'s it needs altgrad to run, until torch.export captures it
    (for one batch size).
    """

    def __init__(self, engine: "Blockwise", problem: Problem, params: Tree, state: Tree):
        super().__init__()
        self.engine, sites = engine, engine.sites(problem)
        self.model = whole(problem, {name: value for name, value in params.items() if name in problem.params()})
        self.facts = {("sites", engine.cut): sites}
        own = {name: value for name, value in params.items() if name not in problem.params()}
        self.own, self.kept = tuple(own), tuple(state)
        self.heads = nn.ParameterList(nn.Parameter(value.detach().clone()) for value in own.values())
        for number, value in enumerate(state.values()):
            self.register_buffer(f"state{number}", value.detach().clone())
        self.eval()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        given = named or (inputs[0] if len(inputs) == 1 else inputs)
        view = Supervised(self.model, F.cross_entropy)
        view.facts.update(self.facts)
        state = {name: getattr(self, f"state{number}") for number, name in enumerate(self.kept)}
        return self.engine.predict(view, {**view.params(), **dict(zip(self.own, self.heads, strict=True))}, state, given)


class Held(nn.Module):
    """What a graph refers to, by dotted names."""

    def __init__(self, values: Mapping[str, Any]):
        super().__init__()
        for name, value in values.items():
            first, _, rest = name.partition(".")
            if rest and not hasattr(self, first):
                self.add_module(first, nn.Module())
            setattr(getattr(self, first) if rest else self, rest or first, value)


def placeholders(graph: fx.Graph, first: nn.Module, who: str) -> list[fx.Node]:
    """The inputs of the model, under their own names."""
    found = []
    for name, entry in inspect.signature(first.forward).parameters.items():
        if entry.kind not in NAMED:
            raise CapabilityError(f"{who}: {type(first).__name__}.forward takes {entry}, so an exported module could not name its inputs.")
        found.append(graph.placeholder(name, default_value=entry.default))
    return found


def standalone(block: Block, params: Tree) -> nn.Module:
    """A copy of what runs a block, with `params`."""
    module = copy.deepcopy(block.module)
    loaded(module, block.names, params)
    return nn.Sequential(*module.layers) if isinstance(module, Chain) else module


def pruned(module: fx.GraphModule) -> fx.GraphModule:
    """Without what its output does not depend on; in evaluation mode."""
    module.eval()
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


__all__ = ["Reading", "joined"]
