"""How a peer without a state of its own finds its way in: when to begin, and from what.

It asks all members where they are, and its neighbours for their states. Which of the answers count
is decided in quorum.py; one member that lies about its round or its state moves nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from plait.peers.codec import Header
from plait.peers.exchange import Exchange, Left
from plait.peers.inbox import FactorRows
from plait.peers.quorum import shared_by_most

GREET_AGAIN_S = 1.0


@dataclass
class Entrance:
    """The way in.

    Attributes:
        exchange: What connects the peer with the others.
        joins: The first round that it takes part in.
        expects: Rounds done -> (active, factors) of a state after so many.
        indivisible: Whether a state has to be one that a member has (`Mix.indivisible`).
        states: What came so far, by peer.
    """

    exchange: Exchange
    joins: int
    expects: Callable[[int], tuple[str, str]]
    indivisible: bool = False
    states: dict[int, FactorRows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take the parts that are used all the time."""
        self.desk, self.inbox = self.exchange.desk, self.exchange.inbox

    def is_late(self) -> bool:
        """Whether the others are too far ahead to begin at round 0.

        While some of the members were not heard of and could confirm it they are waited for, as at
        any start.

        Raises:
            ValueError: All neighbours are, by their own word, and no majority can confirm it.
            Left: The peer was told to leave.
        """
        desk, keep = self.desk, self.inbox.keep_rounds
        self.exchange.greet(self.exchange.neighbours)
        end = time.monotonic() + self.exchange.terms.start_timeout_s
        while desk.target() <= keep and (ahead := desk.ahead()):
            self.exchange.greet(self.exchange.others)
            if desk.target() > keep:
                break
            open_ = any(desk.quorum.undecided(desk.claims()[k], desk.claims()) for k in ahead)
            if not open_ or time.monotonic() > end:
                if self.exchange.neighbours <= desk.ahead():
                    raise ValueError(self.exchange.unsure(desk.ahead()))
                break
            self._pause()
        return desk.target() > keep

    def find(self) -> int:
        """Wait until there is a round to begin at, and `states` to begin from.

        They are of neighbours that have reached it: one of a peer that is trusted, or two or more.

        Returns:
            The round.

        Raises:
            ValueError: There are too few, or most aren't the same and have to be.
            Left: The peer was told to leave.
        """
        end = None
        while True:
            self.exchange.greet(self.exchange.others)
            target = self.desk.target()
            if target >= max(1, self.joins):
                end = end or time.monotonic() + self.exchange.terms.start_timeout_s
                self._ask(target)
                if self._enough():
                    if self.indivisible:
                        self._agree()
                    return target
                if time.monotonic() > end or self._hopeless():
                    raise ValueError(self._too_few())
            elif self._hopeless():
                raise ValueError(self._too_few())
            self._pause()

    @property
    def _givers(self) -> set[int]:
        trusted = self.desk.quorum.trusted
        return set(self.exchange.neighbours) if trusted is None else {trusted}

    def _hopeless(self) -> bool:
        return self.desk.quorum.trusted is None and len(self._givers) < 2

    def _enough(self) -> bool:
        """All neighbours that are there, and never one alone that nobody vouches for."""
        there = {peer for peer in self._givers if peer in self.desk.seen} - self.desk.absent
        least = 1 if self.desk.quorum.trusted is not None else 2
        return len(self.states) >= max(least, len(there) // 2 + 1)

    def _agree(self) -> None:
        """Keep the one state that most have, bit for bit."""
        found = shared_by_most(self.states)
        if found is None:
            names = [self.desk.names[peer] for peer in sorted(self.states)]
            raise ValueError(
                f"With this method entries of several states make none, and those of "
                f"{', '.join(names)} differ: start {self.desk.name} again with --trust NAME, such "
                f"as --trust {names[0]}."
            )
        self.states = {found: self.states[found]}

    def _ask(self, target: int) -> None:
        """Ask those that have reached a round for their states."""
        claims = self.desk.claims()
        for peer in sorted(self._givers - self.states.keys()):
            if claims.get(peer, 0) < target:
                continue
            reply = self.exchange.inquire(peer, "state")
            if reply is None or reply.header is None or reply.factors is None:
                continue
            if wrong := self._wrong(reply.header, target):
                self.desk.report("rejected", self.desk.names[peer], wrong, "STATE")
            else:
                self.states[peer] = reply.factors
                whose, of = self.desk.names[peer], reply.header.round
                self.desk.note("took", reply.factors, peer=whose, what="state", round=of)

    def _wrong(self, header: Header, target: int) -> str:
        """What is wrong with a state; empty if nothing is."""
        if header.kind != "state" or abs(header.round - target) > self.inbox.keep_rounds:
            return f"a {header.kind!r:.20} of round {header.round}, not a state of round {target}"
        found, expected = (header.active, header.factors), self.expects(header.round)
        return f"a state with {found}, expected {expected}" if found != expected else ""

    def _too_few(self) -> str:
        names, there = self.desk.names, sorted(self.states)
        have = ", ".join(names[peer] for peer in there) or "nobody"
        example = names[there[0] if there else min(self.exchange.neighbours)]
        return (
            f"{self.desk.name} needs the states of two neighbours to begin from, so that no single "
            f"one decides, and has that of {have}. Start it again when more are there, or, if you "
            f"know whom to believe, with --trust NAME, such as --trust {example}; one that gave a "
            "state before gives a later one once it is started anew."
        )

    def _pause(self) -> None:
        if self.exchange.leave.wait(GREET_AGAIN_S):
            raise Left
