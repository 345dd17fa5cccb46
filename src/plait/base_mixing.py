"""Methods that add to the frozen weights what A and B lose in mixing: BASE_B BASE_A, of rank R.

All that is added to W0 has rank r + R then, and is exact as long as R suffices; what a round cuts
off is its mixing error (metrics.py). Each client is computed by itself, as in site_mixing.py, so
the result is bitwise the same however many clients are mixed at once.

Sources: FedEx-LoRA (Singhal et al. 2024, arXiv 2410.09432), FLoRA (Wang et al. 2024, 2409.05976).
Both have a server, which adds a full d_out x d_in matrix to W0 at all clients.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from plait.factors import AB, BASE, BASE_A, BASE_B, VALUE, A, B
from plait.later import Tensor, torch
from plait.lora import Layout, State
from plait.machine.devices import exact
from plait.mixing import Mix, SiteFactors, average
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
                wide, tall = (torch.cat(x, dim) for dim, x in enumerate(zip(*parts, strict=True)))
                for into, value in zip(
                    place, factorized(wide, tall, layout.base_rank), strict=True
                ):
                    into[i].copy_(value)
        return mixed

    together = AB | BASE if mixes_base else AB
    return Mix(combine, together, any_rank, steps=False, indivisible=mixes_base)


def _client(site: SiteFactors, i: int) -> SiteFactors:
    """The factors of one of m clients, in float64."""
    return exact(site[0][i]), exact(site[1][i])
