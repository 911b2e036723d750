"""The claims every engine is held to, by its declared traits; `altgrad.testing` is the way in.

claim.py: what a claim is; probes.py: the small problems; contract.py: purity and form; gradients.py: bias; models.py: buffers, dropout,
frozen parameters, mixed precision; populations.py: ranks, chunks and members that fail; displacements.py: moves; credit.py: maps of local
losses; local.py: blocks and their own losses; labelled.py: right and wrong labels in inputs; limits.py: errors that vanish;
aligned.py: errors carried by other matrices than the weights.
"""
