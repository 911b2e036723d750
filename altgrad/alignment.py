r"""How far an estimate points from backprop's gradient, or from the exact one that its engine names (Engine.exact).

With ĝ_k the estimate under key k and g the gradient (both under the same dropout mask):

    cosine = mean_k ⟨ĝ_k, g⟩ / (‖ĝ_k‖ ‖g‖),   norm ratio = mean_k ‖ĝ_k‖ / ‖g‖,   relative variance = mean_k ‖ĝ_k - g‖² / ‖g‖².

After K normal directions in d dimensions the cosine is expected to be √(K / (K + d + 1)).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad.engine import Engine, Tree
from altgrad.errors import UsageError, require
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers
from altgrad.world import World


def exact_gradient(problem: Problem, params: Tree, batch: Batch, key: Key) -> tuple[Tensor, Tree]:
    """The mean loss [] and its gradient by autograd; names that the loss does not touch are left out.

    Args:
        problem: must be differentiable.
        params: where; names that are not the problem's own (an engine's heads) are passed over.
        key: the estimate's key, so that dropout draws the estimate's mask.
    """
    own = problem.params()
    leaves = {name: value.detach().requires_grad_() for name, value in params.items() if name in own}
    with torch.enable_grad(), AddressedSamplers(key.fold("samplers")):
        loss = problem.loss(leaves, batch, problem.fresh_buffers())
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}


def expected_cosine(tangents: int, dimension: int) -> float:
    """√(K / (K + d + 1)): the cosine to the gradient after K normal directions in d dimensions.

    Raises:
        SettingError: tangents or dimension below 1.
    """
    require(tangents >= 1, "tangents", tangents, ">= 1")
    require(dimension >= 1, "dimension", dimension, ">= 1")
    return (tangents / (tangents + dimension + 1)) ** 0.5


def alignment(engine: Engine, problem: Problem, params: Tree, batch: Batch, keys: Iterable[Key], *, state: Tree | None = None) -> dict[str, Any]:
    """The figures of this file's head, over all parameters and for each one.

    Args:
        engine: the rule to measure.
        problem: must be differentiable.
        params: where to measure; the engine's own trainables among them.
        batch: on what.
        keys: one estimate each; at least one.
        state: the engine's state; a first one by default.

    Returns:
        {"cosine", "norm_ratio", "relative_variance", "keys", "layers": {name: {"cosine", "norm_ratio", "relative_variance"}}}.

    Raises:
        UsageError: no key, or the problem has no gradient.
    """
    keys = list(keys)
    if not keys:
        raise UsageError("alignment got no keys; give at least one, for instance [altgrad.Key(0)].")
    if not problem.differentiable:
        raise UsageError(f"alignment compares with backprop's gradient, which {type(problem).__name__} does not have (differentiable is False).")
    state = engine.init(problem, params, keys[0]) if state is None else state
    sums: dict[str, Tensor] = {}
    for key in keys:
        exact = engine.exact(problem, params, batch, key) or exact_gradient(problem, params, batch, key)[1]
        found = engine.estimate(problem, params, state, batch, key, World()).grads
        for name, row in products(found, exact).items():
            sums[name] = sums[name] + row if name in sums else row
    layers = {name: figures(total, len(keys)) for name, total in sums.items()}
    return {**layers.pop(""), "keys": len(keys), "layers": layers}


def products(found: Mapping[str, Tensor], exact: Tree) -> dict[str, Tensor]:
    """Cosine, norm ratio and squared error over ‖g‖², [3], by name and, under "", for all parameters together."""
    inner = {}  # [3]: ⟨ĝ, g⟩, ⟨ĝ, ĝ⟩, ⟨g, g⟩
    for name, g in exact.items():
        g = g.double().flatten()
        estimate = found[name].double().flatten() if name in found else torch.zeros_like(g)
        inner[name] = torch.stack([estimate @ g, estimate @ estimate, g @ g])
    inner[""] = torch.stack(list(inner.values())).sum(0)
    rows = {}
    for name, (along, own, norm) in inner.items():
        tiny = torch.finfo(torch.float64).tiny
        rows[name] = torch.stack(
            [along / (own * norm).sqrt().clamp_min(tiny), (own / norm.clamp_min(tiny)).sqrt(), (own - 2 * along + norm) / norm.clamp_min(tiny)]
        )
    return rows


def figures(total: Tensor, count: int) -> dict[str, float]:
    """The means, by name."""
    cosine, ratio, variance = (total / count).tolist()
    return {"cosine": cosine, "norm_ratio": ratio, "relative_variance": variance}
