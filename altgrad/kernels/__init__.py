"""Operators with a plain PyTorch reference and a Triton kernel: addressed noise (noise.py), the population's low-rank layer and update (lowrank.py)."""
