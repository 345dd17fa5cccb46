"""What a peer takes, refuses, waits for and makes good: the state machine, and peers together."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import tiny_job
from fake_network import TERMS, Hub, member, start_peer, together
from plait.config import Config
from plait.engines.simulate import simulate
from plait.events import Incident, RoundDone
from plait.factors import VALUE, Factor
from plait.peers.codec import Ack, Question
from plait.peers.exchange import Exchange, Left, Terms, differences
from plait.peers.inbox import Inbox, Letter, LinkTask, Turn, Word
from plait.peers.mailbox import OBSERVER, Desk
from plait.peers.refusals import Reason, Refused
from plait.peers.round_loop import Peer
from plait.peers.transport import Reply
from plait.rng import stream

SETTINGS = {
    "topology": "ring",
    "clients": 4,
    "rounds": 6,
    "local_steps": 1,
    "batch_size": 2,
    "rank": 2,
    "switch_every": 2,
    "lr": 1e-2,
    "eval_every": 6,
}


# -- the state machine


def turn(round_: int) -> Turn:
    return Turn("AB"[round_ % 2], "AB", np.array([0.3, 0.0, 0.3, 0.0]), (0, 2), (0, 2))


def inbox(symmetric=False, me=1) -> Inbox:
    return Inbox(me, turn, rounds=10, keep_rounds=2, symmetric=symmetric)


def letter(digest: bytes = b"x") -> Letter:
    return Letter({(VALUE, Factor.B): torch.ones(2)}, digest)


def message(round_: int = 0):
    return SimpleNamespace(header=SimpleNamespace(round=round_), values_bytes=8, change=None)


@pytest.mark.parametrize(
    ("sender", "round_", "active", "shared", "reason"),
    [
        (0, 2, "A", "AB", Reason.STALE_ROUND),
        (0, 6, "A", "AB", Reason.TOO_FAR_AHEAD),
        (0, 10**9, "A", "AB", Reason.TOO_FAR_AHEAD),
        (3, 3, "B", "AB", Reason.NOT_A_NEIGHBOUR),
        (0, 3, "A", "AB", Reason.WRONG_PHASE),
        (0, 3, "B", "A", Reason.WRONG_PHASE),
    ],
)
def test_what_is_not_expected_is_refused_with_the_reason(sender, round_, active, shared, reason):
    box = inbox()
    box.skip_to(3)
    with pytest.raises(Refused) as refused:
        box.admit(sender, round_, active, shared, b"x")
    assert refused.value.reason is reason


def test_another_message_of_the_same_round_is_a_replay_and_the_same_one_is_not():
    box = inbox()
    box.admit(0, 0, "A", "AB", b"x")
    box.take(0, 0, letter())
    box.admit(0, 0, "A", "AB", b"x")
    with pytest.raises(Refused, match="came before") as refused:
        box.admit(0, 0, "A", "AB", b"y")
    assert refused.value.reason is Reason.REPLAY


def test_a_neighbour_that_runs_ahead_loses_nothing():
    box = inbox()
    for round_ in range(3):
        box.admit(0, round_, "AB"[round_ % 2], "AB", b"x")
        box.take(0, round_, letter())
    for _ in range(3):
        assert box.left() == {2: {LinkTask.ASK}}
        assert list(box.close()) == [0]
    assert box.left() == {0: {LinkTask.ASK}, 2: {LinkTask.ASK}}


def test_a_message_that_was_asked_for_and_comes_again_late_is_no_fault():
    box = inbox()
    box.take(0, 0, letter())
    box.close()
    box.admit(0, 0, "A", "AB", b"x")
    box.take(0, 0, letter())
    with pytest.raises(Refused, match="closed"):
        box.admit(0, 0, "A", "AB", b"y")


def test_what_was_sent_is_kept_for_a_while_and_for_neighbours_only():
    box = inbox()
    with pytest.raises(Refused) as refused:
        box.answer(0, 0)
    assert refused.value.reason is Reason.NOT_HERE
    box.send(message())
    for _ in range(3):
        assert box.answer(2, 0).message.header.round == 0
        box.close()
    with pytest.raises(Refused):
        box.answer(3, 0)
    box.close()
    with pytest.raises(Refused):
        box.answer(2, 0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_peer_started_again_answers_for_the_round_that_it_closed_before(symmetric):
    box = inbox(symmetric=symmetric)
    box.skip_to(4)
    sent = message(3)
    box.remember(3, sent, heard={2})
    assert box.answer(2, 3) == Word(sent, True if symmetric else None)
    # With symmetric loss one that it did not mix with doesn't mix either.
    assert box.answer(0, 3) == (Word(None, False) if symmetric else Word(sent, None))


def test_symmetric_the_lower_number_decides():
    low, high = inbox(symmetric=True, me=0), inbox(symmetric=True, me=2)
    low.turn = high.turn = lambda t: Turn("A", "AB", np.ones(4), (0, 2), (0, 2))
    for box, other in ((low, 2), (high, 0)):
        box.send(message())
        box.take(other, 0, letter())
    assert low.left()[2] == {LinkTask.PUSH}
    assert high.left()[0] == {LinkTask.PUSH, LinkTask.ASK}
    high.delivered(0, 0)
    assert high.left()[0] == {LinkTask.ASK}, "it has to be told"
    assert low.answer(2, 0).agreed is None
    low.delivered(2, 0)
    assert 2 not in low.left()
    assert low.answer(2, 0).agreed
    high.decided(0, 0, True)
    assert 0 not in high.left()
    assert 2 in low.close()
    assert 0 in high.close()


def test_symmetric_without_word_of_it_neither_mixes():
    low, high = inbox(symmetric=True, me=0), inbox(symmetric=True, me=2)
    low.turn = high.turn = lambda t: Turn("A", "AB", np.ones(4), (0, 2), (0, 2))
    for box, other in ((low, 2), (high, 0)):
        box.send(message())
        box.take(other, 0, letter())
    assert high.in_limbo()
    assert not low.in_limbo()
    assert low.close() == {}
    word = low.answer(2, 0)
    assert word.message is None
    assert word.agreed is False
    high.decided(0, 0, word.agreed)
    assert not high.in_limbo(), "no use to wait any longer"
    assert high.close() == {}


class Impatient(Exchange):
    """An exchange that fails where it would wait."""

    def _left(self) -> dict[int, set[LinkTask]]:
        left = super()._left()
        assert not left, "waits for them"
        return left


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("why", ["absent", "late"])
def test_a_neighbour_that_is_absent_or_too_late_is_not_waited_for(symmetric, why):
    desk = Desk(inbox(symmetric), tuple("abcd"))
    terms = Terms(round_timeout_s=600.0, start_timeout_s=600.0)
    exchange = Impatient(desk, transport=None, terms=terms)  # type: ignore[arg-type]
    desk.inbox.send(message())
    if why == "absent":
        for peer in (0, 2):
            desk.set_absent(peer, "gone")
    else:
        exchange._begin -= 601
    exchange.wait()


@pytest.mark.parametrize("kind", ["pushed", "asked for"])
def test_a_row_that_was_acknowledged_is_mixed(kind):
    """The round may not close between the look at a header and the taking of its rows."""
    desk = Desk(inbox(), tuple("abcd"))
    looks = desk if kind == "pushed" else desk.inbox
    admit, heard = looks.admit, {}

    def close():
        with desk.condition:
            heard.update(desk.inbox.close())

    def admit_slowly(*args):
        admit(*args)
        thread.start()
        thread.join(0.05)

    thread = threading.Thread(target=close)
    looks.admit = admit_slowly
    header = SimpleNamespace(
        sender="a", round=0, kind="round", active="A", factors="AB", digest=b"x"
    )
    rows = {(VALUE, Factor.B): torch.ones(2)}
    if kind == "pushed":
        desk.take(header, rows)
    else:
        exchange = Exchange(desk, transport=None, terms=TERMS)  # type: ignore[arg-type]
        exchange._keep(0, 0, Reply(facts={}, header=header, factors=rows))
    thread.join()
    assert list(heard) == [0]


class Answering:
    """A transport to a neighbour that answers, and has no row to give."""

    def __init__(self, reason: Reason, deliver: Reason = Reason.STALE_ROUND) -> None:
        self.reason, self.deliver = reason, deliver

    def send(self, *_) -> Ack:
        return Ack(False, self.deliver, "no")

    def ask(self, to: str, question: Question, deadline_s: float) -> Reply:
        raise Refused(self.reason, "no")


@pytest.mark.parametrize(
    ("reason", "deliver", "costs"),
    [
        (Reason.NOT_HERE, Reason.STALE_ROUND, 60.0),  # it may be slow, and is no longer unheard of
        (Reason.NOT_HERE, Reason.WRONG_SHAPE, 0.0),
        (Reason.WRONG_SHAPE, Reason.STALE_ROUND, 0.0),
        (Reason.NORM_TOO_LARGE, Reason.STALE_ROUND, 0.0),
        (Reason.NOT_A_NEIGHBOUR, Reason.STALE_ROUND, 0.0),
        (Reason.UNREACHABLE, Reason.UNREACHABLE, 300.0),
    ],
)
def test_a_neighbour_that_answers_costs_what_may_still_come_of_it(reason, deliver, costs):
    desk = Desk(inbox(), tuple("abcd"))
    terms = Terms(round_timeout_s=60.0, start_timeout_s=300.0)
    exchange = Exchange(desk, Answering(reason, deliver), terms)  # type: ignore[arg-type]
    sent = message()
    exchange._push(0, sent)
    exchange._ask(0, 0)
    assert exchange._patience(0) == costs
    exchange.stop()


@pytest.mark.parametrize("moves", [False, True])
def test_a_neighbour_whose_message_is_coming_is_waited_for_and_not_asked(moves):
    desk = Desk(inbox(), tuple("abcd"))
    exchange = Exchange(desk, transport=None, terms=Terms())  # type: ignore[arg-type]
    begun = []
    exchange._start = lambda peer, task: begun.append((peer, task))  # type: ignore[method-assign]
    desk.inbox.send(message())
    exchange._begin -= exchange.terms.round_timeout_s - 0.5
    exchange.terms = Terms(start_timeout_s=0.0)
    if moves:
        desk.moving("a", time.monotonic() + 1.0)
    begin = time.monotonic()
    exchange.wait()
    assert (time.monotonic() - begin > 0.9) == moves
    assert ((0, LinkTask.ASK) in begun) != moves


# -- peers together


def federation(config=None, hub=None, spans=None, **kwargs) -> list[Peer]:
    config = config or Config(**SETTINGS)
    hub = hub or Hub()
    members = [member(f"p{k}", **(spans or {}).get(k, {})) for k in range(config.clients)]
    return [start_peer(hub, k, config, members, **kwargs) for k in range(config.clients)]


def watch_the_mean(peers) -> list[dict[int, torch.Tensor]]:
    """For each peer: round -> what mixing changed of its A and B."""
    moved = [{} for _ in peers]
    for peer, changes in zip(peers, moved, strict=True):
        original = peer._mix

        def mix(round_, turn, heard, peer=peer, changes=changes, original=original):
            before = torch.cat([v.flatten().double() for v in peer.stack.factors.values()])
            result = original(round_, turn, heard)
            after = torch.cat([v.flatten().double() for v in peer.stack.factors.values()])
            changes[round_] = after - before
            return result

        peer._mix = mix
    return moved


def drift(moved, rounds) -> float:
    """How far mixing moved the mean of all, at most."""
    return max(float(sum(changes[t] for changes in moved).norm()) for t in range(rounds))


def torn():
    """From round 1 on, one direction of a link in four is cut for a round; a fifth gets lost."""
    rng = np.random.default_rng(0)
    cut = {}

    def lose(kind: str, sender: str, receiver: str, round_: int) -> bool:
        place = (sender, receiver, round_)
        cut.setdefault(place, stream(0, "cut", int(sender[1:]), int(receiver[1:]), round_).random())
        return (round_ > 0 and cut[place] < 0.25) or bool(rng.random() < 0.2)

    return lose


@pytest.mark.parametrize("symmetric", [True, False])
def test_symmetric_loss_conserves_the_mean_and_one_way_loss_does_not(symmetric):
    terms = Terms(round_timeout_s=1, start_timeout_s=20, linger_s=0.5, retry_s=0.05)
    peers = federation(hub=Hub(torn()), terms=terms, symmetric=symmetric)
    moved = watch_the_mean(peers)
    said = together(peers, SETTINGS["rounds"])
    rounds = [event for events in said for event in events if isinstance(event, RoundDone)]
    assert 0 < sum(len(event.edges) for event in rounds) < 2 * len(rounds), "some links mixed"
    moves = drift(moved, SETTINGS["rounds"])
    assert moves < 1e-5 if symmetric else moves > 1e-3
    incidents = [event for events in said for event in events if isinstance(event, Incident)]
    assert any(event.kind == "missing" for event in incidents), "what was lost is reported"


def test_symmetric_a_decision_that_comes_when_time_is_over_still_counts():
    """No question gets through while the asker's round lasts: all is decided in the time after."""
    hub = Hub(lambda kind, sender, *_: kind == "ask" and not peers[int(sender[1:])].inbox.closing)
    terms = Terms(round_timeout_s=1, start_timeout_s=1, linger_s=0.1, retry_s=0.05)
    peers = federation(Config(**SETTINGS | {"rounds": 1}), hub=hub, terms=terms, symmetric=True)
    moved = watch_the_mean(peers)
    said = together(peers, 1)
    edges = [event.edges for events in said for event in events if isinstance(event, RoundDone)]
    assert [len(there) for there in edges] == [2] * 4
    assert drift(moved, 1) < 1e-5


