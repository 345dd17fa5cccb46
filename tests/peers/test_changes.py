"""Messages of which only what changed travels: what comes of them, and what is refused."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
import torch
from test_codec import ALICE, IDENTITY, LAYOUT, addressed, reason_of, some_factors
from test_round_loop import SETTINGS, federation
from xxhash import xxh3_128

from conftest import tiny_job
from fake_network import TERMS, FakeTransport, Hub, member, start_peer, together
from plait.config import Config
from plait.engines.simulate import simulate
from plait.events import Incident, RoundDone
from plait.factors import Factor
from plait.peers.changes import Copies
from plait.peers.codec import Message, Question, decode, encode
from plait.peers.exchange import Exchange
from plait.peers.message_body import digest_of, pack
from plait.peers.refusals import Reason, Refused

WIRE = "top-k:0.1"
SPARSE = dataclasses.replace(IDENTITY, wire=WIRE)
BEFORE = some_factors()
AFTER = {slot: row.clone() for slot, row in BEFORE.items()}
for row in AFTER.values():
    row[[1, 7][: max(1, round(0.1 * len(row)))]] += 1.0


def message(after=AFTER, before=BEFORE) -> Message:
    whole = encode(
        after, layout=LAYOUT, federation="fed", config_digest="c0ffee", sender="alice", round=3,
        active="B", wire=WIRE, before=before,
    )  # fmt: skip
    assert whole.change
    change = addressed(whole.change, receiver="bob")
    return dataclasses.replace(addressed(whole, receiver="bob"), change=change)


def test_what_changed_makes_the_whole_message_of_the_one_before():
    whole, slots = message(), list(AFTER)
    counts = [round(0.1 * LAYOUT.size(factor)) for _, factor in slots]
    assert counts == [2, 2]
    assert whole.change.values_bytes == len(whole.change.body) == 8 * sum(counts)
    SPARSE.check(whole.change.header, ALICE)
    for one in (whole, whole.change):
        taken = decode(one.header, one.body, SPARSE, BEFORE)
        assert all(torch.equal(taken[slot], AFTER[slot]) for slot in slots)
        assert digest_of(taken) == whole.values_digest, "as both note it in their books"
    assert whole.change.header.digest == whole.header.digest, "it is the same message"


def test_where_all_is_sent_there_is_no_change():
    assert encode(
        AFTER, layout=LAYOUT, federation="f", config_digest="d", sender="alice", round=0,
        active="B", wire="top-k:0.5", before=BEFORE,
    ).change is None  # fmt: skip


def changed(body: bytes, header: dict | None = None, identity=SPARSE, before=BEFORE) -> Reason:
    one = message().change
    one = addressed(one, **{"num_bytes": len(body)} | (header or {}))
    return reason_of(decode, one.header, body, identity, before)


def test_whatever_does_not_fit_is_refused():
    body = message().change.body
    old = {slot: row + 1 for slot, row in BEFORE.items()}
    assert changed(body, before=old) is Reason.NO_COPY
    assert changed(body, before={}) is Reason.NO_COPY
    assert changed(body[:-4]) is Reason.WRONG_SHAPE
    assert changed(body + bytes(8)) is Reason.WRONG_SHAPE
    assert changed(body, identity=IDENTITY) is Reason.MALFORMED
    for places in ((7, 1), (1, 1), (1, 2**32 - 1), (1, LAYOUT.size(Factor.A))):
        assert changed(struct.pack("<II", *places) + body[8:]) is Reason.MALFORMED


@pytest.mark.parametrize(
    ("value", "reason"),
    [(float("nan"), Reason.NOT_FINITE), (float("inf"), Reason.NOT_FINITE),
     (1e6, Reason.NORM_TOO_LARGE)],
)  # fmt: skip
def test_the_values_that_come_of_it_are_looked_at(value, reason):
    body = bytearray(message().change.body)
    body[8:12] = struct.pack("<f", value)
    rows = {slot: row.clone() for slot, row in AFTER.items()}
    next(iter(rows.values()))[1] = value
    digest = xxh3_128(pack(rows, message().template)).digest()
    bounded = dataclasses.replace(SPARSE, norm_bound=1e3)
    assert changed(bytes(body), {"digest": digest}, bounded) is reason


def test_a_copy_is_the_newest_that_came_and_before_that_the_start():
    copies, (slot, row) = Copies(lambda _: BEFORE), next(iter(AFTER.items()))
    assert copies.of(0, list(BEFORE)) == BEFORE
    copies.keep(0, 5, {slot: row})
    copies.keep(0, 4, {slot: row * 2})
    assert copies.of(0, [slot])[slot] is row
    assert copies.of(1, [slot]) == {slot: BEFORE[slot]}
    assert copies.of(0, [("m", Factor.A)]) == {}


# -- peers together


CONFIG = Config(**SETTINGS | {"rounds": 4}, method="dec-lora", wire=WIRE, gossip_step=0.5)


class Watched(FakeTransport):
    """Keeps what was sent, and what became of it."""

    def send(self, to, message, deadline_s):
        ack = super().send(to, message, deadline_s)
        head = message.header
        self.hub.sent.append((head.round, self.name, to, head.kind, ack.accepted))
        return ack

    def ask(self, to, question: Question, deadline_s):
        if question.kind == "round" and not self.hub.asked:
            raise Refused(Reason.NOT_HERE, "it will come by itself")
        return super().ask(to, question, deadline_s)


def watched(lose=lambda *_: False, asked=False) -> Hub:
    hub = Hub(lose)
    hub.sent, hub.asked = [], asked
    hub.transport = lambda name: Watched(hub, name)
    return hub


def go_on(peers, hub) -> None:
    """Have peers that have stopped exchange once more."""
    for peer in peers:
        peer.exchange = Exchange(peer.desk, hub.transport(peer.desk.name), TERMS)


def assert_as_simulated(peers, rounds=CONFIG.rounds) -> None:
    job = tiny_job(CONFIG)
    stack = job.initial_stack()
    list(simulate(job, stack))
    for slot, value in stack.state.items():
        found = torch.cat([peer.stack.state[slot] for peer in peers])
        assert torch.equal(value, found), slot


def incidents(said) -> set[str]:
    return {e.kind for events in said for e in events if isinstance(e, Incident)}


def test_without_losses_only_changes_travel():
    hub = watched()
    peers = federation(CONFIG, hub)
    said = together(peers, CONFIG.rounds)
    assert_as_simulated(peers)
    assert {(kind, taken) for *_, kind, taken in hub.sent} == {("change", True)}
    job = peers[0].job
    size = sum(8 * round(0.1 * job.backbone.layout.size(factor)) for factor in Factor.AB)
    for events in said:
        sizes = [event.sent_bytes for event in events if isinstance(event, RoundDone)]
        assert sizes == [2 * size] * CONFIG.rounds


def test_what_is_asked_for_is_whole_and_the_next_is_a_change_of_it():
    hub = watched(lambda kind, sender, receiver, t: kind == "send" and t == 1, asked=True)
    peers = federation(CONFIG, hub)
    together(peers, 2)  # so that nobody goes ahead while another still asks
    go_on(peers, hub)
    together(peers, CONFIG.rounds)
    assert_as_simulated(peers)
    assert {(kind, taken) for t, *_, kind, taken in hub.sent if t > 1} == {("change", True)}


def test_a_peer_that_is_started_again_ends_where_it_would_have():
    hub, members = watched(asked=True), [member(f"p{k}") for k in range(4)]
    peers = federation(CONFIG, hub)
    together(peers, 2)
    anew = start_peer(hub, 1, CONFIG, members)
    anew.stack.state |= peers[1].stack.state
    anew.stack.steps |= peers[1].stack.steps
    go_on((peers[0], peers[2], peers[3]), hub)
    anew.inbox.skip_to(2)
    hub.sent.clear()
    peers[1] = anew
    together(peers, CONFIG.rounds)
    assert_as_simulated(peers)
    of_round = {(to, kind, taken) for t, _, to, kind, taken in hub.sent if t == 2}
    assert {kind for to, kind, taken in of_round if to != "p1"} == {"change"}
    assert {(kind, taken) for to, kind, taken in of_round if to == "p1"} <= {
        ("change", False), ("round", True), ("change", True),
    }  # fmt: skip
    assert ("p1", "change", False) in of_round, "it has no copies any more"


def test_one_that_begins_from_a_state_is_known_as_it_is():
    hub = watched()
    peers = federation(CONFIG, hub)
    late, rng = peers[3], np.random.default_rng(0)
    late.adopt({
        slot: torch.from_numpy(rng.normal(size=late.stack.state[slot].shape[1]).astype("f4"))
        for slot in late.job.travels
    })  # fmt: skip
    for slot in late.job.travels:
        assert torch.equal(late.stack.state[slot], late.stack.state[late.job.sent(slot)])
    said = together(peers, 3)
    assert not incidents(said) & {"refused", "rejected"}, "that is expected"
    for slot in late.job.travels:
        [copy] = late.stack.state[late.job.sent(slot)]
        for neighbour in (0, 2):
            assert torch.equal(peers[neighbour].desk.copies.of(3, [slot])[slot], copy)
    tries = [(t, kind, taken) for t, sender, _, kind, taken in hub.sent if sender == "p3"]
    assert sorted(tries) == [
        *[(0, "change", False)] * 2, *[(0, "round", True)] * 2, *[(1, "change", True)] * 2,
        *[(2, "change", True)] * 2,
    ]  # fmt: skip
