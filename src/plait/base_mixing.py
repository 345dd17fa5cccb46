"""Methods that add to the frozen weights what A and B lose in mixing: BASE_B BASE_A, of rank R.

All that is added to W0 has rank r + R then, and is exact as long as R suffices; what a round cuts
off is its mixing error (metrics.py). Each client is computed by itself, as in site_mixing.py, so
the result is bitwise the same however many clients are mixed at once.

Sources: FedEx-LoRA (Singhal et al. 2024, arXiv 2410.09432), FLoRA (Wang et al. 2024, 2409.05976).
Both have a server, which adds a full d_out x d_in matrix to W0 at all clients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from plait.factors import AB, BASE, BASE_A, BASE_B, VALUE, A, B
from plait.later import Tensor, torch
from plait.lora import Layout, State
from plait.machine.devices import exact
from plait.mixing import Mix, SiteFactors, average, restored
from plait.screening import Slots
from plait.site_mixing import factorized, stacked

Keep = Callable[[Layout, State], tuple[Tensor, Tensor]]
"""(layout, what averaging makes of m clients) -> the A and B (m, P) that they go on with."""


def averaged_with_residual(mixes_base: bool) -> Mix:
    """FedEx-LoRA: A~ and B~ are averages, and sum_j w_ij B_j A_j - B~ A~ goes into the base.

    Args:
        mixes_base: Whether bases travel and are mixed, too. Else each client adds to its own, which
            is the same on the complete graph only.
    """
    return _into_base(
        lambda _layout, averages: (averages[VALUE, A], averages[VALUE, B]), mixes_base
    )


def stacked_into_base(start: Callable[[Layout], Tensor], mixes_base: bool) -> Mix:
    """FLoRA: sum_j w_ij B_j A_j goes into the base; all start again with one A, and with B = 0.

    Args:
        start: layout -> that A, (P,).
        mixes_base: As for `averaged_with_residual`.
    """

    def restart(layout: Layout, averages: State) -> tuple[Tensor, Tensor]:
        old_A, old_B = averages[VALUE, A], averages[VALUE, B]
        return start(layout).to(old_A).repeat(len(old_A), 1), torch.zeros_like(old_B)

    return _into_base(restart, mixes_base, any_rank=True)


def _into_base(keep: Keep, mixes_base: bool, any_rank: bool = False) -> Mix:
    """The mix that goes on with `keep`, and whose base takes up what that lacks of the product."""

    def combine(layout: Layout, mine: Slots, heard: Slots, W: np.ndarray) -> State:
        factors = [slot for slot in mine if slot[1] not in BASE]
        mixed = {slot: average(mine[slot], heard[slot], W) for slot in factors}
        mixed[VALUE, A], mixed[VALUE, B] = keep(layout, mixed)
        mixed |= {(VALUE, base): mine[VALUE, base].clone() for base in (BASE_A, BASE_B)}
        own, theirs, kept = (layout.by_site(one) for one in (mine, heard, mixed))
        old, found = (layout.by_site(one, BASE_A, BASE_B) for one in (mine, mixed))
        bases = layout.by_site(heard, BASE_A, BASE_B) if mixes_base else None
        for site, place in enumerate(found):
            for i, row in enumerate(W):
                A_i, B_i = _client(kept[site], i)
                if not row.any() and torch.equal(B_i, exact(own[site][1][i])):
                    continue  # nothing is lost
                parts = [
                    stacked(own[site], theirs[site], i, row),
                    stacked(old[site], bases[site], i, row) if bases else _client(old[site], i),
                    (A_i, -B_i),
                ]
                _put(place, i, parts)
        return mixed

    together = AB | BASE if mixes_base else AB
    return Mix(combine, together, any_rank, _restored, indivisible=mixes_base)


def _restored(layout: Layout, mixed: State, mine: Slots, sent: Slots) -> State:
    """What rounding took off one's own products goes into the base: each round would lose more."""
    others = {slot: value for slot, value in mixed.items() if slot[1] not in AB | BASE}
    found = mixed | restored(layout, others, mine, sent)
    found |= {(VALUE, base): mixed[VALUE, base].clone() for base in (BASE_A, BASE_B)}
    products = [
        (sign, layout.by_site(state, *of))
        for of in ((A, B), (BASE_A, BASE_B))
        for sign, state in ((1, mine), (-1, sent))
    ]
    for site, place in enumerate(layout.by_site(found, BASE_A, BASE_B)):
        for i in range(len(place[0])):
            lost = [(a, sign * b) for sign, of in products for a, b in [_client(of[site], i)]]
            _put(place, i, [_client(place, i), *lost])
    return found


def _put(place: SiteFactors, i: int, parts: Sequence[SiteFactors]) -> None:
    """Make the base of one of m clients the sum of some products, cut to its rank."""
    wide, tall = (torch.cat(x, dim) for dim, x in enumerate(zip(*parts, strict=True)))
    for into, value in zip(place, factorized(wide, tall, place[0].shape[1]), strict=True):
        into[i].copy_(value)


def _client(site: SiteFactors, i: int) -> SiteFactors:
    """The factors of one of m clients, in float64."""
    return exact(site[0][i]), exact(site[1][i])