def test_a_lost_message_leaves_its_weight_with_its_receiver():
    """Rows keep summing to one: a peer that hears nobody is where training left it."""
    hub = Hub(lambda kind, sender, receiver, t: (receiver == "p0" and kind == "send") or
              (sender == "p0" and kind == "ask"))  # fmt: skip
    peers = federation(hub=hub, terms=Terms(round_timeout_s=0.3, start_timeout_s=0.3, linger_s=0.2))
    moved = watch_the_mean(peers)
    together(peers, SETTINGS["rounds"])
    assert all(float(change.norm()) == 0 for change in moved[0].values())


def test_a_peer_that_was_away_too_long_goes_on_where_the_others_are():
    peers = federation(terms=Terms(round_timeout_s=0.2, start_timeout_s=0.2, linger_s=0.1,
                                   retry_s=0.05), keep_rounds=1)  # fmt: skip
    together(peers[:3], SETTINGS["rounds"])
    late = peers[3]
    late.exchange.greet({0, 2})
    [events] = together([late], SETTINGS["rounds"])
    rounds = [event.round for event in events if isinstance(event, RoundDone)]
    skipped = [event for event in events if isinstance(event, Incident) and event.kind == "skipped"]
    assert rounds == [5]
    assert skipped[0].detail == "from round 0 to 5"
    assert [edge[1] for event in events if isinstance(event, RoundDone)
            for edge in event.edges] == [0, 2]  # fmt: skip


