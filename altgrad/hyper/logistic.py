r"""The two tasks on labelled images: per-parameter weight decay of logistic regression, and cleaning of labels.

    weight decay:   g = mean_i ℓ_i(W, b) + ½ Σ e^{θ} W² + ½ ε ‖b‖²
    cleaning:       g = mean_i σ(θ_i) ℓ_i(W, b) + ½ ε (‖W‖² + ‖b‖²)

with ℓ_i the cross entropy of training example i. Its Hessian in the logits is at most ½, so that of the mean is at most ½ λ_max(X̃ᵀX̃/n), X̃ = (X, 1).

Source: Lorraine et al. 2020, arXiv 1911.02590 (weight decay); Franceschi et al. 2017, arXiv 1703.01785 (cleaning); Böhning 1992 (the bound).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from altgrad.engine import Tree
from altgrad.hyper.scores import roc_auc
from altgrad.hyper.task import Parts, Task


class Logistic(Task):
    """What both tasks share: a linear classifier and its data.

    Args:
        inputs, targets: of the training examples [n, features] and [n].
        parts: of the validation and test examples.
        classes: how many.
        ridge: ε, the decay that no hyper-parameter sets, above 0.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, parts: Parts, *, classes: int, ridge: float = 1e-2):
        self.inputs, self.targets, self.parts, self.classes, self.ridge = inputs, targets, parts, classes, ridge
        wide = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
        self.bound = 0.5 * torch.linalg.eigvalsh(wide.T @ wide / len(wide))[-1]

    def weights(self) -> Tree:
        return {"weight": self.inputs.new_zeros(self.classes, self.inputs.shape[1]), "bias": self.inputs.new_zeros(self.classes)}

    def each(self, weights: Tree) -> Tensor:
        """ℓ_i [n]."""
        return F.cross_entropy(self.predict(weights, self.inputs), self.targets, reduction="none")

    def predict(self, weights: Tree, inputs: Tensor) -> Tensor:
        return F.linear(inputs, weights["weight"], weights["bias"])

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    def figures(self, params: Tree, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"accuracy": float((outputs.argmax(1) == targets).double().mean())}


class Decay(Logistic):
    """θ = the logarithm of the weight decay, one for every input feature [features] or for every weight [classes, features].

    Args:
        each: "feature" or "weight".
        first: e^θ at the beginning, above 0.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, parts: Parts, *, classes: int, ridge: float = 1e-2, share: str = "feature", first: float = 1e-2):
        super().__init__(inputs, targets, parts, classes=classes, ridge=ridge)
        shape = inputs.shape[1:] if share == "feature" else (classes, inputs.shape[1])
        self.first = torch.full(shape, float(first), dtype=inputs.dtype, device=inputs.device).log()

    def params(self) -> Tree:
        return {"log_decay": self.first}

    def inner(self, params: Tree, weights: Tree) -> Tensor:
        decayed = (params["log_decay"].exp() * weights["weight"].square()).sum()
        return self.each(weights).mean() + 0.5 * decayed + 0.5 * self.ridge * weights["bias"].square().sum()

    def curvature(self, params: Tree) -> Tensor:
        return self.bound + params["log_decay"].exp().amax().clamp_min(self.ridge)


class Cleaning(Logistic):
    """θ_i = the logit of the weight of training example i; all weights begin at σ(first).

    Args:
        targets: as they are given, some of them wrong.
        corrupted: bool [n], which ones; for the figures alone.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, parts: Parts, *, classes: int, ridge: float = 1e-2, corrupted: Tensor, first: float = 0.0):
        super().__init__(inputs, targets, parts, classes=classes, ridge=ridge)
        self.corrupted, self.first = corrupted, torch.full((len(inputs),), float(first), dtype=inputs.dtype, device=inputs.device)

    def params(self) -> Tree:
        return {"logit": self.first}

    def inner(self, params: Tree, weights: Tree) -> Tensor:
        kept = (params["logit"].sigmoid() * self.each(weights)).mean()
        return kept + 0.5 * self.ridge * (weights["weight"].square().sum() + weights["bias"].square().sum())

    def curvature(self, params: Tree) -> Tensor:
        return self.bound * params["logit"].sigmoid().amax() + self.ridge

    def figures(self, params: Tree, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """accuracy; of the corrupted examples found (weight below ½): recovered, their share, precision, and auc of the weight as a score; the share of
        clean ones kept.
        """
        weight = params["logit"].detach().sigmoid()
        found = weight < 0.5
        right = float((found & self.corrupted).sum())
        return {
            **super().figures(params, outputs, targets),
            "recovered": right / max(1, int(self.corrupted.sum())),
            "precision": right / max(1, int(found.sum())),
            "clean_kept": float((~found & ~self.corrupted).sum()) / max(1, int((~self.corrupted).sum())),
            "auc": roc_auc(-weight, self.corrupted),
        }
