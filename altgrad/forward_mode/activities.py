r"""Perturbing what layers put out instead of what they hold.

For a layer l with output y_l (one row an example n) the tangents are ε_k ~ N(0, I) of y_l's shape; one jvp gives, per example,
j_kn = Σ_l ⟨∂L_n/∂y_ln, ε_kln⟩. Since E[j ε] = ∂L/∂y, the layer's parameters get

    δ_ln = (1/K) Σ_k j_kn ε_kln,      ∂W_l = (1/N) Σ_n δ_ln x_lnᵀ,      ∂b_l = (1/N) Σ_n δ_ln.

Where a layer's output y meets relu and nothing else, ∂L/∂y is 0 wherever relu'(y) is, and so is δ made: what is known needs no estimate.
Noise at units that are dead for one example would reach the others through the weights; leaving it out costs one comparison.

Memory: `store` keeps every layer's input and noise until j is known; `replay` keeps nothing, runs the plain forward once more,
draws the same noise from its address and adds each layer's gradient as it passes.

Source: Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses", ICLR 2023, arXiv 2210.03310.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from altgrad.credit import per_example
from altgrad.errors import CapabilityError
from altgrad.forward_mode.custom import following_custom_functions
from altgrad.forward_mode.dual import CONSTANT, Dual, Trace
from altgrad.forward_mode.guide import Guide
from altgrad.forward_mode.lazy import Copied, Lazy
from altgrad.kernels import noise
from altgrad.perturb import Dense
from altgrad.problem import Batch, Problem
from altgrad.rng import Key, tensor_id
from altgrad.samplers import AddressedSamplers

Local = Callable[[Tensor], list[Tensor | None]]
LONG = 1 << 14  # numbers: noise of a site, one tangent's, from which a pass over all of it costs more than a call for each tangent
RELU = {F.relu, torch.relu, torch.Tensor.relu}
READS = {getattr(torch.Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout")}  # tell nothing of a tensor's values


class SiteParameter:
    """A parameter whose layer's output is perturbed in its stead; used outside any layer it falls back to weight tangents."""

    is_site = True

    def __init__(self, trace: "ActivityTrace", name: str, value: Tensor):
        self.trace, self.name, self.value = trace, name, value
        self.used = False

    def dense(self) -> Tensor:
        """Weight tangents [K (+ guides), *shape], for operations that have no layer rule; noted on the trace."""
        return self.trace.fallen(self.name, self.value)