@pytest.mark.parametrize(("behind", "kept"), [(2, ()), (3, (Factor.A,))])
def test_moments_of_a_phase_that_is_over_are_not_gone_on_with(behind, kept):
    """B trains in rounds 0, 1, 4 and 5, A in 2 and 3; it goes on with round 5."""
    peers = federation(Config(**SETTINGS, optimizer_state="reset_each_phase"), keep_rounds=1)
    peer = peers.pop(1)
    peer.inbox.skip_to(behind)
    for factor in Factor.AB:
        for moments in peer.stack.beside(factor).values():
            moments.fill_(1.0)
    for other in peers:
        other.inbox.skip_to(5)
        peer.desk.heard_of(other.me, 5)
    assert peer._catch_up() == 5
    left = [f for f in Factor.AB if any(m.any() for m in peer.stack.beside(f).values())]
    assert left == list(kept)


def test_a_peers_mixing_error_is_its_own():
    """Those of all peers have the mean that one who sees all clients has."""
    config = Config(**SETTINGS | {"rounds": 2})
    said = together(federation(config), config.rounds)
    job = tiny_job(config)
    whole = [e for e in simulate(job, job.initial_stack()) if isinstance(e, RoundDone)]
    for event in whole:
        own = [
            sum(layer.mixing_error for layer in e.before)
            for events in said
            for e in events
            if isinstance(e, RoundDone) and e.round == event.round
        ]
        expected = sum(layer.mixing_error for layer in event.before)
        assert np.mean(own) == pytest.approx(expected, rel=1e-6)


