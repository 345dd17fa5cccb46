"""What the transport reaches beside raw TLS sockets: `python benchmarks/transport.py`.

Eight peers, a process each, on a ring: in a round everyone sends a message the size of
RoBERTa-large's rank-8 factors (3 MiB) to both neighbours, and the round is over when all have all.
Rounds of the two kinds alternate in blocks within one run, so that whatever else the machine does
hits both. The gRPC side does all that a peer does: encode once, hash, check, decode into tensors.
The TLS side moves bytes from buffer to buffer and answers with one byte.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import queue
import socket
import ssl
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from plait.config import Config
from plait.factors import VALUE, Factor
from plait.lora import Layout, Site
from plait.peers.audit import Book
from plait.peers.certificates import free_ports, init_federation
from plait.peers.codec import Answer, Header, Message, Question, encode
from plait.peers.federation import Federation, PeerSettings, load_federation, load_peer
from plait.peers.membership import Members
from plait.peers.refusals import Reason
from plait.peers.transport import GrpcTransport

# RoBERTa-large, query and value: 48 sites of 1024 x 1024 at rank 8, 3 MiB for A and B together.
LAYOUT = Layout(tuple(Site(f"layer.{i}", 1024, 1024) for i in range(48)), 8, 2.0)
DEADLINE_S = 30.0


class RawTls:
    """Blocking sockets, one to and one from each neighbour, and a thread for each."""

    def __init__(self, settings: PeerSettings, index: int, ports: list[int], body: bytes) -> None:
        self.body, self.index, self.ports = body, index, ports
        self.server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=settings.ca)
        self.client = ssl.create_default_context(cafile=settings.ca)
        self.server.verify_mode = ssl.CERT_REQUIRED
        for context in (self.server, self.client):
            context.load_cert_chain(settings.certificate, settings.key)
        self.listener = socket.create_server(("127.0.0.1", ports[index]))
        self.pool = ThreadPoolExecutor(4)

    def connect(self, names: tuple[str, ...]) -> None:
        neighbours = [(self.index + step) % len(names) for step in (1, -1)]
        accepted = [self.pool.submit(self._accept) for _ in neighbours]
        self.outgoing = [
            self.client.wrap_socket(
                socket.create_connection(("127.0.0.1", self.ports[j])), server_hostname=names[j]
            )
            for j in neighbours
        ]
        self.incoming = [future.result() for future in accepted]
        self.buffers = [bytearray(len(self.body)) for _ in neighbours]

    def _accept(self) -> ssl.SSLSocket:
        return self.server.wrap_socket(self.listener.accept()[0], server_side=True)

    def round(self) -> None:
        jobs = [self.pool.submit(self._send, sock) for sock in self.outgoing]
        jobs += [
            self.pool.submit(self._receive, sock, buffer)
            for sock, buffer in zip(self.incoming, self.buffers, strict=True)
        ]
        for job in jobs:
            job.result()

    def _send(self, sock: ssl.SSLSocket) -> None:
        sock.sendall(self.body)
        assert sock.recv(1) == b"1"

    def _receive(self, sock: ssl.SSLSocket, buffer: bytearray) -> None:
        view = memoryview(buffer)
        while view:
            view = view[sock.recv_into(view) :]
        sock.sendall(b"1")

    def close(self) -> None:
        for sock in (*self.outgoing, *self.incoming, self.listener):
            sock.close()
        self.pool.shutdown()


class Grpc:
    """The transport as a peer uses it, with an audit book."""

    def __init__(self, federation: Federation, settings: PeerSettings, index: int) -> None:
        self.federation, self.index = federation, index
        self.taken: queue.Queue[Header] = queue.Queue()
        self.transport = GrpcTransport(Members(federation), settings, LAYOUT, self)
        self.factors = {(VALUE, f): torch.randn(LAYOUT.size(f)) for f in (Factor.A, Factor.B)}
        self.rounds = 0
        self.pool = ThreadPoolExecutor(2)
        settings.out.mkdir(parents=True)
        self.book = Book(settings.out, None)

    def admit(self, header: Header) -> None:
        pass

    def take(self, header: Header, factors: dict[Factor, torch.Tensor]) -> None:
        self.book.note("took", factors, peer=header.sender, what="round", round=header.round)
        self.taken.put(header)

    def gave(self, asker: str, message: Message) -> None:
        pass

    def moving(self, sender: str, until: float) -> None:
        pass

    def answer(self, question: Question) -> Answer:
        return Answer({})

    def refused(self, sender: str, reason: Reason, detail: str) -> None:
        raise AssertionError(f"{sender}: {reason} {detail}")

    def round(self) -> None:
        names = self.federation.names
        message = encode(
            self.factors,
            layout=LAYOUT,
            federation=self.federation.id,
            config_digest=self.transport.identity.config_digest(0),
            sender=names[self.index],
            round=self.rounds,
            active="B",
        )
        self.rounds += 1
        jobs = [
            self.pool.submit(
                self.transport.send, names[(self.index + step) % len(names)], message, DEADLINE_S
            )
            for step in (1, -1)
        ]
        for job in jobs:
            ack = job.result()
            assert ack.accepted, ack
            self.book.note("sent", message, peer="neighbour", what="round", round=self.rounds)
        for _ in jobs:
            self.taken.get(timeout=DEADLINE_S)

    def close(self) -> None:
        self.transport.stop(0.5)
        self.book.close()
        self.pool.shutdown()


def worker(index, path, ports, blocks, rounds, barrier, results) -> None:
    torch.set_num_threads(1)
    federation = load_federation(path)
    settings = load_peer(path, federation.names[index])
    grpc = Grpc(federation, settings, index)
    grpc.transport.start()
    body = torch.randn(LAYOUT.size(Factor.A) + LAYOUT.size(Factor.B)).numpy().tobytes()
    raw = RawTls(settings, index, ports, body)
    barrier.wait()
    raw.connect(federation.names)
    kinds = {"raw TLS": raw, "gRPC mTLS": grpc}
    for kind in kinds.values():  # warm up
        for _ in range(3):
            kind.round()
    for _ in range(blocks):
        for name, kind in kinds.items():
            for _ in range(rounds):
                barrier.wait()
                begin, cpu = time.perf_counter(), time.process_time()
                kind.round()
                results.put((name, index, time.perf_counter() - begin, time.process_time() - cpu))
    barrier.wait()
    raw.close()
    grpc.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5, help="of each kind in a block")
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    given = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(given.peers), spawn.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        names = [f"p{i}" for i in range(given.peers)]
        path = init_federation(Path(folder) / "ring", names, Config(topology="ring"))
        fixed = (path, free_ports(given.peers), given.blocks, given.rounds, barrier, results)
        workers = [spawn.Process(target=worker, args=(i, *fixed)) for i in range(given.peers)]
        collected: list[tuple[str, int, float, float]] = []
        expected = given.peers * given.blocks * given.rounds * 2
        reader = threading.Thread(
            target=lambda: collected.extend(results.get() for _ in range(expected)), daemon=True
        )
        for one in workers:
            one.start()
        reader.start()
        for one in workers:
            one.join()
        assert not any(one.exitcode for one in workers), "a peer failed"
        reader.join(10)
    figures = report(collected, given)
    if given.out:
        given.out.write_text(json.dumps(figures, indent=2) + "\n")


def report(collected: list[tuple[str, int, float, float]], given: argparse.Namespace) -> dict:
    """Print the figures, and return them."""
    values_bytes = 4 * (LAYOUT.size(Factor.A) + LAYOUT.size(Factor.B))
    moved = values_bytes * 2 * given.peers
    print(f"{given.peers} peers on a ring, {values_bytes / 2**20:.1f} MiB to each neighbour,")
    print(f"{given.blocks} blocks of {given.rounds} rounds of each kind, interleaved")
    medians: dict[str, list[float]] = {}
    figures: dict = {
        "peers": given.peers, "blocks": given.blocks, "rounds_in_a_block": given.rounds,
        "message_bytes": values_bytes, "cores": os.cpu_count(), "machine": platform.platform(),
    }  # fmt: skip
    for name in ("raw TLS", "gRPC mTLS"):
        # A round is as long as its slowest peer takes.
        per_peer = [
            [s for n, i, s, _ in collected if (n, i) == (name, p)] for p in range(given.peers)
        ]
        seconds = [max(times) for times in zip(*per_peer, strict=True)]
        cpu = sum(c for n, _, _, c in collected if n == name)
        size = given.rounds
        blocks = [statistics.median(seconds[i : i + size]) for i in range(0, len(seconds), size)]
        medians[name] = [moved / block / 1e6 for block in blocks]
        median = statistics.median(seconds)
        figures[name] = {
            "mb_per_s": moved / median / 1e6,
            "round_ms": 1e3 * median,
            "cpu_s_per_gib": cpu / (moved * len(seconds) / 2**30),
        }
        print(
            f"{name:>10}: {moved / median / 1e6:6.0f} MB/s  round {1e3 * median:5.1f} ms  "
            f"cpu {cpu / (moved * len(seconds) / 2**30):4.2f} s/GiB"
        )
    ratios = [g / r for g, r in zip(medians["gRPC mTLS"], medians["raw TLS"], strict=True)]
    print(
        f"gRPC / raw TLS by block: median {statistics.median(ratios):.2f}, "
        f"from {min(ratios):.2f} to {max(ratios):.2f}; the target is 0.70"
    )
    return figures | {"ratio": statistics.median(ratios), "ratio_by_block": ratios}


if __name__ == "__main__":
    main()
