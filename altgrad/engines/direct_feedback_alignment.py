r"""Direct feedback alignment: every layer is told the output's error through a fixed random matrix of its own, and no sweep goes down.

    e = ∂L/∂y,   δ_k = B_k e,   (∂h_k/∂W_k)ᵀ δ_k  in place of  ∂L/∂W_k,   h_k = f_k(h_{k-1}; W_k),   k = 1 … n-1

with h_k behind the block's nonlinearity, so that f' comes with the block's own derivative. The last block gets e itself: its gradient is
backprop's. One pass without a graph gives e; then the blocks run again one at a time, and none waits for another's error. What is saved for
the backward steps is one block's: it does not grow with depth.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from altgrad.blocks import chained
from altgrad.engine import Bias, Engine, Estimate, Needs, Split, Tree, describe
from altgrad.errors import CapabilityError, require
from altgrad.local import feedback as matrices
from altgrad.local.chain import hold_to_model, mixing, sampling
from altgrad.local.streaming import stream
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.world import World

LARGEST = 2**28  # elements of one feedback matrix, 1 GiB in float32


@dataclass(frozen=True)
class DirectFeedbackAlignment(Engine):
    """The output's error, broadcast to every block.

    B_k is [features of the block, outputs], full also for maps [C, H, W]. Where outputs are [N, positions…, K] and a block keeps the positions,
    one matrix [features, K] serves them all, each with its own error.

    Raises:
        SettingError: scale that is not positive, rows < 1.
        CapabilityError: a model that is one block, that cannot be cut, that does not give a tensor [N, …], or whose feedback would not fit.

    Source: Nøkland 2016, arXiv 1609.01596; per position: Launay et al. 2020, arXiv 2006.12878.
    """

    scale: float = field(default=1.0, metadata={"help": "of the feedback, in units of √(2 / (features + outputs)), > 0"})
    cut: str = field(default="", metadata={"help": "names of the modules at which blocks start, separated by commas; none for a cut at every layer"})
    rows: int = field(default=1024, metadata={"help": "examples run through a block at a time, where they do not see one another; changes rounding only"})

    def __post_init__(self) -> None:
        require(0 < self.scale < math.inf, "scale", self.scale, "a number > 0")
        require(isinstance(self.rows, int) and self.rows >= 1, "rows", self.rows, "a whole number >= 1")
        require(isinstance(self.cut, str), "cut", self.cut, "text such as 'stem,layer1.0'")

    @property
    def name(self) -> str:
        return "direct-feedback-alignment"

    @property
    def needs(self) -> Needs:
        return Needs.REVERSE | Needs.BLOCKS

    @property
    def bias(self) -> Bias:
        return Bias.ALIGNED

    @property
    def split(self) -> Split:
        return Split.DATA

    @property
    def source(self) -> str:
        return "Nøkland 2016, arXiv 1609.01596"

    def check(self, problem: Problem) -> None:
        blocks = problem.blocks(self.cut)
        if len(blocks) < 2:
            whole = f"{blocks[0].name!r} holds all of it" if blocks else "there is nothing to train in it"
            raise CapabilityError(
                f"{describe(self)} needs a model of two blocks or more, of which the last gets backprop's own gradient; {whole}. Where a value is used "
                "again further down there can be no cut. Use feedback-alignment, backprop, or a model with another layer."
            )

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        blocks, count = problem.blocks(self.cut), problem.batch_size_of(batch)
        params = {name: value.detach() for name, value in params.items()}
        hold_to_model(problem, self.cut, params, blocks, batch, key)
        with torch.no_grad(), sampling(problem, batch, key):
            outputs = chained(blocks, params, batch.inputs, problem.fresh_buffers())
        loss, error = self.error(problem, outputs, batch.targets, count)
        whole = mixing(problem, self.cut, self.rows, params, blocks, batch, key) if count > self.rows else set()

        def objective(position: int, output: Any, leaves: Tree, rows: slice) -> Tensor | None:
            if isinstance(output, Tensor) and not output.requires_grad:
                return None  # nothing in this block is trained
            own = error[rows]
            if position < len(blocks) - 1:
                own = self.broadcast(problem, key, blocks[position].name, own, output)
            share = count / (rows.stop - rows.start)  # a mean over the rows is asked for
            return (output * (own if share == 1.0 else own * share)).sum()

        buffers = problem.fresh_buffers()
        with sampling(problem, batch, key):
            grads = stream(blocks, params, batch.inputs, buffers, objective, rows=self.rows, whole=whole)
        return Estimate(loss, grads, state, {"forwards": torch.tensor(2), "backwards": torch.tensor(1)}, buffers)

    def error(self, problem: Problem, outputs: Any, targets: Any, count: int) -> tuple[Tensor, Tensor]:
        """(the loss, its derivative by the outputs [N, …]), from the loss alone."""
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or outputs.shape[0] != count:
            seen = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise CapabilityError(f"{describe(self)} broadcasts the error of one tensor [{count}, …], but the model gives {seen}. Use feedback-alignment.")
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            loss = problem.score(outputs, targets).mean()
            (error,) = torch.autograd.grad(loss, outputs)
        return loss.detach(), error

    def broadcast(self, problem: Problem, key: Key, name: str, error: Tensor, output: Any) -> Tensor:
        """B e for a block's output [rows, …], from the error [rows, …]."""
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim < 1 or output.shape[0] != error.shape[0]:
            seen = f"{output.dtype} of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise CapabilityError(f"{describe(self)}: block {name!r} gives {seen} for {error.shape[0]} examples; cut elsewhere (cut='…').")
        by_position = error.ndim > 2 and output.shape[:-1] == error.shape[:-1]
        error = error if by_position else error.flatten(1) if error.ndim > 1 else error.unsqueeze(1)
        features = output.shape[-1] if by_position else output[0].numel()
        if features * error.shape[-1] > LARGEST:
            raise CapabilityError(
                f"{describe(self)}: block {name!r} has {features} features and the model {error.shape[-1]} outputs an example; their feedback matrix would "
                f"have {features * error.shape[-1]} elements, and {LARGEST} are allowed. Cut where maps are smaller (cut='…'), or use feedback-alignment."
            )
        wide = error.to(torch.promote_types(error.dtype, torch.float32))
        matrix = matrices.fixed(problem, key, name, (features, error.shape[-1]), self.scale, wide)  # [features, outputs]
        return (wide @ matrix.mT).to(output.dtype).view(output.shape)
