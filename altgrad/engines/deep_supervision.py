r"""Deep supervision: the local losses of all blocks and the model's own, added up, and one backward sweep through everything.

    ĝ = ∇(L + Σ_k mean_n L_k(h_k,n, y_n; V_k)),   h_k = f_k(h_{k-1}), nothing detached

The baseline that local rules have to be held against: the same heads and losses, with gradients that do cross from block to block.
"""

from dataclasses import dataclass

import torch

from altgrad.engine import Bias, Estimate, Tree
from altgrad.engines.blockwise import option
from altgrad.engines.local import Local
from altgrad.errors import require
from altgrad.local.chain import hold_to_model
from altgrad.local.step import Step
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.world import World


@dataclass(frozen=True)
class DeepSupervision(Local):
    """Backprop of the model's own loss and of a local loss on every block together.

    Raises:
        SettingError: as Local, or a schedule other than 'joint'. CapabilityError, DataError: as Local.

    Source: Lee, Xie, Gallagher, Zhang, Tu 2015, arXiv 1409.5185, equation 3.
    """

    loss: str = option("mono-forward", "the local loss: as for the engine local")
    readout: str = option("own", "what predicts: as for the engine local")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.schedule == "joint", "schedule", self.schedule, "'joint': one sweep goes through all blocks")

    @property
    def name(self) -> str:
        return "deep-supervision"

    @property
    def bias(self) -> Bias:
        return Bias.SURROGATE

    @property
    def source(self) -> str:
        return "Lee, Xie, Gallagher, Zhang, Tu 2015, arXiv 1409.5185, equation 3"

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        blocks, sites = problem.blocks(self.cut), self.sites(problem)
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        self.check_targets(problem, sites[0], batch, key)
        hold_to_model(problem, self.cut, leaves, blocks, batch, key)
        step = Step(self, problem, blocks, sites, leaves, state, batch, key, ())
        carried, sampler, values = step.enter(), step.sampling(), []
        rows = slice(0, step.total)
        if self.rule.sees == "all":
            step.survey(carried)
        with torch.enable_grad():
            for position, block in enumerate(blocks):
                with sampler:
                    carried = block.apply(leaves, carried, step.buffers)
                values.append(step.objective(position, carried, leaves, rows))
                carried = step.bridge(position, carried)
            found = torch.autograd.grad(torch.stack(values).sum(), list(leaves.values()), allow_unused=True)
        return step.estimate({name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}, step.buffers)
