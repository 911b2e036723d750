"""Equilibrium propagation: systems that settle, how they are nudged, and what gradient the nudged states tell.

relaxation.py: sweeps until an example stands still; nudges.py: which nudges, and their weights; fields.py: vector fields, a chain of blocks among
them; energies.py: energies; nets.py: nets that settle; settling.py: a problem made of one; holomorphic.py: what complex nudges can pass;
homeostasis.py: a loss that makes Jacobians symmetric; homeostatic.py: the same in a problem's losses, for any rule; feedback.py: a net with weights
of its own up and down; symmetry.py: the same update for both; online.py: nudges one by one, or one that goes round; hardware.py: weights that are off
and noisy states; adjoint.py: the exact gradient, for reference; diagnostics.py: how far from it an estimate points, for the log.
"""
