"""How far the clients are apart, and what averaging factors instead of products costs.

    dA_i = A_i - mean(A),  Xi_A = mean_i ||dA_i||_F^2            consensus distance, likewise B
    C    = mean(B_i A_i) - mean(B) mean(A) = mean(dB_i dA_i)      cross term of exact averaging
    E_i  = sum_j w_ij B_j A_j - B~_i A~_i                         mixing error of client i

with ~ for the state after mixing. ||C||_F <= sqrt(Xi_A Xi_B). No d_out x d_in product of more than
one client is formed where ranks are small: ||P Q||_F^2 = <P^T P, Q Q^T>.

Legend: N clients, r rank, k columns of a stacked product. All sums in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plait.lora import Layout
from plait.methods import Factor


@dataclass(frozen=True)
class LayerState:
    """One adapted layer's diagnostics at one moment of a round.

    Attributes:
        site: The layer's name.
        consensus_A: Xi_A.
        consensus_B: Xi_B.
        cross_term: ||C||_F.
        mixing_error: Mean over clients of ||E_i||_F, against the weights of this round; before
            mixing, with the client's own product in the place of the mixed one.
        norm_A: Mean over clients of ||A_i||_F.
        norm_B: Mean over clients of ||B_i||_F.
    """

    site: str
    consensus_A: float
    consensus_B: float
    cross_term: float
    mixing_error: float
    norm_A: float
    norm_B: float


def consensus(X: Tensor) -> float:
    """Xi = mean_i ||X_i - mean(X)||_F^2 of X (N, ...)."""
    return float(distances(X).mean())


def distances(X: Tensor) -> Tensor:
    """(N,) ||X_i - mean(X)||_F^2 of X (N, ...): who is far from the others. Their mean is Xi."""
    flat = X.flatten(1).double()
    return (flat - flat.mean(dim=0)).square().sum(dim=1)


def product_norm(P: Tensor, Q: Tensor) -> float:
    """||P Q||_F of P (d_out, k) and Q (k, d_in)."""
    P, Q = P.double(), Q.double()
    if P.shape[1] >= min(P.shape[0], Q.shape[1]):
        return float((P @ Q).norm())
    squared = float(((P.T @ P) * (Q @ Q.T)).sum())
    return math.sqrt(max(squared, 0.0))


def cross_term(A: Tensor, B: Tensor) -> float:
    """||mean(B_i A_i) - mean(B) mean(A)||_F of A (N, r, d_in) and B (N, d_out, r)."""
    dA = A.double() - A.double().mean(dim=0)
    dB = B.double() - B.double().mean(dim=0)
    return product_norm(dB.permute(1, 0, 2).flatten(1) / len(A), dA.flatten(0, 1))


def mixing_errors(A: Tensor, B: Tensor, A_after: Tensor, B_after: Tensor, W: np.ndarray) -> Tensor:
    """(N,) ||E_i||_F, the distance of each client's mixed product from the mix of the products.

    Written around the mixed state, which cancels exactly what two large products would cancel
    only to rounding:
    E_i = sum_j w_ij (B_j - B~)(A_j - A~) + (sum_j w_ij B_j - B~) A~ + B~ (sum_j w_ij A_j - A~).

    Args:
        A: (N, r, d_in) before mixing.
        B: (N, d_out, r) before mixing.
        A_after: (N, r, d_in).
        B_after: (N, d_out, r).
        W: (N, N) mixing matrix, rows summing to one.
    """
    errors = []
    for i in range(len(A)):
        heard = np.flatnonzero(W[i])
        weights = torch.from_numpy(W[i, heard]).to(A.device)[:, None, None]
        dA = A[heard].double() - A_after[i].double()
        dB = B[heard].double() - B_after[i].double()
        left = [*(weights * dB), (weights * dB).sum(0), B_after[i].double()]
        right = [*dA, A_after[i].double(), (weights * dA).sum(0)]
        errors.append(product_norm(torch.cat(left, dim=1), torch.cat(right, dim=0)))
    return torch.tensor(errors, dtype=torch.float64)


Pair = tuple[int, int, float]
"""(i, j, ||x_i - x_j||^2), i < j."""

MOST_PAIRED = 100
"""Clients of which each pair's distance is measured: the pairs grow with the square."""


def pair_distances(layout: Layout, state: dict[Factor, Tensor]) -> Tensor:
    """(n, n) ||x_i - x_j||^2 of each pair of the first n <= `MOST_PAIRED` clients, all layers.

    One Gram matrix for each layer, ||x||^2 + ||y||^2 - 2 <x, y>. Seen from the mean client, since
    what all have in common, the greater part, would leave nothing but rounding.

    Args:
        layout: Where the layers lie.
        state: Factor -> (N, P).
    """
    gram = torch.zeros((), dtype=torch.float64, device=state[Factor.A].device)
    for factor in (Factor.A, Factor.B):
        for view in layout.views(factor, state[factor][:MOST_PAIRED]).values():
            flat = view.flatten(1).double()
            flat = flat - flat.mean(dim=0)
            gram = gram + flat @ flat.T
    norms = gram.diagonal()
    return (norms[:, None] + norms - 2 * gram).clamp(min=0)


def pair(i: int, j: int, distance: float) -> Pair:
    """Two clients, to four digits: there are many pairs.

    Example:
        >>> pair(3, 1, 0.123456)
        (1, 3, 0.1235)
    """
    return min(i, j), max(i, j), float(f"{distance:.4g}")


def all_pairs(distances: Tensor) -> list[Pair]:
    """The pairs of `pair_distances` (n, n)."""
    rows = distances.tolist()
    return [pair(i, j, row[j]) for i, row in enumerate(rows) for j in range(i + 1, len(rows))]


def layer_states(
    layout: Layout,
    before: dict[Factor, Tensor],
    after: dict[Factor, Tensor],
    W: np.ndarray,
) -> tuple[list[LayerState], list[LayerState]]:
    """Diagnostics of every adapted layer before and after mixing.

    Args:
        layout: Where the layers lie.
        before: Factor -> (N, P) after local training.
        after: Factor -> (N, P) after mixing with W.
        W: (N, N), rows summing to one.
    """
    views = [
        {factor: layout.views(factor, state[factor]) for factor in (Factor.A, Factor.B)}
        for state in (before, after)
    ]
    names = [site.name for site in layout.sites]
    old_A, old_B = views[0][Factor.A], views[0][Factor.B]
    states = [
        [
            LayerState(
                site=name,
                consensus_A=consensus(view[Factor.A][name]),
                consensus_B=consensus(view[Factor.B][name]),
                cross_term=cross_term(view[Factor.A][name], view[Factor.B][name]),
                mixing_error=float(
                    mixing_errors(
                        old_A[name], old_B[name], view[Factor.A][name], view[Factor.B][name], W
                    ).mean()
                ),
                norm_A=float(view[Factor.A][name].flatten(1).norm(dim=1).mean()),
                norm_B=float(view[Factor.B][name].flatten(1).norm(dim=1).mean()),
            )
            for name in names
        ]
        for view in views
    ]
    return states[0], states[1]


def apart(layout: Layout, state: dict[Factor, Tensor]) -> list[float]:
    """(N,) each client's squared distance from the mean of all, over all adapted layers.

    Args:
        layout: Where the layers lie.
        state: Factor -> (N, P).
    """
    # Layer by layer: float64 copies of all layers at once would be twice the whole stack.
    layers = [
        distances(view)
        for factor in (Factor.A, Factor.B)
        for view in layout.views(factor, state[factor]).values()
    ]
    total: list[float] = torch.stack(layers).sum(dim=0).tolist()
    return total
