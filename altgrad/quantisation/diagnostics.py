r"""How well surrogates do, layer by layer: numbers for the log. With w a weight, q its quantiser, h = F' the surrogate, g the gradient of w:

    estimating-error     ‖f(w) - q(w)‖₂,  f = sign(w) |w|^(1/o) for ReSTE, F for others                summed over layers
    gradient-variance    the variance of |g|: how unlike the steps of a layer's weights are             summed over layers
    flips                share of the weights whose q(w) changed since the step before
    dead                 share of the weights with h(w) = 0, which nothing moves: |w| > t for ReSTE
    cosine               ⟨g, ∇L_σ⟩ / (‖g‖ ‖∇L_σ‖) to the gradient of the smoothed loss L_σ(w) = E L(w + σ s ε)

∇L_σ is estimated by antithetic pairs with addressed noise, s being each tensor's root mean square: d_p = (L(w + σsε_p) - L(w - σsε_p)) / 2σs, ĝ_p = d_p ε_p.
Both ⟨g, mean ĝ_p⟩ and ‖∇L_σ‖² ≈ Σ_{p≠q} ⟨ĝ_p, ĝ_q⟩ / P (P - 1) are unbiased, so noise does not shrink the cosine; it makes it uncertain (it may leave
[-1, 1]), and where the pairs cannot tell ‖∇L_σ‖ from 0 it is NaN. Pairs should be several times √(number of parameters).

Source: estimating error and gradient stability: Wu et al. 2023, arXiv 2308.06689.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from altgrad.engine import Tree
from altgrad.kernels import noise
from altgrad.problem import Batch, Problem
from altgrad.quantisation.layers import WEIGHT, named, own_part
from altgrad.quantisation.packing import dotted
from altgrad.quantisation.quantisers import TernaryWeight, nonzero, trailing
from altgrad.rng import Key, tensor_id
from altgrad.samplers import AddressedSamplers
from altgrad.surrogates.modules import BinaryWeight
from altgrad.surrogates.pointwise import Pointwise

KEPT = "levels/"  # in the engine's state
BLOCK = 16  # pairs drawn at once


class Weight(NamedTuple):
    """A weight with two or three levels: its parameter's name and its quantiser."""

    parameter: str
    part: nn.Module

    @property
    def estimator(self) -> Pointwise:
        return self.part.estimator  # type: ignore[return-value]

    def seen(self, w: Tensor) -> Tensor:
        """What the surrogate is given."""
        return w / nonzero(w.abs().amax(trailing(self.part.axes), keepdim=True)) if isinstance(self.part, TernaryWeight) else w

    def levels(self, w: Tensor) -> Tensor:
        """q, without its scale."""
        return self.estimator.value(self.seen(w))


def weights_of(problem: Problem) -> dict[str, Weight]:
    """The quantised weights of two or three levels of a problem's model, by the names they have in the plain model."""
    model = getattr(problem, "model", None)
    found = {}
    for name, layer in named(model).items() if isinstance(model, nn.Module) else ():
        part = own_part(layer)
        if isinstance(part, (BinaryWeight, TernaryWeight)):
            found[dotted(name, WEIGHT)] = Weight(dotted(name, f"parametrizations.{WEIGHT}.original"), part)
    return found


def levels(weights: Mapping[str, Weight], params: Tree) -> Tree:
    """q(w) of every weight, to be told from the next step's: engine state."""
    return {KEPT + label: weight.levels(params[weight.parameter].detach()) for label, weight in weights.items() if weight.parameter in params}