def test_a_neighbour_that_lies_about_its_round_moves_nobody():
    peer = federation()[1]
    peer.desk.heard_of(0, 10**9)
    peer.desk.heard_of(2, 0)
    assert peer._catch_up() == 0
    for word in ("soon", -5, 1e9, None, [10**9], 10**40):
        peer.desk.heard_of(0, word)
    assert peer.desk.target() == 0


def test_who_has_not_joined_or_has_left_gives_and_gets_no_weight():
    peers = federation(spans={3: {"joins": 2}, 1: {"leaves": 4}})
    W = np.array([[peer.inbox.turn(t).weights for peer in peers] for t in range(6)])
    for t in range(6):
        assert np.allclose(W[t], W[t].T)
        assert (W[t][3].any(), W[t][1].any()) == (t >= 2, t < 4)
    assert peers[0].inbox.turn(0).hears == (1,)


def test_the_state_for_others_is_what_travels_and_no_more():
    config = Config(method="ffa", **SETTINGS)
    peers = federation(config, keep_rounds=1)
    with pytest.raises(Refused):
        peers[0].desk.answer(Question(kind="state", sender="p1"))
    together(peers, config.rounds)
    answer = peers[0].desk.answer(Question(kind="state", sender="p1"))
    assert answer.message.header.factors == "B"
    assert answer.message.header.kind == "state"
    assert answer.message.header.round == config.rounds


