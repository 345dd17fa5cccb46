"""Where a peer's engine and its transport meet: one lock around an inbox, and a record of faults.

The transport calls it from a thread of its own, the engine from the main one. Everything here is
quick; whatever computes or waits for the network happens in the engine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from plait.events import Incident
from plait.factors import Slot
from plait.peers.audit import Note, no_note
from plait.peers.changes import Copies, Rows
from plait.peers.codec import Answer, Header, Message, Question
from plait.peers.inbox import FactorRows, Inbox, Letter
from plait.peers.quorum import Quorum
from plait.peers.refusals import Reason, Refused, plain

LOG = logging.getLogger("plait.peer")

OBSERVER = 2**32 - 1
"""The round of one who asks as a peer without being one: `plait status`."""

EXPECTED = frozenset({Reason.NOT_HERE, Reason.NOT_DUE, Reason.NO_COPY})
"""Refusals that belong to the protocol: a neighbour asks for what is not there yet, or sends what
changed to one that hasn't what was before."""


FOREIGN = frozenset({Reason.WRONG_VERSION, Reason.WRONG_FEDERATION, Reason.WRONG_CONFIG})
"""Refusals after which nothing can be expected of a neighbour until it is started anew."""


class Desk:
    """What neighbours can reach of a peer.

    Attributes:
        inbox: The messages; use it under `condition`.
        names: The peers' names, in the order of their numbers.
        condition: Held while the inbox is used; notified when something came.
        seen: Peer -> the round that it last said it is in, no more than the run has.
        absent: Neighbours that are not waited for until they are heard of again.
        counts: (kind of incident, peer, reason) -> how often.
        resting: The peer's own state between two rounds, for one that lost its own.
        quorum: Whose word on the round counts.
        settings: What all peers must share, for one whose digest is another.
        foreign: Neighbours that don't run the same, and what they or this peer said of it.
        facts: What else the status says, set by the engine.
        live: As `facts`, looked up when somebody asks.
        note: Adds a line to the audit book.
        copies: What others sent last, where changes of it travel.
        version: Of the newest list of members.
        roster: Version -> the text of that list; empty if there is none.
        newer: Peers that say they have a newer one.
    """

    def __init__(self, inbox: Inbox, names: Sequence[str], quorum: Quorum | None = None) -> None:
        self.inbox, self.names = inbox, tuple(names)
        others = frozenset(range(len(names))) - {inbox.me}
        self.quorum = quorum or Quorum(voters=lambda _: others)
        self.settings: dict[str, Any] = {}
        self.foreign: dict[int, str] = {}
        self.condition = threading.Condition()
        self.seen: dict[int, int] = {}
        self.absent: set[int] = set()
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.resting: Callable[[], Message] | None = None
        self.facts: dict[str, Any] = {}
        self.live: Callable[[], dict[str, Any]] = dict
        self.note: Note = no_note
        self.copies: Copies | None = None
        self.version = 1
        self.roster: Callable[[int], str] = lambda _: ""
        self.newer: set[int] = set()
        self._moving: dict[int, float] = {}
        self._took: set[int] = set()
        self._gave: dict[int, Message] = {}
        self._incidents: list[Incident] = []
        self._said: set[tuple[object, ...]] = set()
        self._began = time.monotonic()

    @property
    def name(self) -> str:
        """This peer's name."""
        return self.names[self.inbox.me]

    # -- what the transport calls

    def admit(self, header: Header) -> None:
        """Look at a message's header before its body is taken; raises `Refused`."""
        with self.condition:
            sender = self._number(header.sender)
            self._hear(sender, header.round)
            if header.kind not in ("round", "change"):
                raise Refused(Reason.MALFORMED, f"a {header.kind!r:.40} that nobody asked for")
            self.inbox.admit(sender, header.round, header.active, header.factors, header.digest)

    def take(self, header: Header, rows: FactorRows) -> None:
        """Take a message that was checked; raises `Refused` when its round has closed meanwhile."""
        with self.condition:
            self.admit(header)
            sender = self._number(header.sender)
            self.keep(sender, header, rows)
            self._took.add(sender)
            self.condition.notify_all()

    def keep(self, sender: int, header: Header, rows: FactorRows) -> None:
        """Keep a row that was admitted. To be called under `condition`."""
        if self.inbox.take(sender, header.round, Letter(rows, header.digest)):
            if self.copies:
                self.copies.keep(sender, header.round, rows)
            self.note("took", rows, peer=self.names[sender], what="round", round=header.round)

    def known(self, sender: str, slots: Collection[Slot]) -> Rows:
        """What of some slots of a peer is here, for its change of them."""
        with self.condition:
            return self.copies.of(self._number(sender), slots) if self.copies else {}

    def answer(self, question: Question) -> Answer:
        """Answer a neighbour; raises `Refused`."""
        with self.condition:
            asker = self._number(question.sender)
            if question.members > self.version:
                self.newer.add(asker)
                self.condition.notify_all()
            if question.kind == "settings":
                return Answer(self.settings)
            if question.kind == "members":
                return Answer({"members": self.version}, roster=self.roster(question.round))
            if question.asker_round != OBSERVER:
                self._hear(asker, question.asker_round)
            if question.kind == "status":
                return Answer(self.status())
            if question.kind == "state":
                state = self._asked_for_state(asker, question.asker_round)
                return Answer({"round": self.inbox.round}, state)
            word = self.inbox.answer(asker, question.round)
            facts = {"round": self.inbox.round, "agreed": word.agreed, "members": self.version}
            return Answer(facts, word.message)

    def gave(self, asker: str, message: Message) -> None:
        """Note that an answer's message has gone out whole."""
        with self.condition:
            what, round_ = message.header.kind, message.header.round
            if what == "round":
                self.inbox.pulled(self._number(asker), round_)
            if self._is_first(self.inbox.round, "gave", asker, f"{what} {round_}"):
                self.note("gave", message, peer=asker, what=what, round=round_)
            self.condition.notify_all()

    def moving(self, sender: str, until: float) -> None:
        """Note that a message is coming, and by when its next piece is here."""
        with self.condition:
            self._moving[self._number(sender)] = until
            self.condition.notify_all()

    def refused(self, sender: str, reason: Reason, detail: str) -> None:
        """Record that something was refused here."""
        if reason in EXPECTED:
            return
        self.report("refused", sender, detail, reason.name)
        # One that hasn't the newest list yet is no stranger: it gets it with the next question.
        lags = reason is Reason.WRONG_CONFIG and self.version > 1
        if reason in FOREIGN and sender in self.names and not lags:
            self.set_foreign(self.names.index(sender), detail)

    # -- what the engine calls

    def status(self) -> dict[str, Any]:
        """What `plait status` shows."""
        refused: Counter[str] = Counter()
        for (kind, _, reason), count in self.counts.items():
            if kind == "refused":
                refused[reason] += count
        return {
            "name": self.name,
            "members": self.version,
            "round": self.inbox.round,
            "rounds": self.inbox.rounds,
            "absent": [self.names[peer] for peer in sorted(self.absent)],
            "seen": {self.names[peer]: round_ for peer, round_ in sorted(self.seen.items())},
            "refused": dict(refused),
            "missing": sum(n for (kind, *_), n in self.counts.items() if kind == "missing"),
            "time": time.time(),
            "up_seconds": round(time.monotonic() - self._began, 1),
            **self.facts,
            **self.live(),
        }

    def report(
        self, kind: str, peer: str, detail: str, reason: str = "", round_: int | None = None
    ) -> None:
        """Count an incident, and say it once for each round, peer and reason.

        A neighbour that sends a million bad messages fills neither log nor memory.
        """
        peer = peer[:80] if peer in self.names else "unknown"
        with self.condition:
            self.counts[kind, peer, reason] += 1
            round_ = self.inbox.round if round_ is None else round_
            if not self._is_first(round_, kind, peer, reason):
                return
            if kind == "refused":
                self.note(kind, peer=peer, reason=reason, round=round_, detail=plain(detail, 500))
            self._incidents.append(
                Incident(round=round_, kind=kind, peer=peer, reason=reason, detail=detail[:500])
            )
        LOG.warning(
            "%s %s: %s", kind, reason, detail,
            extra={"round": round_, "peer": peer, "kind": kind, "reason": reason},
        )  # fmt: skip

    def incidents(self) -> list[Incident]:
        """The incidents since the last call."""
        with self.condition:
            said, self._incidents = self._incidents, []
        return said

    def heard_of(self, peer: int, round_: object) -> None:
        """Note where a neighbour says it is."""
        if isinstance(round_, int):
            with self.condition:
                self._hear(peer, round_)

    def set_absent(self, peer: int, why: str) -> None:
        """Wait no longer for a neighbour until it is heard of again."""
        with self.condition:
            known = peer in self.absent
            self.absent.add(peer)
            self.condition.notify_all()
        if not known:
            name = self.names[peer]
            self.report("absent", name, f"not waiting for {name} until it is back: {why}")

    def set_foreign(self, peer: int, detail: str) -> None:
        """Expect nothing of a neighbour that does not run the same, until it is heard of again."""
        with self.condition:
            self.foreign.setdefault(peer, detail)
        self.set_absent(peer, "it does not run the same")

    def is_moving(self, peer: int) -> bool:
        """Whether a message of a neighbour is coming in."""
        with self.condition:
            return time.monotonic() < self._moving.get(peer, 0.0)

    def target(self) -> int:
        """The round that the others have reached by the word of a majority of them."""
        with self.condition:
            return self.quorum.reached(self.claims())

    def claims(self) -> dict[int, int]:
        """Peer -> the round that it says it is in."""
        with self.condition:
            return dict(self.seen)

    def ahead(self) -> set[int]:
        """Those who say they are further than the messages that are kept for them."""
        with self.condition:
            limit = self.inbox.round + self.inbox.keep_rounds
            return {peer for peer, round_ in self.claims().items() if round_ > limit}

    def _is_first(self, round_: int, *what: object) -> bool:
        """Whether it is the first of its kind in a round; what was said in others is forgotten."""
        key = (round_, *what)
        if key in self._said:
            return False
        self._said = {one for one in self._said if one[0] == round_} | {key}
        return True

    def _asked_for_state(self, asker: int, asker_round: int) -> Message:
        """As `_state`, and whoever asked is noted, with what it got."""
        here, asked = self.inbox.round, {"peer": self.names[asker], "what": "state"}
        try:
            state = self._state(asker, asker_round)
        except Refused as refused:
            reason = refused.reason.name
            if self._is_first(here, "asked", asker, reason):
                self.note("asked", round=here, reason=reason, **asked)
            raise
        if self._is_first(here, "asked", asker):
            self.note("asked", state, round=state.header.round, reason="given", **asked)
        return state

    def _state(self, asker: int, asker_round: int) -> Message:
        """The state for one that needs it: a neighbour, now or soon, that lost its own or joins.

        Once: the same again when the answer got lost, and nothing newer.
        """
        here = self.inbox.round
        if self.resting is None:
            raise Refused(Reason.NOT_HERE, "no round is done here yet")
        last = self.inbox.rounds - 1
        soon = range(min(here, last), min(here + self.inbox.keep_rounds, last) + 1)
        if not any(asker in self.inbox.turn(t).heard_by for t in soon):
            raise Refused(Reason.NOT_A_NEIGHBOUR, f"not in round {here}, nor soon after")
        if asker in self._took and asker_round + self.inbox.keep_rounds >= here:
            raise Refused(Reason.NOT_DUE, f"whoever is in round {asker_round} has a state")
        if asker not in self._gave:
            self._gave[asker] = self.resting()
        name = self.names[asker]
        state = self._gave[asker]
        self.report("gave", name, f"the state of round {state.header.round} went to {name}")
        return state

    def _hear(self, peer: int, round_: int) -> None:
        self.seen[peer] = min(max(0, round_), self.inbox.rounds)
        self.foreign.pop(peer, None)
        if peer in self.absent:
            self.absent.discard(peer)
            self.report("back", self.names[peer], f"{self.names[peer]} is back")
        self.condition.notify_all()

    def _number(self, name: str) -> int:
        if name not in self.names:
            raise Refused(Reason.WRONG_SENDER, f"{name!r:.80} is not in the federation")
        return self.names.index(name)
