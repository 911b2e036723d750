"""Operations with a plain PyTorch reference and, later, a Triton kernel: addressed noise (noise.py)."""
