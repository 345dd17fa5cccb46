"""What strangers and members can hold of a peer: connections, descriptors, calls."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health_pb2
from test_transport import SOON_S, Network

from plait.peers.certificates import make_certificate
from plait.peers.codec import Question
from plait.peers.envelope import write_question
from plait.peers.grpc_server import OPTIONS
from plait.peers.guard import HANDSHAKE_S, OPEN_CALLS, caller_of
from plait.peers.refusals import Reason
from plait.peers.transport import ASK

NUM_DESCRIPTORS = 200


@pytest.fixture
def network(tmp_path):
    network = Network(tmp_path)
    yield network
    for name in list(network.peers):
        network.stop(name)


def address(network: Network, name: str = "bob") -> tuple[str, int]:
    host, port = network.federation.member(name).address.split(":")
    return host, int(port)


SERVER = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (64, {limit}))
from pathlib import Path
sys.path.insert(0, "..")  # conftest.py
from plait.peers.federation import load_federation, load_peer
from plait.peers.guard import raise_descriptor_limit
from plait.peers.membership import Members
from plait.peers.transport import GrpcTransport
from test_transport import LAYOUT, Desk
path = Path(sys.argv[1])
raise_descriptor_limit()
transport = GrpcTransport(Members(load_federation(path)), load_peer(path, "bob"), LAYOUT, Desk())
transport.start()
print("listening", flush=True)
for line in sys.stdin:
    (path.parent / "written").write_text(line)
    print("written", flush=True)
transport.stop(0)
"""


def test_idle_connections_of_strangers_leave_a_peer_its_descriptors(network):
    """Four hundred of them against a limit of two hundred, and it still writes and answers."""
    network.stop("bob")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER.format(limit=NUM_DESCRIPTORS), str(network.path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    with contextlib.ExitStack() as held:
        held.callback(process.kill)
        assert process.stdout.readline() == "listening\n"
        for _ in range(2 * NUM_DESCRIPTORS):
            with contextlib.suppress(OSError):
                held.enter_context(socket.create_connection(address(network), timeout=1))
        used = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        process.stdin.write("while they hold on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "written\n"
        assert used < NUM_DESCRIPTORS - 20
        end = time.monotonic() + 2 * HANDSHAKE_S + SOON_S
        ack = network.peers["alice"].send("bob", network.message(), SOON_S)
        while not ack.accepted and time.monotonic() < end:
            time.sleep(0.2)
            ack = network.peers["alice"].send("bob", network.message(), SOON_S)
        assert ack.accepted
    _, said = process.communicate()
    assert said == "", "gRPC's own lines are no JSON, and have no end"


def test_the_limit_of_descriptors_is_raised(monkeypatch):
    from plait.peers import guard

    given = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 5000))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: given.append(limits))
    guard.raise_descriptor_limit()
    assert given == [(5000, 5000)]
    assert guard.most_connections() == 512


# -- calls that are held


class Held:
    """A connection, with calls that its owner never reads an answer of: no window at all."""

    def __init__(self, network: Network, name: str, files: Path) -> None:
        pair = make_certificate(network.authority, name)
        (files / f"{name}.pem").write_bytes(pair.certificate + pair.key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(files / f"{name}.pem")
        context.set_alpn_protocols(["h2"])
        self.socket = context.wrap_socket(socket.create_connection(address(network)))
        self.stream = 1
        no_window = struct.pack(">HI", 4, 0)
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, no_window))

    def ask(self, path: str, body: bytes) -> None:
        headers = b"".join(
            b"\x00" + bytes([len(key)]) + key + bytes([len(value)]) + value
            for key, value in (
                (b":method", b"POST"), (b":scheme", b"https"), (b":path", path.encode()),
                (b":authority", b"bob"), (b"content-type", b"application/grpc"),
                (b"te", b"trailers"),
            )
        )  # fmt: skip
        message = b"\x00" + struct.pack(">I", len(body)) + body
        self.socket.sendall(frame(1, 4, self.stream, headers) + frame(0, 1, self.stream, message))
        self.stream += 2


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def question(network: Network, sender: str) -> bytes:
    return write_question(
        Question(kind="status", sender=sender, receiver="bob", federation=network.federation.id,
                 config_digest=network.federation.digest())
    )  # fmt: skip


@pytest.mark.parametrize("who", ["mallory", "carol"])
def test_calls_that_nobody_reads_keep_no_other_peer_out(network, who, tmp_path):
    """Neither of a member nor of somebody with a certificate who is none."""
    connections = [Held(network, who, tmp_path) for _ in range(4)]
    for held in connections:
        for _ in range(4 * len(network.desks)):
            held.ask(ASK, question(network, who))
    time.sleep(0.5)
    for _ in range(3):
        reply = network.peers["alice"].ask("bob", Question(kind="status"), SOON_S)
        assert reply.facts["by"] == "alice"
    expected = {"mallory": Reason.WRONG_SENDER, "carol": Reason.BUSY}
    assert network.desks["bob"].sees(expected[who])
    for held in connections:
        held.socket.close()


@pytest.mark.parametrize("who", ["mallory", "alice"])
def test_the_health_service_has_nothing_to_watch(network, who):
    pair = make_certificate(network.authority, who)
    credentials = grpc.ssl_channel_credentials(
        network.authority.certificate, pair.key, pair.certificate
    )
    named = [*OPTIONS, ("grpc.ssl_target_name_override", "bob")]
    asked = health_pb2.HealthCheckRequest().SerializeToString()
    with grpc.secure_channel(network.federation.member("bob").address, credentials, named) as bob:
        watch = bob.unary_stream("/grpc.health.v1.Health/Watch")
        streams = [watch(asked, timeout=SOON_S) for _ in range(10 * OPEN_CALLS)]
        for stream in streams:
            with pytest.raises(grpc.RpcError) as caught:
                next(stream)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        check = bob.unary_unary("/grpc.health.v1.Health/Check")
        if who == "mallory":
            with pytest.raises(grpc.RpcError) as caught:
                check(asked, timeout=SOON_S)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        else:
            assert check(asked, timeout=SOON_S)
    assert network.peers["alice"].ask("bob", Question(kind="status"), SOON_S).facts


@pytest.mark.parametrize(
    ("names", "caller"),
    [
        ({"www.alice.org", "alice"}, "alice"),
        ({"bob", "alice"}, "alice"),
        ({"x", "w"}, "w|x"),
        (None, "ipv4:1"),
        (set(), "ipv4:1"),
    ],
)
def test_a_member_with_several_names_is_that_member(names, caller):
    context = SimpleNamespace(peer=lambda: "ipv4:1")
    assert caller_of(names, {"alice", "bob"}, context) == caller