class ActivityTrace(Trace):
    """One pass with perturbed layer outputs: draws the noise, and turns the measured derivatives into gradients.

    Args:
        key: the address of the noise.
        draws: the member numbers of this pass's random tangents, K of them.
        law: "normal" or "sign".
        examples: N, the examples in the batch; first: the global index of the first one.
        store: keep inputs and noise for `gradients`; otherwise run a `replay`.
        guide: unit directions at guided sites, which random ones keep clear of; None for random directions alone.
        lead: measure the guides too, one extra tangent each (in the first of several passes only).
        scale: the divisor of the random part, K over all passes.
        grads: where the gradients are added up, by parameter name.
    """

    def __init__(
        self,
        key: Key,
        draws: Sequence[int],
        *,
        law: str,
        examples: int,
        first: int,
        store: bool,
        guide: Guide | None,
        lead: bool = True,
        scale: int,
        grads: dict[str, Tensor] | None = None,
    ):
        self.guides = guide.count if guide and lead else 0
        super().__init__(len(draws) + self.guides)
        self.key, self.draws, self.law, self.examples, self.first, self.store, self.guide, self.scale = (
            key,
            draws,
            law,
            examples,
            first,
            store,
            guide,
            max(1, scale),
        )
        self.calls: Counter[str] = Counter()
        self.records: list[tuple[list[str | None], Local, Tensor, Tensor | None, int, str]] = []
        self.latest = ""  # the site that was perturbed last
        self.gated: dict[str, bool] = {}  # site -> whether all that its output met was relu; sites that met nothing yet are absent
        self.alive: dict[str, Tensor] = {}  # site -> where relu let its output through
        self.weights: dict[str, Dense] = {}  # parameters that fell back to weight tangents
        self.moved: Tensor | None = None  # [K (+ guides), N] or [K (+ guides), 1]: the measured derivatives
        self.grads: dict[str, Tensor] = {} if grads is None else grads
        self.dtypes: dict[str, torch.dtype] = {}
        self.rows_are_examples = True  # set by `independent_rows`: what a layer's rows do reaches no other example's loss
        self.by_batch = 0  # sites whose rows are not examples: one coefficient a batch

    def parameters(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters as sites."""
        self.dtypes = {name: value.dtype for name, value in params.items()}
        return {name: Dual(value, None, self, SiteParameter(self, name, value)) for name, value in params.items()}

    def base(self, drawn: Tensor) -> Tensor | Lazy | None:
        if self.guide is not None:
            return None
        # A record needs its noise as it was drawn, so the sum grows in a copy: the same additions as without a record, the same bits.
        return Copied(drawn) if self.store and not self.plain else drawn

    def draw_ahead(self, weight: Any, bias: Any, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        if torch.is_autocast_enabled(like.device.type):
            return None  # the output's dtype is autocast's to choose
        name = owners_of(weight, bias)[2]
        return self.draw(f"{name}@{self.calls[name]}", shape, like.dtype, like.device)

    def draw(self, site: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The noise of a site [K, *shape], addressed by the global number of the example."""
        size = torch.Size(shape)
        start = self.first * (size.numel() // self.examples) if size[0] == self.examples else 0
        return noise.draw(self.law, self.key, tensor_id(site), self.draws, size, start=start, dtype=dtype, device=device)

    def perturbed(self, output: Dual) -> None:
        output.site = self.latest

    def met(self, func: Any, args: Any, kwargs: Any) -> None:
        if getattr(func, "__name__", "") in CONSTANT or func in READS:
            return
        for leaf in tree_leaves((args, kwargs)):
            if not isinstance(leaf, Dual) or leaf.site is None:
                continue
            self.gated[leaf.site] = through = func in RELU and self.gated.get(leaf.site, True)
            if not through:
                self.alive.pop(leaf.site, None)
            elif self.store:
                self.alive[leaf.site] = leaf.primal > 0
            if through and (kwargs.get("inplace") or args[1:] == (True,)):
                leaf.site = None  # from here on it is what relu put out

    def site(
        self, weight: Any, bias: Any, output: Tensor, tangent: Tensor | None, local: Local, *, channel: int, drawn: Tensor | None = None, included: bool = False
    ) -> Tensor | Lazy | None:
        first, second, name = owners_of(weight, bias)
        call, self.calls[name] = self.calls[name], self.calls[name] + 1
        if drawn is None:
            drawn = self.draw(f"{name}@{call}", output.shape, output.dtype, output.device)
        self.latest = f"{name}@{call}"
        unit, slot = None, -1
        if self.guide is not None and self.guide.knows(name, output, channel):
            if call:
                raise CapabilityError(f"guess='local' guides a layer that runs once a pass, but {name!r} runs more often; use guess='random'.")
            unit, slot = self.turned(self.guide.direction(name, output, channel)), len(self.draws) + self.guide.slot(name)
            drawn -= (drawn * unit).sum(tuple(range(2, drawn.ndim)), keepdim=True) * unit
            unit = unit if self.guides else None
        if self.plain:
            if self.gated.get(self.latest):
                self.alive = {self.latest: output > 0}
            self.collect([first, second], local, drawn, unit, slot, self.latest)
            return None
        if self.store:
            self.records.append(([first, second], local, drawn, unit, slot, self.latest))
        if not self.guides:
            if included:
                return tangent
            start = Copied(drawn) if self.guide is not None else self.base(drawn)  # never the record's own: an in-place activation may write into it
            assert start is not None
            if tangent is None:
                return start
            return (start.whole() if isinstance(start, Lazy) else start).add_(tangent)
        tangent = output.new_zeros(self.members, *output.shape) if tangent is None else tangent
        tangent[: len(self.draws)] += drawn
        if unit is not None:
            tangent[slot] += unit
        return tangent

    def fallen(self, name: str, value: Tensor) -> Tensor:
        """Weight tangents [K (+ guides), *shape] for a parameter that is used outside any layer."""
        if name not in self.weights:
            self.weights[name] = Dense(self.key, name, value, self.draws, self.law)
        drawn = self.weights[name].dense()
        return drawn if not self.guides else torch.cat([drawn, drawn.new_zeros(self.guides, *drawn.shape[1:])])

    def turned(self, unit: Tensor) -> Tensor:
        """±unit, a sign an example: where examples mix, one coefficient for the batch is unbiased only so; elsewhere the sign cancels."""
        signs = noise.draw(
            "sign", self.key, tensor_id("guide signs"), [0], torch.Size((self.examples,)), start=self.first, dtype=unit.dtype, device=unit.device
        )
        return unit * signs.reshape(-1, *(1 for _ in unit.shape[1:]))

    def collect(self, owners: list[str | None], local: Local, drawn: Tensor, unit: Tensor | None, slot: int, site: str) -> None:
        """δ from the noise and the measured derivatives, and from δ the gradients of the layer's parameters."""
        assert self.moved is not None
        count, moved = len(self.draws), self.moved
        by_example = moved.shape[1] == self.examples and drawn.shape[1] == self.examples and self.rows_are_examples and not self.mixes_examples
        if by_example:
            spread = (-1, self.examples, *(1 for _ in drawn.shape[2:]))
            share = moved / self.examples
        else:
            self.by_batch += 1
            spread = (-1, *(1 for _ in drawn.shape[1:]))
            share = moved.mean(1)
        coefficients = (share[:count] / self.scale).to(drawn.dtype).reshape(spread)
        delta = weighted_sum(drawn, coefficients)
        if unit is not None:
            delta += unit * share[slot].to(drawn.dtype).reshape(spread[1:] if by_example else ())
        alive = self.alive.get(site)
        if alive is not None:
            delta.mul_(alive)  # its own memory, made above
        for owner, grad in zip(owners, local(delta), strict=False):
            if owner is not None and grad is not None:
                grad = grad.to(self.dtypes[owner])  # under autocast a layer's output is narrower than its parameters
                self.grads[owner] = self.grads[owner].add_(grad) if owner in self.grads else grad

    def settle(self, moved: Tensor) -> None:
        """Take the measured derivatives of the losses, [K (+ guides), N]."""
        self.moved = moved

    def gradients(self) -> None:
        """Complete `grads`: collect the recorded sites (a replay has none), and add what fell back to weight tangents."""
        for record in self.records:
            self.collect(*record)
        self.records = []
        assert self.moved is not None
        total = (self.moved.mean(1)[: len(self.draws)] / self.scale).float()
        for name, drawn in self.weights.items():
            fallen = drawn.combine(total)
            self.grads[name] = self.grads[name].add_(fallen) if name in self.grads else fallen

    def begin_replay(self) -> None:
        """From here on, layers run plainly and add their gradients as they pass."""
        self.plain = True
        self.calls.clear()


class FirstRow(ActivityTrace):
    """Noise in the first row of every layer's output and nowhere else: the derivative of example 0's loss alone should move."""

    def draw(self, site: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        drawn = super().draw(site, shape, dtype, device)
        drawn[:, 1 if shape[0] == self.examples else 0 :] = 0  # other shapes share one coefficient a batch anyway
        return drawn

    def fallen(self, name: str, value: Tensor) -> Tensor:
        return value.new_zeros(1, *value.shape)


def weighted_sum(drawn: Tensor, coefficients: Tensor) -> Tensor:
    """Σ_k c_k drawn_k, [...]; reads long noise once, and may use up short noise, which nothing asks for again."""
    if not len(drawn) or drawn[0].numel() < LONG:
        return drawn.mul_(coefficients).sum(0)
    total = drawn[0] * coefficients[0]
    for k in range(1, len(drawn)):
        total.addcmul_(drawn[k], coefficients[k])
    return total


def independent_rows(problem: Problem, weights: dict[str, Tensor], batch: Batch, key: Key) -> bool:
    """Whether row n of every layer's output belongs to example n and to no other, so that each example may have a coefficient of its own.

    False where layers mix examples (statistics over the batch, attention across it) and where the first axis is not the batch's, though it
    has its length (time-major sequences as long as the batch).
    """
    examples = problem.batch_size_of(batch)
    if examples == 1:
        return True
    trace = FirstRow(key.fold("first row"), [0], law="sign", examples=examples, first=0, store=False, guide=None, lead=True, scale=1)
    with AddressedSamplers(key.fold("samplers"), first=batch.first, examples=examples), following_custom_functions():
        value = per_example(problem.losses(trace.parameters(weights), batch, problem.fresh_buffers()))
    if not isinstance(value, Dual) or value.shape[0] != examples:
        return True  # the loss has one value a batch, and so has the coefficient
    own, others = value.tangent[:, 0].abs().max(), value.tangent[:, 1:].abs().max()
    return not bool(others > 1e-6 * own)


def owners_of(weight: Any, bias: Any) -> tuple[str | None, str | None, str]:
    """The names of a layer's site parameters, weight and bias, and the one that names the site."""
    first, second = (p.source.name if isinstance(p, Dual) and getattr(p.source, "is_site", False) else None for p in (weight, bias))
    return first, second, first or second or ""
