"""Mixing: what a client makes of its own state and of what its neighbours sent.

A mix is a pure function of one neighbourhood, with all that travels; it knows no round, rank or
clock. A *rule* mixes the rows of one slot: `each_factor` applies it to every slot by itself, so A,
B and a head are judged apart. `each_site` is for rules that take A and B of a layer together, and
`screened` for averaging with weights that follow from what was heard (screening.py). `MIXES` has
mixes by name: gossip averaging, and some that a few liars among the neighbours can't steer. What
these don't take leaves its weight with the receiver, as a message does that never came.

Shapes: m own clients, n clients that were heard (own ones included), P parameters of a factor.

Sources: coordinate-wise trimmed mean (Yin et al. 2018, arXiv 1803.01498), in gossip BRIDGE
(1908.08098); clipped gossip (He, Karimireddy, Jaggi 2022, 2202.01545).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from plait.factors import AB, NONE, VALUE, A, B, Factor
from plait.later import Tensor, torch
from plait.lookup import lookup
from plait.lora import Layout, State
from plait.machine.devices import exact, exact_device
from plait.screening import Screen, Slots, clipped_product, trimmed_product

Number = TypeVar("Number", int, float)
Rule = Callable[[Tensor, Tensor, np.ndarray], Tensor]
"""(mine (m, P), theirs (n, P), W (m, n)) -> mine after mixing (m, P). W holds the weights of the
*others* only: what a client keeps of itself is the rest, 1 - sum(W[i])."""

SiteFactors = tuple[Tensor, Tensor]
"""A (m, r, d_in) and B (m, d_out, r) of an adapted layer."""
SiteRule = Callable[[SiteFactors, SiteFactors, np.ndarray], SiteFactors]
"""As `Rule`, of a layer's A and B together."""


Restore = Callable[[Layout, State, Slots, Slots], State]
"""(layout, mixed, mine, mine as it was sent) -> mixed with what rounding took off."""


def restored(_layout: Layout, mixed: State, mine: Slots, sent: Slots) -> State:
    """It is added again, where the result is one's own state and steps from it in each slot."""
    return {slot: value + (mine[slot] - sent[slot]) for slot, value in mixed.items()}


@dataclass(frozen=True)
class Mix:
    """What a client makes of its own slots and those that it heard.

    Attributes:
        combine: (layout, mine, heard, W) -> mine after mixing; slots are (m, P) and (n, P), W as
            for a `Rule`.
        together: Factors that must travel in the same rounds, or `combine` can't work.
        any_rank: Whether zeros may stand for the directions that clients of smaller rank lack; what
            they get in them is cut off again.
        restore: What becomes of what rounding for the wire took off one's own, if it isn't lost.
        indivisible: Whether a state counts as a whole only, as where each client's factors have a
            basis of their own: then a peer that lost its own takes no entries of several.
    """

    combine: Callable[[Layout, Slots, Slots, np.ndarray], State]
    together: Factor = NONE
    any_rank: bool = False
    restore: Restore | None = restored
    indivisible: bool = False


def each_factor(rule: Rule, any_rank: bool = False) -> Mix:
    """Mix every slot by itself."""

    def combine(_layout: Layout, mine: Slots, heard: Slots, W: np.ndarray) -> State:
        return {slot: rule(own, heard[slot], W) for slot, own in mine.items()}

    return Mix(combine, any_rank=any_rank)


def screened(screen: Screen) -> Mix:
    """Average every slot with the weights that a screen of all of them takes."""

    def combine(layout: Layout, mine: Slots, heard: Slots, W: np.ndarray) -> State:
        taken = screen(layout, mine, heard, W)
        return {slot: average(own, heard[slot], taken) for slot, own in mine.items()}

    return Mix(combine, together=AB)


def each_site(rule: SiteRule, any_rank: bool = False, indivisible: bool = True) -> Mix:
    """Mix the values of A and B layer by layer, both at once; other slots are averaged."""

    def combine(layout: Layout, mine: Slots, heard: Slots, W: np.ndarray) -> State:
        a, b = (VALUE, A), (VALUE, B)
        own, theirs = (layout.by_site(one) for one in (mine, heard))
        pairs = [rule(x, y, W) for x, y in zip(own, theirs, strict=True)]
        mixed = {slot: average(mine[slot], heard[slot], W) for slot in mine if slot not in (a, b)}
        for slot, parts in zip((a, b), zip(*pairs, strict=True), strict=True):
            mixed[slot] = torch.cat([part.flatten(1) for part in parts], dim=1)
        return mixed

    return Mix(combine, together=AB, any_rank=any_rank, restore=None, indivisible=indivisible)


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


AVERAGE = each_factor(average, any_rank=True)
"""Every slot averaged."""


def taken(mine: Tensor, theirs: Tensor, W: np.ndarray) -> Tensor:
    """What was heard in the place of one's own, with whatever weight; nothing is averaged."""
    mixed = mine.clone()
    for i, j in zip(*np.nonzero(W), strict=True):
        mixed[i] = theirs[j]
    return mixed


