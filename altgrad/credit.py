r"""Credit: which elements of a parameter touch which of the local losses, so that their coefficient sums no others.

Where a loss is the mean of local ones, L = Σ_o ℓ_o / O over outputs o = (n, p) (pixels, tokens, heads), and the elements of group g touch the
outputs C(g) only, a rule that multiplies noise by a loss may take

    c_g = Σ_{o ∈ C(g)} ℓ_o / O      in place of      c = Σ_o ℓ_o / O:

what is left out is independent of the group's noise, so the mean of the estimate stays, and its variance falls from the number of all
parameters to that of those which share an output.

Source: Deliot, Heitz, Belcour, "Transforming a Non-Differentiable Rasterizer into a Differentiable One with Stochastic Gradient Estimation",
I3D 2024, arXiv 2404.09758 (pixels); Ren et al., ICLR 2023, arXiv 2210.03310 (local losses).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from altgrad.errors import ShapeError, near_miss

FEW = 4  # members whose sums are made faster than pairs are sorted


@dataclass(frozen=True, eq=False)
class Influence:
    """Which outputs each group of a parameter's elements touches.

    Args:
        index: the group of each element, int64 in the parameter's shape, in [0, count).
        count: groups.
        groups, outputs: int64 [M]: group groups[i] touches output outputs[i]; no pair twice.
        places: P where `outputs` are p in [0, P), the same for every example; None where they are flat, n P + p.

    Raises:
        ShapeError: parts that do not fit together, or numbers out of range.
    """

    index: Tensor
    count: int
    groups: Tensor
    outputs: Tensor
    places: int | None = None
    layout: dict[str, Tensor] = field(default_factory=dict, repr=False, init=False)  # what sums are made with, kept

    def __post_init__(self) -> None:
        for name in ("index", "groups", "outputs"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype != torch.int64:
                seen = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise ShapeError(f"an influence map's {name} is {seen}; it must be an int64 tensor.")
        if self.groups.ndim != 1 or self.groups.shape != self.outputs.shape:
            raise ShapeError(f"an influence map's pairs have the shapes {tuple(self.groups.shape)} and {tuple(self.outputs.shape)}; both must be [M].")
        for name, most in (("index", self.count), ("groups", self.count), ("outputs", self.places)):
            out_of_range(name, getattr(self, name), most)

    @staticmethod
    def whole(mask: Tensor, shape: Sequence[int]) -> "Influence":
        """The whole parameter as one group that touches the outputs `mask` [P] (bool) of every example."""
        checked(mask, 1)
        return Influence.grouped(torch.zeros(tuple(shape), dtype=torch.int64, device=mask.device), mask[None])

    @staticmethod
    def grouped(index: Tensor, mask: Tensor) -> "Influence":
        """Group g touches the outputs `mask[g]`, mask [G, P] (bool), of every example; index: the group of each element."""
        checked(mask, 2)
        groups, outputs = mask.nonzero(as_tuple=True)
        return Influence(index, mask.shape[0], groups, outputs, mask.shape[1])

    @staticmethod
    def pairs(index: Tensor, groups: Tensor, outputs: Tensor, *, count: int | None = None, distinct: bool = False) -> "Influence":
        """Group groups[i] touches output outputs[i] = n P + p.

        Args:
            count: groups; None for the largest of `index` and one.
            distinct: no pair comes twice; otherwise they are looked through, as an output counts once however often it is named.
        """
        count = (int(index.max()) + 1 if index.numel() else 0) if count is None else count
        if not distinct and groups.ndim == 1 and groups.shape == outputs.shape and groups.numel():
            out_of_range("outputs", outputs, None)
            span = int(outputs.max()) + 1
            both = torch.unique(groups * span + outputs)  # sorted by group
            groups, outputs = both // span, both % span
        return Influence(index, count, groups, outputs)

    @property
    def mask(self) -> Tensor | None:
        """[G, P] where it is the same for every example; None otherwise."""
        if self.places is None:
            return None
        found = torch.zeros(self.count, self.places, dtype=torch.bool, device=self.groups.device)
        found[self.groups, self.outputs] = True
        return found

    def check(self, name: str, value: Tensor, losses: Tensor) -> None:
        """Raise ShapeError unless this fits parameter `name`, `value`, and local losses [..., N, P]."""
        if self.index.shape != value.shape:
            raise ShapeError(f"the influence map of {name!r} has an index of shape {tuple(self.index.shape)}; the parameter's is {tuple(value.shape)}.")
        examples, places = losses.shape[-2:]
        if self.places is not None and self.places != places:
            raise ShapeError(f"the influence map of {name!r} is for {self.places} local losses an example; there are {places}, losses [{examples}, {places}].")
        if self.places is None:
            out_of_range("outputs", self.outputs, examples * places, of=f" of {name!r}")

    def sums(self, losses: Tensor) -> Tensor:
        """What each group touches, summed and divided by the number of all outputs: losses [..., N, P] -> [..., count], in float32 or better.

        NaN and infinity reach the groups that touch them and no other.
        """
        examples, places = losses.shape[-2:]
        dtype = torch.promote_types(losses.dtype, torch.float32)
        wide = losses.flatten(-2).double() if self.places is None else losses.sum(-2, dtype=torch.float64)
        flat = wide.reshape(-1, wide.shape[-1])
        groups, outputs = self.groups.to(flat.device), self.outputs.to(flat.device)
        if self.count == 1:
            found = flat[:, outputs].sum(1, keepdim=True)
        elif len(flat) <= FEW and not flat.is_cuda and not self.layout and not in_order(groups):
            found = flat.new_zeros(len(flat), self.count)
            for row, values in zip(found, flat, strict=True):
                row.index_add_(0, groups, values[outputs])
        else:
            found = (self.matrix(flat.shape[1], flat.device) @ flat.T).T
        return (found / (examples * places)).to(dtype).reshape(*losses.shape[:-2], self.count)

    def means(self, losses: Tensor) -> Tensor:
        """The mean loss of what each group touches, losses [..., N, P] -> [..., count]; 0 of nothing."""
        touched = torch.bincount(self.groups, minlength=self.count).clamp(min=1).to(losses.device)
        found = self.sums(losses)
        return found * ((self.places or losses.shape[-2:].numel()) / touched.double()).to(found.dtype)

    def matrix(self, width: int, device: torch.device) -> Tensor:
        """The pairs as a sparse matrix of ones [count, width]; a product with it is the sum, in the same order each time."""
        kept = self.layout.get("matrix")
        if kept is not None and kept.shape[1] == width and kept.device == device:
            return kept
        groups, outputs = self.groups.to(device), self.outputs.to(device)
        if not in_order(groups):
            groups, order = groups.sort(stable=True)
            outputs = outputs[order]
        rows = torch.zeros(self.count + 1, dtype=torch.int64, device=device)
        torch.cumsum(torch.bincount(groups, minlength=self.count), 0, out=rows[1:])
        ones = torch.ones(len(outputs), dtype=torch.float64, device=device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the layout is young
            made = torch.sparse_csr_tensor(rows, outputs, ones, (self.count, width), check_invariants=False)
        self.layout["matrix"] = made
        return made


def in_order(numbers: Tensor) -> bool:
    return bool((numbers[1:] >= numbers[:-1]).all())


def checked(mask: Tensor, axes: int) -> None:
    """Raise ShapeError unless `mask` is a bool tensor of so many axes."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != axes:
        seen = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(f"an influence mask is {seen}; it must be a bool tensor {'[P]' if axes == 1 else '[groups, P]'} over the local losses.")


