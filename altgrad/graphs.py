r"""Graphs and graph convolutions: every node adds up its neighbours' features before a linear layer sees them.

    H' = σ(Â H W),   Â = D^-1/2 (A + I) D^-1/2,   D_ii = Σ_j (A + I)_ij

Â is kept as lists: the neighbours of every node, and their entries of Â.

Source: Kipf, Welling, "Semi-supervised classification with graph convolutional networks", ICLR 2017, arXiv 1609.02907, equation 2.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from altgrad.errors import ShapeError, require

GRAIN = 1e8  # squared distances are compared to 1 / GRAIN of the largest: rounding, which differs between machines, does not order neighbours


class Graph(NamedTuple):
    """Â by its rows, all padded to the largest number of neighbours; every node is a neighbour of its own."""

    neighbours: Tensor  # int64 [nodes, most]; padded with the node itself
    weights: Tensor  # [nodes, most]: Â[node, neighbour], 0 where padded

    def mix(self, values: Tensor) -> Tensor:
        """Â values [nodes, …] of all nodes."""
        return gathered(values, self.neighbours, self.weights)

    def dense(self) -> Tensor:
        """Â as a matrix [nodes, nodes]."""
        return self.weights.new_zeros(len(self.weights), len(self.weights)).scatter_add_(1, self.neighbours, self.weights)


def gathered(values: Tensor, neighbours: Tensor, weights: Tensor) -> Tensor:
    """Σ_m weights[n, m] values[neighbours[n, m]] [n, …]."""
    return torch.einsum("nm,nm...->n...", weights.to(values), values[neighbours])


def nearest_neighbours(points: Tensor, k: int) -> Tensor:
    """A [nodes, nodes], true where one of two points [nodes, features] is among the `k` nearest of the other; no point is its own.

    Raises:
        SettingError: k is not in [1, nodes - 1].
        ShapeError: points are not a matrix.
    """
    if points.ndim != 2:
        raise ShapeError(f"a graph's points have shape {tuple(points.shape)}; they must be [nodes, features].")
    count = len(points)
    require(isinstance(k, int) and not isinstance(k, bool) and 1 <= k < count, "k", k, f"an integer in [1, {count - 1}], one less than the nodes")
    square = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    grains = (square * (GRAIN / square.max().clamp_min(1e-300))).round().long()
    order = grains * count + torch.arange(count)  # no two alike in a row: of equal distances the lower number is the nearer
    near = order.fill_diagonal_(torch.iinfo(torch.int64).max).topk(k, dim=1, largest=False).indices
    edges = torch.zeros(count, count, dtype=torch.bool).scatter_(1, near, torch.ones_like(near, dtype=torch.bool))
    return edges | edges.T


def normalised(edges: Tensor) -> Graph:
    r"""The graph of D^-1/2 (A + I) D^-1/2 for A = `edges` [nodes, nodes], true where two nodes are joined.

    Raises:
        ShapeError: edges are not square, or not symmetric.
    """
    if edges.ndim != 2 or edges.shape[0] != edges.shape[1] or not torch.equal(edges, edges.T):
        raise ShapeError(f"edges of shape {tuple(edges.shape)} are not allowed; they must be a symmetric matrix [nodes, nodes].")
    joined = edges.bool().clone().fill_diagonal_(True)
    degree = joined.sum(1)
    rows, columns = joined.nonzero(as_tuple=True)  # row by row
    place = torch.arange(len(rows)) - (degree.cumsum(0) - degree)[rows]
    neighbours = torch.arange(len(joined))[:, None].repeat(1, int(degree.max()))
    weights = torch.zeros(neighbours.shape, dtype=torch.float64)
    neighbours[rows, place] = columns
    weights[rows, place] = degree.double().rsqrt()[rows] * degree.double().rsqrt()[columns]
    return Graph(neighbours, weights.float())


class GraphNetwork(nn.Module):
    r"""Two graph convolutions, relu(Â X W₁ + b₁) and Â H W₂ + b₂; reads numbers of nodes, puts out their scores.

    Neither the scores of a node nor their gradient depend on `whole`, which decides what is computed and in which order:

        whole=False   every node in the batch computes its own neighbourhood: a row of a layer belongs to one example, so that engines with noise
                      on layers' outputs give each example its own coefficient; a neighbour of two examples is computed twice
        whole=True    each layer is computed once for all nodes of the graph, then the batch's scores are picked out: examples mix

    Args:
        features: X [nodes, features].
        hidden: width of H. classes: number of scores.
    """

    def __init__(self, features: Tensor, graph: Graph, *, hidden: int, classes: int, whole: bool = False):
        super().__init__()
        # Constants, and no buffers: those are a model's state, which ranks average and checkpoints hold.
        self.graph, self.whole = graph, whole
        self.mixed = graph.mix(features)  # Â X, the same at every step
        self.first, self.second = nn.Linear(features.shape[1], hidden), nn.Linear(hidden, classes)

    def forward(self, nodes: Tensor) -> Tensor:
        mixed = self.mixed.to(nodes.device, self.first.weight.dtype)
        neighbours, weights = (part.to(nodes.device) for part in self.graph)
        if self.whole:
            return self.second(gathered(torch.relu(self.first(mixed)), neighbours, weights))[nodes]
        around, share = neighbours[nodes], weights[nodes]  # [N, most]
        inputs = mixed[around] * (share > 0)[..., None]  # padding says nothing of the first layer's weight
        hidden = torch.relu(self.first(inputs))  # [N, most, hidden]
        return self.second(torch.einsum("nm,nmh->nh", share.to(hidden), hidden))
