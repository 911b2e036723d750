"""Decompositions (see helper)."""
