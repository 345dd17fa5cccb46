"""How far the clients are apart, and what averaging factors instead of products costs.

    dA_i = A_i - mean(A),  Xi_A = mean_i ||dA_i||_F^2            consensus distance, likewise B
    C    = mean(B_i A_i) - mean(B) mean(A) = mean(dB_i dA_i)      cross term of exact averaging
    E_i  = sum_j w_ij B_j A_j - B~_i A~_i                         mixing error of client i

with ~ for the state after mixing. ||C||_F <= sqrt(Xi_A Xi_B). Where a method adds more than B A to
the frozen weights, E_i is of all that is added, and so what was cut off. No d_out x d_in product of
more than one client is formed where ranks are small: ||P Q||_F^2 = <P^T P, Q Q^T>.

A layer's state is put together from parts, each what some clients contribute who know the mean of
all: a simulation has one part, a cluster one for each block of clients.

Legend: N clients, m of them in a part, n that these heard (themselves included), r rank, k columns
of a stacked product. All sums in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from plait.factors import Factor
from plait.lora import Layout, joined, product_norm
from plait.machine.devices import exact


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


MEANS = ("consensus_A", "consensus_B", "mixing_error", "norm_A", "norm_B")
"""The fields of a `LayerState` that are means over clients."""


@dataclass(frozen=True)
class Diagnostics:
    """How all clients stand in a round.

    Attributes:
        before: Every layer after local training.
        after: Every layer after mixing.
        apart: (N,) each client's squared distance from the mean of all after mixing, over all
            adapted layers.
    """

    before: list[LayerState]
    after: list[LayerState]
    apart: list[float]


def consensus(X: Tensor) -> float:
    """Xi = mean_i ||X_i - mean(X)||_F^2 of X (N, ...)."""
    return float(distances(X, exact(X).mean(dim=0)).mean())


def distances(X: Tensor, mean: Tensor) -> Tensor:
    """(m,) ||X_i - mean||_F^2 of X (m, ...) and mean (...): who is far from the others."""
    return (exact(X) - mean).flatten(1).square().sum(dim=1)


def cross_term(A: Tensor, B: Tensor) -> float:
    """||mean(B_i A_i) - mean(B) mean(A)||_F of A (N, r, d_in) and B (N, d_out, r)."""
    means = exact(A).mean(dim=0), exact(B).mean(dim=0)
    return norm_of_sum([cross_part(A, B, *means, len(A))])


def cross_part(
    A: Tensor, B: Tensor, mean_A: Tensor, mean_B: Tensor, num_clients: int
) -> tuple[Tensor, ...]:
    """What m clients contribute to the cross term, sum_i dB_i dA_i / N, in its smaller form.

    Args:
        A: (m, r, d_in).
        B: (m, d_out, r).
        mean_A: (r, d_in) float64, of all clients.
        mean_B: (d_out, r) float64, of all clients.
        num_clients: N.

    Returns:
        Two matrices (d_out, m r) and (m r, d_in) whose product it is, or that product alone.
    """
    P = ((exact(B) - mean_B) / num_clients).permute(1, 0, 2).flatten(1)
    Q = (exact(A) - mean_A).flatten(0, 1)
    return (P, Q) if P.numel() + Q.numel() < len(P) * Q.shape[1] else (P @ Q,)


def norm_of_sum(parts: Sequence[tuple[Tensor, ...]]) -> float:
    """||C||_F of its `cross_part`s."""
    if all(len(part) == 2 for part in parts):
        P, Q = zip(*parts, strict=True)
        return product_norm(torch.cat(P, dim=1), torch.cat(Q))
    return float(torch.stack([reduce(torch.matmul, part) for part in parts]).sum(dim=0).norm())


ROOM = 4_000_000
"""Numbers that are formed at once, about."""


def mixing_errors(A: Tensor, B: Tensor, A_after: Tensor, B_after: Tensor, W: np.ndarray) -> Tensor:
    """(m,) ||E_i||_F, the distance of each client's mixed product from the mix of the products.

    Written around a centre A', B', as the mixed state or the mean of all, which cancels exactly
    what two large products would cancel only to rounding. With a = A - A' and b = B - B':
    E_i = sum_j w_ij b_j a_j - b~_i a~_i + (sum_j w_ij b_j - b~_i) A' + B' (sum_j w_ij a_j - a~_i).

    Args:
        A: (n, r, d_in) before mixing, of all that were heard.
        B: (n, d_out, r) before mixing, of all that were heard.
        A_after: (m, r, d_in).
        B_after: (m, d_out, r).
        W: (m, n) their rows of the mixing matrix, each summing to one.
    """
    A, B, A_after, B_after = map(exact, (A, B, A_after, B_after))
    ranks = (np.count_nonzero(W, axis=1) + 2) * A.shape[1]
    many = ranks >= min(A.shape[2], B.shape[1])
    errors = A.new_empty(len(W))
    if many.any():
        errors[many] = _errors_around_all(A, B, A_after[many], B_after[many], W[many])
    for rank in np.unique(ranks[~many]):
        alike = np.flatnonzero(ranks == rank)
        size = len(alike) * int(rank) * (A.shape[2] + B.shape[1])
        for some in np.array_split(alike, min(len(alike), -(-size // ROOM))):
            errors[some] = _errors_around_each(A, B, A_after[some], B_after[some], W[some])
    return errors


def _errors_around_each(
    A: Tensor, B: Tensor, A_after: Tensor, B_after: Tensor, W: np.ndarray
) -> Tensor:
    """The mixing errors of clients that heard equally many, and few: products stay in factors."""
    heard = np.nonzero(W)[1].reshape(len(W), -1)
    weights = torch.from_numpy(np.take_along_axis(W, heard, axis=1)).to(A.device)
    places = torch.from_numpy(heard).to(A.device)
    a = A[places] - A_after[:, None]
    b = (B[places] - B_after[:, None]) * weights[:, :, None, None]
    left = (
        torch.cat([b, b.sum(1, keepdim=True), B_after[:, None]], dim=1).transpose(1, 2).flatten(2)
    )
    mean_a = (a * weights[:, :, None, None]).sum(1, keepdim=True)
    right = torch.cat([a, A_after[:, None], mean_a], dim=1).flatten(1, 2)
    squares = ((left.mT @ left) * (right @ right.mT)).sum(dim=(1, 2))
    return squares.clamp(min=0).sqrt()


def _errors_around_all(
    A: Tensor, B: Tensor, A_after: Tensor, B_after: Tensor, W: np.ndarray
) -> Tensor:
    """The mixing errors of clients that heard many: each product is formed once for all of them."""
    A0, B0 = A.mean(dim=0), B.mean(dim=0)
    a, b, a_after, b_after = A - A0, B - B0, A_after - A0, B_after - B0
    weights = torch.from_numpy(W).to(A.device)
    off_a = (weights @ a.flatten(1)).view_as(a_after) - a_after
    off_b = (weights @ b.flatten(1)).view_as(b_after) - b_after
    left = torch.cat([off_b, B0.expand_as(b_after), -b_after], dim=2)
    right = torch.cat([A0.expand_as(a_after), off_a, a_after], dim=1)
    squares = A.new_zeros(len(W))
    rows = max(1, ROOM // (len(A) * A.shape[2]))
    for some, left_rows in zip(b.split(rows, dim=1), left.split(rows, dim=1), strict=True):
        mixed = (weights @ (some @ a).flatten(1)).view(len(W), -1, A.shape[2])
        squares += mixed.baddbmm_(left_rows, right).square_().sum(dim=(1, 2))
    return squares.sqrt()


Pair = tuple[int, int, float]
"""(i, j, ||x_i - x_j||^2), i < j."""

MOST_PAIRED = 100
"""Clients of which each pair's distance is measured: the pairs grow with the square."""


