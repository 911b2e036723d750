r"""Losses to coefficients: (L_kn - b_kn) / (K N). A baseline that does not depend on the noise it is subtracted for leaves the mean alone.

clean   b_n = L_n without noise: one more pass for all copies, and some 300 times less variance: with it the estimate is a finite difference
mean    b = a running mean over the steps before this one: no pass, and no more than the loss's level is taken off
loo     b_kn = the mean loss of example n over the other copies (the other pairs): no pass, >= 2 copies (pairs)
none    b = 0, as published

Source: Mnih, Rezende 2016, arXiv 1602.06725 (leave-one-out); Jiang et al. 2024, arXiv 2305.08960 (none).
"""

import torch
from torch import Tensor

BASELINES = ("clean", "mean", "loo", "none")
DECAY = 0.9  # of the running mean: ten steps or so


def coefficients(losses: Tensor, count: int, baseline: Tensor | None) -> Tensor:
    """(L - b) / (K N) of some copies' losses [copies, N], (ℓ - b) / (K N P) of local ones [copies, N, P]; K = `count` copies in all."""
    centred = losses if baseline is None else losses - baseline
    return centred / (count * losses[0].numel())


def leave_one_out(losses: Tensor, *, pairs: bool) -> Tensor:
    """The mean loss of the other copies, [K, N], of all losses [K, N]; pairs are laid out all + then all -, and left out as a whole."""
    if not pairs:
        return (losses.sum(0) - losses) / (len(losses) - 1)
    own = losses.unflatten(0, (2, -1))  # [sign, pairs, N]
    both = own.sum(0)
    others = (both.sum(0) - both) / (2 * (len(both) - 1))  # [pairs, N]
    return torch.cat([others, others])


def first_state(device: torch.device) -> dict[str, Tensor]:
    """The running mean of nothing yet."""
    return {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("baseline", "baseline_weight")}


def running(state: dict[str, Tensor]) -> Tensor:
    """b from the state: weights of the steps so far sum to less than one at first."""
    return torch.where(state["baseline_weight"] > 0, state["baseline"] / state["baseline_weight"].clamp_min(1e-30), 0.0)


def followed(state: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """The state after a step with this mean loss."""
    return {
        "baseline": DECAY * state["baseline"] + (1 - DECAY) * loss.double(),
        "baseline_weight": DECAY * state["baseline_weight"] + (1 - DECAY),
    }
