"""What a peer says of itself: taken when it can be, and harmless wherever it is shown."""

from __future__ import annotations

import json

import pytest
from test_round_loop import inbox

from plait.cli import main as cli
from plait.config import Config
from plait.peers import status as peer_status
from plait.peers.certificates import init_federation
from plait.peers.codec import Answer
from plait.peers.envelope import pb, read_ack, read_answer, write_answer
from plait.peers.exchange import differences
from plait.peers.facts import FACTS, read_facts
from plait.peers.mailbox import Desk
from plait.peers.refusals import Reason, Refused
from plait.peers.transport import Reply

STATUS = Desk(inbox(), tuple("abcd")).status() | {"loss": 0.5, "score": 1, "phase": "A|B"}

BAD = {
    "a round that is null": {"round": None},
    "a round that is a truth": {"round": True},
    "a round below 0": {"round": -1},
    "a large round": {"round": 10**400},
    "a round in words": {"round": "soon"},
    "no number": {"loss": float("nan")},
    "bytes without end": {"sent_bytes": float("inf")},
    "a list for a mapping": {"seen": [1]},
    "text for a count": {"refused": {"REPLAY": "x"}},
    "a long name": {"absent": ["x" * 10_000]},
    "a name that is none": {"name": {"a": 1}},
    "agreed in words": {"agreed": "yes"},
    "a large number of no name": {"x": [10**400]},
}


@pytest.mark.parametrize("kind", BAD)
def test_facts_that_cant_be_are_refused(kind):
    with pytest.raises(Refused) as refused:
        read_answer(write_answer(Answer(STATUS | BAD[kind]), "b"))
    assert refused.value.reason is Reason.MALFORMED
    assert len(refused.value.detail) < 200


@pytest.mark.parametrize("text", ["[]", "1e999", "{", '{"x": 1e999}', "[" * 10**5])
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(Refused):
        read_facts(text)


def test_a_peers_own_status_is_taken_as_it_is():
    assert read_facts(json.dumps(STATUS)) == STATUS
    settings = {"text": "a\tb", "list": [["p0", 0, None]], "seed": 2**40}
    assert read_facts(json.dumps(settings))["list"] == [["p0", 0, None]]
    assert {"round", "agreed", *STATUS} <= FACTS.keys()


def test_no_word_of_a_peer_reaches_a_terminal_as_more_than_text():
    evil = "\x1b[2J[/x]\n\u202e"
    facts = read_facts(json.dumps({"phase": evil, "refused": {evil: 1}, "more": [{evil: evil}]}))
    assert all(not set("\x1b\n\u202e") & set(text) for text in (json.dumps(facts), str(facts)))
    assert read_ack(pb.Ack(reason="BUSY", detail=evil).SerializeToString()).detail == "?[2J[/x]??"
    assert str(Refused(Reason.OTHER, evil)) == "other: ?[2J[/x]??"
    assert "\x1b" not in differences({}, read_facts(json.dumps({evil: evil})), "ben")


@pytest.mark.parametrize(
    "facts", [{"round": 1}, {"refused": {"[/x]": 1}, "phase": "[/x]"}, {"seen": {"[red]": 1}}]
)
def test_status_shows_whatever_a_peer_says(tmp_path, monkeypatch, capsys, facts):
    file = init_federation(tmp_path / "f", ["p0", "p1"], Config(clients=2))
    said = facts if len(facts) == 1 and "round" in facts else STATUS | facts

    class Transport:
        def __init__(self, *_, **__): ...
        def start(self, serve): ...
        def stop(self, grace_s): ...
        def ask(self, *_):
            return Reply(facts=read_facts(json.dumps(said)))

    monkeypatch.setattr(peer_status, "GrpcTransport", Transport)
    code = cli.main(["status", "--config", str(file)])
    shown = capsys.readouterr().out
    assert code == (1 if said is facts else 0)
    assert ("its answer has no missing" if said is facts else "p1") in shown
    assert ("[/x] 1" in shown) == ("refused" in facts)
