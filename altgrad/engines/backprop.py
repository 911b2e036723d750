r"""The reference: ĝ = ∇f by reverse mode, with activation checkpointing and gradient accumulation as settings."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from altgrad.calling import swapped
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
            for part, weight in parts:
                with AddressedSamplers(key.fold("samplers"), first=part.first, examples=problem.batch_size_of(part)), self.stages(problem):
                    loss = problem.loss(leaves, part, buffers) * weight
                    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                total = [new if old is None else old if new is None else old.add_(new) for old, new in zip(total, found, strict=True)]
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
        holder = find_holder(model) if isinstance(model, nn.Module) else None
        if holder is None:
            raise CapabilityError("checkpointing=True needs a model with an nn.Sequential or nn.ModuleList of two or more stages; none was found.")
        # A Sequential is cut into about √n runs of children (Chen et al. 2016); a list's members are called by the model, one by one.
        patched = [holder] if isinstance(holder, nn.Sequential) else list(holder)
        for position, module in enumerate(patched):
            run = in_segments(module) if isinstance(module, nn.Sequential) and module is holder else again(module, module.forward, position)
            object.__setattr__(module, "forward", run)
        try:
            yield
        finally:
            for module in patched:
                object.__delattr__(module, "forward")


def in_segments(holder: nn.Sequential) -> Callable[[Any], Any]:
    """The forward of a Sequential, segment by segment under checkpoint."""
    children = list(holder)
    length = round(len(children) / max(1, round(len(children) ** 0.5)))

    def segment(start: int) -> Callable[[Any], Any]:
        def run(x: Any) -> Any:
            for child in children[start : start + length]:
                x = child(x)
            return x

        return run

    def forward(input: Any) -> Any:  # the name nn.Sequential gives it, which callers may use
        for start in range(0, len(children), length):
            input = again(holder, segment(start), start)(input)
        return input

    return forward


def again(module: nn.Module, forward: Callable[..., Any], position: int) -> Callable[..., Any]:
    """`forward` under checkpoint, with the parameters and the random draws of the first run in the second one too."""

    def run(*args: Any, **kwargs: Any) -> Any:
        values = {**dict(module.named_parameters()), **dict(module.named_buffers())}  # what functional_call swapped in
        outer = ACTIVE[-1]
        rerun = False

        def inner(*inner_args: Any) -> Any:
            nonlocal rerun
            # The second run must not move the running statistics again.
            held = {name: value.clone() for name, value in module.named_buffers()} if rerun else {}
            current = {**values, **held}
            rerun = True
            with AddressedSamplers(outer.key.fold("stage", position), first=outer.first, examples=outer.examples), swapped(module, current):
                return forward(*inner_args, **kwargs)

        inner.remembers = True  # type: ignore[attr-defined] # for calling.py, which need not see to it
        return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=False)

    return run


def find_holder(model: nn.Module) -> nn.Sequential | nn.ModuleList | None:
    """The longest nn.Sequential or nn.ModuleList, whose members are the stages."""
    holders = [module for module in model.modules() if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module) > 1]
    return max(holders, key=len) if holders else None


def cut(batch: Batch, parts: int, count: int) -> Iterator[tuple[Batch, float]]:
    """The batch in `parts` runs of examples, each with its share of the mean."""
    if parts == 1:
        yield batch, 1.0
        return
    parts = min(parts, count)
    edges = [count * i // parts for i in range(parts + 1)]
    for start, stop in itertools.pairwise(edges):

        def run(leaf: Any, start: int = start, stop: int = stop) -> Any:
            return leaf[start:stop] if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == count else leaf

        yield Batch(tree_map(run, batch.inputs), tree_map(run, batch.targets), batch.first + start), (stop - start) / count
