"""Whether the members of a federation can do what its graph asks of them."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from plait.methods import settled
from plait.mixing import neighbour_weights
from plait.peers.federation import Federation
from plait.topology import build_schedule, topology_row

MOST_TURNS = 1000
"""Of a long run the first rounds decide who meets whom."""


def check_members(federation: Federation) -> None:
    """Refuse what the graph can't give.

    Raises:
        ValueError: What needs a symmetric W has none, or two would have to meet that can't.
    """
    _check_symmetry(federation)
    _check_reachability(federation)


def links(federation: Federation) -> frozenset[tuple[int, int]]:
    """The pairs of members (i, j), i < j, of whom one needs the other's messages in some round."""
    schedule = build_schedule(settled(federation.config))
    met: set[tuple[int, int]] = set()
    for round_ in range(min(federation.config.rounds, MOST_TURNS)):
        W = neighbour_weights(schedule(round_))
        met |= {(int(i), int(j)) for i, j in np.argwhere(np.triu(W + W.T))}
    return frozenset(met)


def _check_reachability(federation: Federation) -> None:
    hidden = [k for k, peer in enumerate(federation.peers) if not peer.reachable]
    if federation.relay or len(hidden) < 2:
        return
    stuck = sorted(links(federation) & set(combinations(hidden, 2)))
    if stuck:
        pairs = ", ".join(" and ".join(federation.names[k] for k in pair) for pair in stuck[:3])
        raise ValueError(
            f"{pairs} exchange messages over the topology {federation.config.topology} and neither "
            "can be called by the other; add a relay, one that both can reach (relay = "
            '"host:port", or --relay for a new federation), give one of them an address, or take '
            "another topology, such as a star around one that can be called."
        )


def _check_symmetry(federation: Federation) -> None:
    changing = any(peer.joins or peer.leaves is not None for peer in federation.peers)
    for needs, what in (
        (changing, "peers that join or leave"),
        (federation.limits.symmetric_loss, "symmetric_loss"),
    ):
        if needs and not topology_row(settled(federation.config)).symmetric:
            raise ValueError(
                f"{what} need a symmetric topology; {federation.config.topology} with "
                f"weights {federation.config.weights} is not."
            )
