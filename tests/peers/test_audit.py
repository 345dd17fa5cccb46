"""The audit books of peers: what is in them, what changes are found, what several of them tell."""

from __future__ import annotations

import dataclasses
import json
import os
from types import SimpleNamespace

import pytest
import torch
from test_round_loop import SETTINGS, inbox

from fake_network import TERMS, FakeTransport, Hub, member, start_peer, together
from plait.cli import main as cli
from plait.config import Config
from plait.factors import VALUE, Factor
from plait.peers.audit import BOOK, Book
from plait.peers.audit_check import PeersBook, findings
from plait.peers.audit_lines import hash_of, read_chain
from plait.peers.codec import Message, Question
from plait.peers.mailbox import Desk
from plait.peers.message_body import digest_of
from plait.peers.refusals import Reason, Refused

CONFIG = Config(**SETTINGS | {"rounds": 3})
ROW = "a" * 64


def federation(tmp_path, config=CONFIG, transport=None):
    """Four peers on a ring that keep books, run to the end; their books."""
    hub, members = Hub(), [member(f"p{k}") for k in range(4)]
    if transport:
        hub.transport = lambda name: transport(hub, name)
    peers = [start_peer(hub, k, config, members, terms=TERMS) for k in range(4)]
    books = []
    for peer in peers:
        (tmp_path / peer.desk.name).mkdir()
        books.append(Book(tmp_path / peer.desk.name))
        peer.desk.note = books[-1].note
        started(books[-1], peer.desk.name)
    together(peers, config.rounds)
    for book in books:
        book.close()
    return [PeersBook.read(tmp_path / peer.desk.name) for peer in peers]


def started(book, name="p0", round_=0, **facts):
    given = {"federation": "f", "config": "d", "keep": 8}
    book.note("started", by=name, round=round_, **given | facts)


def said(book, *kinds):
    return [line for kind in kinds for line in book.lines(kind)]


@pytest.mark.parametrize(
    ("method", "wire"), [("adf", "float32"), ("rolora", "float32"), ("adf", "top-k:0.1")]
)
def test_the_books_of_a_run_say_the_same(tmp_path, method, wire):
    books = federation(tmp_path, dataclasses.replace(CONFIG, method=method, wire=wire))
    assert findings(books) == []
    for book in books:
        assert not book.chain.wrong
        assert [line["round"] for line in said(book, "mixed")] == [0, 1, 2]
        assert len(book.took) == 6
        assert len(said(book, "made")) == 3
    p0, p1 = books[:2]
    for (_, what, round_), digests in p1.rows("sent", "gave").items():
        assert set(digests) == set(p1.made[round_]), what
    assert p0.took["p1", "round", 1] == p1.made[1]


class TwoFaced(FakeTransport):
    """p1 sends p2 other rows than p0."""

    def send(self, to: str, message: Message, deadline_s: float):
        return super().send(to, self._changed(to, message), deadline_s)

    def ask(self, to: str, question: Question, deadline_s: float):
        if (self.name, to, question.kind) == ("p2", "p1", "round"):  # it would get the true ones
            raise Refused(Reason.NOT_HERE, "not yet")
        return super().ask(to, question, deadline_s)

    def _changed(self, to: str, message: Message) -> Message:
        if (self.name, to) != ("p1", "p2"):
            return message
        from xxhash import xxh3_128

        body = message.body[:-4] + bytes(4)
        header = dataclasses.replace(message.header, digest=xxh3_128(body).digest())
        return dataclasses.replace(message, header=header, body=body)


def test_different_rows_to_different_neighbours_are_found(tmp_path):
    books = federation(tmp_path, transport=TwoFaced)
    wrong = [one.text for one in findings([books[0], books[2]])]
    assert len(wrong) == CONFIG.rounds
    assert wrong[0].startswith("round 0: p1 sent different rows: p0 took ")
    of_both = [one.text for one in findings(books[1:3])]
    assert [text.split(" took")[0] for text in of_both] == [f"round {t}: p2" for t in range(3)]
    assert ", by whose book it was " in of_both[0]