def layer_figures(
    weights: Mapping[str, Weight], params: Tree, grads: Mapping[str, Tensor], before: Tree, slope: Callable[[Pointwise], Pointwise]
) -> dict[str, Tensor]:
    """All but the cosine, [] by "figure/weight" and by "figure" for all weights together.

    Args:
        before: `levels` of the step before.
        slope: the surrogate that is in use in the place of a quantiser's own.
    """
    found: dict[str, Tensor] = {}
    counts = []
    for label, weight in weights.items():
        if weight.parameter not in params:
            continue
        w = weight.seen(params[weight.parameter].detach())
        q, chosen = weight.estimator.value(w), slope(weight.estimator)
        soft = getattr(chosen, "soft_sign", chosen.primitive)(w)
        last = before.get(KEPT + label, q)
        found[f"estimating-error/{label}"] = torch.linalg.vector_norm(soft - q)
        found[f"flips/{label}"] = ((q - last).abs() > 0.5).float().mean()  # a mean over ranks may be a rounding away
        found[f"dead/{label}"] = (chosen.derivative(w) == 0).float().mean()
        if weight.parameter in grads:
            found[f"gradient-variance/{label}"] = grads[weight.parameter].abs().var(correction=0)
        counts.append((label, w.numel()))
    total = sum(count for _, count in counts)
    if counts:
        for figure in ("flips", "dead"):
            found[figure] = torch.stack([found[f"{figure}/{label}"] * (count / total) for label, count in counts]).sum()
        for figure in ("estimating-error", "gradient-variance"):
            own = [value for name, value in found.items() if name.startswith(f"{figure}/")]
            found[figure] = torch.stack(own).sum() if own else torch.zeros(())
    return found


@torch.no_grad()
def smoothed_cosines(problem: Problem, params: Tree, grads: Mapping[str, Tensor], batch: Batch, key: Key, *, sigma: float, pairs: int) -> dict[str, Tensor]:
    """cosine/<parameter> and `cosine` of gradients to that of the smoothed loss.

    Args:
        key: the address of the noise; the model's own draws are those of the estimate under this key.
        sigma: σ, a share of each tensor's root mean square (of 1 for a tensor of zeros), > 0.
        pairs: P >= 2; 2 P forward passes.
    """
    own = {name: value.detach() for name, value in params.items() if name in grads}
    scales = {name: rms(value) for name, value in own.items()}
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in own.items()}
    squares = {name: torch.zeros((), dtype=torch.float64, device=value.device) for name, value in own.items()}
    drawn: Tree = {}
    for pair in range(pairs):
        if pair % BLOCK == 0:
            block = range(pair, min(pair + BLOCK, pairs))
            drawn = {
                name: noise.draw("normal", key.fold("smoothing"), tensor_id(name), block, value.shape, dtype=value.dtype, device=value.device)
                for name, value in own.items()
            }
        moves = {name: several[pair % BLOCK] for name, several in drawn.items()}
        losses = []
        for side in (1, -1):
            moved = {name: value + side * sigma * scales[name] * moves[name] for name, value in own.items()}
            with AddressedSamplers(key.fold("samplers"), first=batch.first, examples=problem.batch_size_of(batch)):
                losses.append(problem.objective({**params, **moved}, batch, problem.fresh_buffers()).double())
        slope = (losses[0] - losses[1]) / (2 * sigma)
        for name, move in moves.items():
            each = slope / scales[name].double() * move.double()
            sums[name] += each
            squares[name] += each.square().sum()
    return cosines_of(grads, sums, squares, pairs)


def cosines_of(grads: Mapping[str, Tensor], sums: Tree, squares: Tree, pairs: int) -> dict[str, Tensor]:
    """The unbiased quotients of this file's head, from Σ ĝ_p and Σ ‖ĝ_p‖²."""
    rows = {}  # [3]: ⟨g, ∇L⟩, ‖g‖², ‖∇L‖²
    for name, total in sums.items():
        g = grads[name].double()
        rows[name] = torch.stack([(g * total).sum() / pairs, g.square().sum(), (total.square().sum() - squares[name]) / (pairs * (pairs - 1))])
    rows[""] = torch.stack(list(rows.values())).sum(0)
    return {f"cosine/{name}" if name else "cosine": row[0] / (row[1] * row[2]).sqrt() for name, row in rows.items()}  # NaN where ‖∇L‖² is not above 0


def rms(value: Tensor) -> Tensor:
    """The root mean square, 1 for a tensor of zeros."""
    found = value.square().mean().sqrt()
    return torch.where(found > 0, found, torch.ones_like(found))


__all__ = ["Weight", "layer_figures", "levels", "smoothed_cosines", "weights_of"]