def trimmed_mean(count: int) -> Rule:
    """Averaging without the values at the edges, coordinate by coordinate.

    Of a coordinate's values, one's own and those heard, the `count` lowest and highest mark out a
    range; a neighbour's value outside it is left out. With at most `count` liars among those heard
    the range lies within the honest values, so whatever they send, the result does too. One's own
    state always stays part of it: a lone neighbour's in its place would undo the local training.

    A client that hears fewer than twice `count` others keeps its state. The mean of all clients
    moves, even when everybody is honest.

    Args:
        count: Values cut off at each end, and so the number of liars that can be stood.
    """

    def mix(mine: Tensor, theirs: Tensor, W: np.ndarray) -> Tensor:
        mixed = mine.clone()
        for i, weights in enumerate(W):
            heard = np.flatnonzero(weights)
            if len(heard) < 2 * count:
                continue
            ordered = torch.cat([mine[i : i + 1], theirs[heard]]).sort(dim=0).values
            low, high = ordered[count], ordered[len(heard) - count]
            for j in heard:
                kept = (low <= theirs[j]) & (theirs[j] <= high)
                step = torch.where(kept, theirs[j] - mine[i], 0.0)
                mixed[i].add_(step, alpha=float(weights[j]))
        return mixed

    return mix


def clipped_gossip(radius: float) -> Rule:
    """Averaging with bounded steps, x_i + sum_j w_ij clip(x_j - x_i, radius).

    A neighbour moves a factor by at most its weight times `radius`, whatever it sends. The paper's
    radius is each client's own and follows the spread of the honest ones, which nobody knows; here
    all have the same, so that with a symmetric W the mean of all clients is conserved: what one
    side of a link gains the other one loses.

    Args:
        radius: The largest L2 norm of the difference to a neighbour, over a factor of all layers.
    """

    def mix(mine: Tensor, theirs: Tensor, W: np.ndarray) -> Tensor:
        mixed = mine.clone()
        for i, j in zip(*np.nonzero(W), strict=True):
            step = theirs[j] - mine[i]
            # In float64, where the square of the largest float32 is still a number.
            norm = float(torch.linalg.vector_norm(exact(step)))
            mixed[i].add_(step, alpha=float(W[i, j]) * (radius / max(norm, radius)))
        return mixed

    return mix


@dataclass(frozen=True)
class MixRow:
    """A line of `MIXES`.

    Attributes:
        build: Makes the mix of what follows the colon in its name.
        summary: What it is, in one line.
        conserves_mean: Whether a symmetric W leaves the mean of all clients where it is.
        example: An argument to show; none if the mix takes none.
    """

    build: Callable[[str], Mix]
    summary: str
    conserves_mean: bool
    example: str = ""


MIXES: dict[str, MixRow] = {
    "average": MixRow(
        lambda _: AVERAGE,
        "Gossip averaging with the weights of W; one liar can send everybody anywhere",
        conserves_mean=True,
    ),
    "trimmed-mean": MixRow(
        lambda argument: each_factor(trimmed_mean(_above_zero("trimmed-mean", argument, int))),
        "In each coordinate without the so many lowest and highest values of those heard",
        conserves_mean=False,
        example="1",
    ),
    "clipped-gossip": MixRow(
        lambda argument: each_factor(
            clipped_gossip(_above_zero("clipped-gossip", argument, float))
        ),
        "Differences to a neighbour cut down to this L2 norm",
        conserves_mean=True,
        example="0.5",
    ),
    "trimmed-product": MixRow(
        lambda argument: screened(trimmed_product(_above_zero("trimmed-product", argument, int))),
        "Without the so many neighbours that are farthest from most in A, in B, or in B A",
        conserves_mean=False,
        example="1",
    ),
    "clipped-product": MixRow(
        lambda argument: screened(clipped_product(_above_zero("clipped-product", argument, float))),
        "Neighbours' weights cut down so that none moves A, B or B A further than this L2 norm",
        conserves_mean=True,
        example="0.5",
    ),
}


def build_mix(name: str) -> Mix:
    """The mix that `name` or `name:argument` means.

    Raises:
        ValueError: There is no such mix, or its argument can't be; the message has the fix.

    Example:
        >>> build_mix("trimmed-mean")
        Traceback (most recent call last):
        ValueError: Mix 'trimmed-mean': write `trimmed-mean:1`.
    """
    key, _, argument = name.partition(":")
    row = lookup(MIXES, key, "mix")
    if bool(argument) != bool(row.example):
        raise ValueError(f"Mix {name!r}: write `{key}{row.example and f':{row.example}'}`.")
    return row.build(argument)


def _above_zero(name: str, argument: str, kind: type[Number]) -> Number:
    try:
        value = kind(argument)
    except ValueError:
        value = kind(0)
    if not 0 < value < np.inf:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(
            f"Mix {name}:{argument} needs {what} above 0, as in {name}:{MIXES[name].example}."
        )
    return value


def neighbour_weights(W: np.ndarray) -> np.ndarray:
    """W (N, N) without its diagonal: the form in which a `Rule` wants it."""
    return np.asarray(W - np.diag(np.diag(W)))


def mean(stack: Tensor) -> Tensor:
    """The mean client (1, P) of a stack (N, P), accumulated in float64."""
    return (total(stack) / len(stack)).to(stack.dtype).to(stack.device)


def total(stack: Tensor) -> Tensor:
    """The sum (1, P) float64 of a stack (n, P), on the device if that has the type."""
    there = stack.to(exact_device(stack.device))
    return there.sum(dim=0, keepdim=True, dtype=torch.float64)
