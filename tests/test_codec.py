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

from plait import wire_pb2 as pb
from plait.body import pack, template_of, unpack
from plait.chunks import read_chunk, write_chunks
from plait.codec import Ack, Answer, Header, Identity, Message, Question, decode, encode
from plait.frames import (
    ENVELOPE_BYTES,
    Assembly,
    answer_frame,
    frames,
    read_ack,
    read_frame,
    read_question,
    write_ack,
    write_question,
)
from plait.lora import Layout, Site
from plait.methods import Factor
from plait.refusal import Reason, Refused

LAYOUT = Layout(
    (Site("encoder.0.query", 6, 4), Site("encoder.0.value", 6, 6)),
    rank=2,
    scale=2.0,
    head=(("classifier.weight", (3, 6)), ("classifier.bias", (3,))),
)
IDENTITY = Identity(
    name="bob", federation="fed", config_digest="c0ffee", layout=LAYOUT, max_message_bytes=1 << 20
)
ALICE = frozenset({"alice"})


def some_factors(factors: Factor = Factor.AB) -> dict[Factor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        factor: torch.randn(LAYOUT.size(factor), generator=generator)
        for factor in LAYOUT.factors
        if factor in factors
    }


def some_message(which: Factor = Factor.AB, **header) -> Message:
    fields = {"federation": "fed", "config_digest": "c0ffee", "sender": "alice", "round": 3}
    message = encode(some_factors(which), layout=LAYOUT, active="B", **fields)
    return Message(
        dataclasses.replace(message.header, **({"receiver": "bob"} | header)), message.body
    )


def received(message: Message) -> dict[Factor, torch.Tensor]:
    """What a transport does with a message."""
    first, *rest = frames(message, message.header.receiver)
    header = read_frame(first)
    assert isinstance(header, Header)
    IDENTITY.check(header, ALICE)
    IDENTITY.template(header)
    assembly = Assembly(header.num_bytes)
    for frame in rest:
        assembly.add(frame)
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


def test_the_body_does_not_change_with_the_factors():
    factors = some_factors()
    body = pack(factors, template_of(LAYOUT, Factor.AB))
    before = bytes(body)
    factors[Factor.A].zero_()
    assert body == before


def test_safetensors_reads_the_body_and_the_body_may_be_of_safetensors():
    message = some_message(Factor.AB | Factor.HEAD)
    tensors = load(message.body)
    views = LAYOUT.views(Factor.B, some_factors()[Factor.B][None])
    assert torch.equal(tensors["B/encoder.0.value"], views["encoder.0.value"][0])
    theirs = bytearray(save(dict(reversed(tensors.items()))))
    taken = unpack(theirs, template_of(LAYOUT, Factor.AB | Factor.HEAD))
    for factor, row in some_factors(Factor.AB | Factor.HEAD).items():
        assert torch.equal(taken[factor], row)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 2}, Reason.WRONG_VERSION),
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
        ({"federation": "x" * ENVELOPE_BYTES}, Reason.MALFORMED),
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
    factors[factor][5] = bad
    template = template_of(LAYOUT, Factor.AB)
    assert reason_of(unpack, bytearray(pack(factors, template)), template) is Reason.NOT_FINITE


def test_the_norm_is_bounded_when_asked_for():
    template = template_of(LAYOUT, Factor.AB)
    factors = {factor: torch.ones(LAYOUT.size(factor)) for factor in (Factor.A, Factor.B)}
    body = bytearray(pack(factors, template))
    norm = sum(row.numel() for row in factors.values()) ** 0.5
    assert reason_of(unpack, body, template, norm - 0.01) is Reason.NORM_TOO_LARGE
    unpack(body, template, norm + 0.01)
    huge = bytearray(pack({f: row * 3e38 for f, row in factors.items()}, template))
    assert reason_of(unpack, huge, template, 1e9) is Reason.NORM_TOO_LARGE


# -- bodies of a hostile writer


def body_with(head: object, values: bytes | None = None) -> bytearray:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    template = template_of(LAYOUT, Factor.A)
    values = bytes(template.values_bytes) if values is None else values
    return bytearray(struct.pack("<Q", len(text)) + text + values)


def entries() -> dict[str, dict[str, object]]:
    body = pack(some_factors(), template_of(LAYOUT, Factor.A))
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
    template = template_of(LAYOUT, Factor.A)
    # The longest of these is longer than any that is read.
    assert reason_of(unpack, body_with(head), template) is reason


