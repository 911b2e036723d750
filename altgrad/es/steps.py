r"""From a gradient estimate to a move of the mean: plain, Adam, ClipUp.

    sgd     Δ = lr g
    adam    p ← β₁ p + (1-β₁) g,  q ← β₂ q + (1-β₂) g²,  Δ = lr p̂ / (√q̂ + ε),  p̂ = p/(1-β₁^t), q̂ = q/(1-β₂^t)
    clipup  v ← β v + lr g/‖g‖,  v ← v · min(1, vmax/‖v‖),  Δ = v

Sources: Kingma and Ba, arXiv 1412.6980; Toklu, Liskowski, Srivastava, "ClipUp", arXiv 2008.02387.
"""

import numpy as np

RULES = ("adam", "clipup", "sgd")
BETA = (0.9, 0.999)
MOMENTUM = 0.9
EPSILON = 1e-8


def adam(gradient: np.ndarray, first: np.ndarray, second: np.ndarray, updates: int, rate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The move to subtract and both moments, [n] each; `updates` counts those before this one."""
    first = BETA[0] * first + (1 - BETA[0]) * gradient
    second = BETA[1] * second + (1 - BETA[1]) * np.square(gradient)
    corrected = np.sqrt(second / (1 - BETA[1] ** (updates + 1)))
    return rate * (first / (1 - BETA[0] ** (updates + 1))) / (corrected + EPSILON), first, second


def clipup(gradient: np.ndarray, velocity: np.ndarray, rate: float, greatest: float) -> np.ndarray:
    """The velocity, [n], which is also the move to subtract. A gradient of 0 leaves only the momentum."""
    norm = float(np.linalg.norm(gradient))
    velocity = MOMENTUM * velocity + (rate / norm) * gradient if norm > 0 else MOMENTUM * velocity
    speed = float(np.linalg.norm(velocity))
    return velocity * (greatest / speed) if speed > greatest else velocity
