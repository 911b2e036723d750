r"""One noisy pass: the noise of every layer, and from it the gradients once the losses are known.

For a layer l with output y_l = phi(x_l; W_l) the pass goes on with y_l + σ_l ε_l. With the coefficients c_kn = (L_kn - b_n) / (K N) of copy k and
example n

    ∂E L/∂W_l = Σ_kn c_kn ∂⟨ε_kln, y_ln⟩/∂W_l / σ_l       (for a linear layer ε xᵀ),
    ∂E L/∂σ_l = Σ_kn c_kn Σ_u (ε²_klnu - 1) / σ_l.

Memory: `store` keeps every layer's input and noise; a replay keeps neither, runs the noisy pass again from the same addresses and adds each
layer's gradient as it passes. Both add the same numbers in the same order.

Source: Jiang et al., "One forward is enough for neural network training via likelihood ratio method", ICLR 2024, arXiv 2305.08960, theorem 1.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, get_unwrapped, is_batchedtensor, maybe_current_level, maybe_get_bdim

from altgrad.errors import CapabilityError
from altgrad.inner import differentiated, refused
from altgrad.noisy.credited import Credit, touched
from altgrad.noisy.draws import Draws
from altgrad.noisy.parameters import Noisy

Local = Callable[[Tensor, Tensor], Sequence[Tensor | None]]  # (inputs, δ) -> gradients of weight and bias


@dataclass
class Record:
    """What a layer's gradient is made of: its parameters, its input, the noise of its output."""

    weight: Any
    bias: Any
    inputs: Tensor
    noise: Tensor
    local: Local
    name: str
    site: str
    units: int | None  # the axis of the output along which the first axis of the weight lies


class Sums:
    """Gradients and scores of σ, added up over passes."""

    def __init__(self, dtypes: dict[str, torch.dtype]):
        self.dtypes = dtypes
        self.grads: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}  # layer -> Σ c (ε² - 1), averaged over units
        self.by_batch = 0  # layers whose rows are not examples: one coefficient a copy

    def add(self, name: str, grad: Tensor) -> None:
        grad = grad.to(self.dtypes[name])
        self.grads[name] = self.grads[name].add_(grad) if name in self.grads else grad


