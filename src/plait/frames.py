"""Messages as the frames of a stream, in the format of `wire.proto`, and back.

Nothing here does I/O: a transport feeds in the frames that come and sends the ones given out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeVar, cast

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto

from plait import wire_pb2 as pb
from plait.chunks import BODY_TAG, CHUNK_BYTES, read_chunk
from plait.codec import Ack, Answer, Header, Message, Question
from plait.refusal import Reason, Refused

ENVELOPE_BYTES = 1 << 12
"""The most that a header may have."""
FACTS_BYTES = 1 << 16
"""The most that the facts of an answer may have."""
FRAME_BYTES = CHUNK_BYTES + ENVELOPE_BYTES + FACTS_BYTES
"""The most that any frame has: gRPC itself refuses a larger one without buffering it."""

P = TypeVar("P", bound=Proto)


class Assembly:
    """The body of a message while it comes in; never more than its header declared."""

    def __init__(self, num_bytes: int) -> None:
        self._body = bytearray(num_bytes)
        self._filled = 0

    @property
    def whole(self) -> bool:
        """Whether all of it has come."""
        return self._filled == len(self._body)

    def add(self, frame: bytes) -> None:
        """Take the next frame.

        Raises:
            Refused: It is not a piece of a body, or more than was declared.
        """
        chunk = read_frame(frame)
        if not isinstance(chunk, memoryview) or not chunk:
            raise Refused(Reason.MALFORMED, "expected a piece of the body")
        end = self._filled + len(chunk)
        if end > len(self._body):
            raise Refused(Reason.TOO_LARGE, f"more than the {len(self._body)} bytes declared")
        self._body[self._filled : end] = chunk
        self._filled = end

    def finish(self) -> bytearray:
        """The body.

        Raises:
            Refused: The stream ended before it was whole.
        """
        if not self.whole:
            raise Refused(Reason.MALFORMED, f"cut off after {self._filled} bytes")
        return self._body


def frames(message: Message, receiver: str) -> Iterator[bytes]:
    """A message to one receiver as frames: the header, then the body in chunks."""
    fields = {**vars(message.header), "receiver": receiver}
    yield pb.Frame(header=pb.Header(**fields)).SerializeToString()
    yield from message.chunks


def read_frame(frame: bytes) -> Header | Answer | Ack | memoryview:
    """What a frame holds; an answer that is a refusal as its `Ack`.

    Raises:
        Refused: It holds none of these.
    """
    if frame[:1] == BODY_TAG:
        return read_chunk(frame)
    content = _parsed(pb.Frame, frame, ENVELOPE_BYTES + FACTS_BYTES)
    kind = content.WhichOneof("content")
    if kind == "header" and len(frame) <= ENVELOPE_BYTES:
        return Header(**_fields(content.header))
    if kind == "answer":
        ack = _ack(content.answer.ack)
        return Answer(_facts(content.answer.facts)) if ack.accepted else ack
    raise Refused(Reason.MALFORMED, "a frame that is no header, body or answer")


def answer_frame(answer: Answer | Refused) -> bytes:
    """The first frame of an answer."""
    if isinstance(answer, Refused):
        ack = pb.Ack(reason=answer.reason.name, detail=answer.detail[:1000])
        return pb.Frame(answer=pb.Answer(ack=ack)).SerializeToString()
    facts = json.dumps(answer.facts)
    assert len(facts) <= FACTS_BYTES, "facts are a few words, not data"
    return pb.Frame(answer=pb.Answer(ack=pb.Ack(accepted=True), facts=facts)).SerializeToString()


def write_question(question: Question) -> bytes:
    """A question as bytes."""
    return pb.Question(**vars(question)).SerializeToString()


def read_question(data: bytes) -> Question:
    """The question of `write_question`.

    Raises:
        Refused: It is none.
    """
    values = _fields(_parsed(pb.Question, data, ENVELOPE_BYTES))
    if values["kind"] not in ("status", "round", "state"):
        raise Refused(Reason.MALFORMED, f"a question for {values['kind']!r:.80}")
    return Question(**values)


def write_ack(refused: Refused | None) -> bytes:
    """The acknowledgement of a message: taken, or refused."""
    if refused is None:
        return pb.Ack(accepted=True).SerializeToString()
    return pb.Ack(reason=refused.reason.name, detail=refused.detail[:1000]).SerializeToString()


def read_ack(data: bytes) -> Ack:
    """The acknowledgement of `write_ack`.

    Raises:
        Refused: It is none.
    """
    return _ack(_parsed(pb.Ack, data, ENVELOPE_BYTES))


def _ack(ack: pb.Ack) -> Ack:
    if ack.accepted:
        return Ack(True)
    known = ack.reason in Reason.__members__
    reason = Reason[ack.reason] if known else Reason.OTHER
    return Ack(False, reason, ack.detail)


def _parsed(kind: type[P], data: bytes, most_bytes: int) -> P:
    if len(data) > most_bytes:
        raise Refused(Reason.TOO_LARGE, f"{len(data)} bytes; at most {most_bytes} are taken")
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise Refused(Reason.MALFORMED, f"not a {kind.__name__}: {error}") from None


def _fields(message: Proto) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.DESCRIPTOR.fields_by_name}


def _facts(text: str) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(Reason.MALFORMED, f"the facts are not JSON: {error!s:.100}") from None
    if not isinstance(facts, dict):
        raise Refused(Reason.MALFORMED, "the facts are not a JSON object")
    return cast("dict[str, Any]", facts)
