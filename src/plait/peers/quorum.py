"""What a peer believes of a federation that it comes late to: pure functions, no I/O.

A member may claim any round and offer any state, so no member's word alone decides. A round is
reached when a majority of the other members says so; who was not heard of counts as at round 0. The
state to begin from is the middle, entry by entry, of several states: as long as most of them are
honest, each entry lies between two honest ones (coordinate-wise median, Yin et al. 2018,
arXiv:1803.01498). Where these make no state (`Mix.indivisible`) it is the one that most have. Two
voices are no majority of anything, so with one other member the operator says whom to trust.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
Claims = Mapping[int, int]
"""Peer -> the round that it says it is in, of those that were heard of."""

LEAST_VOICES = 2
"""One alone moves nobody."""


@dataclass(frozen=True, kw_only=True)
class Quorum:
    """Whose word counts.

    Attributes:
        voters: Round -> the other members of that round.
        trusted: The peer whose word alone is enough, because the operator says so.
    """

    voters: Callable[[int], Collection[int]]
    trusted: int | None = None

    def reached(self, claims: Claims) -> int:
        """The furthest round that a majority says it has reached; 0 if there is none."""
        if self.trusted is not None:
            return claims.get(self.trusted, 0)
        return max((t for t in set(claims.values()) if self._agreed(t, claims, 0)), default=0)

    def undecided(self, round_: int, claims: Claims) -> bool:
        """Whether those that were not heard of could still make a majority for a round."""
        if self.trusted is not None:
            return self.trusted not in claims
        return self._agreed(round_, claims, round_) and not self._agreed(round_, claims, 0)

    def _agreed(self, round_: int, claims: Claims, unheard: int) -> bool:
        voters = self.voters(round_)
        ayes = sum(claims.get(peer, unheard) >= round_ for peer in voters)
        return ayes >= max(LEAST_VOICES, len(voters) // 2 + 1)


def middle(own: Mapping[Key, Tensor], states: Sequence[Mapping[Key, Tensor]]) -> dict[Key, Tensor]:
    """The state to begin from: of each entry the middle one.

    Args:
        own: Key -> (P,) what this peer would begin with; it makes an even number odd.
        states: The same of others, one or more. A single one is taken as it is.

    Returns:
        Key -> (P,), in memory of its own.

    Example:
        >>> liar, honest = {"B": torch.tensor([1e9])}, {"B": torch.tensor([2.0])}
        >>> middle({"B": torch.tensor([1.0])}, [liar, honest])
        {'B': tensor([2.])}
    """
    several = len(states) > 1 and len(states) % 2 == 0
    voices = [*states, own] if several else states
    return {
        key: torch.stack([state[key] for state in voices]).median(dim=0).values for key in states[0]
    }


def shared_by_most(states: Mapping[int, Mapping[Key, Tensor]]) -> int | None:
    """The first peer whose state more than half of these have, bit for bit, if there is one.

    Args:
        states: Peer -> key -> (P,).
    """
    for peer, state in states.items():
        alike = (all(torch.equal(one[key], state[key]) for key in state) for one in states.values())
        if 2 * sum(alike) > len(states):
            return peer
    return None
