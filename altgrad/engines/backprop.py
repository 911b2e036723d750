r"""The reference: ĝ = ∇f by reverse mode, with activation checkpointing and gradient accumulation as settings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from altgrad.engine import Bias, Engine, Estimate, Needs, Split, Tree
from altgrad.errors import CapabilityError, require
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.samplers import ACTIVE, AddressedSamplers
from altgrad.world import World


@dataclass(frozen=True)
class Backprop(Engine):
    """Reverse-mode gradient of the mean loss.

    `checkpointing` keeps only the inputs of the model's stages and runs each stage again in the backward sweep; `accumulation` cuts
    the batch into equal parts and adds their gradients, so that the activations of one part are alive at a time.

    Raises:
        SettingError: accumulation < 1.
        CapabilityError: checkpointing on a model with no stages.

    Source: Rumelhart, Hinton, Williams 1986; checkpointing: Chen et al. 2016, arXiv 1604.06174.
    """

    checkpointing: bool = field(default=False, metadata={"help": "run every stage again in the backward sweep instead of keeping its activations"})
    accumulation: int = field(default=1, metadata={"help": "parts the batch is cut into, >= 1"})

    def __post_init__(self) -> None:
        require(isinstance(self.accumulation, int) and self.accumulation >= 1, "accumulation", self.accumulation, "a whole number >= 1")

    @property
    def name(self) -> str:
        return "backprop"

    @property
    def needs(self) -> Needs:
        return Needs.REVERSE

    @property
    def bias(self) -> Bias:
        return Bias.EXACT

    @property
    def split(self) -> Split:
        return Split.DATA

    @property
    def source(self) -> str:
        return "Rumelhart, Hinton, Williams 1986, Nature 323"

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        buffers = problem.fresh_buffers()
        total: list[Tensor | None] = [None] * len(leaves)
        losses = []
        parts = list(cut(batch, self.accumulation, problem.batch_size_of(batch)))
        with torch.enable_grad():
            for index, (part, weight) in enumerate(parts):
                with AddressedSamplers(key.fold("samplers", index) if index else key.fold("samplers")), self.stages(problem):
                    loss = problem.loss(leaves, part, buffers) * weight
                    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                total = [new if old is None else old if new is None else old.add_(new) for old, new in zip(total, grads, strict=True)]
                losses.append(loss.detach())
        # Counted in passes over the whole batch: the parts of an accumulated step add up to one.
        metrics = {"forwards": torch.tensor(2 if self.checkpointing else 1), "backwards": torch.tensor(1)}
        grads = {name: grad for name, grad in zip(leaves, total, strict=True) if grad is not None}
        return Estimate(torch.stack(losses).sum(), grads, state, metrics, buffers)

    @contextmanager
    def stages(self, problem: Problem) -> Iterator[None]:
        """The model's stages run under checkpoint while inside."""
        if not self.checkpointing:
            yield
            return
        model = getattr(problem, "model", None)
        stages = find_stages(model) if isinstance(model, nn.Module) else []
        if not stages:
            raise CapabilityError("checkpointing=True needs a model with an nn.Sequential or nn.ModuleList of two or more stages; none was found.")
        for position, stage in enumerate(stages):
            object.__setattr__(stage, "forward", recomputed_forward(stage, stage.forward, position))
        try:
            yield
        finally:
            for stage in stages:
                object.__delattr__(stage, "forward")


def recomputed_forward(stage: nn.Module, forward: Callable[..., Any], position: int) -> Callable[..., Any]:
    """`forward` under checkpoint, with the parameters and the random draws of the first run in the second one too."""

    def run(*args: Any, **kwargs: Any) -> Any:
        values = {**dict(stage.named_parameters()), **dict(stage.named_buffers())}  # what functional_call swapped in
        outer = ACTIVE[-1].key
        rerun = False

        def inner(*inner_args: Any) -> Any:
            nonlocal rerun
            # The second run must not move the running statistics again.
            held = {name: value.clone() for name, value in stage.named_buffers()} if rerun else {}
            current = {**values, **held}
            rerun = True
            with AddressedSamplers(outer.fold("stage", position)), swapped(stage, current):
                return forward(*inner_args, **kwargs)

        return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=False)

    return run


@contextmanager
def swapped(stage: nn.Module, values: Tree) -> Iterator[None]:
    """The stage with other tensors in place of its parameters and buffers."""
    with torch.nn.utils.stateless._reparametrize_module(stage, values):
        yield


def find_stages(model: nn.Module) -> list[nn.Module]:
    """The members of the longest nn.Sequential or nn.ModuleList, those with no output of their own (activations) joined to nothing."""
    holders = [module for module in model.modules() if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module) > 1]
    if not holders:
        return []
    return [stage for stage in max(holders, key=len) if any(True for _ in stage.children()) or any(True for _ in stage.parameters())]


def cut(batch: Batch, parts: int, count: int) -> Iterator[tuple[Batch, float]]:
    """The batch in `parts` runs of examples, each with its share of the mean."""
    if parts == 1:
        yield batch, 1.0
        return
    parts = min(parts, count)
    edges = [count * i // parts for i in range(parts + 1)]
    for start, stop in zip(edges, edges[1:], strict=False):

        def run(leaf: Any, start: int = start, stop: int = stop) -> Any:
            return leaf[start:stop] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == count else leaf

        yield Batch(tree_map(run, batch.inputs), tree_map(run, batch.targets), batch.first + start), (stop - start) / count