@pytest.mark.parametrize(
    "body", [b"", bytes(7), bytes(8), bytes(300), struct.pack("<Q", 1 << 63) + bytes(200)]
)
def test_a_body_of_another_size_is_refused(body):
    reason = reason_of(unpack, bytearray(body), template_of(LAYOUT, Factor.A))
    assert reason in (Reason.MALFORMED, Reason.WRONG_SHAPE)


def test_a_body_with_our_head_and_other_values_is_refused():
    template = template_of(LAYOUT, Factor.A)
    body = pack(some_factors(), template)
    assert reason_of(unpack, bytearray(body[:-4]), template) is Reason.WRONG_SHAPE
    assert reason_of(unpack, bytearray(body + bytes(4)), template) is Reason.WRONG_SHAPE


# -- frames


@given(st.binary(max_size=5000), st.integers(1, 700))
def test_chunks_are_protobuf(body, chunk_bytes):
    chunks = write_chunks(body, chunk_bytes)
    assert b"".join(pb.Frame.FromString(chunk).body for chunk in chunks) == body
    assert b"".join(read_chunk(chunk) for chunk in chunks) == body
    assert all(pb.Frame(body=read_chunk(c).tobytes()).SerializeToString() == c for c in chunks)


def test_more_or_less_than_was_declared_is_refused():
    assembly = Assembly(4)
    assembly.add(write_chunks(b"abc")[0])
    assert reason_of(assembly.add, write_chunks(b"de")[0]) is Reason.TOO_LARGE
    assert reason_of(assembly.finish) is Reason.MALFORMED
    assert reason_of(assembly.add, b"") is Reason.MALFORMED
    assert reason_of(assembly.add, b"\x12\x00") is Reason.MALFORMED
    assert reason_of(assembly.add, answer_frame(Answer({}))) is Reason.MALFORMED
    assembly.add(write_chunks(b"d")[0])
    assert assembly.finish() == b"abcd"


def test_questions_and_answers_are_read_as_written():
    question = Question(kind="round", round=3, asker_round=2, sender="a", receiver="b")
    assert read_question(write_question(question)) == question
    assert read_frame(answer_frame(Answer({"round": 3}))) == Answer({"round": 3})
    refused = Refused(Reason.NOT_HERE, "gone")
    assert read_frame(answer_frame(refused)) == Ack(False, Reason.NOT_HERE, "gone")
    assert read_ack(write_ack(refused)) == Ack(False, Reason.NOT_HERE, "gone")
    assert read_ack(write_ack(None)) == Ack(True)
    assert read_ack(pb.Ack(reason="NEW").SerializeToString()) == Ack(False, Reason.OTHER)


@pytest.mark.parametrize("facts", ["", "[]", "{", "[" * 100_000, "9" * 5000])
def test_bad_facts_are_refused(facts):
    answer = pb.Answer(ack=pb.Ack(accepted=True), facts=facts)
    frame = pb.Frame(answer=answer).SerializeToString()
    assert reason_of(read_frame, frame) in (Reason.MALFORMED, Reason.TOO_LARGE)


def test_a_question_for_something_else_is_refused():
    data = pb.Question(kind="secrets").SerializeToString()
    assert reason_of(read_question, data) is Reason.MALFORMED


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_random_bytes_are_read_or_refused(data):
    for read in (read_frame, read_ack, read_question):
        with contextlib.suppress(Refused):
            read(data)


@settings(max_examples=300)
@given(st.data())
def test_a_changed_message_is_refused_or_the_same(data):
    message = some_message()
    stream = list(frames(message, "bob"))
    which = data.draw(st.integers(0, len(stream) - 1))
    frame = bytearray(stream[which])
    place = data.draw(st.integers(0, len(frame) - 1))
    frame[place] ^= data.draw(st.integers(1, 255))
    stream[which] = bytes(frame)
    try:
        header = read_frame(stream[0])
        if not isinstance(header, Header):
            return
        IDENTITY.check(header, ALICE)
        assembly = Assembly(header.num_bytes if header.num_bytes < 1 << 20 else 0)
        IDENTITY.template(header)
        for one in stream[1:]:
            assembly.add(one)
        taken = decode(header, assembly.finish(), IDENTITY)
    except Refused:
        return
    for factor, row in some_factors().items():
        assert torch.equal(taken[factor], row)
