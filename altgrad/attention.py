"""Attention by plain products, where a fused kernel would have no formula: forward mode, and the derivative of a derivative."""

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel


def unfused() -> AbstractContextManager[None]:
    """Within it `scaled_dot_product_attention` is softmax(q kᵀ / √d) v, step by step; it takes the memory of the matrix of weights."""
    return sdpa_kernel(SDPBackend.MATH)
