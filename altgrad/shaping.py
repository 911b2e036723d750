r"""Fitness to weights: what each member of a population counts for in the gradient estimate.

With members f_p = f(θ + σ ε_p), ε signed, and weights w the estimate of the loss's gradient is

    ĝ = (1/σ) Σ_p w_p ε_p,

so a weight grows with the loss and an optimizer that descends ĝ moves away from what was bad. `raw` and `baseline-pair` leave ĝ the unscaled
estimate of the smoothed loss's gradient. The others are free of the loss's scale, w = u / P with P members and the values u given at each;
their ĝ is a direction whose length means nothing.

Fitness that is NaN or infinite, of either sign, is worse than every finite one: rules that look at order only rank it last, all of it tied;
rules that use values see the worst finite value in its place. Where nothing is finite, or all members are equal, every weight is exactly 0
(for `raw` without pairs: all equal to the clean loss). Nothing here waits for the device: no value decides which code runs.

Sources: Sarkar et al., arXiv 2511.16652 (EGGROLL); Salimans et al., arXiv 1703.03864; Wierstra et al., JMLR 15, 2014.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.errors import SettingError, ShapeError, near_miss, require

DEVIATION_FLOOR = 1e-5  # added to the variance by z-scores, as in EGGROLL: equal members give zeros, not 0 / 0


class Scores(NamedTuple):
    """A population's losses, to be minimised; rows [0, P/2) are the + members and [P/2, P) the - members where there are pairs."""

    values: Tensor  # [P] float64, finite
    order: Tensor  # [P] float64, inf in place of what was not finite
    clean: Tensor | None  # 0-d: the loss of the unperturbed parameters
    groups: Tensor  # [P] int64 in [0, P): the group of each member


# ---------------------------------------------------------------------------------------------------------------- the rules


def raw(scores: Scores) -> Tensor:
    """w = (f - c) / P with the clean loss c; with pairs, where any constant cancels in ĝ, c is the mean: no clean pass, and less to round.

    Source: the smoothed loss E f(θ + σε) has the gradient E[f(θ + σε) ε] / σ (Nesterov and Spokoiny 2017, section 2).
    """
    moved = _centred(scores.values) if scores.clean is None else scores.values - scores.clean
    return moved / len(moved)


def z_score(scores: Scores) -> Tensor:
    """u = (f - mean f) / √(var f + 1e-5), var over P members. Source: EGGROLL's default."""
    centred = _centred(scores.values)
    return centred / _deviation(centred) / len(centred)


def group_z_score(scores: Scores) -> Tensor:
    """u = (f - the group's mean) / √(var f + 1e-5) with the variance of ALL members about the mean of all.

    One deviation for all, so that a group in which nothing differs much does not shout. Source: EGGROLL, s̄ = (s - μ_q) / σ̄ (q: the prompt).
    """
    return _centred(scores.values, scores.groups) / _deviation(_centred(scores.values)) / len(scores.values)


def centred_rank(scores: Scores) -> Tensor:
    """u = rank / (size - 1) - 1/2 in [-1/2, 1/2], rank from 0 (best) within the group; ties share their mean rank, a group of one gets 0.

    Source: Salimans et al. 2017, section 2.
    """
    low, high, size = _placed(scores.order, scores.groups)
    # Whole numbers until the last division: f -> -f negates the weights exactly, and equal members give exactly 0.
    return (low + high - size).double() / (2 * (size - 1).clamp(min=1)) / len(low)


def nes(scores: Scores) -> Tensor:
    """w = -u_k of the k-th best, u_k = max(0, ln(P/2 + 1) - ln k) / Σ_j(…) - 1/P; ties share their mean utility.

    Utilities hold their 1/P already: the positive ones sum to at most 1. Source: Wierstra et al. 2014, fitness shaping and table 1.
    """
    count = len(scores.order)
    low, high, _ = _placed(scores.order, torch.zeros_like(scores.groups))
    places = torch.arange(1, count + 1, dtype=torch.float64, device=scores.order.device)
    summed = (math.log(count / 2 + 1) - places.log()).clamp(min=0).cumsum(0)
    shared = torch.cat([summed.new_zeros(1), summed / summed[-1]])  # [P + 1]: what the k best hold together; its end is exactly 1
    return 1 / count - (shared[high] - shared[low]) / (high - low)


