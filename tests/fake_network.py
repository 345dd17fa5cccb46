"""Peers in one process: threads for processes, and a network of function calls that can lose."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable

import sklearn.metrics  # noqa: F401 - takes seconds, which are none of the peers'

from conftest import tiny_job
from plait.config import Config
from plait.peers.codec import Ack, Answer, Identity, Message, Question, decode, encode
from plait.peers.exchange import Exchange, Terms
from plait.peers.federation import Member
from plait.peers.inbox import Inbox
from plait.peers.mailbox import LOG, Desk
from plait.peers.refusals import Reason, Refused
from plait.peers.round_loop import Due, Peer, agreed_turns
from plait.peers.transport import Reply
from plait.privacy import seeded_noise

TERMS = Terms(round_timeout_s=20, start_timeout_s=20, linger_s=20, retry_s=0.05)


class Hub:
    """A network. `lose(kind, sender, receiver, round)` says what does not get through."""

    def __init__(self, lose: Callable[[str, str, str, int], bool] = lambda *_: False) -> None:
        self.lose = lose
        self.desks: dict[str, Desk] = {}
        self.identities: dict[str, Identity] = {}

    def transport(self, name: str) -> FakeTransport:
        return FakeTransport(self, name)


@dataclasses.dataclass
class FakeTransport:
    """Every message becomes bytes, and is checked as one that came over the network."""

    hub: Hub
    name: str

    def start(self) -> None: ...

    def stop(self, grace_s: float) -> None: ...

    def send(self, to: str, message: Message, deadline_s: float) -> Ack:
        round_ = message.header.round
        if to not in self.hub.desks or self.hub.lose("send", self.name, to, round_):
            return Ack(False, Reason.UNREACHABLE, "lost")
        message = addressed(message, to)
        try:
            factors = self._received(message, to)
            self.hub.desks[to].admit(message.header)
            self.hub.desks[to].take(message.header, factors)
        except Refused as refused:
            self.hub.desks[to].refused(self.name, refused.reason, refused.detail)
            return Ack(False, refused.reason, refused.detail)
        if self.hub.lose("ack", to, self.name, round_):
            return Ack(False, Reason.NO_ANSWER, "the acknowledgement was lost")
        return Ack(True)

    def ask(self, to: str, question: Question, deadline_s: float) -> Reply:
        if to not in self.hub.desks or self.hub.lose("ask", self.name, to, question.round):
            raise Refused(Reason.UNREACHABLE, "lost")
        question = dataclasses.replace(question, sender=self.name, receiver=to)
        answer: Answer = self.hub.desks[to].answer(question)
        if self.hub.lose("answer", to, self.name, question.round):
            raise Refused(Reason.NO_ANSWER, "the answer was lost")
        if answer.message is None:
            return Reply(facts=answer.facts)
        message = addressed(answer.message, self.name)
        factors = self._received(message, self.name)
        self.hub.desks[to].gave(self.name, answer.message)
        return Reply(facts=answer.facts, header=message.header, factors=factors)

    def _received(self, message: Message, to: str):
        identity = self.hub.identities[to]
        identity.check(message.header, frozenset([message.header.sender]))
        slots = identity.template(message.header).slots
        before = self.hub.desks[to].known(message.header.sender, slots)
        return decode(message.header, bytearray(message.body), identity, before)


def addressed(message: Message, to: str) -> Message:
    header = dataclasses.replace(message.header, receiver=to)
    return dataclasses.replace(message, header=header)


def member(name: str, **span) -> Member:
    return Member(name=name, address=f"127.0.0.1:{1000 + int(name[1:])}", **span)


def start_peer(
    hub: Hub,
    me: int,
    config: Config,
    members,
    *,
    terms=TERMS,
    keep_rounds=8,
    symmetric=False,
    noise=None,
    job=None,
) -> Peer:
    """A peer that can be reached over the hub; its rounds are not begun."""
    job = job or tiny_job(config)
    names = [one.name for one in members]
    turn = agreed_turns(job, me, lambda _: tuple(members))
    desk = Desk(Inbox(me, turn, config.rounds, keep_rounds, symmetric), names)
    layout, stack = job.backbone.layout, job.initial_stack([me])

    def write(rows, round_, active, kind, before=None):
        return encode(
            job.own(rows, me), layout=job.layout_of(me), federation="f", config_digest="d",
            sender=names[me], round=round_, active=active, kind=kind, wire=config.wire,
            before=None if before is None else job.own(before, me),
        )  # fmt: skip

    hub.identities[names[me]] = Identity(
        name=names[me],
        federation="f",
        config_digest=lambda _: "d",
        layout=layout,
        max_message_bytes=1 << 20,
        kinds=job.method.kinds,
        rank_of=lambda name: config.rank_of(names.index(name)),
        wire=config.wire,
    )
    hub.desks[names[me]] = desk
    return Peer(
        job,
        stack,
        Exchange(desk, hub.transport(names[me]), terms),
        write,
        noise or seeded_noise(config.seed),
    )


class Bugs(logging.Handler):
    """What threads of the exchange raised."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self.errors.append(record.exc_info[1])


def together(peers, rounds: int) -> list[list]:
    """Run peers to the end, each in a thread of its own; returns the events of each."""
    said = [[] for _ in peers]
    errors = []

    def live(peer: Peer, events: list) -> None:
        try:
            for one in peer.rounds(peer.inbox.round, rounds):
                peer.train(one) if isinstance(one, Due) else events.append(one)
            peer.exchange.linger(set(range(len(peers))) - {peer.me}, rounds)
        except Exception as error:
            errors.append(error)
        finally:
            peer.exchange.stop()

    bugs = Bugs()
    LOG.addHandler(bugs)
    threads = [threading.Thread(target=live, args=pair) for pair in zip(peers, said, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a peer hangs"
    LOG.removeHandler(bugs)
    if errors or bugs.errors:
        raise [*errors, *bugs.errors][0]
    return said
