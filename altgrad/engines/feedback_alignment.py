r"""Feedback alignment: backprop whose errors go down through other matrices than the transposed weights.

    δ_l = f'(a_l) ⊙ B_{l+1}ᵀ δ_{l+1},   ∂L/∂W_l ≈ δ_l h_{l-1}ᵀ

    random                   B = σ z                    FA: drawn once
    uniform-sign             B = σ sign(W)              uSF
    fixed-magnitude-sign     B = σ |z| sign(W)          frSF: z drawn once
    random-magnitude-sign    B = σ |z_t| sign(W)        brSF: z drawn at every step
    weights                  B = W                      backprop, to hold the others against

with σ = scale · √(2 / (fan in + fan out)). The last layer's gradient is backprop's; in the layers below, learning turns W towards B until the
error that B carries points the way of the gradient. A sweep over the whole graph, so time and memory are those of backprop.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from altgrad.engine import Bias, Engine, Estimate, Needs, Split, Tree, describe
from altgrad.errors import CapabilityError, SettingError, near_miss, require
from altgrad.local import feedback as matrices
from altgrad.local.chain import sampling
from altgrad.local.detours import Detours
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.world import World

KINDS = ("random", "uniform-sign", "fixed-magnitude-sign", "random-magnitude-sign", "weights")


@dataclass(frozen=True)
class FeedbackAlignment(Engine):
    """Errors go down through feedback matrices, layer by layer.

    Linear, convolutional, recurrent and attention layers have feedback; norms, activations and biases keep their derivatives. A weight that the
    model uses in another way carries errors by its own transpose; metrics["transported"] counts those.

    Raises:
        SettingError: no such feedback, or scale that is not positive.
        CapabilityError: a model in which no error passes a layer, so that nothing is left but backprop.

    Source: Lillicrap et al. 2016, Nature Communications 7, 13276; the signs: Liao, Leibo, Poggio 2016, arXiv 1510.05067; σ: Sanfiz,
    Akrout 2021, arXiv 2108.13446.
    """

    feedback: str = field(default="random", metadata={"help": "what carries errors down: " + ", ".join(KINDS)})
    scale: float = field(default=1.0, metadata={"help": "of the feedback, in units of √(2 / (fan in + fan out)), > 0; weights ignores it"})

    def __post_init__(self) -> None:
        if self.feedback not in KINDS:
            raise SettingError(near_miss("feedback", str(self.feedback), KINDS))
        require(0 < self.scale < float("inf"), "scale", self.scale, "a number > 0")

    @property
    def name(self) -> str:
        return "feedback-alignment"

    @property
    def needs(self) -> Needs:
        return Needs.REVERSE

    @property
    def bias(self) -> Bias:
        return Bias.EXACT if self.feedback == "weights" else Bias.ALIGNED

    @property
    def redraws(self) -> bool:
        """Whether the feedback is another at every step."""
        return self.feedback == "random-magnitude-sign"

    @property
    def split(self) -> Split:
        return Split.DATA

    @property
    def source(self) -> str:
        return "Lillicrap et al. 2016, Nature Communications 7, 13276; signs: Liao, Leibo, Poggio 2016, arXiv 1510.05067"

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        buffers = problem.fresh_buffers()
        names = {id(value): name for name, value in {**self.frozen(problem, leaves), **leaves}.items()}
        detours = Detours(names, lambda name, weight: self.matrix(problem, key, name, weight))
        with torch.enable_grad(), sampling(problem, batch, key), detours:
            loss = problem.loss(leaves, batch, buffers)
        if not detours.passed:
            raise CapabilityError(
                f"{describe(self)} needs a model with a linear or convolutional layer behind another trained one; in this one no error passes a layer, "
                "so that its gradient is backprop's. Use backprop."
            )
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        grads = {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
        transported = [name for name in grads if leaves[name].ndim >= 2 and name not in detours.met]
        metrics = {"forwards": torch.tensor(1), "backwards": torch.tensor(1), "transported": torch.tensor(len(transported))}
        return Estimate(loss.detach(), grads, state, metrics, buffers)

    def frozen(self, problem: Problem, leaves: Tree) -> Tree:
        """The model's other parameters: errors pass those layers too."""
        model = getattr(problem, "model", None)
        return {} if model is None else {name: value for name, value in model.named_parameters() if name not in leaves}

    def matrix(self, problem: Problem, key: Key, name: str, weight: Tensor) -> Tensor:
        """The feedback B of a layer, of its weight's shape."""
        if self.feedback == "weights":
            return weight
        if self.feedback == "uniform-sign":
            return weight.sign() * (self.scale * matrices.deviation(weight.shape))
        if self.redraws:
            return matrices.fresh(key, name, weight.shape, self.scale, weight).abs_() * weight.sign()
        found = matrices.fixed(problem, key, name, weight.shape, self.scale, weight)
        return found if self.feedback == "random" else found.abs() * weight.sign()
