"""Getting one's rows to the neighbours and theirs to oneself, in time or not at all.

Sending is the fast path: a neighbour's row usually is there before it is missed. Asking mends what
went wrong: a peer that was killed asks for what was acknowledged to its dead process, a cut link
is made good when it heals. Every wait has an end, because a stopped process keeps its connection.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from plait.peers.codec import Message, Question
from plait.peers.inbox import Letter, Rows, Task, Turn
from plait.peers.mailbox import FOREIGN, LOG, Desk
from plait.peers.refusals import Reason, Refused
from plait.peers.transport import Reply, Transport

ASK_S = 5.0
"""Longest that a question may take, transfer of the answer not included."""

MIN_PUSH_S = 1.0

GONE = frozenset({Reason.UNREACHABLE, Reason.NO_ANSWER})


class Left(Exception):  # noqa: N818
    """This peer was told to leave; its state is that of the last round it finished."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How long a peer waits, and for what.

    Attributes:
        round_timeout_s: Longest wait for the neighbours of a round, after own training.
        start_timeout_s: The same for neighbours that were not heard of since this peer started.
        linger_s: How long to stay after the last round for peers that are not done.
        retry_s: Pause between two questions to a neighbour that is awaited.
    """

    round_timeout_s: float = 60.0
    start_timeout_s: float = 300.0
    linger_s: float = 60.0
    retry_s: float = 1.0


class Exchange:
    """The sending, asking and waiting of one peer.

    Attributes:
        desk: What the neighbours reach of it.
        leave: Set it to end every wait.
        sent_bytes: Bytes of factors that neighbours took.
    """

    def __init__(self, desk: Desk, transport: Transport, terms: Terms) -> None:
        self.desk, self.transport, self.terms = desk, transport, terms
        self.inbox = desk.inbox
        self.leave = threading.Event()
        self.sent_bytes = 0
        self._busy: set[tuple[int, Task]] = set()
        self._gone: set[int] = set()
        # Enough threads for every link at once: a stopped neighbour holds its own until a deadline.
        self._pool = ThreadPoolExecutor(2 * len(desk.names), "plait-exchange")
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
            self._start(peer, Task.PUSH)

    def wait(self) -> None:
        """Until every neighbour's row is there or its time is over; those that are late are asked.

        Raises:
            Left: `leave` was set.
        """
        pause = 0.02 if self.inbox.symmetric else self.terms.retry_s
        due = self._begin + pause
        while left := self._left():
            if self.leave.is_set():
                raise Left
            now = time.monotonic()
            if now >= due:
                for peer, tasks in left.items():
                    for task in tasks:
                        self._start(peer, task)
                pause = min(2 * pause, self.terms.retry_s)
                due = now + pause
            with self.desk.condition:
                if self.inbox.left() == left:
                    # Half a second at most: a signal sets `leave` and notifies nobody.
                    self.desk.condition.wait(min(due - now, 0.5))

    def _left(self) -> dict[int, set[Task]]:
        """What is still worth waiting for."""
        with self.desk.condition:
            left, spent = self.inbox.left(), time.monotonic() - self._begin
            if any(spent < self._patience(peer) for peer in left):
                return left
            # Whoever has to be told of a decision waits longer than the one who takes it.
            if self.inbox.in_limbo() and spent < 2 * self.terms.round_timeout_s:
                return self.inbox.left()
            return {}

    def close(self) -> dict[int, Rows]:
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

    # -- before the first round and after the last

    def greet(self, peers: Iterable[int]) -> None:
        """Ask some peers where they are, all at once; returns when all have answered or not."""
        asked = [self._pool.submit(self.inquire, peer) for peer in peers]
        for answer in asked:
            answer.result()

    def inquire(self, peer: int, kind: str = "status") -> Reply | None:
        """Ask a peer for its status or state; None if it has none or can't be reached."""
        name = self.desk.names[peer]
        question = Question(
            kind="state" if kind == "state" else "status", asker_round=self.inbox.round
        )
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
            if not waiting:
                return
            self.greet(waiting)

    # -- one link

    def _start(self, peer: int, task: Task) -> None:
        """Push or ask on a thread of the pool, each at most once at a time for a neighbour."""
        if (peer, task) in self._busy:
            return
        self._busy.add((peer, task))
        round_, message = self.inbox.round, self.inbox.mine()
        assert message is not None, "send() comes before wait()"

        def work() -> None:
            try:
                if task is Task.PUSH:
                    self._push(peer, message)
                else:
                    self._ask(peer, round_)
            except Exception:  # a bug of ours; nobody looks at what a pool's thread raises
                LOG.exception("%s with %s failed", task.value, self.desk.names[peer])
            finally:
                self._busy.discard((peer, task))

        self._pool.submit(work)

    def _push(self, peer: int, message: Message) -> None:
        name = self.desk.names[peer]
        spent = time.monotonic() - self._begin
        if self.inbox.symmetric and spent > self.terms.round_timeout_s:
            return
        # Not beyond the round: an old acknowledgement is worth nothing, and holds a thread.
        deadline_s = max(MIN_PUSH_S, self.terms.round_timeout_s - spent)
        ack = self.transport.send(name, message, deadline_s)
        if not ack.accepted:
            self._outcome(peer, ack.reason or Reason.OTHER, ack.detail)
            return
        self._gone.discard(peer)
        with self.desk.condition:
            self.sent_bytes += len(message.body)
            self.inbox.delivered(peer, message.header.round)
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

    def _keep(self, peer: int, round_: int, reply: Reply) -> None:
        """Take the message in an answer, as `Desk.take` does, and the other side's decision."""
        with self.desk.condition:
            if reply.header is not None and reply.factors is not None:
                head = reply.header
                if (head.kind, head.round) != ("round", round_):
                    raise Refused(Reason.STALE_ROUND, f"asked for round {round_}")
                if not self.inbox.has(peer, round_, head.digest):
                    self.inbox.admit(peer, round_, head.active, head.factors, head.digest)
                    self.inbox.take(peer, round_, Letter(reply.factors, head.digest))
            agreed = reply.facts.get("agreed")
            if isinstance(agreed, bool):
                self.inbox.decided(peer, round_, agreed)
            self.desk.condition.notify_all()

    def _answered(self, peer: int, reply: Reply) -> None:
        self._gone.discard(peer)
        self.desk.heard_of(peer, reply.facts.get("round"))

    def _outcome(self, peer: int, reason: Reason, detail: str) -> None:
        """Take note of a call that a neighbour refused, or that did not get through."""
        name = self.desk.names[peer]
        if reason in GONE:
            self._gone.add(peer)
            self.desk.report("unanswered", name, detail, reason.name)
            return
        self._gone.discard(peer)
        if reason is not Reason.NOT_HERE:
            self.desk.report("rejected", name, f"{name} refused: {detail}", reason.name)
        if reason in FOREIGN:
            self.desk.set_absent(peer, "it does not run the same")

    def _patience(self, peer: int) -> float:
        if peer in self.desk.absent:
            return 0.0
        if peer not in self.desk.seen:
            return max(self.terms.start_timeout_s, self.terms.round_timeout_s)
        return self.terms.round_timeout_s
