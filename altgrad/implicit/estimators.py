"""Ready problems: linear models whose weights are differentiable in the data, the targets and every hyperparameter.

Features X [n, p], weights w [p], no intercept (append a column of ones); batches by torch.func.vmap. Strengths are numbers or tensors, scalar or [p], one
for each weight. Every problem is convex; those without a formula are the fixed points of a gradient or proximal gradient step, which Newton finds;
`adjoint`, `tol`, `max_steps`, `strict` are those of `fixed_point`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from altgrad.errors import SettingError, ShapeError, SingularError, near_miss, require
from altgrad.implicit.calls import fixed_point
from altgrad.implicit.conditions import projected_gradient, proximal_gradient
from altgrad.implicit.projections import project_nonnegative
from altgrad.implicit.proxes import prox_elastic_net
from altgrad.implicit.quadratic import qp
from altgrad.implicit.safeguarded import SafeguardedNewton
from altgrad.linearised import condition

Strength = float | Tensor
NEWTON = SafeguardedNewton()
LOSSES = ("squared-hinge", "hinge")


def checked_data(features: Tensor, targets: Tensor) -> None:
    if features.dim() != 2 or targets.shape != features.shape[:1]:
        raise ShapeError(
            f"features are {tuple(features.shape)} and targets {tuple(targets.shape)}; they must be [n, p] and [n]. For a batch of problems use "
            "torch.func.vmap."
        )
    if features.dtype not in (torch.float32, torch.float64):
        raise ShapeError(f"features are {features.dtype}; they must be float32 or float64: features.double(), say.")


def checked_strength(value: Strength, name: str, features: Tensor) -> Tensor:
    """As a tensor, scalar or [p]; numbers are checked to be 0 or more."""
    if not isinstance(value, Tensor):
        require(value >= 0, name, value, "0 or more")
        return torch.tensor(value, dtype=features.dtype, device=features.device)
    if value.shape not in ((), features.shape[1:]):
        raise ShapeError(f"{name} is {tuple(value.shape)}; it must be a scalar or [{features.shape[1]}], one for each weight.")
    return value


def curvature(features: Tensor) -> Tensor:
    """The largest eigenvalue of XᵀX, by which steps are scaled: no derivative flows through it, and the solution does not depend on it."""
    return torch.linalg.matrix_norm(features.detach(), 2).square().clamp(min=torch.finfo(features.dtype).tiny)


def ridge(features: Tensor, targets: Tensor, strength: Strength) -> Tensor:
    """argmin_w ‖X w − y‖² / 2 + Σ_j strength_j w_j² / 2 = (XᵀX + strength)⁻¹ Xᵀy, whose factors serve the derivative.

    scikit-learn's Ridge(alpha=strength, fit_intercept=False).

    Errors: ShapeError, SettingError; SingularError where X has dependent columns and no strength.
    """
    checked_data(features, targets)
    gram = features.mT @ features + torch.diag_embed(checked_strength(strength, "strength", features).expand(features.shape[1]))
    values = stripped(gram.detach())
    factor, info = torch.linalg.cholesky_ex(values)
    pivot = factor.diagonal(dim1=-2, dim2=-1)
    if bool((info != 0).any()) or not bool((pivot.amin(-1) > 4 * torch.finfo(values.dtype).eps ** 0.5 * pivot.amax(-1)).all()):
        refuse_singular(values)
    return torch.linalg.solve_ex(gram, (features.mT @ targets).unsqueeze(-1))[0].squeeze(-1)


def stripped(tensor: Tensor) -> Tensor:
    """The values behind torch.func's wrappers, mapped axes in front."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        dim = functorch.maybe_get_bdim(tensor) if functorch.is_batchedtensor(tensor) else -1
        tensor = functorch.get_unwrapped(tensor)
        if dim >= 0:
            tensor = tensor.movedim(dim, 0)
    return tensor.detach()


def refuse_singular(gram: Tensor) -> None:
    """SingularError where one of [*, p, p] is singular to rounding."""
    estimate, limit = condition(gram), 1 / (4 * torch.finfo(gram.dtype).eps)
    if not estimate < limit:
        raise SingularError(
            f"XᵀX + strength is singular: condition estimate {estimate:.1e}, which must stay below {limit:.1e} in {gram.dtype}. Columns of the features "
            "depend on each other; give a strength above 0, or leave some out."
        )


