r"""A box for strategies that know none: where members are evaluated, and what the strategy is told.

    none       x as it is
    clip       evaluated at the nearest point of the box, and told there; the mean is kept inside. For strategies without directions: a matrix is
               flattened by points that lie on a face
    reflect    folded at the faces like light between mirrors: f outside is f of the mirror image, so nothing is distorted inside
    transform  two bounds: x = c + h sin((u - c)/h), c the middle and h half the width; one bound: x = l + √(1 + (u - l)²) - 1
    penalty    evaluated at the nearest point x', told f(x') + r Σ ((x - x')_i / s_i)², r the interquartile range of f and s_i the
               standard deviation of the coordinate, both within the generation

In `reflect`, `transform` and `penalty` the strategy lives in an unbounded space: `inside` gives the points to evaluate and to report.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from altgrad.errors import SettingError, ShapeError, near_miss
from altgrad.es.base import S, numbers

KINDS = ("none", "clip", "reflect", "transform", "penalty")


@dataclass(frozen=True, eq=False)
class Bounds:
    """lower ≤ x ≤ upper; each is a number or [n], and may be infinite."""

    lower: float | np.ndarray = field(default=-np.inf, metadata={"help": "smallest value of every coordinate"})
    upper: float | np.ndarray = field(default=np.inf, metadata={"help": "largest value of every coordinate"})
    how: str = field(default="reflect", metadata={"help": "none, clip, reflect, transform or penalty"})

    def __post_init__(self) -> None:
        if self.how not in KINDS:
            raise SettingError(near_miss("kind of bounds", str(self.how), KINDS))
        lower, upper = numbers(self.lower, "lower bound"), numbers(self.upper, "upper bound")
        if lower.ndim > 1 or upper.ndim > 1:
            raise ShapeError(f"bounds are numbers or vectors; their shapes are {lower.shape} and {upper.shape}.")
        try:
            wrong = ~(lower < upper)
        except ValueError as error:
            raise ShapeError(f"the lower bound has {lower.size} entries and the upper bound {upper.size}; give as many of both.") from error
        if wrong.any():
            place = int(np.flatnonzero(np.atleast_1d(wrong))[0])
            low, high = (float(np.broadcast_to(bound, wrong.shape).reshape(-1)[place]) for bound in (lower, upper))
            raise SettingError(f"bounds [{low:g}, {high:g}] of coordinate {place} are not allowed; the lower one must be below the upper one.")
        object.__setattr__(self, "lower", lower)
        object.__setattr__(self, "upper", upper)

    def faces(self, dimension: int) -> tuple[np.ndarray, np.ndarray]:
        """Both bounds as [n].

        Raises:
            ShapeError: they are vectors of another length.
        """
        lower, upper = np.asarray(self.lower), np.asarray(self.upper)
        for bound in (lower, upper):
            if bound.ndim and len(bound) != dimension:
                raise ShapeError(f"bounds of {len(bound)} entries do not fit x0 of {dimension}; give a number, or one entry a coordinate.")
        return np.broadcast_to(lower, (dimension,)), np.broadcast_to(upper, (dimension,))

    def start(self, x0: np.ndarray) -> np.ndarray:
        """Where the strategy starts for `x0` [n].

        Raises:
            SettingError: x0 is outside.
        """
        lower, upper = self.faces(len(x0))
        outside = np.flatnonzero((x0 < lower) | (x0 > upper))
        if self.how != "none" and len(outside):
            place = int(outside[0])
            raise SettingError(
                f"x0[{place}]={x0[place]:g} is not allowed; it must be within the bounds [{lower[place]:g}, {upper[place]:g}]"
                + (f", as must {len(outside) - 1} other coordinates." if len(outside) > 1 else ".")
            )
        return untransformed(x0, lower, upper) if self.how == "transform" else x0

    def inside(self, points: np.ndarray) -> np.ndarray:
        """The points of the box that stand for `points` [..., n]."""
        if self.how == "none":
            return points
        lower, upper = self.faces(points.shape[-1])
        if self.how == "reflect":
            return reflected(points, lower, upper)
        if self.how == "transform":
            return transformed(points, lower, upper)
        return np.clip(points, lower, upper)

    def told(self, points: np.ndarray) -> np.ndarray:
        """The points the strategy is told for a population it asked for."""
        return self.inside(points) if self.how == "clip" else points

    def kept(self, state: S) -> S:
        """`state` after a tell, with its mean brought back where a strategy that clips has left the box."""
        return replace(state, mean=self.inside(state.mean)) if self.how == "clip" else state

    def charged(self, points: np.ndarray, fitness: np.ndarray) -> np.ndarray:
        """The fitness the strategy is told, [λ], for members that were asked for at `points` [λ, n]."""
        if self.how != "penalty":
            return fitness
        deviations = np.maximum(points.std(0), 1e-300)
        excess = np.square((points - self.inside(points)) / deviations).sum(-1)
        finite = fitness[np.isfinite(fitness)]
        spread = float(np.subtract(*np.percentile(finite, [75, 25]))) if len(finite) else 0.0
        # A flat generation lies wholly outside on one side: any price leads it back, so take one of the size of f.
        return fitness + (spread or 1.0 + float(np.abs(finite).max(initial=0.0))) * excess


def reflected(points: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """`points` folded into the box."""
    found = np.where(points < lower, 2 * lower - points, points)
    found = np.where(points > upper, 2 * upper - points, found)
    both = np.isfinite(lower) & np.isfinite(upper)
    width = np.where(both, upper - lower, 1.0)
    base = np.where(both, lower, 0.0)
    wave = base + width - np.abs(np.mod(points - base, 2 * width) - width)
    far = both & ((found < lower) | (found > upper))  # further out than the box is wide
    with np.errstate(invalid="ignore"):
        return np.clip(np.where(far, wave, found), lower, upper)


def transformed(points: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """The smooth map from everywhere into the box."""
    both, low, high, floor, ceiling = sides(lower, upper)
    middle, half = (floor + ceiling) / 2, np.where(both, (ceiling - floor) / 2, 1.0)
    found = np.where(both, middle + half * np.sin((points - middle) / half), points)
    found = np.where(low, floor + np.sqrt(1 + np.square(points - floor)) - 1, found)
    found = np.where(high, ceiling - np.sqrt(1 + np.square(points - ceiling)) + 1, found)
    return np.clip(found, lower, upper)


def untransformed(points: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """A point that `transformed` takes to `points`, which are inside."""
    both, low, high, floor, ceiling = sides(lower, upper)
    middle, half = (floor + ceiling) / 2, np.where(both, (ceiling - floor) / 2, 1.0)
    found = np.where(both, middle + half * np.arcsin(np.clip((points - middle) / half, -1, 1)), points)
    found = np.where(low, floor + np.sqrt(np.maximum(np.square(points - floor + 1) - 1, 0.0)), found)
    return np.where(high, ceiling - np.sqrt(np.maximum(np.square(ceiling - points + 1) - 1, 0.0)), found)


def sides(lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which coordinates are bounded on both sides, below only, above only; and both bounds with 0 for an infinite one."""
    low, high = np.isfinite(lower), np.isfinite(upper)
    return low & high, low & ~high, high & ~low, np.where(low, lower, 0.0), np.where(high, upper, 0.0)
