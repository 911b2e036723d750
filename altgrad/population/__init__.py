"""Populations of perturbed models: parameters that act as W + L Rᵀ, the layers' rules, and the evaluation of all members at once."""

from altgrad.population.draws import Chunk, Draws
from altgrad.population.evaluate import Notes, population
from altgrad.population.parameters import Perturbed

__all__ = ["Chunk", "Draws", "Notes", "Perturbed", "population"]
