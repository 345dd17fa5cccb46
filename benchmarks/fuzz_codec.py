"""A million bad inputs for the decoder: `make fuzz`.

Random bytes, and valid messages with bits flipped, pieces cut out, doubled or exchanged, and
numbers set to extremes, go through all that a transport does with what comes. Anything but a
decoded message or a refusal is a failure, so is a message with values that were not sent, a slow
input, and memory that grows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import resource
import struct
import time
from collections import Counter
from functools import partial

import torch
from cryptography import x509
from xxhash import xxh3_128

from plait.factors import VALUE, Factor
from plait.lora import Layout, Site
from plait.peers.audit_lines import START, hash_of, read_chain
from plait.peers.certificates import make_authority, make_certificate
from plait.peers.changes import whole_of
from plait.peers.codec import Answer, Identity, Question, decode, encode
from plait.peers.envelope import (
    Assembly,
    read_ack,
    read_answer,
    read_header,
    read_question,
    write_ack,
    write_answer,
    write_header,
    write_question,
    write_refusal,
)
from plait.peers.federation import Member
from plait.peers.message_body import pack, template_of, unpack
from plait.peers.refusals import Reason, Refused
from plait.peers.roster import Roster, Trust, after, read_roster, sign, signers, write_roster
from plait.wire_types import wire_type

LAYOUT = Layout((Site("layer.0", 6, 4), Site("layer.1", 6, 6)), rank=2, scale=2.0)
IDENTITY = Identity(
    name="bob",
    federation="fed",
    config_digest=lambda _: "c0ffee",
    layout=LAYOUT,
    max_message_bytes=1 << 16,
)
TEMPLATE = template_of(LAYOUT, tuple((VALUE, factor) for factor in Factor.AB))
FACTORS = {
    (VALUE, factor): torch.randn(
        LAYOUT.size(factor), generator=torch.Generator().manual_seed(factor.value)
    )
    for factor in Factor.AB
}
BEFORE = {slot: row + (torch.arange(len(row)) % 5 == 0) for slot, row in FACTORS.items()}
"""What alice sent before: a fifth of it has changed."""
SPARSE = dataclasses.replace(IDENTITY, wire="top-k:0.2")
SLOW_S = 1.0
EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes with one to four changes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        to = min(len(out), at + rng.randint(1, 16))
        kind = rng.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at:to] = rng.randbytes(rng.randint(0, 16))
        elif kind == 2:
            del out[at:to]
        elif kind == 3:
            out[at:at] = out[at:to]
        elif kind == 4:
            out[at : at + 8] = struct.pack("<Q", rng.choice(EXTREMES))
        elif kind == 5:
            out[at : at + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), 1e38]))
        elif kind == 6:
            del out[at:]
    return bytes(out)


def receive(header_bytes: bytes, pieces: list[bytes]) -> dict[Factor, torch.Tensor]:
    """What a transport does with a message."""
    header = read_header(header_bytes)
    IDENTITY.check(header, frozenset({"alice"}))
    IDENTITY.template(header)
    assembly = Assembly(header.num_bytes)
    for piece in pieces:
        assembly.add(piece)
    return decode(header, assembly.finish(), IDENTITY)


WRITTEN = partial(
    encode,
    FACTORS,
    layout=LAYOUT,
    federation="fed",
    config_digest="c0ffee",
    sender="alice",
    round=3,
    active="B",
)
MESSAGE = WRITTEN()
CHANGE = WRITTEN(wire=SPARSE.wire, before=BEFORE).change
assert CHANGE
HEADER = write_header(MESSAGE.header, "bob")
PIECES = [MESSAGE.body[start : start + 300] for start in range(0, len(MESSAGE.body), 300)]
BODY = pack(FACTORS, TEMPLATE)
AUTHORITY = make_authority("fed")
FIRST = Roster(
    federation="fed", version=1, from_round=0, follows="",
    peers=tuple(Member(name=name, address=f"{name}:7600") for name in ("alice", "bob")),
)  # fmt: skip
PAIR = make_certificate(AUTHORITY, "alice")
LIST = sign(after(FIRST, 9, leave=["bob"]), "alice", PAIR.certificate, PAIR.key)
TRUST = Trust(x509.load_pem_x509_certificates(AUTHORITY.certificate))
SMALL = [
    (read_header, HEADER),
    (read_answer, write_answer(Answer({"round": 3, "absent": [1, 2]}), "bob")),
    (read_answer, write_answer(Answer({"round": 3}, MESSAGE), "bob")),
    (read_answer, write_refusal(Refused(Reason.NOT_HERE, "gone"))),
    (read_ack, write_ack(Refused(Reason.NOT_HERE, "gone"))),
    (read_question, write_question(Question(kind="round", round=3, sender="alice"))),
    (read_answer, write_answer(Answer({}, roster=write_roster(LIST)), "bob")),
    (read_question, write_question(Question(kind="members", members=1, sender="alice"))),
]


def changed_pieces(rng: random.Random) -> None:
    """A message with a part or two changed: the digest must catch what nothing before did."""
    parts = [HEADER, *PIECES]
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(parts))
        parts[at] = mutated(parts[at], rng)
    header, *pieces = parts
    if rng.random() < 0.1:
        rng.shuffle(pieces)
    taken = receive(header, pieces)
    assert all(torch.equal(taken[factor], row) for factor, row in FACTORS.items())


def changed_body(rng: random.Random) -> None:
    """A body with changes of which its sender made the digest: nothing but the checks is left."""
    taken = unpack(bytearray(mutated(BODY, rng)), TEMPLATE)
    for factor, row in taken.items():
        assert row.shape == FACTORS[factor].shape
        assert bool(torch.isfinite(row).all())


def resent_body(rng: random.Random) -> None:
    """The same, with a header that fits."""
    body = mutated(BODY, rng)
    header = dataclasses.replace(MESSAGE.header, num_bytes=len(body), receiver="bob")
    receive(write_header(header, "bob"), [body])


def changed_change(rng: random.Random) -> None:
    """What changed, changed: only what was sent comes of it."""
    header = read_header(write_header(CHANGE.header, "bob"))
    body = mutated(CHANGE.body, rng)
    taken = decode(dataclasses.replace(header, num_bytes=len(body)), body, SPARSE, BEFORE)
    assert all(torch.equal(taken[slot], row) for slot, row in FACTORS.items())


def made_up_change(rng: random.Random) -> None:
    """The same with the digest of what would come of it: nothing but the checks is left."""
    body = bytearray(mutated(CHANGE.body, rng))[: len(CHANGE.body)]
    body += bytes(len(CHANGE.body) - len(body))
    whole = whole_of(body, BEFORE, TEMPLATE, wire_type(SPARSE.wire))
    header = dataclasses.replace(CHANGE.header, digest=xxh3_128(whole).digest(), receiver="bob")
    for row in decode(header, body, SPARSE, BEFORE).values():
        assert bool(torch.isfinite(row).all())


def a_book() -> bytes:
    """An audit book of a few lines."""
    lines, before = [], START
    row = {"peer": "alice", "what": "round", "round": 3, "digest": "a" * 64}
    for kind, facts in (
        ("started", {"by": "bob", "federation": "f", "config": "c", "round": 0, "keep": 8}),
        ("took", row),
        ("mixed", {"round": 3, "peers": ["alice"]}),
        ("refused", {"peer": "alice", "reason": "REPLAY", "round": 3, "detail": "twice"}),
    ):
        line = json.dumps({"n": len(lines), "before": before, "kind": kind, **facts}).encode()
        lines.append(line + b"\n")
        before = hash_of(line)
    return b"".join(lines)


BOOK = a_book()


def changed_book(rng: random.Random) -> None:
    """An audit book with changes: all are found but those of the last line."""
    data = mutated(BOOK, rng) if rng.random() < 0.9 else rng.randbytes(rng.randint(0, 200))
    chain = read_chain(data)
    sure = BOOK.splitlines(keepends=True)[: max(0, len(chain.lines) - 1)]
    assert data.startswith(b"".join(sure))
    assert chain.wrong or chain.size == len(data)


def changed_list(rng: random.Random) -> None:
    """A signed list of members with changes: who signed it has signed this."""
    text = mutated(write_roster(LIST).encode(), rng).decode(errors="replace")
    try:
        roster = read_roster(text)
    except ValueError as error:
        raise Refused(Reason.MALFORMED, str(error)) from error
    signed, _ = signers(FIRST, roster, TRUST)
    assert not signed or roster.signed == LIST.signed


def random_bytes(rng: random.Random) -> None:
    """Noise, for every reader."""
    data = rng.randbytes(rng.randint(0, 200))
    for read in (read_header, read_answer, read_ack, read_question):
        try:
            read(data)
        except Refused:
            continue
    unpack(bytearray(data), TEMPLATE)


def changed_small(rng: random.Random) -> None:
    """Headers, answers, acknowledgements and questions with changes."""
    read, data = rng.choice(SMALL)
    read(mutated(data, rng))


KINDS = (
    changed_pieces, changed_body, resent_body, random_bytes, changed_small, changed_book,
    changed_list, changed_change, made_up_change,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    assert all(torch.equal(receive(HEADER, PIECES)[factor], row) for factor, row in FACTORS.items())
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    begin, settled = time.perf_counter(), 0
    for number in range(given.inputs):
        started = time.perf_counter()
        try:
            KINDS[number % len(KINDS)](rng)
            outcomes["read"] += 1
        except Refused as refused:
            outcomes[refused.reason.value] += 1
        slowest = max(slowest, time.perf_counter() - started)
        if number == given.inputs // 10:
            settled = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - settled
    for reason, count in outcomes.most_common():
        print(f"{count:>9} {reason}")
    assert slowest < SLOW_S, f"an input took {slowest:.2f} s"
    assert grown < 32 << 10, f"memory grew by {grown >> 10} MiB"
    print(
        f"{given.inputs} inputs in {time.perf_counter() - begin:.0f} s: no crash; the slowest took "
        f"{1e3 * slowest:.1f} ms; memory grew by {grown / 1024:.1f} MiB after the first tenth"
    )


if __name__ == "__main__":
    main()
