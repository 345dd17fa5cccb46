"""Peers that accept no connections: called through streams of their own, or through a relay."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import time

import pytest
import torch
from grpc import aio
from test_transport import LAYOUT, LIMITS, Desk, some_factors

from plait.config import Config
from plait.factors import VALUE, Factor
from plait.peers import tunnel
from plait.peers.certificates import free_ports, init_federation
from plait.peers.codec import Question, encode
from plait.peers.event_loop import BACKGROUND
from plait.peers.federation import load_federation, load_peer, split_address
from plait.peers.guard import TUNNELS
from plait.peers.membership import Members
from plait.peers.pem import Pair
from plait.peers.refusals import Reason
from plait.peers.relay import Relay
from plait.peers.revocation import fingerprint_of
from plait.peers.signing import make_certificate
from plait.peers.transport import GrpcTransport


class Office:
    """ada accepts connections, ben and cai don't; with a relay or without one."""

    def __init__(self, folder, *, relay: bool = False, insecure: bool = False) -> None:
        here = [f"127.0.0.1:{port}" for port in free_ports(2)]
        self.path = init_federation(
            folder / "f", ("ada", "ben", "cai"), Config(topology="star"), limits=LIMITS,
            addresses=(here[0], "", ""), relay=here[1] if relay else None,
        )  # fmt: skip
        self.federation = load_federation(self.path)
        self.insecure = insecure
        self.desks = {name: Desk() for name in self.federation.names}
        self.stopping = contextlib.ExitStack()
        if relay:
            self.relay = Relay(Members(self.federation), load_peer(self.path, "relay"), insecure)
            self.relay.start()
            self.stopping.callback(self.relay.stop)
        self.peers = {name: self.peer(name) for name in self.federation.names}

    def peer(self, name: str) -> GrpcTransport:
        peer = GrpcTransport(
            Members(self.federation), load_peer(self.path, name), LAYOUT, self.desks[name],
            insecure_loopback=self.insecure,
        )  # fmt: skip
        peer.start()
        self.stopping.callback(peer.stop, 0)
        return peer

    def listens(self, name: str) -> str:
        return load_peer(self.path, name).listen

    def send(self, sender: str, to: str, factors=None):
        message = encode(
            factors or some_factors(), layout=LAYOUT, federation=self.federation.id,
            config_digest=self.federation.digest(), sender=sender, round=3, active="B",
        )  # fmt: skip
        return self.peers[sender].send(to, message, 10.0)


@pytest.fixture
def office(tmp_path, request):
    made = Office(tmp_path, **getattr(request, "param", {}))
    with made.stopping:
        yield made


PLAIN = pytest.mark.parametrize(
    "office", [{}, {"insecure": True}], ids=["tls", "insecure"], indirect=True
)
RELAYED = pytest.mark.parametrize("office", [{"relay": True}], ids=["relay"], indirect=True)


@PLAIN
def test_a_peer_that_accepts_no_connection_gets_and_gives_messages(office):
    sent = some_factors()
    for sender, to in (("ada", "ben"), ("ben", "ada"), ("ada", "cai")):
        assert office.send(sender, to, sent).accepted, (sender, to)
        header, rows = office.desks[to].taken[-1]
        assert header.sender == sender
        assert all(torch.equal(rows[slot], sent[slot]) for slot in sent)
    reply = office.peers["ada"].ask("ben", Question(kind="status"), 5.0)
    assert reply.facts == {"asked": "status", "by": "ada"}


def test_two_that_accept_none_and_have_no_relay_say_so(office):
    ack = office.send("ben", "cai")
    assert (ack.accepted, ack.reason) == (False, Reason.UNREACHABLE)
    assert "there is no relay" in ack.detail


@RELAYED
def test_two_that_accept_none_meet_at_the_relay(office):
    for sender, to in itertools.permutations(("ben", "cai"), 2):
        assert office.send(sender, to).accepted
        assert office.desks[to].taken[-1][0].sender == sender