def test_a_state_goes_once_and_only_to_a_neighbour_that_needs_it():
    config = Config(**SETTINGS | {"rounds": 20})
    desk = federation(config, keep_rounds=2, spans={3: {"leaves": 5}})[0].desk
    desk.resting = lambda: desk_message(desk.inbox.round)
    desk.inbox.skip_to(9)
    desk._took = {1}
    for asker, round_, reason in (
        ("p2", 0, Reason.NOT_A_NEIGHBOUR),  # across the ring
        ("p3", 0, Reason.NOT_A_NEIGHBOUR),  # it has left
        ("p1", 8, Reason.NOT_DUE),  # it is in step
    ):
        with pytest.raises(Refused) as refused:
            desk.answer(Question(kind="state", sender=asker, asker_round=round_))
        assert refused.value.reason is reason
    for here in (9, 10, 11):
        desk.inbox.skip_to(here)
        answer = desk.answer(Question(kind="state", sender="p1", asker_round=0))
        assert answer.message.header.round == 9, "the answer may have got lost; none newer"
    assert [(e.kind, e.peer) for e in desk.incidents()][:1] == [("gave", "p1")]


def desk_message(round_: int):
    return SimpleNamespace(header=SimpleNamespace(round=round_, kind="state"))


def test_one_that_joins_gets_a_state_from_those_that_will_hear_it():
    config = Config(**SETTINGS | {"rounds": 20})
    desk = federation(config, keep_rounds=2, spans={3: {"joins": 9}})[0].desk
    desk.resting = lambda: desk_message(desk.inbox.round)
    ask = Question(kind="state", sender="p3", asker_round=0)
    desk.inbox.skip_to(5)
    with pytest.raises(Refused, match="not in round 5"):
        desk.answer(ask)
    desk.inbox.skip_to(8)
    assert desk.answer(ask).message


