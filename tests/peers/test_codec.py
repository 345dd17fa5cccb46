"""The codec: what is written is read again, and whatever else comes is refused with a reason."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from plait.factors import VALUE, Factor, Slot
from plait.lora import Layout, Site
from plait.peers import wire_pb2 as pb
from plait.peers.codec import Ack, Answer, Identity, Message, Question, decode, encode
from plait.peers.envelope import (
    ENVELOPE_BYTES,
    Assembly,
    Begin,
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
from plait.peers.message_body import digest_of, pack, template_of, unpack
from plait.peers.refusals import Reason, Refused
from plait.wire_types import WIRE_TYPES

LAYOUT = Layout(
    (Site("encoder.0.query", 6, 4), Site("encoder.0.value", 6, 6)),
    rank=2,
    scale=2.0,
    head=(("classifier.weight", (3, 6)), ("classifier.bias", (3,))),
)
IDENTITY = Identity(
    name="bob",
    federation="fed",
    config_digest=lambda _: "c0ffee",
    layout=LAYOUT,
    max_message_bytes=1 << 20,
)
ALICE = frozenset({"alice"})


def slots(factors: Factor) -> tuple[Slot, ...]:
    """The values of some factors."""
    return tuple((VALUE, factor) for factor in LAYOUT.factors if factor in factors)


def some_factors(factors: Factor = Factor.AB) -> dict[Slot, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {slot: torch.randn(LAYOUT.size(slot[1]), generator=generator) for slot in slots(factors)}


def some_message(which: Factor = Factor.AB, **header) -> Message:
    fields = {"federation": "fed", "config_digest": "c0ffee", "sender": "alice", "round": 3}
    message = encode(some_factors(which), layout=LAYOUT, active="B", **fields)
    return addressed(message, **{"receiver": "bob"} | header)


def addressed(message: Message, **header) -> Message:
    return dataclasses.replace(message, header=dataclasses.replace(message.header, **header))


def received(message: Message) -> dict[Factor, torch.Tensor]:
    """What a transport does with a message."""
    return received_bytes(write_header(message.header, message.header.receiver), message.body)


def received_bytes(header_bytes: bytes, *pieces: bytes) -> dict[Factor, torch.Tensor]:
    header = read_header(header_bytes)
    IDENTITY.check(header, ALICE)
    IDENTITY.template(header)
    assembly = Assembly(header.num_bytes)
    for piece in pieces:
        assembly.add(piece)
    return decode(header, assembly.finish(), IDENTITY)


def reason_of(call, *args) -> Reason:
    with pytest.raises(Refused) as caught:
        call(*args)
    assert caught.value.detail
    assert len(caught.value.detail) < 500
    return caught.value.reason


# -- messages


@pytest.mark.parametrize("factors", [Factor.A, Factor.B, Factor.AB, Factor.AB | Factor.HEAD])
def test_factors_arrive_bit_for_bit(factors):
    sent, taken = some_factors(factors), received(some_message(factors))
    assert list(taken) == list(sent)
    for factor in sent:
        assert torch.equal(taken[factor], sent[factor])
        taken[factor].add_(1)  # it is the receiver's own memory


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_values_of_fewer_bits_arrive_as_they_were_rounded(wire):
    fewer = dataclasses.replace(IDENTITY, wire=wire)
    fields = {"federation": "fed", "config_digest": "c0ffee", "sender": "alice", "round": 3}
    sent, sizes = some_factors(Factor.AB | Factor.HEAD), {f: LAYOUT.sizes(f) for f in Factor}
    for kind in ("round", "state"):
        message = encode(sent, layout=LAYOUT, active="B", wire=wire, kind=kind, **fields)
        message = addressed(message, receiver="bob")
        fewer.check(message.header, ALICE)
        taken = decode(message.header, message.body, fewer)
        kind_of = WIRE_TYPES[wire if kind == "round" else "float32"]
        for slot, row in sent.items():
            assert torch.equal(taken[slot], kind_of.rounded(row, sizes[slot[1]]))
        assert message.values_digest == digest_of(taken), "as both note it in their books"
        assert message.values_bytes == sum(kind_of.num_bytes(sizes[factor]) for _, factor in sent)
        refused = reason_of(IDENTITY.check, message.header, ALICE) if kind == "round" else None
        assert refused in (None, Reason.WRONG_SHAPE)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 3e38])
def test_a_scale_that_makes_values_infinite_is_refused(scale):
    template = template_of(LAYOUT, slots(Factor.AB), "I8")
    body = bytearray(pack(some_factors(), template))
    body[-2:] = struct.pack("<f", scale)[2:]
    assert reason_of(unpack, body, template) is Reason.NOT_FINITE
    assert reason_of(unpack, body[:-2], template) is Reason.WRONG_SHAPE


def test_values_and_scales_may_lie_in_another_order():
    template = template_of(LAYOUT, slots(Factor.AB), "I8")
    body = pack(some_factors(), template)
    tensors = load(body)
    assert tensors["B/encoder.0.query"].dtype == torch.int8
    assert tensors["scales/B"].shape == (2,)
    taken, expected = (unpack(one, template) for one in (bytearray(save(tensors)), body))
    assert all(torch.equal(row, expected[slot]) for slot, row in taken.items())


def test_the_body_does_not_change_with_the_factors():
    factors = some_factors()
    body = pack(factors, template_of(LAYOUT, slots(Factor.AB)))
    before = bytes(body)
    factors[VALUE, Factor.A].zero_()
    assert body == before


def test_safetensors_reads_the_body_and_the_body_may_be_of_safetensors():
    message = some_message(Factor.AB | Factor.HEAD)
    tensors = load(message.body)
    views = LAYOUT.views(Factor.B, some_factors()[VALUE, Factor.B][None])
    assert torch.equal(tensors["B/encoder.0.value"], views["encoder.0.value"][0])
    theirs = bytearray(save(dict(reversed(tensors.items()))))
    taken = unpack(theirs, template_of(LAYOUT, slots(Factor.AB | Factor.HEAD)))
    for factor, row in some_factors(Factor.AB | Factor.HEAD).items():
        assert torch.equal(taken[factor], row)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 1}, Reason.WRONG_VERSION),
        ({"federation": "other"}, Reason.WRONG_FEDERATION),
        ({"config_digest": "bad"}, Reason.WRONG_CONFIG),
        ({"receiver": "carol"}, Reason.WRONG_RECEIVER),
        ({"sender": "carol"}, Reason.WRONG_SENDER),
        ({"layout": "0" * 16}, Reason.WRONG_SHAPE),
        ({"dtype": "BF16"}, Reason.WRONG_SHAPE),
        ({"factors": "C"}, Reason.MALFORMED),
        ({"factors": "A"}, Reason.TOO_LARGE),
        ({"factors": "A|B|HEAD"}, Reason.WRONG_SHAPE),
        ({"num_bytes": 1 << 30}, Reason.TOO_LARGE),
        ({"num_bytes": 0}, Reason.WRONG_SHAPE),
        ({"digest": bytes(32)}, Reason.WRONG_DIGEST),
        ({"federation": "x" * ENVELOPE_BYTES}, Reason.TOO_LARGE),
    ],
)
def test_a_header_that_does_not_agree_is_refused(change, reason):
    assert reason_of(received, some_message(**change)) is reason


def test_the_limit_of_the_federation_holds_below_that_of_the_template():
    tight = dataclasses.replace(IDENTITY, max_message_bytes=100)
    assert reason_of(tight.template, some_message().header) is Reason.TOO_LARGE


def test_without_certificates_the_sender_is_believed():
    IDENTITY.check(some_message(sender="carol").header, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("factor", [Factor.A, Factor.B])
def test_values_must_be_finite(bad, factor):
    factors = some_factors()
    factors[VALUE, factor][5] = bad
    template = template_of(LAYOUT, slots(Factor.AB))
    assert reason_of(unpack, bytearray(pack(factors, template)), template) is Reason.NOT_FINITE


def test_the_norm_is_bounded_when_asked_for():
    template = template_of(LAYOUT, slots(Factor.AB))
    factors = {slot: torch.ones(LAYOUT.size(slot[1])) for slot in slots(Factor.AB)}
    body = bytearray(pack(factors, template))
    norm = sum(row.numel() for row in factors.values()) ** 0.5
    assert reason_of(unpack, body, template, norm - 0.01) is Reason.NORM_TOO_LARGE
    unpack(body, template, norm + 0.01)
    huge = bytearray(pack({f: row * 3e38 for f, row in factors.items()}, template))
    assert reason_of(unpack, huge, template, 1e9) is Reason.NORM_TOO_LARGE


# -- bodies of a hostile writer


def body_with(head: object, values: bytes | None = None) -> bytearray:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    template = template_of(LAYOUT, slots(Factor.A))
    values = bytes(template.values_bytes) if values is None else values
    return bytearray(struct.pack("<Q", len(text)) + text + values)


def entries() -> dict[str, dict[str, object]]:
    body = pack(some_factors(), template_of(LAYOUT, slots(Factor.A)))
    return json.loads(body[8 : 8 + struct.unpack_from("<Q", body)[0]])


def changed(**change: object) -> dict[str, dict[str, object]]:
    head = entries()
    head["A/encoder.0.query"] |= change
    return head


HEADS = {
    "not JSON": (b"{", Reason.MALFORMED),
    "not UTF-8": (b"\xff\xfe", Reason.MALFORMED),
    "a list": ([], Reason.MALFORMED),
    "no tensors": ({}, Reason.WRONG_SHAPE),
    "one more": (entries() | {"x": {}}, Reason.WRONG_SHAPE),
    "another name": ({"x": {}, "A/encoder.0.value": {}}, Reason.WRONG_SHAPE),
    "metadata": (entries() | {"__metadata__": {}}, Reason.WRONG_SHAPE),
    "a key twice": (b'{"a":1,"a":2}', Reason.MALFORMED),
    "an entry that is none": (entries() | {"A/encoder.0.query": 3}, Reason.MALFORMED),
    "an extra field": (changed(extra=1), Reason.MALFORMED),
    "transposed": (changed(shape=[6, 2]), Reason.WRONG_SHAPE),
    "another dtype": (changed(dtype="I32"), Reason.WRONG_SHAPE),
    "overlapping": (changed(data_offsets=[48, 96]), Reason.MALFORMED),
    "negative": (changed(data_offsets=[-48, 0]), Reason.MALFORMED),
    "not numbers": (changed(data_offsets=["0", "48"]), Reason.MALFORMED),
    "fractions": (changed(data_offsets=[0.0, 48.0]), Reason.MALFORMED),
    "too short": (changed(data_offsets=[0, 44]), Reason.MALFORMED),
    "nested": (b"[" * 200, Reason.MALFORMED),
    "a long number": (b"[" + b"9" * 5000 + b"]", Reason.MALFORMED),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_hostile_head_is_refused(name):
    head, reason = HEADS[name]
    template = template_of(LAYOUT, slots(Factor.A))
    # The longest of these is longer than any that is read.
    assert reason_of(unpack, body_with(head), template) is reason


@pytest.mark.parametrize(
    "body", [b"", bytes(7), bytes(8), bytes(300), struct.pack("<Q", 1 << 63) + bytes(200)]
)
def test_a_body_of_another_size_is_refused(body):
    reason = reason_of(unpack, bytearray(body), template_of(LAYOUT, slots(Factor.A)))
    assert reason in (Reason.MALFORMED, Reason.WRONG_SHAPE)


def test_a_body_with_our_head_and_other_values_is_refused():
    template = template_of(LAYOUT, slots(Factor.A))
    body = pack(some_factors(), template)
    assert reason_of(unpack, bytearray(body[:-4]), template) is Reason.WRONG_SHAPE
    assert reason_of(unpack, bytearray(body + bytes(4)), template) is Reason.WRONG_SHAPE


# -- what surrounds a body


def test_more_or_less_than_was_declared_is_refused():
    assembly = Assembly(4)
    assembly.add(b"abc")
    assert reason_of(assembly.add, b"de") is Reason.TOO_LARGE
    assert reason_of(assembly.finish) is Reason.MALFORMED
    assert reason_of(assembly.add, b"") is Reason.MALFORMED
    assert not assembly.whole
    assembly.add(b"d")
    assert assembly.whole
    assert assembly.finish() == b"abcd"
    assert reason_of(assembly.add, b"e") is Reason.TOO_LARGE


def test_a_body_that_comes_in_one_piece_is_not_copied():
    assembly, piece = Assembly(4), b"abcd"
    assembly.add(piece)
    assert assembly.finish() is piece
    assert reason_of(assembly.add, b"e") is Reason.TOO_LARGE
    message = some_message()
    assert message.pieces[0] is message.body


def test_questions_and_answers_are_read_as_written():
    question = Question(kind="round", round=3, asker_round=2, sender="a", receiver="b")
    assert read_question(write_question(question)) == question
    assert read_answer(write_answer(Answer({"round": 3}), "b")) == Begin({"round": 3})
    assert read_answer(write_answer(Answer({}, roster="x"), "b")).roster == "x"
    message = some_message(receiver="")
    answer = write_answer(Answer({}, message), "bob", 7)
    assert read_answer(answer) == Begin({}, dataclasses.replace(message.header, receiver="bob"), 7)
    refused = Refused(Reason.NOT_HERE, "gone")
    with pytest.raises(Refused, match="gone") as caught:
        read_answer(write_refusal(refused))
    assert caught.value.reason is Reason.NOT_HERE
    assert read_ack(write_ack(refused)) == Ack(False, Reason.NOT_HERE, "gone")
    assert read_ack(write_ack(None)) == Ack(True)
    assert read_ack(pb.Ack(reason="NEW").SerializeToString()) == Ack(False, Reason.OTHER)


@pytest.mark.parametrize(
    ("have", "known", "offset"), [(0, True, 0), (8, True, 8), (8, False, 0), (1 << 60, True, 0)]
)
def test_one_who_has_the_beginning_gets_the_rest(have, known, offset):
    message = some_message()
    digest = message.header.digest if known else b"another"
    asked = Question(kind="round", have=have, have_digest=digest)
    found, pieces = message.rest(asked)
    assert (found, b"".join(pieces)) == (offset, message.body[offset:])


@pytest.mark.parametrize("facts", ["", "[]", "{", "[" * 100_000, "9" * 5000])
def test_bad_facts_are_refused(facts):
    answer = pb.Answer(ack=pb.Ack(accepted=True), facts=facts).SerializeToString()
    assert reason_of(read_answer, answer) in (Reason.MALFORMED, Reason.TOO_LARGE)


def test_a_question_for_something_else_is_refused():
    data = pb.Question(kind="secrets").SerializeToString()
    assert reason_of(read_question, data) is Reason.MALFORMED


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_random_bytes_are_read_or_refused(data):
    for read in (read_header, read_answer, read_ack, read_question):
        with contextlib.suppress(Refused):
            read(data)


@settings(max_examples=300)
@given(st.data())
def test_a_changed_message_is_refused_or_the_same(data):
    message = some_message()
    sent = [write_header(message.header, "bob"), message.body]
    which = data.draw(st.integers(0, 1))
    part = bytearray(sent[which])
    place = data.draw(st.integers(0, len(part) - 1))
    part[place] ^= data.draw(st.integers(1, 255))
    sent[which] = bytes(part)
    try:
        taken = received_bytes(*sent)
    except Refused:
        return
    for factor, row in some_factors().items():
        assert torch.equal(taken[factor], row)
