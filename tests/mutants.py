"""Planted bugs: the one table. Each names the claims that must fail on it (`altgrad.testing.checks`); test_mutants.py holds them to it.

A new planted bug goes into the file of its engine, tests/mutants_<engine>.py, never here; an engine's first bug brings its file and a line here.
"""

import mutants_ask_tell
import mutants_backprop
import mutants_equilibrium
import mutants_evolution
import mutants_feedback
import mutants_forward
import mutants_forward_forward
import mutants_implicit_engine
import mutants_likelihood_ratio
import mutants_local
import mutants_mixed
import mutants_straight_through
import mutants_subspace
from mutants_form import EVERYWHERE, POPULATION, WEIGHTS, Mutant, altered, on, patched, rekeyed, scaled

__all__ = ["EVERYWHERE", "MUTANTS", "POPULATION", "WEIGHTS", "Mutant", "altered", "on", "patched", "rekeyed", "scaled"]

FILES = (
    mutants_backprop,
    mutants_forward,
    mutants_likelihood_ratio,
    mutants_evolution,
    mutants_subspace,
    mutants_ask_tell,
    mutants_local,
    mutants_forward_forward,
    mutants_feedback,
    mutants_equilibrium,
    mutants_mixed,
    mutants_implicit_engine,
    mutants_straight_through,
)
MUTANTS = [mutant for file in FILES for mutant in file.MUTANTS]
