"""Getting one's rows to the neighbours and theirs to oneself, in time or not at all.

Sending is the fast path: a neighbour's row usually is there before it is missed. Asking mends what
went wrong: a peer that was killed asks for what was acknowledged to its dead process, a cut link
is made good when it heals. Every wait has an end, because a stopped process keeps its connection.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from plait.peers.codec import Message, Question
from plait.peers.inbox import FactorRows, LinkTask, Turn
from plait.peers.mailbox import EXPECTED, FOREIGN, LOG, Desk
from plait.peers.refusals import Reason, Refused
from plait.peers.transport import Reply, Transport

ASK_S = 5.0
"""Longest that a question may take, transfer of the answer not included."""

MIN_PUSH_S = 1.0

GONE = frozenset({Reason.UNREACHABLE, Reason.NO_ANSWER})

FOR_GOOD = FOREIGN | {Reason.TOO_LARGE, Reason.WRONG_SHAPE, Reason.REVOKED}
"""Refusals that the next round will not change."""

NO_ROW = {
    *(Reason.TOO_LARGE, Reason.WRONG_SHAPE, Reason.WRONG_PHASE, Reason.NOT_A_NEIGHBOUR),
    *(Reason.NOT_FINITE, Reason.NORM_TOO_LARGE),
}
"""What comes of a question for a row, and would come of it again until the round is over."""


class Left(Exception):  # noqa: N818
    """This peer was told to leave; its state is that of the last round it finished."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How long a peer waits, and for what.

    Attributes:
        round_timeout_s: Longest wait for the neighbours of a round, after own training, while
            nothing comes from them.
        start_timeout_s: The same for neighbours that were not heard of since this peer started.
        linger_s: How long to stay after the last round for peers that are not done.
        retry_s: Pause between two questions to a neighbour that is awaited.
    """

    round_timeout_s: float = 600.0
    start_timeout_s: float = 600.0
    linger_s: float = 600.0
    retry_s: float = 1.0


class Exchange:
    """The sending, asking and waiting of one peer.

    Attributes:
        desk: What the neighbours reach of it.
        others: All other members.
        neighbours: Those that it exchanges messages with in some round; the rest need not be
            reachable, and nothing is said of them.
        leave: Set it to end every wait.
        learn: Takes the text of a newer list of members; whether it counts.
    """

    def __init__(
        self,
        desk: Desk,
        transport: Transport,
        terms: Terms,
        neighbours: Collection[int] | None = None,
    ) -> None:
        self.desk, self.transport, self.terms = desk, transport, terms
        self.inbox = desk.inbox
        self.others = frozenset(range(len(desk.names))) - {self.inbox.me}
        self.neighbours = self.others if neighbours is None else frozenset(neighbours)
        self.leave = threading.Event()
        self.learn: Callable[[int, str], bool] = lambda *_: False
        self._counted_bytes = 0
        self._refusing: dict[int, str] = {}
        self._survey_due = 0.0
        self._busy: set[tuple[int, LinkTask]] = set()
        self._gone: set[int] = set()
        self._answering: set[int] = set()
        self._without_row: set[tuple[int, int]] = set()
        # Enough threads for every link at once: a stopped neighbour holds its own until a deadline.
        # Members may become more.
        self._pool = ThreadPoolExecutor(max(32, 3 * len(desk.names)), "plait-exchange")
        self._begin = time.monotonic()

    def stop(self) -> None:
        """Begin nothing new."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- a round

    def send(self, turn: Turn, message: Message) -> None:
        """Keep this peer's message of the open round and send it to all that hear it."""
        with self.desk.condition:
            self.inbox.send(message)
        self._begin = time.monotonic()
        for peer in turn.heard_by:
            self._start(peer, LinkTask.PUSH)
        self.desk.note("made", message, round=message.header.round)

    def wait(self) -> None:
        """Until every neighbour's row is there or its time is over; those that are late are asked.

        Raises:
            Left: `leave` was set.
            ValueError: Nobody takes what this peer sends.
        """
        pause = 0.02 if self.inbox.symmetric else self.terms.retry_s
        due = self._begin + pause
        while left := self._left():
            if self.leave.is_set():
                raise Left
            self._learn_from(self.desk.newer)
            now = time.monotonic()
            if now >= due:
                for peer, tasks in left.items():
                    # What is coming in need not be asked for.
                    for task in tasks - ({LinkTask.ASK} if self.desk.is_moving(peer) else set()):
                        self._start(peer, task)
                pause = min(2 * pause, self.terms.retry_s)
                due = now + pause
            with self.desk.condition:
                if self.inbox.left() == left:
                    # Half a second at most: a signal sets `leave` and notifies nobody.
                    self.desk.condition.wait(min(due - now, 0.5))
        self.check_welcome()  # whoever refuses is not waited for

    def _left(self) -> dict[int, set[LinkTask]]:
        """What is still worth waiting for."""
        with self.desk.condition:
            left, spent = self.inbox.left(), self._spent()
            if any(spent < self._patience(peer) or self.desk.is_moving(peer) for peer in left):
                return left
            # Whoever has to be told of a decision waits longer than the one who takes it.
            if self.inbox.in_limbo() and spent < 2 * self.terms.round_timeout_s:
                return self.inbox.left()
            return {}

    def close(self) -> dict[int, FactorRows]:
        """End the open round; a neighbour that is missing and can't be reached is absent."""
        with self.desk.condition:
            round_, left = self.inbox.round, set(self.inbox.left())
            heard = self.inbox.close()
        for peer in sorted(left - set(heard)):
            name = self.desk.names[peer]
            detail = f"nothing of {name} in round {round_} in time; its weight stays here"
            self.desk.report("missing", name, detail, round_=round_)
            if peer in self._gone:
                self.desk.set_absent(peer, "it can't be reached")
        return heard

    def settle(self) -> int:
        """Bytes of values that neighbours took since the last call: acknowledged, or asked for.

        Waits, while the last round's time lasts, for messages that are still on their way; one that
        found its neighbour not there yet is sent again.
        """
        round_ = self.inbox.round - 1
        message = self.inbox.mine(round_)
        again: set[int] = set()
        while message is not None and not self.leave.is_set():
            with self.desk.condition:
                waiting = self._on_their_way(round_, again)
                if not waiting or self._spent() > self.terms.round_timeout_s:
                    break
                for peer in waiting:
                    if (peer, LinkTask.PUSH) not in self._busy:
                        again.add(peer)
                        self._do(peer, LinkTask.PUSH, partial(self._push, peer, message))
                self.desk.condition.wait(0.05)
        with self.desk.condition:
            taken = self.inbox.taken_bytes - self._counted_bytes
            self._counted_bytes = self.inbox.taken_bytes
        return taken

    def _on_their_way(self, round_: int, again: set[int]) -> set[int]:
        """Neighbours that may yet take the message of a round that was closed."""
        waiting = self.inbox.without(round_) - self.desk.absent - self._refusing.keys()
        sending = {k for k in waiting - self._gone if (k, LinkTask.PUSH) in self._busy}
        if self.inbox.symmetric:  # what was decided stands
            return sending
        # Whoever was heard is there by now, whatever became of the message to it.
        return sending | (waiting & self.inbox.heard_in(round_)) - again

    def check_welcome(self) -> None:
        """Stop where nobody takes what this peer sends: it would train alone to the end.

        Raises:
            ValueError: Every neighbour refuses for good, or does not run the same.
        """
        with self.desk.condition:
            against = self.desk.foreign | self._refusing
        if not self.neighbours or not self.neighbours <= against.keys():
            return
        for peer in self.neighbours - self._refusing.keys():  # refused here; it hasn't said why
            against[peer] = self._what_differs(self.desk.names[peer]) or against[peer]
        said = "; ".join(f"{self.desk.names[k]}: {against[k]}" for k in sorted(self.neighbours))
        raise ValueError(
            f"No neighbour works with {self.desk.name}. {said}. All peers need the same "
            "federation.toml, the same model with its tokenizer, and the same version of plait."
        )

    # -- before the first round and after the last

    def whereabouts(self) -> int:
        """The round that a majority of the members has reached.

        Where somebody says that it is too far ahead, all members are asked, now and then.

        Raises:
            ValueError: All neighbours say so, and too few others can be asked to believe them.
        """
        ahead, now = self.desk.ahead(), time.monotonic()
        if not ahead or now < self._survey_due:
            return self.desk.target()
        self.greet(self.others)
        self._survey_due = now + self.terms.round_timeout_s
        target, ahead = self.desk.target(), self.desk.ahead()
        if target <= self.inbox.round + self.inbox.keep_rounds and self.neighbours <= ahead:
            raise ValueError(self.unsure(ahead))
        return target

    def unsure(self, ahead: Collection[int]) -> str:
        """What to tell an operator when there is no majority to believe."""
        names, claims = self.desk.names, self.desk.claims()
        said = ", ".join(f"{names[peer]} says round {claims[peer]}" for peer in sorted(ahead))
        example = names[min(ahead, default=min(self.others))]
        return (
            f"{self.desk.name} is at round {self.inbox.round} and can't tell where the others are: "
            f"{said or 'too few answer'}, and no majority of the members confirms it. If you know "
            f"whom to believe, start this peer again with --trust NAME, such as --trust {example}."
        )

    def meets(self, neighbours: Collection[int]) -> None:
        """The members, and those of them with whom messages are exchanged, are others now."""
        self.others = frozenset(range(len(self.desk.names))) - {self.inbox.me}
        self.neighbours = frozenset(neighbours)

    def spread(self) -> None:
        """Tell all that there is a newer list of members: whoever is asked anything hears of it."""
        for peer in self.others:
            self._pool.submit(self.inquire, peer)

    def _learn_from(self, peers: Iterable[int]) -> None:
        """Have newer lists of members from some peers, on threads of the pool."""
        for peer in [*peers]:
            self._do(peer, LinkTask.LEARN, partial(self._fetch, peer))

    def _fetch(self, peer: int) -> bool:
        """Have a peer's lists of members that are newer; whether one counts."""
        learned = False
        while True:
            here = self.desk.version
            question = Question(kind="members", round=here + 1, asker_round=self.inbox.round)
            try:
                text = self.transport.ask(self.desk.names[peer], question, ASK_S).roster
            except Refused:
                text = ""
            if not text or not self.learn(peer, text) or self.desk.version == here:
                with self.desk.condition:
                    self.desk.newer.discard(peer)
                return learned
            learned = True

    def _is_of_another_list(self, peer: int) -> bool:
        """Whether a peer that refuses has another version of the list; both have the newer soon."""
        before = self.desk.version
        reply = self.inquire(peer)
        there = reply.facts.get("members", 1) if reply else before
        return there < before or (there > before and self._fetch(peer))

    def greet(self, peers: Iterable[int]) -> None:
        """Ask some peers where they are, all at once; returns when all have answered or not."""
        asked = [self._pool.submit(self.inquire, peer) for peer in peers]
        for answer in asked:
            answer.result()

    def inquire(self, peer: int, kind: Literal["status", "state"] = "status") -> Reply | None:
        """Ask a peer for its status or state; None if it has none or can't be reached."""
        name = self.desk.names[peer]
        question = Question(kind=kind, asker_round=self.inbox.round)
        try:
            reply = self.transport.ask(name, question, ASK_S)
        except Refused as refused:
            self._outcome(peer, refused.reason, refused.detail)
            return None
        self._answered(peer, reply)
        return reply

    def linger(self, peers: Iterable[int], rounds: int) -> None:
        """Stay for the peers that still need messages: until all are done, or `linger_s` is over.

        Whoever is done says so with its question, so the last two to finish don't wait in vain.
        """
        end = time.monotonic() + self.terms.linger_s
        peers = set(peers)
        self.greet(peers)
        while time.monotonic() < end and not self.leave.wait(self.terms.retry_s / 2):
            waiting = {peer for peer in peers if self.desk.seen.get(peer, 0) < rounds}
            waiting -= self.desk.absent
            if not waiting:
                return
            self.greet(waiting)

    # -- one link

    def _start(self, peer: int, task: LinkTask) -> None:
        """Push or ask on a thread of the pool, each at most once at a time for a neighbour."""
        round_, message = self.inbox.round, self.inbox.mine()
        assert message is not None, "send() comes before wait()"
        work = {
            LinkTask.PUSH: lambda: self._push(peer, message),
            LinkTask.ASK: lambda: self._ask(peer, round_),
        }
        self._do(peer, task, work[task])

    def _do(self, peer: int, task: LinkTask, work: Callable[[], object]) -> None:
        if (peer, task) in self._busy:
            return
        self._busy.add((peer, task))

        def attempt() -> None:
            try:
                work()
            except Exception:  # a bug of ours; nobody looks at what a pool's thread raises
                LOG.exception("%s with %s failed", task.value, self.desk.names[peer])
            finally:
                self._busy.discard((peer, task))
                with self.desk.condition:
                    self.desk.condition.notify_all()

        self._pool.submit(attempt)

    def _push(self, peer: int, message: Message) -> None:
        name = self.desk.names[peer]
        spent = self._spent()
        if self.inbox.symmetric and spent > self.terms.round_timeout_s:
            return
        # Not beyond the round: an old acknowledgement is worth nothing, and holds a thread.
        deadline_s = max(MIN_PUSH_S, self.terms.round_timeout_s - spent)
        knows = self.inbox.knows(peer, message.header.round)
        sent = message.change if message.change and knows else message
        ack = self.transport.send(name, sent, deadline_s)
        if ack.reason is Reason.NO_COPY:
            sent, ack = message, self.transport.send(name, message, deadline_s)
        if not ack.accepted:
            self._outcome(peer, ack.reason or Reason.OTHER, ack.detail)
            return
        self._gone.discard(peer)
        self._refusing.pop(peer, None)
        self.desk.note("sent", message, peer=name, what="round", round=message.header.round)
        with self.desk.condition:
            self.inbox.delivered(peer, message.header.round, sent.values_bytes)
            self.desk.condition.notify_all()

    def _ask(self, peer: int, round_: int) -> None:
        question = Question(kind="round", round=round_, asker_round=round_)
        deadline_s = max(ASK_S, self.terms.round_timeout_s / 2)
        try:
            reply = self.transport.ask(self.desk.names[peer], question, deadline_s)
            self._answered(peer, reply)
            self._keep(peer, round_, reply)
        except Refused as refused:
            self._outcome(peer, refused.reason, refused.detail)
            if refused.reason in NO_ROW:
                self._without_row = {(k, t) for k, t in self._without_row if t == round_}
                self._without_row.add((peer, round_))

    def _keep(self, peer: int, round_: int, reply: Reply) -> None:
        """Take the message in an answer, as `Desk.take` does, and the other side's decision."""
        with self.desk.condition:
            if reply.header is not None and reply.factors is not None:
                head = reply.header
                if (head.kind, head.round) != ("round", round_):
                    raise Refused(Reason.STALE_ROUND, f"asked for round {round_}")
                if not self.inbox.has(peer, round_, head.digest):
                    self.inbox.admit(peer, round_, head.active, head.factors, head.digest)
                    self.desk.keep(peer, head, reply.factors)
            agreed = reply.facts.get("agreed")
            if isinstance(agreed, bool):
                self.inbox.decided(peer, round_, agreed)
            self.desk.condition.notify_all()

    def _answered(self, peer: int, reply: Reply) -> None:
        self._gone.discard(peer)
        self._answering.add(peer)
        self.desk.heard_of(peer, reply.facts.get("round"))
        if reply.facts.get("members", 1) > self.desk.version:
            self._learn_from([peer])

    def _outcome(self, peer: int, reason: Reason, detail: str) -> None:
        """Take note of a call that a neighbour refused, or that did not get through."""
        if peer not in self.neighbours:
            return
        name = self.desk.names[peer]
        if reason in GONE:
            self._gone.add(peer)
            self.desk.report("unanswered", name, detail, reason.name)
            return
        self._gone.discard(peer)
        self._answering.add(peer)
        if reason in EXPECTED:
            return
        if reason is Reason.WRONG_CONFIG and self._is_of_another_list(peer):
            return
        if reason is Reason.WRONG_CONFIG:
            detail = self._what_differs(name) or detail
        self.desk.report("rejected", name, f"{name} refused: {detail}", reason.name)
        if reason in FOR_GOOD:
            self._refusing[peer] = detail
        if reason in FOREIGN or reason is Reason.WRONG_SHAPE:  # its rows won't fit here either
            self.desk.set_foreign(peer, detail)

    def _what_differs(self, name: str) -> str:
        """The settings in which a neighbour differs, both values each; empty if it doesn't say."""
        try:
            theirs = self.transport.ask(name, Question(kind="settings"), ASK_S).facts
        except Refused:
            return ""
        return differences(self.desk.settings, theirs, name)

    def _spent(self) -> float:
        """Seconds since this peer sent its message of the round."""
        return time.monotonic() - self._begin

    def _patience(self, peer: int) -> float:
        if peer in self.desk.absent or (peer, self.inbox.round) in self._without_row:
            return 0.0
        if peer not in self.desk.seen and peer not in self._answering:
            return max(self.terms.start_timeout_s, self.terms.round_timeout_s)
        return self.terms.round_timeout_s


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> str:
    """The settings in which two peers differ, a few of them, in words.

    Example:
        >>> differences({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0}, "ben")
        'lr is 0.1 here and 0.2 at ben'
    """
    keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    shown = [
        f"{key:.40} is {ours.get(key)!r:.60} here and {theirs.get(key)!r:.60} at {name}"
        for key in keys[:4]
    ]
    more = [f"{len(keys) - 4} more differ"] if len(keys) > 4 else []
    return ", ".join([*shown, *more])
