"""Small problems that settle, and how an estimate is held to its exact gradient."""

import torch
from test_equilibrium import KEY, Bowl, chain, drawn, error, layered, look, recurrent, reference

from altgrad.equilibrium.feedback import LayeredFeedback
from altgrad.equilibrium.settling import Settling, squared_error
from altgrad.problem import Batch
from altgrad.rng import Key


def feedback(dtype=torch.float64, **settings):
    """Two hidden layers whose ways up and down have weights of their own."""
    problem = Settling(LayeredFeedback([12, 16, 10, 5], key=Key(3), **{"gain": 0.5, **settings}).to(dtype), squared_error)
    return problem, Batch(drawn("x", 6, 12, dtype=dtype), torch.arange(6) % 5)


__all__ = ["KEY", "Bowl", "chain", "drawn", "error", "feedback", "layered", "look", "recurrent", "reference"]
