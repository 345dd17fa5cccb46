"""What a power cut leaves of a peer, at every moment: it goes on from its last checkpoint."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from conftest import tiny_tokenizer
from fake_network import Hub, member, start_peer
from fake_runs import evaluated, events
from plait.config import Config
from plait.events import RoundDone
from plait.peers import process as peers
from plait.peers.audit_check import PeersBook
from plait.peers.certificates import init_federation
from plait.peers.federation import load_federation, load_peer
from plait.peers.membership import Members
from plait.runs.run_folder import RunFolder, load_events
from power_cut import Disk

PRIVATE = Config(
    topology="ring", clients=3, rounds=3, rank=2, local_steps=1, batch_size=2, dp_clip=1.0,
    dp_noise=1.0,
)  # fmt: skip


@pytest.fixture
def process(tmp_path, monkeypatch):
    """Makes the process of a peer in a run folder, the model being a tiny one."""
    job = start_peer(Hub(), 0, PRIVATE, [member(f"p{k}") for k in range(3)]).job
    job.backbone.tokenizer = tiny_tokenizer()
    monkeypatch.setattr(peers, "prepare_peer", lambda *_: job)
    monkeypatch.setattr(peers, "fingerprints", lambda *_: {"rows": "0"})
    file = init_federation(tmp_path / "f", ["p0", "p1", "p2"], PRIVATE)

    def make(out):
        settings = dataclasses.replace(load_peer(file, "p0"), out=out)
        return peers.Process(Members(load_federation(file)), settings, threading.Event(), False)

    return make


def go(process, rounds) -> None:
    """Do some rounds with nobody, as far as what is kept of them goes."""
    said = {e.round: e for e in events(PRIVATE, 0.8) if isinstance(e, RoundDone)}
    with process.desk.condition:
        process.desk.inbox.skip_to(process.first_round)
    process._remember()
    if not process.done:
        process._see(process.job.started)
        process._see(evaluated(PRIVATE, -1, 0.5))
    for round_ in rounds:
        mine = {slot: process.stack.state[slot][0] for slot in process.job.shared(round_)}
        active = process.desk.inbox.turn(round_).active
        process.desk.inbox.send(process.write(mine, round_, active, "round"))
        process.desk.note("made", process.desk.inbox.mine(), round=round_)
        process.desk.inbox.close()
        process._see(said[round_])
        if process.peer.evaluates_after(round_):
            process._see(evaluated(PRIVATE, round_, 0.5))


def test_after_a_power_cut_a_peer_goes_on_from_its_checkpoint(tmp_path, monkeypatch, process):
    with monkeypatch.context() as patched:
        disk = Disk(tmp_path / "disk", patched)
        first = process(tmp_path / "disk" / "out")
        go(first, range(3))
        first._until_end.close()
    assert len(disk.images) > 20
    monkeypatch.setattr("os.fsync", lambda _: None)  # which takes its time
    begun = []
    for number, image in enumerate(disk.images):
        disk.leave(image, tmp_path / f"{number}")
        again = process(tmp_path / f"{number}" / "out")
        go(again, range(again.first_round, 3))
        assert len(again.done) == 1 or again.first_round == 3, "memory stays flat"
        said = load_events(tmp_path / f"{number}" / "out")
        rounds = [event.round for event in said if isinstance(event, RoundDone)]
        assert rounds == [0, 1, 2]
        begun.append(again.first_round)
        again._until_end.close()
        book = PeersBook.read(tmp_path / f"{number}" / "out")
        assert not book.chain.wrong
        assert sorted(book.made) == [0, 1, 2]
        assert not list(book.lines("lost"))
    assert set(begun) == {0, 1, 2, 3}
    disk.close()


def test_what_was_sent_is_there_again_after_rounds_without_a_message(tmp_path, process):
    """As where a model was handed on: nobody else may have it."""
    first = process(tmp_path / "out")
    go(first, range(1))
    sent = first.desk.inbox.last_sent()
    rests = next(e for e in events(PRIVATE, 0.8) if isinstance(e, RoundDone) and e.round == 1)
    first.desk.inbox.close()
    first._see(rests)
    first._until_end.close()
    again = process(tmp_path / "out")
    assert again.first_round == 2
    again._remember()
    assert again.desk.inbox.mine(0).body == sent.body
    again._until_end.close()


@pytest.mark.parametrize(("rests", "said"), [(False, ["finish", "linger"]), (True, ["linger"])])
def test_who_handed_the_model_on_is_not_done_before_all_are(
    tmp_path, monkeypatch, process, rests, said
):
    one, order = process(tmp_path / "out"), []
    monkeypatch.setattr(peers, "some_rest", lambda _: rests)
    monkeypatch.setattr(one, "_finish", lambda: order.append("finish"))
    monkeypatch.setattr(one.exchange, "linger", lambda *_: order.append("linger"))
    one.leave.set()
    one._end()
    assert order == said
    one.leave.clear()
    one._end()
    assert order[len(said) :] == (["linger", "finish"] if rests else said)
    one._until_end.close()


def test_a_peer_without_its_noise_does_not_go_on(tmp_path, process):
    first = process(tmp_path / "out")
    go(first, range(1))
    first._until_end.close()
    for left in (None, b"short"):
        (tmp_path / "out" / "noise.key").unlink(missing_ok=True)
        if left:
            (tmp_path / "out" / "noise.key").write_bytes(left)
        with pytest.raises(ValueError, match=r"noise\.key is not there any more, or cut short"):
            process(tmp_path / "out")
    RunFolder(tmp_path / "out").checkpoint_file.unlink()
    again = process(tmp_path / "out")
    assert again.first_round == 0
    again._until_end.close()


def test_the_noise_is_on_the_disk_before_it_is_used(tmp_path, monkeypatch):
    disk = Disk(tmp_path / "disk", monkeypatch)
    folder = RunFolder(tmp_path / "disk")
    peers.noise_of(folder, PRIVATE)
    disk.images.clear()
    disk._cut()
    key = (tmp_path / "disk" / "noise.key").read_bytes()
    assert list(disk.images) == [frozenset({("noise.key", key)})]
    disk.close()