def pair_distances(layout: Layout, state: Mapping[Factor, Tensor]) -> Tensor:
    """(n, n) ||x_i - x_j||^2 of each pair of the first n <= `MOST_PAIRED` clients, all layers.

    One Gram matrix for each layer, ||x||^2 + ||y||^2 - 2 <x, y>. Seen from the mean client, since
    what all have in common, the greater part, would leave nothing but rounding.

    Args:
        layout: Where the layers lie.
        state: Factor -> (N, P).
    """
    gram = exact(state[Factor.A].new_zeros(()))
    for factor in (Factor.A, Factor.B):
        for view in layout.views(factor, state[factor][:MOST_PAIRED]).values():
            flat = exact(view.flatten(1))
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


def layer_part(
    A: Tensor,
    B: Tensor,
    mean_A: Tensor,
    mean_B: Tensor,
    own: tuple[Tensor, Tensor],
    heard: tuple[Tensor, Tensor],
    W: np.ndarray,
) -> Tensor:
    """What m clients contribute to a layer's state, apart from the cross term.

    Args:
        A: (m, r, d_in).
        B: (m, d_out, r).
        mean_A: (r, d_in) float64, of all clients.
        mean_B: (d_out, r) float64, of all clients.
        own: A and B, or with the base's beside them (m, r + R, d_in) and (m, d_out, r + R).
        heard: The same before mixing, of all n that were heard.
        W: (m, n) their rows of the mixing matrix.

    Returns:
        (5, m) float64 on the CPU, each client's own value of `MEANS`.
    """
    norms = [X.flatten(1).norm(dim=1) for X in (A, B)]
    values = [distances(A, mean_A), distances(B, mean_B), mixing_errors(*heard, *own, W), *norms]
    return torch.stack([value.cpu().double() for value in values])


