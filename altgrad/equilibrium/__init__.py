"""Equilibrium propagation: systems that settle, how they are nudged, and what gradient the nudged states tell.

relaxation.py: sweeps until an example stands still; nudges.py: which nudges, and their weights; fields.py: vector fields, a chain of blocks among
them; energies.py: energies; nets.py: nets that settle; settling.py: a problem made of one; holomorphic.py: what complex nudges can pass;
homeostasis.py: a loss that makes Jacobians symmetric; adjoint.py: the exact gradient, for reference.
"""
