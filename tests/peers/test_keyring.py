"""Certificates while peers run: renewed, revoked, about to end; nobody is started anew."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable

import grpc
import pytest
from test_transport import SOON_S, Network, _server, wire

from plait.peers import keyring
from plait.peers.codec import Ack, Question
from plait.peers.pem import Pair
from plait.peers.refusals import Reason, Refused
from plait.peers.revocation import Route, fingerprint_of, read_revoked, shown
from plait.peers.signing import make_authority, make_certificate


@pytest.fixture
def network(tmp_path, monkeypatch):
    monkeypatch.setattr("plait.peers.transport.LOOK_S", 0.05)
    network = Network(tmp_path)
    yield network
    for name in list(network.peers):
        network.stop(name)


def soon(what: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON_S
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def write(network: Network, name: str, pair: Pair) -> Pair:
    folder = network.path.parent / name
    (folder / "key.pem").write_bytes(pair.key)
    (folder / "cert.pem").write_bytes(pair.certificate)
    return pair


def renew(network: Network, name: str) -> Pair:
    return write(network, name, make_certificate(network.authority, name))


def revoke(network: Network, name: str, pair: Pair) -> None:
    with (network.path.parent / "revoked.txt").open("a") as file:
        file.write(f"{fingerprint_of(pair.certificate)} {name} lost on a train\n")


def shows(network: Network, name: str) -> bytes:
    """The certificate that a peer's server shows now."""
    route = Route(network.federation.member(name).address)
    return shown(route, name, network.authority.certificate)


def send(network: Network, sender: str, to: str) -> Ack:
    return network.peers[sender].send(to, network.message(sender=sender), SOON_S)


def ring(network: Network, name: str) -> keyring.Keyring:
    found = network.peers[name]._keyring
    assert found
    return found


# -- renewed


def test_new_certificates_are_taken_while_messages_go_to_and_fro(network):
    old = [network.pair(name) for name in ("alice", "bob")]
    new = [renew(network, name) for name in ("alice", "bob")]
    acks = []
    soon(
        lambda: (
            acks.append(send(network, "alice", "bob"))
            or shows(network, "bob") == new[1].certificate
        )
    )
    soon(lambda: ring(network, "alice")._papers.now.own == new[0])
    # The old ones are used no more: neither side minds that they count no more.
    for name, pair in zip(("alice", "bob"), old, strict=True):
        revoke(network, name, pair)
    soon(lambda: len(ring(network, "carol")._revoked.now) == 2)
    soon(lambda: ring(network, "bob")._pins == {"alice": new[0].certificate})
    soon(lambda: ring(network, "alice")._pins == {"bob": new[1].certificate})
    acks += [send(network, "alice", "bob"), send(network, "bob", "alice")]
    assert [ack for ack in acks if not ack.accepted] == []
    assert network.desks["bob"].refusals == []


def test_a_new_authority_beside_the_old_one_then_alone(network):
    """Nobody is cut off on the way from one authority to another."""
    root = make_authority("another")
    ca = network.path.parent / "ca.pem"
    ca.write_bytes(network.authority.certificate + root.certificate)
    soon(
        lambda: all(
            root.certificate in ring(network, n)._papers.now.authority for n in network.peers
        )
    )
    for name in network.peers:
        write(network, name, make_certificate(root, name))
        pair = network.pair(name)
        soon(lambda name=name, pair=pair: ring(network, name)._papers.now.own == pair)
        assert all(send(network, "alice", to).accepted for to in ("bob", "carol"))
    ca.write_bytes(root.certificate)
    soon(lambda: ring(network, "bob")._papers.now.authority == root.certificate)
    assert send(network, "bob", "alice").accepted


