"""Every tolerance of the statistical and numerical tests, with its reason. None is loosened to make a test pass."""

from typing import NamedTuple


class Tolerance(NamedTuple):
    value: float
    reason: str


TABLE = {
    "rounding64": Tolerance(1e-9, "float64 keeps 16 digits; a few hundred additions in another order lose three or four"),
    "closed_form64": Tolerance(1e-12, "figure 1's own: a formula of a few operations in float64, against the same formula written another way"),
    "rounding32": Tolerance(1e-5, "float32 keeps 7 digits; a few dozen additions in another order lose one or two"),
    "oracle64": Tolerance(1e-6, "a d x d linear system is solved in float64: digits are lost to its condition number, up to 1e6 here"),
    "closed_form": Tolerance(0.10, "relative variance over 2,560 fixed directions or more: its own standard error is √(2 / 2,560), about 3 %"),
    "low_rank": Tolerance(
        0.03,
        "rank 1 against the closed form at d = 400: the excess kurtosis of products costs O(1/rows), and 40,000 fixed draws have a standard error below 1 %",
    ),
    "cosine": Tolerance(0.05, "the mean over 100 fixed keys, whose standard error is 1 %; √(K/(K+d+1)) itself is a first-order formula, off by O(1/d)"),
    "standard_errors": Tolerance(4.0, "one honest test in 16,000 would fail; keys are fixed, so a pass stays a pass"),
    "moment_errors": Tolerance(3.0, "figure 5's own: standard errors between a measured second moment and its closed form, at fixed keys"),
    "population_cosine": Tolerance(
        0.02, "figure 5's own; the mean over 131,072 directions has a standard error below 1 %, and the law is first order, off by O(1/N)"
    ),
}


def tolerance(name: str) -> float:
    """The figure; the reason is in the table."""
    return TABLE[name].value