def test_an_undisturbed_run_reports_the_bytes_that_a_simulation_does():
    peers = federation()
    said = together(peers, SETTINGS["rounds"])
    rounds = [[event for event in events if isinstance(event, RoundDone)] for events in said]
    for peer, events in zip(peers, rounds, strict=True):
        size = 4 * sum(peer.job.backbone.layout.size(f) for f in (Factor.A, Factor.B))
        assert [event.sent_bytes for event in events] == [2 * size] * SETTINGS["rounds"]


def test_what_nobody_took_was_not_sent():
    hub = Hub(lambda kind, *_: kind in ("send", "ask"))
    peers = federation(hub=hub, terms=Terms(round_timeout_s=0.3, start_timeout_s=0.3, linger_s=0))
    said = together(peers, 2)
    assert {e.sent_bytes for events in said for e in events if isinstance(e, RoundDone)} == {0}


def test_what_was_pushed_and_asked_for_counts_once():
    box = inbox()
    box.send(message())
    box.pulled(2, 0)
    box.delivered(2, 0)
    assert box.taken_bytes == 8
    assert box.without(0) == {0}


def test_a_peer_that_all_neighbours_refuse_stops():
    peer = federation()[1]
    peer.desk.refused("p0", Reason.WRONG_CONFIG, "lr")
    peer.exchange.check_welcome()
    peer.exchange.neighbours = frozenset({0, 2})
    peer.desk.refused("p2", Reason.WRONG_CONFIG, "lr")
    with pytest.raises(ValueError, match=r"No neighbour works with p1. p0: lr; p2: lr"):
        peer.exchange.wait()
    peer.desk.heard_of(2, 0)
    peer.exchange.check_welcome()


def test_the_settings_that_differ_are_named():
    ours, theirs = {"lr": 0.1, "seed": 0, "mix": "average"}, {"lr": 0.2, "seed": 0}
    assert differences(ours, theirs, "ben") == (
        "lr is 0.1 here and 0.2 at ben, mix is 'average' here and None at ben"
    )


def test_a_message_that_nobody_asked_for_is_refused():
    peers = federation()
    header = SimpleNamespace(sender="p1", round=0, kind="state")
    with pytest.raises(Refused, match="nobody asked"):
        peers[0].desk.admit(header)
    with pytest.raises(Refused, match="not in the federation"):
        peers[0].desk.admit(SimpleNamespace(sender="stranger", round=0, kind="round"))


def test_a_flood_of_bad_messages_is_counted_and_said_once():
    desk = federation()[0].desk
    for _ in range(1000):
        desk.refused("p1", Reason.NOT_FINITE, "a NaN")
    desk.refused("a name that is long and unknown" * 10, Reason.MALFORMED, "x" * 10_000)
    said = desk.incidents()
    assert [(event.peer, event.reason) for event in said] == [
        ("p1", "NOT_FINITE"),
        ("unknown", "MALFORMED"),
    ]
    assert len(said[1].detail) == 500
    assert desk.status()["refused"] == {"NOT_FINITE": 1000, "MALFORMED": 1}


def test_somebody_who_only_looks_leaves_no_trace():
    desk = federation()[0].desk
    facts = desk.answer(Question(kind="status", sender="p1", asker_round=OBSERVER)).facts
    assert facts["round"] == 0
    assert facts["seen"] == {}


def test_leaving_while_waiting_ends_the_wait():
    peer = federation(terms=TERMS)[0]
    said = peer.rounds(0, SETTINGS["rounds"])
    peer.exchange.leave.set()
    begin = time.monotonic()
    with pytest.raises(Left):
        list(said)
    assert time.monotonic() - begin < 5
    assert peer.inbox.round == 0, "the round can be done again"
    peer.exchange.stop()


def test_a_loss_that_is_not_finite_is_not_sent():
    config = Config(**SETTINGS | {"lr": 1e30, "clip_norm": None, "clients": 2})
    peers = federation(config)
    with pytest.raises(ValueError, match="Lower the learning rate"):
        together(peers[:1] + peers[1:], config.rounds)