UNFIT = {
    "half-written": lambda network, good: Pair(good.certificate[:300], good.key),
    "for another name": lambda network, good: make_certificate(network.authority, "carol"),
    "with the key of another": lambda network, good: Pair(
        good.certificate, make_certificate(network.authority, "bob").key
    ),
    "of a stranger": lambda network, good: make_certificate(make_authority("x"), "bob"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_an_unfit_pair_is_said_in_a_line_and_the_old_one_stays(network, kind, caplog):
    good = network.pair("bob")
    write(network, "bob", UNFIT[kind](network, good))
    soon(lambda: "not taken" in caplog.text)
    time.sleep(0.2)
    (said,) = [one.getMessage() for one in caplog.records if "not taken" in one.getMessage()]
    assert "cert.pem" in said
    assert shows(network, "bob") == good.certificate
    assert send(network, "alice", "bob").accepted
    new = renew(network, "bob")
    soon(lambda: shows(network, "bob") == new.certificate)


# -- revoked


def test_a_revoked_certificate_ends_with_the_next_call_over_an_open_connection(network):
    assert send(network, "carol", "bob").accepted
    revoke(network, "carol", network.pair("carol"))
    soon(lambda: send(network, "carol", "bob").reason is Reason.REVOKED)
    with pytest.raises(Refused, match="revoked certificate"):
        network.peers["carol"].ask("bob", Question(kind="status"), SOON_S)
    assert not network.peers["carol"].alive("bob", SOON_S)
    assert ("carol", Reason.REVOKED) in [one[:2] for one in network.desks["bob"].refusals]
    assert send(network, "alice", "bob").accepted


def test_nobody_calls_a_server_that_shows_a_revoked_certificate_until_it_shows_another(network):
    assert send(network, "bob", "carol").accepted
    revoke(network, "carol", network.pair("carol"))
    soon(lambda: "shows no other" in send(network, "bob", "carol").detail)
    assert not network.peers["bob"].alive("carol", SOON_S)
    network.desks["carol"].taken.clear()
    assert send(network, "bob", "carol").reason is Reason.UNREACHABLE
    assert not network.desks["carol"].taken
    renew(network, "carol")
    soon(lambda: send(network, "bob", "carol").accepted)
    soon(lambda: send(network, "carol", "bob").accepted)


def test_a_revoked_key_on_the_way_is_no_use_even_where_its_owner_shows_another(network):
    """Whoever has it may let the look at the certificate through, and take the connection."""
    stolen, new = network.pair("carol"), make_certificate(network.authority, "carol")
    network.stop("carol")
    revoke(network, "carol", stolen)
    with _server(network.federation.member("carol").address, new, network.authority):
        soon(lambda: ring(network, "bob")._pins == {"carol": new.certificate})
    with _server(network.federation.member("carol").address, stolen, network.authority):
        ring(network, "bob")._certificate_of = lambda _: new.certificate
        end = time.monotonic() + 1
        while time.monotonic() < end:
            ack = send(network, "bob", "carol")
            assert ack.reason is Reason.UNREACHABLE, ack
            if "CERTIFICATE_VERIFY_FAILED" in ack.detail:
                break
        assert "CERTIFICATE_VERIFY_FAILED" in ack.detail


def test_a_revoked_certificate_gets_nowhere_by_hand_either(network):
    stolen = network.pair("alice")
    revoke(network, "alice", stolen)
    soon(lambda: len(ring(network, "bob")._revoked.now) == 1)
    with pytest.raises(grpc.RpcError) as caught:
        network.deliver(*wire(network.message()), stolen)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert not network.desks["bob"].taken


def test_a_list_that_cannot_be_read_leaves_the_old_one(network, caplog):
    revoke(network, "carol", network.pair("carol"))
    soon(lambda: len(ring(network, "bob")._revoked.now) == 1)
    path = network.path.parent / "revoked.txt"
    for spoil in (lambda: path.write_text("12:34 carol\n"), path.unlink):
        caplog.clear()
        spoil()
        soon(lambda: "revoked.txt" in caplog.text)
        assert len(ring(network, "bob")._revoked.now) == 1


def test_a_list_has_fingerprints_as_openssl_or_anybody_writes_them(tmp_path):
    path = tmp_path / "revoked.txt"
    plain = "ab" * 32
    path.write_text(f"# none\n\n{plain} ada left the company\n{':'.join(['CD'] * 32)}\tben\n")
    assert read_revoked(path) == {":".join(["AB"] * 32): "ada", ":".join(["CD"] * 32): "ben"}
    assert read_revoked(None) == {}


@pytest.mark.parametrize(
    "line", ["ada", "ab" * 32, "ab" * 31 + " ada", "xy" * 32 + " ada", "ab" * 32 + " A.da"]
)
def test_what_a_list_cannot_have_is_refused(tmp_path, line):
    path = tmp_path / "revoked.txt"
    path.write_text(line)
    with pytest.raises(ValueError, match=r"plait cert show|peer is named"):
        read_revoked(path)
    with pytest.raises(ValueError, match="is missing"):
        read_revoked(tmp_path / "none.txt")


# -- about to end


def test_what_ends_soon_is_said_once_a_day(network, monkeypatch, caplog):
    days = 12.5
    write(network, "bob", make_certificate(network.authority, "bob", days))
    soon(lambda: "bob/cert.pem ends on" in caplog.text)
    time.sleep(0.2)
    assert caplog.text.count("in 12 days: have a new one signed") == 1
    ends = network.peers["bob"].expires()
    assert abs(ends["certificate"] - time.time() - days * 86400) < 60
    assert ends["authority"] > time.time() + 3600 * 86400

    today = dt.datetime

    class Tomorrow(dt.datetime):
        @classmethod
        def now(cls, tz=None):
            return today.now(tz) + dt.timedelta(days=1)

    monkeypatch.setattr(keyring.dt, "datetime", Tomorrow)
    soon(lambda: "in 11 days" in caplog.text)