def lines_of(tmp_path) -> list[bytes]:
    book = Book(tmp_path)
    started(book)
    book.note("took", {(VALUE, Factor.B): torch.ones(2)}, peer="p1", what="round", round=0)
    book.note("mixed", round=0, peers=["p1"])
    book.close()
    return (tmp_path / BOOK).read_bytes().splitlines(keepends=True)


def test_a_line_has_the_digest_of_the_values(tmp_path):
    lines = [json.loads(line) for line in lines_of(tmp_path)]
    values = torch.ones(2).numpy().tobytes()
    assert lines[1]["digest"] == hash_of(values) == digest_of({(VALUE, Factor.B): torch.ones(2)})
    assert [line["n"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda lines: lines[:1] + lines[2:], "line 2 has the number 2 where 1 is due"),
        (lambda lines: [lines[0].replace(b"p0", b"px"), *lines[1:]], "line 2 does not follow"),
        (lambda lines: [lines[0], lines[1], lines[1]], "line 3 has the number 1"),
        (lambda lines: [*lines, b"{}\n"], "line 4 is no line of a book"),
        (lambda lines: [*lines, b"[" * 10**5 + b"\n"], "line 4 is no line of a book"),
        (lambda lines: [*lines[:2], lines[2][:-9]], "line 3 is cut short"),
        (lambda lines: [lines[0].replace(b'"round": 0', b'"round": -1')], "a round that can't be"),
        (lambda lines: [lines[0].replace(b'"keep"', b'"kept"')], "line 1 has no keep"),
        (lambda lines: [lines[0].replace(b"p0", b"\\u001b[2J")], "a by that can't be"),
        (lambda lines: [b"9" * 5000 + b"\n"], "line 1 is no line"),
    ],
)
def test_a_book_that_was_changed_is_found(tmp_path, change, found):
    assert found in read_chain(b"".join(change(lines_of(tmp_path)))).wrong


def test_a_book_is_gone_on_with_and_a_torn_line_is_cut_off(tmp_path):
    whole = lines_of(tmp_path)
    (tmp_path / BOOK).write_bytes(b"".join(whole) + whole[2][:20])
    book = Book(tmp_path, vouched=hash_of(whole[1].strip()))
    last = book.sync()
    book.close()
    chain = read_chain((tmp_path / BOOK).read_bytes())
    assert not chain.wrong
    assert (chain.lines[3]["kind"], chain.lines[3]["bytes"], chain.last) == ("torn", 20, last)
    [note] = findings([PeersBook.read(tmp_path)])
    assert (note.wrong, "20 bytes of a line cut short" in note.text) == (False, True)


@pytest.mark.parametrize("left", [0, 1, None])
def test_a_book_that_lacks_what_a_checkpoint_has_seen_is_not_gone_on_with(tmp_path, left):
    whole = lines_of(tmp_path)
    if left is None:
        (tmp_path / BOOK).unlink()
    else:
        (tmp_path / BOOK).write_bytes(b"".join(whole[:left]))
    book = Book(tmp_path, vouched=hash_of(whole[2].strip()))
    started(book)
    book.close()
    [fault] = findings([PeersBook.read(tmp_path)])
    assert "the book before this one is missing" in fault.text
    assert (tmp_path / "audit-damaged-1.jsonl").exists() == bool(left)


def book_of(tmp_path, name, *lines, **of):
    """A book with some lines: (kind, facts)."""
    folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    book = Book(folder)
    started(book, name, **of)
    for kind, facts in lines:
        book.note(kind, **facts)
    book.close()
    return PeersBook.read(folder)


def row(peer, round_=0, digest=ROW):
    return {"peer": peer, "what": "round", "round": round_, "digest": digest}


DONE = ("mixed", {"round": 0, "peers": []})
AGAIN = ("started", {"by": "p0", "federation": "f", "config": "d", "round": 0, "keep": 8})


