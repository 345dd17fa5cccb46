"""Base-(k+1) graphs: rounds of few neighbours after which all clients have the exact mean.

Takezawa et al., "Beyond Exponential Graph" (arXiv 2305.11420): at most k neighbours in a round, any
number N of clients, about 2 log N / log(k + 1) rounds.

    W (n, n) float64, symmetric: W[i, j] is the weight that client i gives to j; rows sum to 1
    factors   n as a product, so that a client is a digit for each, the first changing fastest
    turn      a function without arguments that returns the W of a round
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.linalg import block_diag

from plait.mixing_matrix import Matrix, complete_rows

Turn = Callable[[], Matrix]


def base_turns(N: int, k: int) -> list[Turn]:
    """The turns of the Base-(k+1) graph, after which it starts over: the shorter of two ways.

    One is the simple Base-(k+1) graph. The other takes the factors up to k + 1 out of N: clients
    come to the mean of a part that has the size of the rest, and then to that of all parts.

    Args:
        N: Number of clients.
        k: Most neighbours of a client in a round.

    Example:
        >>> len(base_turns(6, 1)), len(base_turns(6, 2))
        (4, 2)
    """
    factors, rest = _small_factors(N, k + 1)
    within = [partial(_copies, N // rest, turn) for turn in _simple_turns(rest, k)]
    across = [partial(_average, [rest, *factors], m + 1) for m in range(len(factors))]
    return min([*within, *across], _simple_turns(N, k), key=len) or [partial(np.eye, N)]


def _small_factors(N: int, most: int) -> tuple[list[int], int]:
    """N as factors of at most `most`, and a rest that has none.

    Example:
        >>> _small_factors(140, 4)
        ([4], 35)
    """
    factors = []
    for factor in range(most, 1, -1):
        while N % factor == 0:
            factors.append(factor)
            N //= factor
    return factors, N


def _copies(count: int, turn: Turn) -> Matrix:
    """The same turn in so many parts side by side."""
    return np.kron(np.eye(count), turn()).astype(np.float64)


def _average(factors: Sequence[int], m: int) -> Matrix:
    """A hyper-hypercube: exact averages of all that differ in one digit only, digits by turns."""
    m %= max(1, len(factors))
    (n,) = factors[m : m + 1] or (1,)
    below, above = np.eye(math.prod(factors[:m])), np.eye(math.prod(factors[m + 1 :]))
    return np.kron(above, np.kron(np.full((n, n), 1 / n), below)).astype(np.float64)


@dataclass(frozen=True)
class _Group:
    """`parts` times `base ** power` clients: a digit of N in the number system of this base."""

    parts: int
    base: int
    power: int

    @property
    def size(self) -> int:
        return math.prod(self.factors)

    @property
    def factors(self) -> list[int]:
        return [self.base] * self.power + [self.parts] * (self.parts > 1)


def _groups(N: int, base: int) -> list[_Group]:
    """N clients as a group for each digit that isn't 0, the largest first."""
    groups, power = [], 0
    while N:
        N, digit = divmod(N, base)
        groups += [_Group(digit, base, power)] * (digit > 0)
        power += 1
    return groups[::-1]


def _simple_turns(N: int, k: int) -> list[Turn]:
    """The simple Base-(k+1) graph.

    All groups come to their own means; then each, the largest first, meets all that are smaller, so
    that its parts and the rest have the mean of all; last the parts come to it client by client.
    """
    groups = _groups(N, k + 1)
    first = groups[0]
    num_turns = len(first.factors) + (1 + first.power if len(groups) > 1 else 0)
    return [partial(_simple, groups, turn) for turn in range(num_turns)]


def _simple(groups: Sequence[_Group], turn: int) -> Matrix:
    step = turn - len(groups[0].factors)
    if step < 0:
        return block_diag(*(_average(group.factors, turn) for group in groups))
    met = [_average(group.factors, step - 1 - at) for at, group in enumerate(groups[:step])]
    smaller = sum(group.size for group in groups[step + 1 :])
    return block_diag(*met, *(_meet(group, smaller) for group in groups[step : step + 1]))


def _meet(group: _Group, smaller: int) -> Matrix:
    """A group and so many clients behind it: each of these meets a client of each of its parts.

    The weight brings those behind, in the mean, and each part to the mean of all. Clients of the
    group that meet none of those average among themselves.
    """
    part = group.size // group.parts
    W = np.zeros((group.size + smaller, group.size + smaller))
    behind = group.size + np.arange(smaller)
    for begin in range(0, group.size, part):
        there = begin + np.arange(smaller)
        W[there, behind] = W[behind, there] = part / len(W)
    idle = [i for i in range(group.size) if i % part >= smaller]
    for at in range(0, len(idle), group.base):
        together = idle[at : at + group.base]
        W[np.ix_(together, together)] = 1 / len(together)
    np.fill_diagonal(W, 0.0)
    return complete_rows(W)
