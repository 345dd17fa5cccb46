"""Slow links, and links that break: what moves is not cut off, and what has come stays."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import grpc
import pytest
import torch
from test_transport import SOON_S, Desk

from plait.config import Config
from plait.factors import VALUE, Factor
from plait.lora import Layout, Site
from plait.peers import codec, pace
from plait.peers.certificates import init_federation
from plait.peers.changes import change_bytes
from plait.peers.codec import Ack, Message, Question, decode, encode
from plait.peers.envelope import read_ack, write_header
from plait.peers.federation import Limits, load_federation, load_peer
from plait.peers.grpc_server import OPTIONS
from plait.peers.membership import Members
from plait.peers.refusals import Reason, Refused
from plait.peers.transport import DELIVER, HEADER, GrpcTransport
from plait.wire_types import wire_type

LAYOUT = Layout((Site("large", 1 << 12, 1 << 12),), rank=8, scale=1.0)
PIECE_BYTES = 1 << 15
STILL_S = 0.5
"""How long a transfer may stand still."""


class Two:
    """alice and bob, and a message of alice's of nine pieces."""

    def __init__(self, folder) -> None:
        limits = Limits(round_timeout_s=STILL_S)
        names = ("alice", "bob")
        path = init_federation(folder / "f", names, Config(topology="ring"), limits=limits)
        self.federation = load_federation(path)
        self.desks = {name: Desk() for name in names}
        self.alice, self.bob = self.peers = [
            GrpcTransport(Members(self.federation), load_peer(path, name), LAYOUT, self.desks[name])
            for name in names
        ]
        self.message = self.of(torch.randn)
        for peer in self.peers:
            peer.start()

    def of(self, values) -> Message:
        return encode(
            {(VALUE, f): values(LAYOUT.size(f)) for f in (Factor.A, Factor.B)}, layout=LAYOUT,
            federation=self.federation.id, config_digest=self.federation.digest(), sender="alice",
            round=3, active="B",
        )  # fmt: skip

    def pieces(self, pause_s: float, count: int = 9) -> Iterator[bytes]:
        """The first pieces, one after another; then the stream breaks off."""
        for piece in self.message.pieces[:count]:
            time.sleep(pause_s)
            yield piece

    def deliver(self, pieces: Iterator[bytes]) -> Ack:
        """What alice's program would send to bob."""
        secret = self.alice._keyring.for_channel("bob")
        named = [*OPTIONS, ("grpc.ssl_target_name_override", "bob")]
        metadata = ((HEADER, write_header(self.message.header, "bob")),)
        with grpc.secure_channel(self.federation.member("bob").address, secret, named) as channel:
            return read_ack(channel.stream_unary(DELIVER)(pieces, metadata=metadata, timeout=30))

    def ask(self):
        self.desks["alice"].message = self.message
        return self.bob.ask("alice", Question(kind="round", round=3), SOON_S)


@pytest.fixture
def two(tmp_path, monkeypatch):
    for name in ("PIECE_BYTES", "SMALL_PIECE_BYTES"):
        monkeypatch.setattr(codec, name, PIECE_BYTES)
    made = Two(tmp_path)
    yield made
    for peer in made.peers:
        peer.stop(0)


def test_a_transfer_that_moves_is_not_cut_off(two):
    begin = time.monotonic()
    assert two.deliver(two.pieces(STILL_S / 4)).accepted
    assert time.monotonic() - begin > 2 * STILL_S


def test_one_that_is_too_slow_on_the_whole_is(two, monkeypatch):
    monkeypatch.setattr(pace, "SLOWEST", 1e9)
    assert two.deliver(two.pieces(STILL_S / 4)).reason is Reason.NO_ANSWER
    assert two.desks["bob"].sees(Reason.NO_ANSWER)


def test_while_it_moves_the_desk_knows(two):
    two.deliver(two.pieces(0.0))
    *until, end = [moment for _, moment in two.desks["bob"].moves]
    assert len(until) == 9
    assert until == sorted(until)
    assert until[-1] - time.monotonic() > 8 * PIECE_BYTES / pace.SLOWEST
    assert end == 0.0


def test_an_answer_that_moves_may_take_longer_than_its_time(two, monkeypatch):
    def slowly(num_bytes: int) -> float:
        time.sleep(STILL_S / 10)  # on the one thread of both peers
        return pace.moved(num_bytes)

    monkeypatch.setattr("plait.peers.transport.moved", slowly)
    two.desks["alice"].message = two.message
    question = Question(kind="round", round=3)
    begin = time.monotonic()
    assert two.bob.ask("alice", question, STILL_S / 2).factors
    assert time.monotonic() - begin > STILL_S / 2


def test_one_that_broke_goes_on_where_it_was(two):
    assert not two.deliver(two.pieces(0.0, 6)).accepted
    reply = two.ask()
    assert two.bob.counts.received_bytes["alice"] == len(two.message.body) - 6 * PIECE_BYTES
    whole = decode(two.message.header, two.message.body, two.bob.identity)
    assert all(torch.equal(reply.factors[slot], row) for slot, row in whole.items())
    two.ask()
    assert two.bob.counts.received_bytes["alice"] > len(two.message.body), "nothing is kept twice"


def test_of_another_message_nothing_is_used(two):
    two.deliver(two.pieces(0.0, 6))
    two.message = two.of(torch.zeros)
    assert not any(row.any() for row in two.ask().factors.values())


def test_an_answer_from_where_nobody_asked_is_refused(two, monkeypatch):
    monkeypatch.setattr(Message, "rest", lambda self, _: (PIECE_BYTES, iter([])))
    with pytest.raises(Refused, match="from byte 32768 on"):
        two.ask()


def test_a_change_that_broke_off_is_no_beginning_of_the_whole_message(two, monkeypatch):
    two.bob.identity = dataclasses.replace(two.bob.identity, wire="top-k:0.2")
    size = change_bytes(two.message.template, wire_type("top-k:0.2"))
    header = dataclasses.replace(two.message.header, kind="change", num_bytes=size)
    whole, two.message = two.message, dataclasses.replace(two.message, header=header)
    assert not two.deliver(two.pieces(0.0, 3)).accepted
    two.message = whole
    two.ask()
    assert two.bob.counts.received_bytes["alice"] == len(whole.body)
