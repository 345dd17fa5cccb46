"""Which messages of its neighbours a peer has, still awaits, or refuses: no I/O, threads or clock.

A round is *open* from the moment the one before is closed. Messages of the open round and of the
next `keep_rounds` are kept, so whoever runs ahead loses nothing and memory stays bounded; what a
peer sent itself is kept as long, for neighbours that were away and ask for it.

Symmetric loss. With it both sides of a link mix or neither does, which conserves the mean. Of two
peers the one with the lower number decides: it commits to the link once it has the other's message
and the other has acknowledged its own. The higher one mixes only when it has been told so, and has
as long again to ask. What remains is the two generals' case: a link that is cut between the
decision and the word of it, and stays cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from torch import Tensor

from plait.factors import Slot
from plait.peers.codec import Message
from plait.peers.refusals import Reason, Refused

FactorRows = dict[Slot, Tensor]
"""Slot -> (P,) of one client."""


@dataclass(frozen=True, eq=False)
class Turn:
    """What all peers agree on for a round, as one of them sees it.

    Attributes:
        active: The factors that train, such as `AB`.
        shared: The factors that travel.
        weights: (N,) what this peer gives to each other one; 0 for itself.
        hears: The peers whose message it needs, ascending.
        heard_by: The peers that need its message.
        since: The rounds before, if any, in which what travels did so last, where a message may
            have only what changed since.
    """

    active: str
    shared: str
    weights: np.ndarray
    hears: tuple[int, ...]
    heard_by: tuple[int, ...]
    since: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Letter:
    """A message that was checked and accepted."""

    rows: FactorRows
    digest: bytes


@dataclass(frozen=True)
class Word:
    """An answer to one that asks for a round.

    Attributes:
        message: This peer's message, if the asker may have it yet.
        agreed: Symmetric loss: whether both sides mix; None while that is open.
    """

    message: Message | None
    agreed: bool | None


class LinkTask(Enum):
    """What is left to do for a link of the open round."""

    PUSH = "push"
    ASK = "ask"
    LEARN = "learn"


@dataclass
class Page:
    """The messages of one round.

    Attributes:
        letters: What came, by sender.
        mine: What this peer sent, once it has.
        had: Their digests, once the round is closed: what was asked for may come again by itself.
        delivered: Who has acknowledged it.
        pulled: Who had it as an answer.
        agreed: Symmetric loss: the links on which both sides mix.
        void: Symmetric loss: those on which neither does.
    """

    letters: dict[int, Letter] = field(default_factory=dict)
    had: dict[int, bytes] = field(default_factory=dict)
    mine: Message | None = None
    delivered: set[int] = field(default_factory=set)
    pulled: set[int] = field(default_factory=set)
    agreed: set[int] = field(default_factory=set)
    void: set[int] = field(default_factory=set)


class Inbox:
    """The state machine of one peer's messages. Peers are numbers; the caller knows their names.

    Attributes:
        round: The round that is open.
        taken_bytes: Values of this peer's messages that neighbours have, each counted once.
        closing: Symmetric loss: the round's time is over. Nothing new is taken or given, so no
            link can still be decided for here; what was decided elsewhere is still learned.
    """

    def __init__(
        self, me: int, turn: Callable[[int], Turn], rounds: int, keep_rounds: int, symmetric: bool
    ) -> None:
        """Begin at round 0.

        Args:
            me: This peer's number.
            turn: Round -> what is agreed for it.
            rounds: Rounds of the run.
            keep_rounds: How far ahead messages are accepted, and how long sent ones are kept.
            symmetric: Mix on both sides of a link or on neither.
        """
        self.me, self.turn, self.rounds = me, turn, rounds
        self.keep_rounds, self.symmetric = keep_rounds, symmetric
        self.round = 0
        self.taken_bytes = 0
        self.closing = False
        self._pages: dict[int, Page] = {}

    # -- what comes

    def admit(self, sender: int, round_: int, active: str, shared: str, digest: bytes) -> None:
        """Refuse what is not expected, before its body is taken.

        Raises:
            Refused: With the reason, for both sides.
        """
        here = f"here is round {self.round}"
        if round_ < self.round and not self._had(sender, round_, digest):
            raise Refused(Reason.STALE_ROUND, f"round {round_} is closed, {here}")
        if round_ > self.round + self.keep_rounds or round_ >= self.rounds:
            ahead = f"{here}, and {self.keep_rounds} rounds are kept of {self.rounds}"
            raise Refused(Reason.TOO_FAR_AHEAD, f"round {round_}: {ahead}")
        if round_ < self.round:
            return
        turn = self.turn(round_)
        if sender not in turn.hears:
            raise Refused(Reason.NOT_A_NEIGHBOUR, f"not in round {round_}")
        if self.closing and round_ == self.round:
            raise Refused(Reason.STALE_ROUND, f"round {round_} is being closed")
        if (active, shared) != (turn.active, turn.shared):
            raise Refused(
                Reason.WRONG_PHASE,
                f"round {round_} trains {turn.active} and shares {turn.shared} here, "
                f"not {active} and {shared}",
            )
        known = self._page(round_).letters.get(sender)
        if known and known.digest != digest:
            raise Refused(Reason.REPLAY, f"another message of round {round_} came before")

    def take(self, sender: int, round_: int, letter: Letter) -> bool:
        """Keep a message that `admit` let pass; the same one again changes nothing.

        Returns:
            Whether it is new.
        """
        if round_ < self.round:
            return False
        kept = self._page(round_).letters.setdefault(sender, letter)
        self._commit(sender, round_)
        return kept is letter

    def has(self, sender: int, round_: int, digest: bytes) -> bool:
        """Whether this very message of a round not yet closed is here.

        A decision comes with the message it is about, also when new ones aren't taken any more.
        """
        page = self._pages.get(round_)
        known = page.letters.get(sender) if page else None
        return known is not None and known.digest == digest

    def delivered(self, receiver: int, round_: int, num_bytes: int | None = None) -> None:
        """Note that a neighbour acknowledged this peer's message, or so many bytes for it."""
        if round_ in self._pages:
            self._count(receiver, round_, num_bytes)
            self._page(round_).delivered.add(receiver)
            self._commit(receiver, round_)

    def pulled(self, asker: int, round_: int) -> None:
        """Note that a neighbour had this peer's message as an answer."""
        if round_ in self._pages:
            self._count(asker, round_)
            self._page(round_).pulled.add(asker)

    def decided(self, peer: int, round_: int, agreed: bool) -> None:
        """Note that the other side of a link says that both mix, or that neither does."""
        if round_ >= self.round and self.symmetric:
            page = self._page(round_)
            (page.agreed if agreed else page.void).add(peer)

    def in_limbo(self) -> bool:
        """Whether, with symmetric loss, another side may have decided and this one not know it."""
        self.closing = self.symmetric
        return self.closing and any(LinkTask.ASK in tasks for tasks in self.left().values())

    # -- what is asked

    def answer(self, asker: int, round_: int) -> Word:
        """What a neighbour gets that asks for this peer's message of a round.

        Raises:
            Refused: It is not for the asker, not there yet, or not there any more.
        """
        page = self._pages.get(round_)
        if page is None or page.mine is None:
            raise Refused(Reason.NOT_HERE, f"nothing of round {round_}, here is round {self.round}")
        if asker not in self.turn(round_).heard_by:
            raise Refused(Reason.NOT_A_NEIGHBOUR, f"not in round {round_}")
        if not self.symmetric:
            return Word(page.mine, None)
        if asker in page.agreed:
            return Word(page.mine, True)
        if round_ < self.round:
            return Word(None, False)
        # The one that decides may have the message at once; the other one with the decision.
        early = asker < self.me and not self.closing
        return Word(page.mine if early else None, None)

    def knows(self, receiver: int, round_: int) -> bool:
        """Whether what was shared before a round was for a neighbour too, so that it may have it.

        Before the first such message all have the common start.
        """
        return all(receiver in self.turn(t).heard_by for t in self.turn(round_).since)

    # -- the open round

    def send(self, message: Message) -> None:
        """Keep this peer's own message of the open round."""
        self._page(self.round).mine = message

    def mine(self, round_: int | None = None) -> Message | None:
        """This peer's own message of the open round, or of another that is still kept."""
        return self._page(self.round if round_ is None else round_).mine

    def last_sent(self) -> Message | None:
        """This peer's newest message that is kept."""
        sent = {round_: page.mine for round_, page in self._pages.items() if page.mine}
        return sent[max(sent)] if sent else None

    def remember(self, round_: int, message: Message, heard: set[int]) -> None:
        """After a restart: what this peer sent in a closed round, and whom it mixed with."""
        page = self._page(round_)
        page.mine, page.agreed = message, heard

    def without(self, round_: int) -> set[int]:
        """Those that hear this peer in a round and don't have its message, as far as is known."""
        page = self._pages.get(round_)
        if page is None or page.mine is None:
            return set()
        return set(self.turn(round_).heard_by) - page.delivered - page.pulled

    def heard_in(self, round_: int) -> set[int]:
        """Those whose message of a closed round came."""
        page = self._pages.get(round_)
        return set(page.had) if page else set()

    def left(self) -> dict[int, set[LinkTask]]:
        """What is still to be done in the open round, by neighbour; empty when all are there."""
        page, turn = self._page(self.round), self.turn(self.round)
        if not self.symmetric:
            return {peer: {LinkTask.ASK} for peer in turn.hears if peer not in page.letters}
        left: dict[int, set[LinkTask]] = {}
        for peer in turn.hears:
            if peer in page.agreed | page.void:
                continue
            if self.closing and not (peer < self.me and peer in page.letters):
                continue
            ask = peer < self.me or peer not in page.letters
            push = peer not in page.delivered and not self.closing
            due = ((LinkTask.PUSH, push), (LinkTask.ASK, ask))
            left[peer] = {task for task, is_due in due if is_due}
        return left

    def close(self) -> dict[int, FactorRows]:
        """End the open round: what to mix with, by sender; later messages of it are refused."""
        page = self._page(self.round)
        sure = page.agreed if self.symmetric else set(page.letters)
        heard = {peer: page.letters[peer].rows for peer in sorted(sure & set(page.letters))}
        page.agreed = set(heard)
        self.skip_to(self.round + 1)
        return heard

    def skip_to(self, round_: int) -> None:
        """Go to a round, leaving out those between; what is too old is dropped."""
        self.round, self.closing = round_, False
        for past in [t for t in self._pages if t < round_]:
            page = self._pages[past]
            page.had |= {sender: letter.digest for sender, letter in page.letters.items()}
            page.letters.clear()
            if past < round_ - self.keep_rounds:
                del self._pages[past]

    def _had(self, sender: int, round_: int, digest: bytes) -> bool:
        page = self._pages.get(round_)
        # With symmetric loss an acknowledgement is a promise to mix, and it is too late for that.
        return page is not None and not self.symmetric and page.had.get(sender) == digest

    def _count(self, receiver: int, round_: int, num_bytes: int | None = None) -> None:
        page = self._page(round_)
        if page.mine and receiver not in page.delivered | page.pulled:
            self.taken_bytes += page.mine.values_bytes if num_bytes is None else num_bytes

    def _commit(self, peer: int, round_: int) -> None:
        page = self._page(round_)
        if self.me < peer and peer in page.letters and peer in page.delivered:
            page.agreed.add(peer)

    def _page(self, round_: int) -> Page:
        return self._pages.setdefault(round_, Page())
