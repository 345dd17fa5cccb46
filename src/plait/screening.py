"""Screening: how much of each neighbour a robust mix takes, by the product B A that it would bring.

Who checks A apart from B is deceived: A of one honest client and B of another pass every check of
a factor, and their product is nobody's (arXiv 2601.00566). Who checks the product alone is, too:
B c and A / c have the honest one, and what is averaged with them has not. So a neighbour is judged
by all that it sent and by the product, and what is taken is a share of all of it: weights.

It is judged over the whole adapter. Whoever lies in one layer is not believed in the others, the
adapter stays one that clients have trained, and a bound holds whatever the number of layers.
Judged layer by layer a liar would gain as much in each of them; but so, one layer may hold all
that a neighbour is allowed.

Each client is computed by itself, in float64 and on one thread, from Gram matrices that are small:
bitwise the same however many are mixed at once, and nothing of the size d_out x d_in.

Legend: m own clients, n that were heard, h that one client hears, r rank, k columns.

Sources: the distance to the nearest of the others as a score, as in Krum (Blanchard et al. 2017,
arXiv 1703.02757); clipping as in clipped gossip (He, Karimireddy, Jaggi 2022, 2202.01545).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from plait.factors import Slot
from plait.later import Tensor, functional, torch
from plait.lora import Layout, product_norm
from plait.machine.devices import exact, one_thread

Slots = Mapping[Slot, Tensor]

Screen = Callable[[Layout, Slots, Slots, np.ndarray], np.ndarray]
"""(layout, mine (m, P), heard (n, P), W (m, n)) -> the weights that are taken (m, n), at most W."""


def clipped_product(radius: float) -> Screen:
    """Bounded steps: the weight of a neighbour times radius / max(radius, what it would move).

    So a neighbour moves neither A nor B, nor a head that is mixed, nor B A itself by more than its
    weight times `radius`, whatever it sends. Both sides of a link cut it down alike.

    Args:
        radius: The largest L2 norm over all layers, of B A without its scale (alpha / r).
    """

    def screen(layout: Layout, mine: Slots, heard: Slots, W: np.ndarray) -> np.ndarray:
        taken = W.copy()
        for i, j in zip(*np.nonzero(W), strict=True):
            own, other = _rows(mine, [i]), _rows(heard, [j])
            with one_thread():
                norms = [float((other[slot] - own[slot]).norm()) for slot in own]
            taken[i, j] *= radius / max(radius, *norms, _rate(layout, own, other))
        return taken

    return screen


def _rate(layout: Layout, own: Slots, other: Slots) -> float:
    """How fast B A changes on the straight way from one's own factors to another's, at most.

    That is ||dB A + B dA||_F over all layers at one of the two ends, of slots (1, P). It is never
    less than the distance of the products, and above zero where only these are the same.
    """
    squares = np.zeros(2)
    for (A0, B0), (A1, B1) in zip(layout.by_site(own), layout.by_site(other), strict=True):
        dA, dB = A1[0] - A0[0], B1[0] - B0[0]
        for end, (a, b) in enumerate(((A0[0], B0[0]), (A1[0], B1[0]))):
            with one_thread():
                norm = product_norm(torch.cat([dB, b], dim=1), torch.cat([a, dA]))
            squares[end] += norm**2
    return math.sqrt(squares.max())


def trimmed_product(count: int) -> Screen:
    """Averaging without the neighbours that are farthest from most, in A, in B, a head, or B A.

    A neighbour's score is the distance within which it has all others but `count`, oneself
    included; the `count` highest scores of each of these are left out, those that are equal to the
    next one not. With at most `count` liars among those heard, whoever is kept is in each of them
    as near to an honest client as honest ones are to each other, whatever it sends.

    A client that hears fewer than twice `count` others keeps its state; of more, it may leave out
    `count` for each of A, B, head and B A. The mean of all clients moves.

    Args:
        count: Neighbours left out, and so the number of liars that can be stood.
    """

    def screen(layout: Layout, mine: Slots, heard: Slots, W: np.ndarray) -> np.ndarray:
        taken = np.zeros_like(W)
        for i, row in enumerate(W):
            near = np.flatnonzero(row)
            if len(near) < 2 * count:
                continue
            with one_thread():
                grams = _grams(layout, _rows(mine, [i]), _rows(heard, near))
                kept = np.logical_and.reduce([_near_most(gram, count) for gram in grams])
            taken[i, near[kept]] = row[near[kept]]
        return taken

    return screen


def _near_most(gram: Tensor, count: int) -> np.ndarray:
    """(h,) who isn't among the `count` farthest from most, by `_grams` (h, h)."""
    h = len(gram)
    gram = functional.pad(gram, (1, 0, 1, 0))  # oneself is in the origin
    norms = gram.diagonal()
    squares = (norms[:, None] + norms - (gram + gram.mT)).clamp(min=0)
    scores = squares.sort(dim=1).values[1:, h - count]  # the first of a row is itself
    near: np.ndarray = (scores <= scores.sort().values[h - count - 1]).cpu().numpy()
    return near


def _grams(layout: Layout, own: Slots, others: Slots) -> Iterator[Tensor]:
    """Inner products (h, h) of the differences from one's own: of each slot, and of the products.

    Args:
        layout: Where the layers lie.
        own: Slot -> (1, P).
        others: Slot -> (h, P).
    """
    for slot, value in others.items():
        step = value - own[slot]
        yield step @ step.mT
    product = torch.zeros(())
    for (A0, B0), (A1, B1) in zip(layout.by_site(own), layout.by_site(others), strict=True):
        # B1 A1 - B0 A0 in one product, so that it is zero to the bit where nothing differs.
        tall = torch.cat([B1 - B0, B0.expand_as(B1)], dim=2).transpose(0, 1).flatten(1)
        wide = torch.cat([A1, A1 - A0], dim=1).flatten(0, 1)
        inner = (tall.mT @ tall) * (wide @ wide.mT)
        shape = len(A1), -1
        product = product + inner.unflatten(1, shape).unflatten(0, shape).sum(dim=(1, 3))
    yield product


def _rows(slots: Slots, clients: list[int] | np.ndarray) -> dict[Slot, Tensor]:
    """Some clients' rows in float64."""
    return {slot: exact(value[clients]) for slot, value in slots.items()}
