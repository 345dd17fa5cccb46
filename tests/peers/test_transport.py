"""The transport over real sockets: who gets in, what gets through, and that everything ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path

import grpc
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from plait.config import Config
from plait.factors import VALUE, Factor, Slot
from plait.lora import Layout, Site
from plait.peers.certificates import init_federation, make_authority, make_certificate
from plait.peers.codec import PIECE_BYTES, Ack, Answer, Header, Message, Question, encode
from plait.peers.credentials import Pair
from plait.peers.envelope import read_ack, write_header
from plait.peers.event_loop import BACKGROUND
from plait.peers.federation import Limits, Member, load_federation, load_peer
from plait.peers.grpc_server import OPTIONS
from plait.peers.guard import OPEN_CALLS
from plait.peers.membership import Members
from plait.peers.refusals import Reason, Refused
from plait.peers.transport import DELIVER, HEADER, GrpcTransport

LAYOUT = Layout((Site("query", 6, 4), Site("value", 6, 6)), rank=2, scale=2.0)
LIMITS = Limits(round_timeout_s=1.0, max_message_bytes=1 << 20, norm_bound=1e3)
NAMES = ("alice", "bob", "carol")
SOON_S = 5.0


class Desk:
    """Takes everything, unless a test tells it to refuse."""

    def __init__(self) -> None:
        self.taken: list[tuple[Header, dict[Slot, torch.Tensor]]] = []
        self.refusals: list[tuple[str, Reason, str]] = []
        self.refusal: Refused | None = None
        self.message: Message | None = None
        self.given: list[str] = []
        self.moves: list[tuple[str, float]] = []

    def admit(self, header: Header) -> None:
        if self.refusal:
            raise self.refusal

    def take(self, header: Header, factors: dict[Slot, torch.Tensor]) -> None:
        self.taken.append((header, factors))

    def answer(self, question: Question) -> Answer:
        if self.refusal:
            raise self.refusal
        return Answer({"asked": question.kind, "by": question.sender}, self.message)

    def gave(self, asker: str, message: Message) -> None:
        self.given.append(asker)

    def moving(self, sender: str, until: float) -> None:
        self.moves.append((sender, until))

    def refused(self, sender: str, reason: Reason, detail: str) -> None:
        self.refusals.append((sender, reason, detail))

    def sees(self, reason: Reason) -> bool:
        """Whether a refusal is counted soon: the other side may hear of it first."""
        end = time.monotonic() + SOON_S
        while time.monotonic() < end:
            if reason in [one for _, one, _ in self.refusals]:
                return True
            time.sleep(0.01)
        return False


class Network:
    """Three peers of a federation in this process, and intruders."""

    def __init__(self, folder: Path, insecure_loopback: bool = False) -> None:
        self.path = init_federation(folder / "f", NAMES, Config(topology="ring"), limits=LIMITS)
        self.federation = load_federation(self.path)
        self.insecure_loopback = insecure_loopback
        self.desks = {name: Desk() for name in NAMES}
        self.peers: dict[str, GrpcTransport] = {}
        for name in NAMES:
            self.start(name)

    def start(self, name: str) -> None:
        self.peers[name] = GrpcTransport(
            Members(self.federation),
            load_peer(self.path, name),
            LAYOUT,
            self.desks[name],
            insecure_loopback=self.insecure_loopback,
        )
        self.peers[name].start()

    def stop(self, name: str) -> None:
        self.peers.pop(name).stop(0)

    def pair(self, name: str) -> Pair:
        folder = self.path.parent / name
        return Pair((folder / "cert.pem").read_bytes(), (folder / "key.pem").read_bytes())

    @property
    def authority(self) -> Pair:
        folder = self.path.parent
        return Pair((folder / "ca.pem").read_bytes(), (folder / "ca.key").read_bytes())

    def message(self, factors: dict[Slot, torch.Tensor] | None = None, **header) -> Message:
        fields = {"sender": "alice", "round": 3, "active": "B"}
        message = encode(
            factors or some_factors(),
            layout=LAYOUT,
            federation=self.federation.id,
            config_digest=self.federation.digest(),
            **fields,
        )
        header = dataclasses.replace(message.header, **header)
        return dataclasses.replace(message, header=header)

    def deliver(
        self, header: bytes, pieces: Iterator[bytes], pair: Pair | None, secure: bool = True
    ) -> Ack:
        """What a program that is not ours sends to bob; without metadata for an empty header."""
        address = self.federation.member("bob").address
        named = [*OPTIONS, ("grpc.ssl_target_name_override", "bob")]
        own = (pair.key, pair.certificate) if pair else (None, None)
        credentials = grpc.ssl_channel_credentials(self.authority.certificate, *own)
        with (
            grpc.secure_channel(address, credentials, named)
            if secure
            else grpc.insecure_channel(address)
        ) as channel:
            call = channel.stream_unary(DELIVER)
            metadata = ((HEADER, header),) if header else ()
            return read_ack(call(pieces, timeout=SOON_S, metadata=metadata))


def wire(message: Message, receiver: str = "bob") -> tuple[bytes, Iterator[bytes]]:
    """A message as it travels: header and pieces."""
    return write_header(message.header, receiver), iter(message.pieces)


def some_factors() -> dict[Slot, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        (VALUE, factor): torch.randn(LAYOUT.size(factor), generator=generator)
        for factor in (Factor.A, Factor.B)
    }


@pytest.fixture(scope="module", params=[False, True], ids=["mTLS", "insecure-loopback"])
def either(request, tmp_path_factory):
    network = Network(tmp_path_factory.mktemp("network"), insecure_loopback=request.param)
    yield network
    for name in list(network.peers):
        network.stop(name)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    network = Network(tmp_path_factory.mktemp("network"))
    yield network
    for name in list(network.peers):
        network.stop(name)


@pytest.fixture
def network(running):
    """The running network, with desks that have seen nothing."""
    for name, desk in running.desks.items():
        desk.__init__()
        if name not in running.peers:
            running.start(name)
    return running


# -- what gets through


def test_a_message_arrives_bit_for_bit_and_is_acknowledged(either):
    assert either.peers["alice"].send("bob", either.message(), SOON_S) == Ack(True)
    header, factors = either.desks["bob"].taken[-1]
    assert (header.sender, header.receiver, header.round) == ("alice", "bob", 3)
    for factor, row in some_factors().items():
        assert torch.equal(factors[factor], row)


def test_a_question_is_answered(either):
    reply = either.peers["alice"].ask("bob", Question(kind="status"), SOON_S)
    assert reply.facts == {"asked": "status", "by": "alice"}
    assert reply.factors is None


def test_a_message_that_was_asked_for_is_checked_too(either):
    desk = either.desks["bob"]
    desk.message = either.message(sender="bob")
    reply = either.peers["alice"].ask("bob", Question(kind="round", round=3), SOON_S)
    for factor, row in some_factors().items():
        assert torch.equal(reply.factors[factor], row)
    bad = some_factors()
    bad[VALUE, Factor.A][0] = float("nan")
    for message, reason in (
        (either.message(bad, sender="bob"), Reason.NOT_FINITE),
        (either.message(sender="carol"), Reason.WRONG_SENDER),
        (either.message(sender="bob", num_bytes=1 << 30), Reason.TOO_LARGE),
        (either.message(sender="bob", num_bytes=len(desk.message.body) - 1), Reason.TOO_LARGE),
        (either.message(sender="bob", num_bytes=len(desk.message.body) + 1), Reason.MALFORMED),
    ):
        desk.message = message
        with pytest.raises(Refused) as caught:
            either.peers["alice"].ask("bob", Question(kind="round", round=3), SOON_S)
        assert caught.value.reason is reason
    desk.message = None


@pytest.mark.parametrize(("width", "pieces"), [(1 << 18, 1), (1 << 20, 3)])
def test_a_large_message_arrives_or_its_sender_hears_why_not(tmp_path, width, pieces):
    """The refusal comes before the body is read, and must not get lost in what is on its way."""
    layout = Layout((Site("large", width, 1 << 17),), rank=2, scale=1.0)
    path = init_federation(tmp_path / "f", ["alice", "bob"], Config(topology="ring"))
    federation, desk = load_federation(path), Desk()
    alice, bob = (
        GrpcTransport(Members(federation), load_peer(path, name), layout, desk)
        for name in ("alice", "bob")
    )
    factors = {(VALUE, f): torch.randn(layout.size(f)) for f in (Factor.A, Factor.B)}
    message = encode(
        factors,
        layout=layout,
        federation=federation.id,
        config_digest=federation.digest(),
        sender="alice",
        round=0,
        active="B",
    )
    assert len(message.pieces) == pieces
    alice.start(serve=False)
    bob.start()
    try:
        desk.refusal = Refused(Reason.STALE_ROUND, "over")
        for _ in range(10):
            ack = alice.send("bob", message, SOON_S)
            assert ack == Ack(False, Reason.STALE_ROUND, "over")
        desk.refusal = None
        assert alice.send("bob", message, SOON_S).accepted
        assert all(torch.equal(desk.taken[0][1][factor], row) for factor, row in factors.items())
        assert alice.counts.sent_bytes == {"bob": len(message.body)}
        assert bob.counts.received_bytes == {"alice": len(message.body)}
    finally:
        alice.stop(0)
        bob.stop(0)


def test_what_a_method_sends_of_a_factor_besides_its_value_arrives(tmp_path):
    path = init_federation(tmp_path / "f", ["alice", "bob"], Config(topology="ring"))
    federation = load_federation(path)
    slots = {(kind, Factor.B): torch.randn(LAYOUT.size(Factor.B)) for kind in (VALUE, "m")}
    for kinds, accepted in (((VALUE, "m"), True), ((VALUE,), False)):
        desk = Desk()
        alice, bob = (
            GrpcTransport(Members(federation), load_peer(path, name), LAYOUT, desk, kinds=kinds)
            for name in ("alice", "bob")
        )
        message = encode(
            slots, layout=LAYOUT, federation=federation.id, config_digest=federation.digest(),
            sender="alice", round=0, active="B",
        )  # fmt: skip
        alice.start(serve=False)
        bob.start()
        try:
            assert alice.send("bob", message, SOON_S).accepted == accepted
        finally:
            alice.stop(0)
            bob.stop(0)
        assert len(desk.taken) == accepted
        for _, taken in desk.taken:
            assert taken.keys() == slots.keys()
            assert all(torch.equal(taken[slot], value) for slot, value in slots.items())


def test_many_threads_may_send_at_once(network):
    with ThreadPoolExecutor(4) as pool:
        senders = [
            pool.submit(network.peers["alice"].send, to, network.message(), SOON_S)
            for to in ("bob", "carol") * 10
        ]
    refused = [one.result() for one in senders if not one.result().accepted]
    assert all(ack.reason is Reason.BUSY for ack in refused)
    assert network.desks["bob"].taken
    assert network.desks["carol"].taken


def test_the_health_service_answers(network):
    assert network.peers["alice"].alive("bob", SOON_S)
    network.stop("carol")
    assert not network.peers["alice"].alive("carol", SOON_S)


# -- who gets in


def intruders(network: Network) -> dict[str, Pair | None]:
    stranger = make_authority("stranger")
    return {
        "no certificate": None,
        "expired": make_certificate(network.authority, "alice", days=-1),
        "self-signed": self_signed("alice"),
        "wrong authority": make_certificate(stranger, "alice"),
    }


def self_signed(name: str) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    pkcs8 = serialization.PrivateFormat.PKCS8
    return Pair(certificate.public_bytes(pem), key.private_bytes(pem, pkcs8, plain))


INTRUDERS = ("no certificate", "expired", "self-signed", "wrong authority")


@pytest.mark.parametrize("kind", INTRUDERS)
def test_nobody_gets_in_without_a_certificate_of_the_authority(network, kind):
    with pytest.raises(grpc.RpcError) as caught:
        network.deliver(*wire(network.message()), intruders(network)[kind])
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not network.desks["bob"].taken


def test_nobody_gets_in_without_tls(network):
    with pytest.raises(grpc.RpcError) as caught:
        network.deliver(*wire(network.message()), None, secure=False)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not network.desks["bob"].taken


@pytest.mark.parametrize("kind", INTRUDERS[1:])
def test_nothing_is_sent_to_a_server_without_such_a_certificate(network, kind):
    network.stop("carol")
    own = intruders(network)[kind]
    with _server(network.federation.member("carol").address, own, network.authority):
        assert _failure_of(network, "CERTIFICATE_VERIFY_FAILED")


def test_nothing_is_sent_to_a_member_at_anothers_address(network):
    network.stop("carol")
    address = network.federation.member("carol").address
    with _server(address, network.pair("bob"), network.authority):
        assert _failure_of(network, "Hostname Verification Check failed")


def _failure_of(network: Network, why: str) -> bool:
    """Whether sending to carol fails for this; gRPC tries anew within a second."""
    end = time.monotonic() + SOON_S
    while time.monotonic() < end:
        ack = network.peers["alice"].send("carol", network.message(), SOON_S)
        assert ack.reason is Reason.UNREACHABLE
        if why in ack.detail:
            return True
        time.sleep(0.1)
    raise AssertionError(ack.detail)


@contextlib.contextmanager
def _server(address: str, own: Pair, authority: Pair) -> Iterator[None]:
    server = grpc.server(ThreadPoolExecutor(1), options=OPTIONS)
    server.add_secure_port(
        address,
        grpc.ssl_server_credentials([(own.key, own.certificate)], authority.certificate, True),
    )
    server.start()
    try:
        yield
    finally:
        server.stop(0).wait()


def test_there_is_no_falling_back_to_an_insecure_channel(network, tmp_path):
    settings = load_peer(network.path, "alice")
    missing = dataclasses.replace(settings, certificate=tmp_path / "none.pem")
    with pytest.raises(ValueError, match=r"none\.pem is missing"):
        GrpcTransport(Members(network.federation), missing, LAYOUT, Desk())


@pytest.mark.parametrize("address", ["10.0.0.1:7600", "0.0.0.0:7600", "localhost:7600", "[::]:1"])
def test_insecure_means_this_machine_only(network, address):
    settings = load_peer(network.path, "alice")
    members = (*network.federation.peers[1:], Member(name="alice", address=address))
    elsewhere = dataclasses.replace(network.federation, peers=members)
    for given in (
        (Members(network.federation), dataclasses.replace(settings, listen=address)),
        (Members(elsewhere), settings),
    ):
        with pytest.raises(ValueError, match="insecure-loopback takes addresses such as"):
            GrpcTransport(*given, LAYOUT, Desk(), insecure_loopback=True)


def test_a_port_in_use_is_said(network):
    settings = load_peer(network.path, "alice")
    taken = dataclasses.replace(settings, listen=network.federation.member("bob").address)
    with pytest.raises(ValueError, match="Can't listen on"):
        GrpcTransport(Members(network.federation), taken, LAYOUT, Desk()).start()


def test_settings_and_status_are_told_to_a_member_whose_digest_is_another(network):
    network.peers["alice"].identity = dataclasses.replace(
        network.peers["alice"].identity, config_digest=lambda _: "other"
    )
    try:
        with pytest.raises(Refused, match="config_digest"):
            network.peers["alice"].ask("bob", Question(kind="round"), SOON_S)
        for kind in ("settings", "status"):
            asked = network.peers["alice"].ask("bob", Question(kind=kind), SOON_S)
            assert asked.facts["asked"] == kind
    finally:
        network.stop("alice")


def test_an_answer_that_went_out_is_told_to_the_desk(network):
    desk = network.desks["bob"]
    desk.message = network.message(sender="bob")
    end = time.monotonic() + SOON_S
    while not desk.given and time.monotonic() < end:  # one who has all may hang up before
        network.peers["alice"].ask("bob", Question(kind="round", round=3), SOON_S)
        time.sleep(0.01)
    assert set(desk.given) == {"alice"}


# -- what a member may send


def nan_factors() -> dict[Slot, torch.Tensor]:
    factors = some_factors()
    factors[VALUE, Factor.B][3] = float("nan")
    return factors


def large_factors() -> dict[Slot, torch.Tensor]:
    return {factor: row * 1e6 for factor, row in some_factors().items()}


Sent = tuple[bytes, Iterator[bytes]]


def bad_messages(network: Network) -> dict[str, tuple[Sent, Reason]]:
    """What a member with a valid certificate sends, and what bob says."""
    message = network.message
    good = message()
    header, size = write_header(good.header, "bob"), len(good.body)
    return {
        "forged sender": (wire(message(sender="carol")), Reason.WRONG_SENDER),
        "another federation": (wire(message(federation="x")), Reason.WRONG_FEDERATION),
        "another config": (wire(message(config_digest="x")), Reason.WRONG_CONFIG),
        "another version": (wire(message(version=9)), Reason.WRONG_VERSION),
        "other shapes": (wire(message(layout="x")), Reason.WRONG_SHAPE),
        "for somebody else": (wire(good, "carol"), Reason.WRONG_RECEIVER),
        "NaN": (wire(message(nan_factors())), Reason.NOT_FINITE),
        "a huge norm": (wire(message(large_factors())), Reason.NORM_TOO_LARGE),
        "1 GiB declared": (wire(message(num_bytes=1 << 30)), Reason.TOO_LARGE),
        "more than declared": ((header, iter([good.body[1:], good.body])), Reason.TOO_LARGE),
        "more in one piece": ((header, iter([good.body + b"x"])), Reason.TOO_LARGE),
        "cut off": ((header, iter([good.body[:-1]])), Reason.MALFORMED),
        "an empty piece": ((header, iter([b"", good.body])), Reason.MALFORMED),
        "no body": ((header, iter([])), Reason.MALFORMED),
        "random bytes": ((b"\xff\x00random", iter([b"random"])), Reason.MALFORMED),
        "a random body": ((header, iter([bytes(size)])), Reason.WRONG_DIGEST),
        "nothing": ((b"", iter([])), Reason.MALFORMED),
        "no header": ((b"", iter(good.pieces)), Reason.MALFORMED),
    }


BAD = (
    "forged sender", "another federation", "another config", "another version", "other shapes",
    "for somebody else", "NaN", "a huge norm", "1 GiB declared", "more than declared",
    "more in one piece", "cut off", "an empty piece", "no body", "random bytes", "a random body",
    "nothing", "no header",
)  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_message_is_refused_and_both_sides_know(network, kind):
    sent, reason = bad_messages(network)[kind]
    ack = network.deliver(*sent, network.pair("alice"))
    assert (ack.accepted, ack.reason) == (False, reason)
    assert network.desks["bob"].refusals == [("alice", reason, ack.detail)]
    assert not network.desks["bob"].taken
    assert network.peers["carol"].send("bob", network.message(sender="carol"), SOON_S).accepted


def test_every_bad_message_has_its_case(network):
    assert set(bad_messages(network)) == set(BAD)


def test_what_comes_after_a_whole_message_is_not_read(network):
    good = network.message()
    header, pieces = wire(good)
    ack = network.deliver(header, iter([*pieces, good.body]), network.pair("alice"))
    assert ack.accepted
    assert len(network.desks["bob"].taken) == 1


@pytest.mark.parametrize("what", ["header", "piece"])
def test_what_is_above_the_limit_is_refused_by_grpc_itself(network, what):
    header, pieces = wire(network.message())
    sent = {
        "header": (bytes(1 << 16), pieces),
        "piece": (header, iter([bytes(PIECE_BYTES + 1)])),
    }
    with pytest.raises(grpc.RpcError) as caught:
        network.deliver(*sent[what], network.pair("alice"))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_someone_with_a_certificate_who_is_no_member_is_refused(network):
    pair = make_certificate(network.authority, "mallory")
    with pytest.raises(grpc.RpcError) as caught:
        network.deliver(*wire(network.message(sender="mallory")), pair)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert network.desks["bob"].sees(Reason.WRONG_SENDER)


def test_what_the_desk_refuses_the_sender_hears(network):
    network.desks["bob"].refusal = Refused(Reason.STALE_ROUND, "round 3, here it is 7")
    ack = network.peers["alice"].send("bob", network.message(), SOON_S)
    assert ack == Ack(False, Reason.STALE_ROUND, "round 3, here it is 7")
    with pytest.raises(Refused, match="stale round"):
        network.peers["alice"].ask("bob", Question(kind="state"), SOON_S)
    assert network.desks["bob"].sees(Reason.STALE_ROUND)


def test_a_message_that_never_ends_is_ended(network):
    stop = threading.Event()
    header, pieces = wire(network.message())

    def endless() -> Iterator[bytes]:
        yield next(pieces)[:10]
        stop.wait(SOON_S)

    try:
        ack = network.deliver(header, endless(), network.pair("alice"))
    finally:
        stop.set()
    assert ack.reason is Reason.NO_ANSWER
    assert network.desks["bob"].sees(Reason.NO_ANSWER)


def test_a_peer_may_have_a_few_calls_open_and_no_more(network):
    stop = threading.Event()
    header, _ = wire(network.message())

    def endless() -> Iterator[bytes]:
        stop.wait(SOON_S)
        yield b""

    with ThreadPoolExecutor(OPEN_CALLS + 3) as pool:
        calls = [
            pool.submit(network.deliver, header, endless(), network.pair("alice"))
            for _ in range(OPEN_CALLS + 3)
        ]
        refused = list(islice(as_completed(calls, SOON_S), 3))
        carol = network.peers["carol"].send("bob", network.message(sender="carol"), SOON_S)
        stop.set()
    assert network.desks["bob"].sees(Reason.BUSY)
    assert carol.accepted
    exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert [call.exception().code() for call in refused] == [exhausted] * 3
    assert not any(call.exception() for call in calls if call not in refused)


# -- peers that go and come back


def test_a_peer_that_is_gone_is_said_at_once_and_found_again(network):
    network.stop("carol")
    begin = time.monotonic()
    ack = network.peers["alice"].send("carol", network.message(), SOON_S)
    assert ack.reason is Reason.UNREACHABLE
    assert time.monotonic() - begin < SOON_S / 2
    network.start("carol")
    end = time.monotonic() + SOON_S
    while not ack.accepted and time.monotonic() < end:
        time.sleep(0.1)
        ack = network.peers["alice"].send("carol", network.message(), SOON_S)
    assert ack.accepted


@pytest.mark.parametrize("how", ["before a call", "during one"])
def test_a_channel_that_is_closed_is_a_call_that_failed(network, monkeypatch, how):
    """As happens when certificates are renewed."""
    alice = network.peers["alice"]

    async def close(grace_s):
        channel = await alice._channels.to("bob")
        task = asyncio.ensure_future(channel.close(grace_s))
        await asyncio.sleep(0)
        return task

    network.desks["bob"].message = network.message(sender="bob")
    if how == "before a call":
        BACKGROUND.run(close(0)).result()
    else:
        monkeypatch.setattr(network.desks["bob"], "answer", lambda _: time.sleep(0.5))
        threading.Timer(0.1, lambda: BACKGROUND.run(close(0.0))).start()
    with pytest.raises(Refused) as caught:
        alice.ask("bob", Question(kind="round", round=3), SOON_S)
    assert caught.value.reason is Reason.UNREACHABLE
    if how == "before a call":
        assert alice.send("bob", network.message(), SOON_S).reason is Reason.UNREACHABLE


def test_a_peer_that_hangs_costs_no_more_than_the_deadline(network):
    network.stop("carol")
    host, port = network.federation.member("carol").address.split(":")
    with socket.create_server((host, int(port))):  # accepts, and says nothing
        begin = time.monotonic()
        ack = network.peers["alice"].send("carol", network.message(), 0.5)
        with pytest.raises(Refused) as caught:
            network.peers["alice"].ask("carol", Question(kind="status"), 0.5)
        seconds = time.monotonic() - begin
    assert ack.reason is Reason.NO_ANSWER
    assert caught.value.reason is Reason.NO_ANSWER
    assert seconds < 3
