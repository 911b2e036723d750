"""Vector quantisation: a layer that puts the nearest of K codes in the place of every vector, with a derivative that stands in for its own.

    quantiser = altgrad.vector.VectorQuantizer(codes=128, dim=16, gradient="rotation")
    values, indices, losses = quantiser(z)         # z [N, …, 16]; losses [N] go into the problem's own

Codes follow by gradients, moving averages or inner steps of their own; those that nothing chooses can be brought back.
"""

from altgrad.vector.gradients import GRADIENTS
from altgrad.vector.kmeans import kmeans
from altgrad.vector.quantizer import Quantised, VectorQuantizer
from altgrad.vector.usage import perplexity, shares, used

__all__ = ["GRADIENTS", "Quantised", "VectorQuantizer", "kmeans", "perplexity", "shares", "used"]