def out_of_range(name: str, numbers: Tensor, most: int | None, *, of: str = "") -> None:
    """Raise ShapeError where numbers on the CPU are outside [0, most); on a device that look would stop the step."""
    if numbers.is_cuda or not numbers.numel():
        return
    low, high = (int(bound) for bound in numbers.aminmax())
    if low < 0 or (most is not None and high >= most):
        raise ShapeError(f"an influence map's {name}{of} run from {low} to {high}; they must be in [0, {'N P' if most is None else most}).")


def mapped(name: str, given: "Influence | Tensor", params: Mapping[str, Tensor]) -> Influence:
    """What a user gave for parameter `name` as an Influence: a bool mask is [P] for the whole tensor, [units, P] for the units of its first axis.

    Raises:
        ShapeError: it names no parameter, or is not of that kind.
    """
    if name not in params:
        raise ShapeError(f"influence: {near_miss('parameter', name, params)}")
    if isinstance(given, Influence):
        return given
    if not isinstance(given, Tensor) or given.dtype != torch.bool or given.ndim not in {1, 2}:
        seen = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ShapeError(f"influence of {name!r} is {seen}; it must be an altgrad.credit.Influence or a bool mask, [P] or [units, P].")
    shape = params[name].shape
    if given.ndim == 1:
        return Influence.whole(given, shape)
    if not shape or len(given) != shape[0]:
        units = shape[0] if shape else "no"
        raise ShapeError(f"influence of {name!r} has {len(given)} rows, but the parameter {tuple(shape)} has {units} units; give [units, P].")
    index = torch.arange(shape[0], device=given.device).reshape(-1, *(1 for _ in shape[1:])).expand(shape)
    return Influence.grouped(index, given)


def per_example(losses: Tensor) -> Tensor:
    """One loss an example, [N], of losses [N] or [N, P]: the mean over P."""
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def check(influence: Mapping[str, Influence], params: Mapping[str, Tensor], losses: Tensor) -> None:
    """Raise ShapeError unless a problem's influence maps fit its parameters and its local losses."""
    for name, own in influence.items():
        if name not in params:
            raise ShapeError(f"there is an influence map for {name!r}, which is no parameter; parameters: {', '.join(params)}.")
        if losses.ndim != 2:
            raise ShapeError(f"the influence map of {name!r} needs local losses [N, P], but losses are {tuple(losses.shape)}; return one loss an output.")
        own.check(name, params[name], losses)


__all__ = ["Influence", "check", "mapped", "per_example"]
