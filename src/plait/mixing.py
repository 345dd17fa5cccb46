"""Mixing: what a client makes of its own state and of what its neighbours sent.

A mix is a pure function of one neighbourhood; it knows no round, rank or clock.

Shapes: m own clients, n clients that were heard (own ones included), P parameters of a factor.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Mix = Callable[[Tensor, Tensor, np.ndarray], Tensor]
"""(mine (m, P), theirs (n, P), W (m, n)) -> mine after mixing (m, P). W holds the weights of the
*others* only: what a client keeps of itself is the rest, 1 - sum(W[i])."""


MANY = 32
"""Neighbours from which on a matrix product is the faster way to average."""


def average(mine: Tensor, theirs: Tensor, W: np.ndarray) -> Tensor:
    """Gossip averaging, x_i + sum_j w_ij (x_j - x_i).

    In this form a message that never came, a zero in W, leaves its weight with its receiver, so
    rows keep summing to one. Renormalising over what arrived would break double stochasticity.

    The terms are added one neighbour after another in ascending order, so the result is bitwise
    the same however many rows are mixed at once: a simulation of N and a peer of one agree. Only
    a client with more than `MANY` neighbours takes them in one product, equal to rounding.

    Args:
        mine: (m, P) the state of the clients to be mixed.
        theirs: (n, P) the state of the clients that were heard.
        W: (m, n) float64, the weight that each of mine gives to each of theirs.

    Returns:
        (m, P) a new tensor.
    """
    mixed = mine.clone()
    many = np.count_nonzero(W, axis=1) > MANY
    for i, j in zip(*np.nonzero(W * ~many[:, None]), strict=True):
        mixed[i].add_(theirs[j] - mine[i], alpha=float(W[i, j]))
    if many.any():
        weights = torch.from_numpy(W[many]).to(mine)
        kept = 1 - weights.sum(dim=1, keepdim=True)
        mixed[torch.from_numpy(many)] = kept * mine[torch.from_numpy(many)] + weights @ theirs
    return mixed


def neighbour_weights(W: np.ndarray) -> np.ndarray:
    """W (N, N) without its diagonal: the form in which a `Mix` wants it."""
    return np.asarray(W - np.diag(np.diag(W)))


def mean(stack: Tensor) -> Tensor:
    """The mean client (1, P) of a stack (N, P), accumulated in float64."""
    return stack.to(torch.float64).mean(dim=0, keepdim=True).to(stack.dtype)
