"""Noise on what layers put out, and what it tells of their parameters; no derivative of anything is taken.

parameters.py: a parameter that makes its layer's output noisy; layers.py: the layers; trace.py: noise, records, gradients; passes.py: copies in
one pass; draws.py: the addresses of the noise; baselines.py: losses to coefficients; probe.py: what is found out before the first step.
"""