def diagnose(
    sites: Sequence[str], parts: Tensor, cross_terms: Sequence[list[float]]
) -> Diagnostics:
    """The diagnostics of a round from the parts of all clients.

    Args:
        sites: The names of the S layers.
        parts: (2, S, 5, N) before and after mixing, the `layer_part` of each layer.
        cross_terms: Before and after mixing, ||C||_F of each layer.
    """
    before, after = (
        [
            LayerState(site=site, cross_term=cross, **dict(zip(MEANS, values, strict=True)))
            for site, cross, values in zip(sites, crosses, means, strict=True)
        ]
        for crosses, means in zip(cross_terms, parts.mean(dim=3).tolist(), strict=True)
    )
    return Diagnostics(before, after, parts[1, :, :2].sum(dim=(0, 1)).tolist())


def diagnostics(
    layout: Layout,
    before: Mapping[Factor, Tensor],
    after: Mapping[Factor, Tensor],
    W: np.ndarray,
) -> Diagnostics:
    """The diagnostics of a round, by one who has the state of all clients.

    Args:
        layout: Where the layers lie.
        before: Factor -> (N, P) after local training.
        after: Factor -> (N, P) after mixing with W.
        W: (N, N), rows summing to one.
    """
    sites = [site.name for site in layout.sites]
    whole = [joined_views(layout, rows) for rows in (before, after)]
    parts, cross_terms = [], []
    for rows, own in zip((before, after), whole, strict=True):
        view = factor_views(layout, rows)
        for site in sites:
            A, B = view[Factor.A][site], view[Factor.B][site]
            means = exact(A).mean(dim=0), exact(B).mean(dim=0)
            parts.append(layer_part(A, B, *means, own[site], whole[0][site], W))
        cross_terms.append([cross_term(view[Factor.A][s], view[Factor.B][s]) for s in sites])
    return diagnose(sites, torch.stack(parts).unflatten(0, (2, -1)), cross_terms)


def factor_views(layout: Layout, rows: Mapping[Factor, Tensor]) -> dict[Factor, dict[str, Tensor]]:
    """A and B of (n, P) rows, layer by layer."""
    return {factor: layout.views(factor, rows[factor]) for factor in (Factor.A, Factor.B)}


def joined_views(layout: Layout, rows: Mapping[Factor, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> `joined` A and B of (n, P) rows."""
    A, B = joined(layout, rows)
    views = factor_views(layout, {Factor.A: A, Factor.B: B})
    return {name: (one, views[Factor.B][name]) for name, one in views[Factor.A].items()}