@RELAYED
def test_the_relay_sees_no_factor(office, monkeypatch):
    seen = watched(monkeypatch)
    marked = {slot: torch.full_like(row, 1.2345) for slot, row in some_factors().items()}
    assert office.send("ben", "cai", marked).accepted
    carried = b"".join(seen)
    assert len(carried) > 1000
    assert marked[VALUE, Factor.B].numpy().tobytes()[:16] not in carried
    assert b"query" not in carried


@pytest.mark.parametrize("office", [{"relay": True, "insecure": True}], indirect=True)
def test_without_tls_it_would(office, monkeypatch):
    seen = watched(monkeypatch)
    marked = {slot: torch.full_like(row, 1.2345) for slot, row in some_factors().items()}
    assert office.send("ben", "cai", marked).accepted
    assert marked[VALUE, Factor.B].numpy().tobytes()[:16] in b"".join(seen)


def test_certificates_are_renewed_and_revoked_behind_streams_and_the_relay(tmp_path, monkeypatch):
    monkeypatch.setattr("plait.peers.transport.LOOK_S", 0.2)
    office = Office(tmp_path, relay=True)
    with office.stopping:
        assert office.send("ben", "cai").accepted
        folder = office.path.parent
        authority = Pair((folder / "ca.pem").read_bytes(), (folder / "ca.key").read_bytes())
        rings = {name: one._keyring for name, one in office.peers.items()}
        lines, new = [], {}
        for name in (*office.peers, "relay"):
            old, new[name] = folder / name / "cert.pem", make_certificate(authority, name)
            lines.append(f"{fingerprint_of(old.read_bytes())} {name}\n")
            old.write_bytes(new[name].certificate)
            (folder / name / "key.pem").write_bytes(new[name].key)
        assert until(lambda: all(rings[name]._papers.now.own == new[name] for name in rings))
        relay = office.relay
        assert until(lambda: relay.look() or relay._keyring._papers.now.own == new["relay"])
        (folder / "revoked.txt").write_text("".join(lines))
        shown = {name: pair.certificate for name, pair in new.items()}
        others = {name: {k: v for k, v in shown.items() if k != name} for name in rings}
        assert until(lambda: {name: ring._pins for name, ring in rings.items()} == others)
        for sender, to in itertools.permutations(office.peers, 2):
            ack = office.send(sender, to)
            assert ack.accepted, (sender, to, ack)


def test_doors_that_are_opened_at_once_are_different_ones():
    """Else who calls one member would come to another, as long as both channels are in use."""

    async def opened():
        doors = tunnel.Doors()
        try:
            return await asyncio.gather(*(doors.open(lambda _ends: None) for _ in range(3)))
        finally:
            await doors.close()

    assert len(set(asyncio.run(opened()))) == 3


def watched(monkeypatch) -> list[bytes]:
    """What a switchboard passes on, from now on."""
    seen, pour = [], tunnel._pour

    async def watching(source, sink):
        async def write(data):
            seen.append(data)
            await sink.write(data)

        await pour(source, tunnel.Ends(sink.read, write))

    monkeypatch.setattr(tunnel, "_pour", watching)
    return seen


def test_a_channel_that_is_closed_under_a_waiting_stream_is_made_anew(office):
    """As certificates are renewed: between having a channel and opening a stream on it, too."""
    channels, closed = office.peers["ben"]._channels, []

    async def to():
        channel = await channels.to("ada")
        if len(closed) < 3:
            closed.append(channel)
            await channel.close()
            channels._open.clear()
        return channel

    async def wait():
        return asyncio.create_task(tunnel.wait_at(to, "ben", *split_address(office.listens("ben"))))

    waiting = BACKGROUND.run(wait()).result()
    assert until(lambda: len(closed) == 3)
    assert office.send("ada", "ben").accepted
    assert not waiting.done()

    async def stop():
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    BACKGROUND.run(stop()).result()


