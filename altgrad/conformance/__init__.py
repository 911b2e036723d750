"""The claims every engine is held to, by its declared traits; `altgrad.testing` is the way in.

claim.py: what a claim is; probes.py: the small problems; contract.py: purity and form; gradients.py: bias; models.py: buffers, dropout,
frozen parameters, mixed precision; populations.py: ranks, chunks and members that fail; displacements.py: moves.
"""