def sign(scores: Scores) -> Tensor:
    """u = ±sign(f₊ - f₋) for the two members of a pair, in {-1, 0, 1}: ĝ is the mean over pairs of sign(f₊ - f₋) ε / σ.

    Source: EGGROLL, the int8 model's update.
    """
    plus, minus = scores.order.chunk(2)
    compared = (plus > minus).double() - (plus < minus).double()  # inf against inf: 0, where a difference would be NaN
    return torch.cat([compared, -compared]) / len(scores.order)


def baseline_pair(scores: Scores) -> Tensor:
    """w = (f - b) / Q, b the mean of the group's first pair, which is evaluated without noise and gets 0; Q members are perturbed.

    The baseline cancels between the members of a pair; it matters to what looks at single weights (clipping, σ adaptation).
    Source: EGGROLL's released code, the variant with a baseline.
    """
    quiet = _first_pairs(scores.groups)
    baseline = _group_sum(scores.values * quiet, scores.groups) / 2
    return (scores.values - baseline) * ~quiet / (~quiet).sum().clamp(min=1)


SHAPINGS: dict[str, Callable[[Scores], Tensor]] = {
    "raw": raw,
    "z-score": z_score,
    "group-z-score": group_z_score,
    "centred-rank": centred_rank,
    "nes": nes,
    "sign": sign,
    "baseline-pair": baseline_pair,
}
NEEDS_PAIRS = frozenset({"sign", "baseline-pair"})
TAKES_GROUPS = frozenset({"group-z-score", "centred-rank", "baseline-pair"})


# ---------------------------------------------------------------------------------------------------------------- for engines


def shape(name: str, fitness: Tensor, *, pairs: bool, clean: Tensor | float | None = None, groups: Tensor | None = None, maximize: bool = False) -> Tensor:
    """The weights w of ĝ = (1/σ) Σ_p w_p ε_p, float64 [P].

    Args:
        name: one of SHAPINGS.
        fitness: [P] losses, P >= 1; any real dtype, taken to float64.
        pairs: rows [0, P/2) are the + members and [P/2, P) the - members of the same directions.
        clean: the loss of the unperturbed parameters, needed by `raw` without pairs; NaN there gives NaN weights, for the finite check to name.
        groups: [P] the group of each member as from `group_index`; for the names in TAKES_GROUPS.
        maximize: fitness is a reward; ĝ is then the gradient of its negative, so that optimizers still descend.

    Raises:
        SettingError: an unknown name, pairs in an odd population, or a name without the pairs, groups or clean loss it needs.
        ShapeError: fitness is not [P], or groups are not [P].
    """
    if fitness.ndim != 1 or not len(fitness):
        raise ShapeError(f"fitness has the shape {tuple(fitness.shape)}; it must be one number for each member, [P] with P >= 1.")
    if groups is not None and groups.shape != fitness.shape:
        raise ShapeError(f"groups have the shape {tuple(groups.shape)} beside fitness {tuple(fitness.shape)}; give the group of every member.")
    check(name, len(fitness), pairs=pairs, groups=None if groups is None else 1)  # how many there are is on the device
    if name == "raw" and not pairs and clean is None:
        raise SettingError("shaping='raw' without antithetic pairs subtracts the clean loss, but none was given; hand in clean=, or use pairs.")
    losses = -fitness.double() if maximize else fitness.double()
    finite = losses.isfinite()
    baseline = None
    if clean is not None and not pairs:
        baseline = torch.as_tensor(clean, dtype=torch.float64, device=losses.device)
        baseline = -baseline if maximize else baseline
    scores = Scores(
        values=clean_fitness(losses)[0],
        order=torch.where(finite, losses, torch.inf),
        clean=baseline,
        groups=torch.zeros_like(losses, dtype=torch.int64) if groups is None else groups.to(losses.device, torch.int64),
    )
    return torch.where(finite.any(), SHAPINGS[name](scores), 0.0)


