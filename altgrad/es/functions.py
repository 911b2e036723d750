"""Test functions, each with its minimum value 0: f(x) for x of shape [..., n] -> [...]."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from altgrad import rng
from altgrad.errors import UsageError, near_miss
from altgrad.rng import Key

Function = Callable[[np.ndarray], np.ndarray]


def powers(x: np.ndarray, condition: float) -> np.ndarray:
    """condition^(i/(n-1)), [n]."""
    n = np.shape(x)[-1]
    return condition ** (np.arange(n) / max(n - 1, 1))


def sphere(x: np.ndarray) -> np.ndarray:
    """Σ x²."""
    return np.square(x).sum(-1)


def ellipsoid(x: np.ndarray, *, condition: float = 1e6) -> np.ndarray:
    """Σ condition^(i/(n-1)) x_i²."""
    return (powers(x, condition) * np.square(x)).sum(-1)


def cigar(x: np.ndarray) -> np.ndarray:
    """x_0² + 10^6 Σ_{i>0} x_i²: one long axis."""
    return np.square(x[..., 0]) + 1e6 * np.square(x[..., 1:]).sum(-1)


def discus(x: np.ndarray) -> np.ndarray:
    """10^6 x_0² + Σ_{i>0} x_i²: one short axis."""
    return 1e6 * np.square(x[..., 0]) + np.square(x[..., 1:]).sum(-1)


def different_powers(x: np.ndarray) -> np.ndarray:
    """Σ |x_i|^(2 + 4i/(n-1))."""
    n = np.shape(x)[-1]
    return (np.abs(x) ** (2 + 4 * np.arange(n) / max(n - 1, 1))).sum(-1)


def rosenbrock(x: np.ndarray) -> np.ndarray:
    """Σ 100 (x_{i+1} - x_i²)² + (1 - x_i)²: a bent valley; minimum at 1."""
    return (100 * np.square(x[..., 1:] - np.square(x[..., :-1])) + np.square(1 - x[..., :-1])).sum(-1)


def rastrigin(x: np.ndarray) -> np.ndarray:
    """Σ x² + 10 (1 - cos 2πx): a grid of local minima on a bowl."""
    return (np.square(x) + 10 * (1 - np.cos(2 * np.pi * x))).sum(-1)


def ackley(x: np.ndarray) -> np.ndarray:
    """20 (1 - exp(-0.2 √mean x²)) + e - exp(mean cos 2πx): a hole in a rugged plain."""
    return 20 * (1 - np.exp(-0.2 * np.sqrt(np.square(x).mean(-1)))) + np.e - np.exp(np.cos(2 * np.pi * x).mean(-1))


def griewank(x: np.ndarray) -> np.ndarray:
    """Σ x²/4000 + 1 - Π cos(x_i/√(i+1))."""
    return np.square(x).sum(-1) / 4000 + 1 - np.cos(x / np.sqrt(np.arange(1, np.shape(x)[-1] + 1))).prod(-1)


def steps(x: np.ndarray) -> np.ndarray:
    """Σ floor(|x| + 1/2)²: flat almost everywhere, so that no gradient helps."""
    return np.square(np.floor(np.abs(x) + 0.5)).sum(-1)


@lru_cache(maxsize=16)
def rotation(dimension: int, seed: int = 0) -> np.ndarray:
    """A rotation of n axes, [n, n], uniform over all, named by `seed`: QR of normals with the signs of R's diagonal."""
    normals = rng.normal(Key(seed), rng.tensor_id("altgrad.es.rotation"), range(dimension), dimension).astype(np.float64)
    q, r = np.linalg.qr(normals)
    found = q * np.sign(np.diag(r))
    found.flags.writeable = False
    return found


def rotated(function: Function, *, seed: int = 0) -> Function:
    """x -> function(R x)."""

    def turned(x: np.ndarray) -> np.ndarray:
        return function(np.asarray(x) @ rotation(np.shape(x)[-1], seed).T)

    turned.__name__ = f"rotated_{getattr(function, '__name__', 'function')}"
    turned.__doc__ = f"{function.__doc__} In turned axes."
    return turned


TABLE: dict[str, Function] = {
    "sphere": sphere,
    "ellipsoid": ellipsoid,
    "rotated-ellipsoid": rotated(ellipsoid),
    "cigar": cigar,
    "discus": discus,
    "different-powers": different_powers,
    "rosenbrock": rosenbrock,
    "rastrigin": rastrigin,
    "rotated-rastrigin": rotated(rastrigin),
    "ackley": ackley,
    "griewank": griewank,
    "steps": steps,
}


def find(name: str) -> Function:
    """The test function `name`.

    Raises:
        UsageError: no such function; the nearest one is suggested.
    """
    if name not in TABLE:
        raise UsageError(near_miss("function", name, TABLE) + " Or give package.module:callable.")
    return TABLE[name]


def fewest(name: str) -> int:
    """Coordinates the test function `name` needs."""
    return 2 if name == "rosenbrock" else 1


def start(name: str) -> float:
    """Where a search on the test function `name` begins, every coordinate: away from the minimum."""
    return 0.0 if name == "rosenbrock" else 1.0
