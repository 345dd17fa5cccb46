"""Rules that mix A and B of a layer together: for what a neighbour has learned is their product.

Each client is computed by itself, its neighbours in ascending order, in float64 and on one thread:
so the result is bitwise the same however many clients are mixed at once, and on how many cores.

Legend: m own clients, n that were heard, r rank, k how many a client hears, itself included.

Sources: DeCAF (Saadati et al. 2025, arXiv 2505.21382); HetLoRA (Cho et al. 2024, 2401.06432);
FedRot-LoRA, as its code has it (github.com/haoran-zh/FedRot-LoRA).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from plait.factors import BASE, BASE_A, BASE_B, VALUE, A, B, Factor
from plait.later import Tensor, torch
from plait.lora import Layout, joined, product_norm
from plait.machine.devices import exact, one_thread
from plait.mixing import SiteFactors, SiteRule, mean


def mean_product(mine: SiteFactors, theirs: SiteFactors, W: np.ndarray) -> SiteFactors:
    """DeCAF: the best approximation of rank r of sum_j w_ij B_j A_j, oneself included.

    Whoever hears nobody keeps its state. See `SiteRule` for arguments and result.
    """
    mixed = mine[0].clone(), mine[1].clone()
    for i, row in enumerate(W):
        if row.any():
            found = factorized(*stacked(mine, theirs, i, row), len(mine[0][i]))
            for own, value in zip(mixed, found, strict=True):
                own[i].copy_(value)
    return mixed


def stacked(mine: SiteFactors, theirs: SiteFactors, i: int, row: np.ndarray) -> SiteFactors:
    """Two factors of sum_j w_ij B_j A_j, oneself included: (k r, d_in) and (d_out, k r) float64.

    Args:
        mine: Of m clients.
        theirs: Of n that were heard.
        i: Which of the m it is for.
        row: (n,) its weights of them.
    """
    heard = np.flatnonzero(row)
    # Not the sum of the row: zeros in between would change how it is rounded.
    weights = torch.from_numpy(np.array([1 - row[heard].sum(), *row[heard]]))
    all_A, all_B = (
        exact(torch.cat([own[i : i + 1], others[heard]]))
        for own, others in zip(mine, theirs, strict=True)
    )
    tall = (all_B * weights.to(all_B.device)[:, None, None]).transpose(0, 1).flatten(1)
    return all_A.flatten(0, 1), tall


def mean_client(layout: Layout, factors: Mapping[Factor, Tensor]) -> dict[Factor, Tensor]:
    """The averaged model, factor -> (1, P): the means of the factors of N clients.

    Where something is added to the frozen weights, the mean product of all that is, cut to r + R.

    Args:
        layout: Where everything lies.
        factors: Factor -> (N, P).
    """
    found = {factor: mean(value) for factor, value in factors.items() if factor not in BASE}
    if BASE_A in factors:
        A_all, B_all = joined(layout, factors)
        sites = layout.by_site({(VALUE, A): A_all, (VALUE, B): B_all})
        pairs = [mean_pair(*site) for site in sites]
        for own, base, dim, flats in zip(
            (A, B), (BASE_A, BASE_B), (0, 1), zip(*pairs, strict=True), strict=True
        ):
            halves = [one.split([layout.rank, layout.base_rank], dim=dim) for one in flats]
            for factor, parts in zip((own, base), zip(*halves, strict=True), strict=True):
                found[factor] = torch.cat([part.flatten() for part in parts])[None].to(
                    factors[factor]
                )
    return found


def mean_pair(all_A: Tensor, all_B: Tensor) -> SiteFactors:
    """The best A (k, d_in) and B (d_out, k) of the mean of the products of A (N, k, d_in) and B."""
    wide, tall = exact(all_A).flatten(0, 1), exact(all_B).transpose(0, 1).flatten(1)
    return factorized(wide, tall / len(all_A), all_A.shape[1])


def slice_average(mine: SiteFactors, theirs: SiteFactors, W: np.ndarray) -> SiteFactors:
    """raFLoRA: each of the r directions averaged over those that have it.

    Whoever's A is zero there lacks it, and leaves its weight with the receiver. See `SiteRule` for
    arguments and result.
    """
    mixed = mine[0].clone(), mine[1].clone()
    for i, j in zip(*np.nonzero(W), strict=True):
        has = theirs[0][j].any(dim=1)
        for k, mask in enumerate((has[:, None], has[None])):
            step = torch.where(mask, theirs[k][j] - mine[k][i], 0.0)
            mixed[k][i].add_(step, alpha=float(W[i, j]))
    return mixed


def norm_average(mine: SiteFactors, theirs: SiteFactors, W: np.ndarray) -> SiteFactors:
    """HetLoRA: a client's weight is w_ij times the norm of its B A, over the sum of these.

    Where all products are zero the weights are those of W. See `SiteRule` for arguments and result.
    """
    mixed = mine[0].clone(), mine[1].clone()
    norms = {j: _norm(*theirs, int(j)) for j in np.flatnonzero(W.any(axis=0))}
    for i, row in enumerate(W):
        heard = np.flatnonzero(row)
        weights = np.array([1 - row[heard].sum(), *row[heard]])
        weights *= np.array([_norm(*mine, i), *(norms[j] for j in heard)])
        total = weights.sum()
        for j, weight in zip(heard, weights[1:] / total if total else row[heard], strict=True):
            for k in range(2):
                mixed[k][i].add_(theirs[k][j] - mine[k][i], alpha=float(weight))
    return mixed


def _norm(A: Tensor, B: Tensor, client: int) -> float:
    """||B A||_F of one client, of A (m, r, d_in) and B (m, d_out, r)."""
    with one_thread():
        return product_norm(B[client], A[client])


def factorized(wide: Tensor, tall: Tensor, rank: int) -> SiteFactors:
    """The truncated singular value decomposition U S V^T of a product: sqrt(S) V^T, U sqrt(S).

    The column of U sqrt(S) has its largest entry above zero, else its sign would be LAPACK's whim.

    Args:
        wide: (k r, d_in), the right one.
        tall: (d_out, k r), the left one.
        rank: How many singular values stay.

    Returns:
        A (rank, d_in) and B (d_out, rank); zero from the rank of the product on.
    """
    with one_thread():
        (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(tall), torch.linalg.qr(wide.mT)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
        root = S[:rank].sqrt()
        B = Q_B @ U[:, :rank] * root
        A = (Q_A @ Vh[:rank].mT * root).mT
    top = B.gather(0, B.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(top < 0, -1.0, 1.0).to(B.dtype)
    lacking = rank - len(root)
    return (
        torch.nn.functional.pad(A * signs.mT, (0, 0, 0, lacking)),
        torch.nn.functional.pad(B * signs, (0, lacking)),
    )


def rotated_average(by: Factor, strength: float) -> SiteRule:
    """FedRot-LoRA: averaging of neighbours, each rotated to fit one's own factors before.

    B R and R^T A have the product B A, whatever the rotation R (r, r). That one is taken which
    brings the neighbour's A, or B, next to one's own (orthogonal Procrustes, Schoenemann 1966).

    Args:
        by: Which of A and B is to fit.
        strength: How far to rotate, lambda: 0 not at all, 1 all the way.
    """

    def mix(mine: SiteFactors, theirs: SiteFactors, W: np.ndarray) -> SiteFactors:
        mixed = mine[0].clone(), mine[1].clone()
        for i, j in zip(*np.nonzero(W), strict=True):
            own, other = ((exact(a[k]), exact(b[k])) for (a, b), k in ((mine, i), (theirs, j)))
            for k, found in enumerate(rotated(own, other, by, strength)):
                mixed[k][i].add_(found.to(mine[k]) - mine[k][i], alpha=float(W[i, j]))
        return mixed

    return mix


def rotated(own: SiteFactors, other: SiteFactors, by: Factor, strength: float) -> SiteFactors:
    """R^T A and B R of another's A (r, d_in) and B (d_out, r), R such that they fit one's own."""
    with one_thread():
        fit = other[0] @ own[0].mT if by is A else other[1].mT @ own[1]
        identity = torch.eye(len(fit)).to(fit)
        R = nearest_rotation((1 - strength) * identity + strength * nearest_rotation(fit))
        return R.mT @ other[0], other[1] @ R


def nearest_rotation(matrix: Tensor) -> Tensor:
    """The rotation (r, r) next to a matrix (r, r) in the Frobenius norm; no reflection."""
    U, _, Vh = torch.linalg.svd(matrix)
    U[:, -1] *= torch.linalg.det(U @ Vh).sign()
    rotation: Tensor = U @ Vh
    return rotation