def check(name: str, members: int, *, pairs: bool, groups: int | None = None) -> None:
    """Raise SettingError unless shaping `name` can serve this population in `groups` groups: needs no fitness, for before step 0."""
    if str(name) not in SHAPINGS:
        raise SettingError(near_miss("shaping", str(name), SHAPINGS))
    if pairs:
        require(members % 2 == 0, "population", members, "even with antithetic pairs; use one member more, or antithetic=False")
    if name in NEEDS_PAIRS and not pairs:
        raise SettingError(f"shaping={name!r} works on antithetic pairs, so it needs antithetic=True; or use shaping='centred-rank'.")
    if name == "group-z-score" and groups is None:
        raise SettingError("shaping='group-z-score' needs groups, and there are none; use shaping='z-score'.")
    if groups is not None:
        if name not in TAKES_GROUPS:
            raise SettingError(f"shaping={name!r} does not look at groups; use one of {', '.join(sorted(TAKES_GROUPS))}, or no groups.")
        _divides(members, groups, 2 if pairs else 1)
    if name == "baseline-pair":
        least = 4 * (groups or 1)
        require(members >= least, "population", members, f"at least {least} with shaping='baseline-pair': the first pair of a group is not perturbed")


def clean_fitness(fitness: Tensor, *, maximize: bool = False) -> tuple[Tensor, Tensor]:
    """`fitness` [P] with the worst finite value in place of NaN and infinities (0 where none is finite), and how many there were, 0-d int64."""
    finite = fitness.isfinite()
    worst = torch.where(finite, fitness, torch.inf).min() if maximize else torch.where(finite, fitness, -torch.inf).max()
    return torch.where(finite, fitness, torch.where(worst.isfinite(), worst, 0.0)), (~finite).sum()


def silent(name: str, members: int, groups: Tensor | None = None) -> Tensor:
    """Which of `members` are evaluated without noise, bool [members]: with `baseline-pair` the first pair of each group, else none."""
    if name not in SHAPINGS:
        raise SettingError(near_miss("shaping", name, SHAPINGS))
    if name != "baseline-pair":
        return torch.zeros(members, dtype=torch.bool, device=None if groups is None else groups.device)
    check(name, members, pairs=True)
    return _first_pairs(torch.zeros(members, dtype=torch.int64) if groups is None else groups.long())


def group_index(members: int, groups: int, *, pairs: bool) -> Tensor:
    """The group of each member, int64 [members]: equal contiguous groups, of whole pairs where there are pairs.

    Raises:
        SettingError: the population does not divide into so many groups.
    """
    _divides(members, groups, 2 if pairs else 1)
    index = torch.arange(groups).repeat_interleave(members // (2 if pairs else 1) // groups)
    return torch.cat([index, index]) if pairs else index


# ---------------------------------------------------------------------------------------------------------------- arithmetic


def _divides(members: int, groups: int, each: int) -> None:
    units = members // each
    require(groups >= 1 and units % groups == 0, "groups", groups, f"a divisor of the {units} {'members' if each == 1 else 'pairs'}")


def _centred(values: Tensor, groups: Tensor | None = None) -> Tensor:
    """values - their mean (the group's); taking off the least first makes equal values exactly 0."""
    if groups is None:
        above = values - values.min()
        return above - above.mean()
    least = torch.full_like(values, torch.inf).scatter_reduce(0, groups, values, "amin")
    above = values - least[groups]
    return above - _group_sum(above, groups) / _group_sum(torch.ones_like(above), groups)


def _deviation(centred: Tensor) -> Tensor:
    return (centred.square().mean() + DEVIATION_FLOOR).sqrt()


def _group_sum(values: Tensor, groups: Tensor) -> Tensor:
    """The sum over each member's group, [P]; there are never more groups than members, so no count is needed."""
    return torch.zeros_like(values).index_add(0, groups, values)[groups]


def _placed(order: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each member: how many of its group are better, how many are no worse (itself counted), and how many there are; int64 [P] each."""
    count = len(order)
    better = torch.searchsorted(order.sort().values, order)  # equal losses, equal whole numbers
    keys = groups * count + better
    sorted_keys = keys.sort().values
    sizes = torch.zeros_like(groups).index_add(0, groups, torch.ones_like(groups))
    start = (sizes.cumsum(0) - sizes)[groups]
    return torch.searchsorted(sorted_keys, keys) - start, torch.searchsorted(sorted_keys, keys, right=True) - start, sizes[groups]


def _first_pairs(groups: Tensor) -> Tensor:
    """Both members of each group's first pair, bool [P]."""
    upper = groups.chunk(2)[0]
    place = torch.arange(len(upper), device=groups.device)
    first = torch.full_like(upper, len(upper)).scatter_reduce(0, upper, place, "amin")
    quiet = place == first[upper]
    return torch.cat([quiet, quiet])