def elastic_net(
    features: Tensor, targets: Tensor, lasso_strength: Strength, ridge_strength: Strength, *,
    adjoint: str = "lu", tol: float | None = None, max_steps: int = 500, strict: bool = False,
) -> Tensor:  # fmt: skip
    """argmin_w ‖X w − y‖² / (2 n) + Σ_j a_j |w_j| + Σ_j b_j w_j² / 2 for a = lasso_strength, b = ridge_strength.

    scikit-learn's ElasticNet(alpha, l1_ratio, fit_intercept=False) has a = alpha l1_ratio, b = alpha (1 − l1_ratio).

    Errors: ShapeError, SettingError; SingularError where the columns of the support are dependent and b is 0.
    """
    checked_data(features, targets)
    strengths = checked_strength(lasso_strength, "lasso_strength", features), checked_strength(ridge_strength, "ridge_strength", features)
    count = features.shape[0]

    def smooth(w: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (x @ w - y).square().sum() / (2 * count)

    def prox(v: Tensor, step: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return prox_elastic_net(v, step * a, step * b)

    step = proximal_gradient(smooth, prox, count / curvature(features))
    start = features.new_zeros(features.shape[1])
    return fixed_point(step, start, features, targets, *strengths, solver=NEWTON, adjoint=adjoint, tol=tol, max_steps=max_steps, strict=strict)


def lasso(
    features: Tensor, targets: Tensor, strength: Strength, *, adjoint: str = "lu", tol: float | None = None, max_steps: int = 500, strict: bool = False
) -> Tensor:
    """argmin_w ‖X w − y‖² / (2 n) + Σ_j strength_j |w_j|; its derivative lives on the support.

    scikit-learn's Lasso(alpha=strength, fit_intercept=False). Errors are those of `elastic_net`.
    """
    return elastic_net(features, targets, strength, 0.0, adjoint=adjoint, tol=tol, max_steps=max_steps, strict=strict)


def logistic_regression(
    features: Tensor, targets: Tensor, strength: Strength, *, classes: int | None = None, weights: Tensor | None = None,
    adjoint: str = "lu", tol: float | None = None, max_steps: int = 200, strict: bool = False,
) -> Tensor:  # fmt: skip
    """argmin_w Σ_i weight_i ℓ(X_i w, y_i) + Σ strength w² / 2, ℓ the cross entropy of a logistic or, with `classes`, of a softmax model.

    scikit-learn's LogisticRegression(C=1 / strength, fit_intercept=False).

    Args:
        targets: [n]; probabilities of class 1 (0 or 1, say), differentiable; with `classes` whole numbers below it.
        strength: above 0, or the minimum may lie at infinity; scalar or [p].
        classes: None for two classes and w [p]; k for w [p, k].
        weights: of each example's loss, [n], 0 or more; None: 1.

    Errors: ShapeError, SettingError.
    """
    checked_data(features, targets)
    strength = checked_strength(strength, "strength", features)
    require(classes is None or classes >= 2, "classes", classes, "2 or more, or None")
    if classes is not None and targets.is_floating_point():
        raise ShapeError(f"targets are {targets.dtype}; with classes={classes} they must be whole numbers, one class an example.")
    if weights is not None and weights.shape != targets.shape:
        raise ShapeError(f"weights are {tuple(weights.shape)}; they must be [{targets.shape[0]}], one for each example.")
    each = features.new_ones(targets.shape) if weights is None else weights
    targets = targets.to(features.dtype) if classes is None else targets
    penalty = strength.unsqueeze(-1) if strength.dim() and classes is not None else strength

    def objective(w: Tensor, x: Tensor, y: Tensor, each: Tensor, penalty: Tensor) -> Tensor:
        scores = x @ w
        losses = F.softplus(scores) - y * scores if classes is None else scores.logsumexp(-1) - scores.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        return (each * losses).sum() + (penalty * w * w).sum() / 2

    bound = each.detach().abs().amax() * curvature(features) / (4 if classes is None else 2) + penalty.detach().amax()
    step = projected_gradient(objective, lambda w, *_: w, 1 / bound)
    start = features.new_zeros(features.shape[1], *([] if classes is None else [classes]))
    return fixed_point(step, start, features, targets, each, penalty, solver=NEWTON, adjoint=adjoint, tol=tol, max_steps=max_steps, strict=strict)


def svm(
    features: Tensor, targets: Tensor, cost: Strength, *, loss: str = "squared-hinge",
    adjoint: str = "lu", tol: float | None = None, max_steps: int = 200, strict: bool = False,
) -> Tensor:  # fmt: skip
    """argmin_w ‖w‖² / 2 + Σ_i cost_i ℓ(1 − y_i X_i w), ℓ(m) = max(m, 0)² (squared-hinge) or max(m, 0) (hinge).

    squared-hinge by Newton on w; hinge by the dual quadratic programme, min αᵀQα / 2 − Σα over 0 ≤ α ≤ cost, w = Σ α_i y_i X_i. scikit-learn's
    LinearSVC(C=cost, loss="squared_hinge" or "hinge", fit_intercept=False).

    Args:
        targets: [n], −1 or 1.
        cost: above 0, a number or a tensor, scalar or [n], one for each example.

    Errors: ShapeError, SettingError; for hinge those of `qp`.
    """
    checked_data(features, targets)
    if loss not in LOSSES:
        raise SettingError(near_miss("loss", loss, LOSSES))
    if not isinstance(cost, Tensor):
        require(cost > 0, "cost", cost, "above 0")
        cost = torch.tensor(cost, dtype=features.dtype, device=features.device)
    elif cost.shape not in ((), targets.shape):
        raise ShapeError(f"cost is {tuple(cost.shape)}; it must be a scalar or [{targets.shape[0]}], one for each example.")
    targets = targets.to(features.dtype)
    if loss == "hinge":
        signed = targets.unsqueeze(-1) * features  # [n, p]
        eye = torch.eye(len(targets), dtype=features.dtype, device=features.device)
        room = torch.cat([torch.zeros_like(targets), cost.expand(targets.shape)])
        best = qp(signed @ signed.T, -torch.ones_like(targets), inequality=(torch.cat([-eye, eye]), room), tol=tol, max_steps=max_steps, strict=strict)
        return best.x @ signed

    def objective(w: Tensor, x: Tensor, y: Tensor, cost: Tensor) -> Tensor:
        return w.square().sum() / 2 + (cost * project_nonnegative(1 - y * (x @ w)).square()).sum()

    step = projected_gradient(objective, lambda w, *_: w, 1 / (1 + 2 * cost.detach().amax() * curvature(features)))
    start = features.new_zeros(features.shape[1])
    return fixed_point(step, start, features, targets, cost, solver=NEWTON, adjoint=adjoint, tol=tol, max_steps=max_steps, strict=strict)