@pytest.mark.parametrize(
    ("of_p0", "of_p1", "text", "wrong"),
    [
        ([("sent", row("p1")), DONE], [DONE], "aaaaaaaaaaaaaaaa to p1, whose book says no", True),
        ([("sent", row("p1")), DONE], [], "doesn't reach it or was interrupted", False),
        ([DONE], [("took", row("p0")), DONE], "took aaaaaaaaaaaaaaaa of p0, whose book says", True),
        ([AGAIN, DONE], [("took", row("p0")), DONE], "doesn't reach it or was", False),
        ([("mixed", {"round": 0, "peers": ["p1"]})], [DONE], "says not what it took", True),
        (
            [("made", {"round": 0, "digest": ROW}), ("made", {"round": 0, "digest": "b" * 64})],
            [DONE], "p0 made aaaaaaaaaaaaaaaa and bbbbbbbbbbbbbbbb, and not one row", True,
        ),
    ],
)  # fmt: skip
def test_what_books_lack_is_found(tmp_path, of_p0, of_p1, text, wrong):
    [one] = findings([book_of(tmp_path, "p0", *of_p0), book_of(tmp_path, "p1", *of_p1)])
    assert (text in one.text, one.wrong) == (True, wrong), one.text


@pytest.mark.parametrize("said", ["asked", "gave"])
def test_states_are_compared_too(tmp_path, said):
    state = {"what": "state", "round": 2, "digest": ROW}
    gave = book_of(tmp_path, "p0", (said, {"peer": "p1", **state}))
    assert findings([gave, book_of(tmp_path, "p1", ("took", {"peer": "p0", **state}))]) == []
    other = ("took", {"peer": "p0", **state, "digest": "b" * 64})
    [one] = findings([gave, book_of(tmp_path, "p1", other)])
    assert one.text.startswith("state 2: p1 took bbbbbbbbbbbbbbbb of p0, by whose book it was aaaa")


def test_two_books_of_one_peer_and_books_of_two_federations(tmp_path):
    shorter, longer = book_of(tmp_path, "p0"), book_of(tmp_path, "p0", DONE)
    same = dataclasses.replace(shorter, chain=read_chain(b""))
    [one] = findings([longer, same])
    assert one.text == f"{same.path}: no line says whose book it is"
    rewritten = book_of(tmp_path, "p0", ("mixed", {"round": 1, "peers": []}))
    [one] = findings([longer, rewritten])
    assert "two books of p0, apart from line 2" in one.text
    [one] = findings([longer, book_of(tmp_path, "p1", config="x")])
    assert "p0 and p1 had another config: d, x" in one.text


def test_the_command(tmp_path, capsys):
    good, bad = book_of(tmp_path, "p0", DONE), book_of(tmp_path, "p1", DONE)
    assert cli.main(["audit", str(good.path.parent), str(bad.path)]) == 0
    assert "nothing wrong" in capsys.readouterr().out
    bad.path.write_bytes(bad.path.read_bytes().replace(b"d", b"e"))
    assert cli.main(["audit", str(good.path), str(bad.path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert any(one["wrong"] for one in told["findings"])
    assert told["books"][0]["last_hash"] == good.chain.last
    assert cli.main(["audit", str(tmp_path / "none")]) == 1


def test_what_strangers_do_fills_no_book(tmp_path):
    desk, book = Desk(inbox(), tuple("abcd")), Book(tmp_path)
    desk.note = book.note
    started(book)
    for _ in range(100):
        desk.refused("a", Reason.NOT_FINITE, "a\x1bNaN")
        desk.refused("x|y" * 50, Reason.WRONG_SENDER, "no member")
        with pytest.raises(Refused):
            desk.answer(Question(kind="state", sender="a"))
        header = SimpleNamespace(kind="state", round=2)
        desk.gave("c", SimpleNamespace(header=header, values_digest=ROW))
    book.close()
    kinds = [line["kind"] for line in PeersBook.read(tmp_path).chain.lines]
    assert sorted(kinds) == ["asked", "refused", "refused", "started"]


def test_a_book_that_cant_be_written_stops_its_peer(tmp_path):
    book = Book(tmp_path)
    os.close(book._file)
    book._file = os.open("/dev/full", os.O_WRONLY)
    started(book)
    with pytest.raises(OSError, match="No space"):
        book.sync()
    book.close()
