"""Mixing weights: from who meets whom in a round to a doubly stochastic matrix.

N clients
adjacency (N, N) bool, symmetric with an empty diagonal
W         (N, N) float64: W[i, j] is the weight that client i gives to j; rows sum to 1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigvalsh
from scipy.sparse import csr_array
from scipy.sparse.linalg import eigsh

Matrix = npt.NDArray[np.float64]
Adjacency = npt.NDArray[np.bool_]
Weigh = Callable[[Adjacency, np.random.Generator], Matrix]


def complete_rows(W: Matrix) -> Matrix:
    """W (N, N) with an empty diagonal -> the same with what is left of each row on it."""
    np.fill_diagonal(W, 1.0 - W.sum(axis=1))
    return W


def _metropolis(adjacency: Adjacency, _rng: np.random.Generator) -> Matrix:
    """w_ij = 1 / (1 + max(d_i, d_j)) on an edge (Metropolis-Hastings)."""
    degree = adjacency.sum(axis=1)
    i, j = np.nonzero(adjacency)
    W = np.zeros(adjacency.shape)
    W[i, j] = 1.0 / (1.0 + np.maximum(degree[i], degree[j]))
    return complete_rows(W)


def _laplacian(adjacency: Adjacency, _rng: np.random.Generator) -> Matrix:
    """I - 2 L / (3 lambda_max(L)), the matrix of Dec-LoRA (arXiv 2501.15361)."""
    if not adjacency.any():
        return np.eye(len(adjacency))
    share = 2.0 / (3.0 * _largest_laplacian_eigenvalue(adjacency))
    return complete_rows(np.where(adjacency, share, 0.0))


def _largest_laplacian_eigenvalue(adjacency: Adjacency) -> float:
    N = len(adjacency)
    L = np.diag(adjacency.sum(axis=1, dtype=np.float64)) - adjacency
    if N <= 200:
        return float(eigvalsh(L)[-1])
    # A start of our own: ARPACK's is random, and peers have to agree on W.
    start = np.random.default_rng(0).standard_normal(N)
    return float(eigsh(csr_array(L), 1, which="LA", v0=start, return_eigenvectors=False)[0])


def _sequential(adjacency: Adjacency, rng: np.random.Generator) -> Matrix:
    """The round's meetings one after another in a random order, each a pairwise average."""
    edges = np.argwhere(np.triu(adjacency))
    W = np.eye(len(adjacency))
    for i, j in rng.permutation(edges).tolist():
        W[i] = W[j] = (W[i] + W[j]) / 2
    return W


@dataclass(frozen=True)
class WeightsRow:
    """A rule that turns a graph into W, and what it does to a graph that never changes."""

    weigh: Weigh
    summary: str
    static: bool = True
    """The same graph gives the same W in every round."""
    symmetric: bool = True


WEIGHTS: dict[str, WeightsRow] = {
    "metropolis": WeightsRow(_metropolis, "1 / (1 + the larger degree), the rest on oneself"),
    "laplacian": WeightsRow(_laplacian, "I - 2 L / (3 lambda_max(L)), as in Dec-LoRA"),
    "sequential": WeightsRow(
        _sequential,
        "pairwise averages one after another, in a random order",
        static=False,
        symmetric=False,
    ),
}