@RELAYED
def test_a_relay_that_stops_and_comes_back_is_found_again(office):
    assert office.send("ben", "cai").accepted
    office.relay.stop()
    assert not office.send("ben", "cai").accepted
    office.relay.start()
    assert until(lambda: office.send("ben", "cai").accepted)


def test_a_peer_that_comes_back_is_called_again(office):
    office.peers["ben"].stop(0)
    assert not office.send("ada", "ben").accepted
    office.peers["ben"].start()
    assert until(lambda: office.send("ada", "ben").accepted)


def until(true) -> bool:
    end = time.monotonic() + 20
    return any(true() or time.sleep(0.05) for _ in iter(lambda: time.monotonic() < end, False))


@pytest.mark.parametrize(
    "metadata",
    [{tunnel.NAME: "ben"}, {tunnel.NAME: "cai", tunnel.TO: "ben"}],
    ids=["waits as another", "calls through a peer"],
)
def test_a_peer_carries_only_what_is_its_own(office, metadata):
    async def carry():
        channel = await office.peers["cai"]._channels.to("ada")
        async with tunnel._carried(channel, *metadata.items()) as call:
            await call.read()

    with pytest.raises(aio.AioRpcError, match="PERMISSION_DENIED"):
        BACKGROUND.run(carry()).result()


def test_a_member_may_keep_a_few_streams_and_no_more(office):
    async def hoard():
        channel = await office.peers["cai"]._channels.to("ada")
        carry = channel.stream_stream(tunnel.CARRY)
        return [carry(metadata=((tunnel.NAME, "cai"),)) for _ in range(2 * TUNNELS)]

    _calls = BACKGROUND.run(hoard()).result()  # those that are forgotten are ended
    assert office.desks["ada"].sees(Reason.BUSY)
    assert office.send("ada", "ben").accepted  # the others have theirs


def test_messages_go_through_the_proxy_of_the_environment_unless_switched_off(
    tmp_path, monkeypatch
):
    with proxy() as (port, asked):
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setattr("plait.peers.channels.is_loopback", lambda _: False)
        made = Office(tmp_path)
        with made.stopping:
            assert made.send("ben", "ada").accepted
            assert set(asked) == {made.federation.member("ada").address}
            del asked[:]
            own = (made.path.parent / "ada" / "cert.pem").read_bytes()
            assert made.peers["ben"].shows("ada") == own
            assert asked == [made.federation.member("ada").address]
            made.peers["cai"].stop(0)
            del asked[:]
            settings = dataclasses.replace(load_peer(made.path, "cai"), http_proxy=False)
            made.peers["cai"] = GrpcTransport(Members(made.federation), settings, LAYOUT, Desk())
            made.peers["cai"].start()
            assert made.send("cai", "ada").accepted
            assert not asked


@contextlib.contextmanager
def proxy():
    """An HTTP proxy that knows CONNECT: its port, and whom it was asked for."""
    asked, open_ = [], []

    async def connect(reader, writer):
        open_.append(asyncio.current_task())
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(head.split()[1].decode())
        there = await asyncio.open_connection(*asked[-1].rsplit(":", 1))
        with contextlib.closing(writer), contextlib.closing(there[1]):
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await tunnel.pipe(tunnel.of_socket(reader, writer), tunnel.of_socket(*there))

    async def serve():
        return await asyncio.start_server(connect, "127.0.0.1", 0)

    async def stop():
        server.close()
        for task in open_:
            task.cancel()
        await asyncio.gather(*open_, return_exceptions=True)

    BACKGROUND.acquire()
    server = BACKGROUND.run(serve()).result()
    yield server.sockets[0].getsockname()[1], asked
    BACKGROUND.run(stop()).result()
    BACKGROUND.release()


def test_a_federation_says_what_is_wrong_with_its_reachability(tmp_path):
    with pytest.raises(ValueError, match=r"ben and cai .*relay"):
        init_federation(
            tmp_path / "f", ("ada", "ben", "cai"), Config(topology="complete"),
            addresses=("10.0.0.1:7600", "", ""),
        )  # fmt: skip