class NoisyTrace:
    """One pass of one or several copies.

    Args:
        draws: the addresses of the noise; directions: those of this pass; half: of one pair only its first or second copy.
        sigma: noise scale by layer name.
        independent: rows of layers belong to one example each, so that each may have its own coefficient.
        batched: copies run under one vmap; otherwise there is one copy and no vmap.
        sums: where gradients go.
        store: keep records for `collect_all`.
        coefficients: [copies, N], [copies, N, P] or [copies, 1], in a replay.
        focus: layer-wise: the one layer that is noisy; "" for the parameters that no layer takes; None for everything.
        cache: layer-wise: clean outputs by site, which stand in for the layers before the noisy one.
        scored: measure the score of σ.
        credit: where losses are local, which of them each layer touches; coefficients are [copies, N, P] then.
    """

    def __init__(
        self,
        draws: Draws,
        directions: Sequence[int],
        *,
        half: int | None = None,
        sigma: Callable[[str], float | Tensor],
        independent: bool,
        batched: bool,
        sums: Sums,
        store: bool = True,
        coefficients: Tensor | None = None,
        focus: str | None = None,
        cache: dict[str, Tensor] | None = None,
        scored: bool = False,
        credit: Credit | None = None,
    ):
        self.draws, self.directions, self.half, self.sigma, self.sums = draws, directions, half, sigma, sums
        self.independent, self.batched, self.store, self.coefficients = independent, batched, store, coefficients
        self.focus, self.cache, self.scored, self.credit = focus, cache, scored, credit
        self.calls: Counter[str] = Counter()
        self.records: list[Record] = []
        self.weights: dict[str, Tensor] = {}  # noise of the parameters that no layer takes, [copies, *shape]
        self.begun = focus is None or focus == ""  # layer-wise: whether the noisy layer has been reached
        self.computed = 0  # layers that were computed, not taken from the cache

    def parameters(self, params: dict[str, Tensor], chosen: set[str]) -> dict[str, Tensor]:
        """The parameters, those of `chosen` layers noisy."""
        return {name: Noisy(value, self, parameter=name) if name in chosen else value for name, value in params.items()}

    def site(self, weight: Any, bias: Any, inputs: Tensor, compute: Callable[[], Tensor], local: Local, *, units: int | None = None) -> Tensor:
        """The noisy output of a layer."""
        name = next(part.parameter for part in (weight, bias) if isinstance(part, Noisy))
        call = self.calls[name]
        self.calls[name] += 1
        site = f"{name}@{call}"
        mine = self.focus is None or self.focus == name
        if not self.begun and self.cache is not None and site in self.cache:
            value, self.begun = self.cache[site].clone(), mine  # a clone: an in-place activation may write into it
        else:
            value = compute()
            self.computed += 1
        if differentiated() or value.requires_grad:
            raise refused(f"layer {name!r}", "the derivative depends on the layer's weight, of which noise on the layer's output tells nothing")
        if not value.is_floating_point():
            raise CapabilityError(f"layer {name!r} puts out {value.dtype}; noise can be added to floating point outputs only. Leave it out with layers=….")
        return self.noised(Record(weight, bias, inputs, value, local, name, site, units), site, value) if mine else value

    def noised(self, record: Record, site: str, value: Tensor) -> Tensor:
        """value + σ ε; the record is kept, or turned into gradients at once in a replay."""
        drawn = self.halved(self.draws.site(site, self.directions, value.shape, value.dtype, value.device))
        record.noise = drawn if self.batched else drawn[0]
        moved = self.with_noise(value, record.noise, self.sigma(record.name))
        if self.coefficients is not None:
            self.collect(record, self.coefficients)
        elif self.store:
            self.records.append(record)
        return moved

    def halved(self, drawn: Tensor) -> Tensor:
        return drawn if self.half is None else drawn[self.half : self.half + 1]

    def with_noise(self, value: Tensor, drawn: Tensor, sigma: float | Tensor) -> Tensor:
        if isinstance(sigma, Tensor):
            drawn, sigma = drawn * sigma.to(drawn.dtype), 1.0
        if not self.batched:
            return value.add_(drawn, alpha=sigma)  # the layer's own output, which nobody else has seen
        level = maybe_current_level()
        assert level is not None
        return torch.add(value, _add_batch_dim(drawn, 0, level), alpha=sigma)

    def fallen(self, name: str, value: Tensor) -> Tensor:
        """A parameter that no layer takes: value + σ ε, one ε a copy."""
        if self.focus:
            return value
        if name not in self.weights:
            self.weights[name] = self.halved(self.draws.weights(name, self.directions, value.shape, value.dtype, value.device))
        drawn = self.weights[name]
        return self.with_noise(value.clone() if not self.batched else value, drawn if self.batched else drawn[0], self.sigma(name))

    def collect(self, record: Record, coefficients: Tensor) -> None:
        """δ = c ε / σ, and from δ the gradients of the layer's parameters."""
        if self.credit is None:
            self.settle(record, coefficients, (0, 1), last=True)
            return
        shares = self.credit.masks(record)
        for number, (mask, places) in enumerate(shares):
            self.settle(record, touched(coefficients, mask), places, last=number == len(shares) - 1)

    def settle(self, record: Record, coefficients: Tensor, places: Sequence[int], *, last: bool) -> None:
        """The gradients of a layer's weight (0) and bias (1), where in `places`, from coefficients [copies, N] or, of each unit, [copies, N, units]."""
        drawn = record.noise if self.batched else record.noise[None]  # [copies, *shape]
        examples = self.draws.examples
        by_example = self.independent and coefficients.shape[1] == examples and drawn.ndim > 1 and drawn.shape[1] == examples
        rows = coefficients if by_example else coefficients.sum(1, keepdim=True)
        self.sums.by_batch += last and not by_example
        sigma = self.sigma(record.name)
        rows = rows.reshape(self.spread(record, rows, drawn))
        if self.scored and last:
            units = drawn[0, 0].numel() if by_example else drawn[0].numel()
            score = (rows.double() * (drawn.double().square() - 1)).sum() / units
            self.sums.scores[record.name] = self.sums.scores.get(record.name, 0) + score
        scaled = (rows / sigma).to(drawn.dtype)
        delta = drawn * scaled if self.store or not last else drawn.mul_(scaled)  # in a replay the noise is not asked for again
        inputs, delta = folded(record.inputs, delta, batched=self.batched)
        grads = record.local(inputs, delta)
        for place, owner in enumerate((record.weight, record.bias)):
            grad = grads[place] if place in places and place < len(grads) else None
            if isinstance(owner, Noisy) and grad is not None:
                self.sums.add(owner.parameter, owner.gradient(grad))

    def spread(self, record: Record, rows: Tensor, drawn: Tensor) -> list[int]:
        """The shape in which coefficients of copies, examples (and units) meet the noise [copies, *shape]."""
        if rows.ndim == 2:
            return [*rows.shape, *(1 for _ in range(drawn.ndim - 2))] if drawn.ndim > 1 else list(rows.shape[:1])
        assert record.units is not None
        shape = [rows.shape[0], *(1 for _ in drawn.shape[1:])]
        if rows.shape[1] > 1:
            shape[1] = rows.shape[1]
        shape[record.units if record.units < 0 else record.units + 1] = rows.shape[2]
        return shape

    def collect_all(self, coefficients: Tensor) -> None:
        """The gradients of all records, and of what no layer takes. `coefficients` [copies, N(, P)] or [copies, 1]: (L - b) / (K N (P))."""
        for record in self.records:
            self.collect(record, coefficients)
        self.records = []
        for name, drawn in self.weights.items():
            total, index = (coefficients.sum(1), None) if self.credit is None else self.credit.loose(name, coefficients)
            share = (total / self.sigma(name)).to(drawn.dtype)
            self.sums.add(name, torch.tensordot(share, drawn, 1) if index is None else (share[:, index] * drawn).sum(0))
            if self.scored:
                squares = drawn.double().square() - 1
                score = (total.double() @ squares.flatten(1) if index is None else total.double()[:, index] * squares).sum() / drawn[0].numel()
                self.sums.scores[name] = self.sums.scores.get(name, 0) + score


def folded(inputs: Tensor, delta: Tensor, *, batched: bool) -> tuple[Tensor, Tensor]:
    """Copies as a longer batch; where all copies have one input, δ is added up over them first."""
    if not batched:
        return inputs, delta[0]
    if not is_batchedtensor(inputs):
        return inputs, delta.sum(0)
    own = get_unwrapped(inputs).movedim(maybe_get_bdim(inputs), 0)
    return own.flatten(0, 1), delta.flatten(0, 1)
