"""What surrounds a body, in the format of `wire.proto`: written, and read with distrust.

Nothing here does I/O: a transport feeds in what comes and sends what is given out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto

from plait.peers import wire_pb2 as pb
from plait.peers.codec import Ack, Answer, Header, Question
from plait.peers.facts import read_facts
from plait.peers.refusals import MOST_DETAIL, Reason, Refused, plain
from plait.peers.roster import MOST_BYTES

ENVELOPE_BYTES = 1 << 12
"""The most that a header, a question or an acknowledgement may have."""
FACTS_BYTES = 1 << 16
"""The most that the facts of an answer may have."""

P = TypeVar("P", bound=Proto)


class Assembly:
    """The body of a message while it comes in; never more than its header declared."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._body: bytes | bytearray = bytearray()

    @property
    def num_bytes(self) -> int:
        """How many have come."""
        return len(self._body)

    @property
    def whole(self) -> bool:
        """Whether all of it has come."""
        return len(self._body) == self._num_bytes

    def add(self, piece: bytes) -> None:
        """Take the next piece.

        Raises:
            Refused: It is empty, or more than was declared.
        """
        if not piece:
            raise Refused(Reason.MALFORMED, "an empty piece of the body")
        if len(self._body) + len(piece) > self._num_bytes:
            raise Refused(Reason.TOO_LARGE, f"more than the {self._num_bytes} bytes declared")
        if len(piece) == self._num_bytes:
            self._body = piece  # most do come in one, which needs no copy
        else:
            self._body += piece

    def finish(self) -> bytes | bytearray:
        """The body.

        Raises:
            Refused: The stream ended before it was whole.
        """
        if not self.whole:
            raise Refused(Reason.MALFORMED, f"cut off after {len(self._body)} bytes")
        return self._body


def write_header(header: Header, receiver: str) -> bytes:
    """A header to one receiver."""
    return _header(header, receiver).SerializeToString()


def read_header(data: bytes) -> Header:
    """The header of `write_header`.

    Raises:
        Refused: It is none.
    """
    if not data:
        raise Refused(Reason.MALFORMED, "a message without a header")
    return Header(**_fields(_parsed(pb.Header, data, ENVELOPE_BYTES)))


def write_answer(answer: Answer, receiver: str, offset: int = 0) -> bytes:
    """An answer, with the header of its message if it has one; its pieces begin at `offset`."""
    facts = json.dumps(answer.facts)
    assert len(facts) <= FACTS_BYTES, "facts are a few words, not data"
    header = _header(answer.message.header, receiver) if answer.message else None
    taken = pb.Ack(accepted=True)
    return pb.Answer(
        ack=taken, facts=facts, header=header, offset=offset, roster=answer.roster
    ).SerializeToString()


def write_refusal(refused: Refused) -> bytes:
    """The answer to a question that is refused."""
    return pb.Answer(ack=_refusal(refused)).SerializeToString()


@dataclass(frozen=True)
class Begin:
    """What an answer begins with.

    Attributes:
        facts: A few words and numbers.
        header: Of the message that follows, if one does.
        offset: Where in its body the pieces begin.
        roster: The text of a list of members, if that was asked for.
    """

    facts: dict[str, Any]
    header: Header | None = None
    offset: int = 0
    roster: str = ""


def read_answer(data: bytes) -> Begin:
    """What an answer begins with.

    Raises:
        Refused: The question was, or this is no answer.
    """
    answer = _parsed(pb.Answer, data, ENVELOPE_BYTES + FACTS_BYTES + MOST_BYTES)
    ack = _ack(answer.ack)
    if not ack.accepted:
        raise Refused(ack.reason or Reason.OTHER, ack.detail)
    header = Header(**_fields(answer.header)) if answer.HasField("header") else None
    return Begin(read_facts(answer.facts), header, answer.offset, answer.roster)


def write_question(question: Question) -> bytes:
    """A question as bytes."""
    return pb.Question(**vars(question)).SerializeToString()


def read_question(data: bytes) -> Question:
    """The question of `write_question`.

    Raises:
        Refused: It is none.
    """
    values = _fields(_parsed(pb.Question, data, ENVELOPE_BYTES))
    if values["kind"] not in ("status", "round", "state", "settings", "members"):
        raise Refused(Reason.MALFORMED, f"a question for {values['kind']!r:.80}")
    return Question(**values)


def write_ack(refused: Refused | None) -> bytes:
    """The acknowledgement of a message: taken, or refused."""
    return (_refusal(refused) if refused else pb.Ack(accepted=True)).SerializeToString()


def read_ack(data: bytes) -> Ack:
    """The acknowledgement of `write_ack`.

    Raises:
        Refused: It is none.
    """
    return _ack(_parsed(pb.Ack, data, ENVELOPE_BYTES))


def _header(header: Header, receiver: str) -> pb.Header:
    return pb.Header(**{**vars(header), "receiver": receiver})


def _refusal(refused: Refused) -> pb.Ack:
    return pb.Ack(reason=refused.reason.name, detail=refused.detail)


def _ack(ack: pb.Ack) -> Ack:
    if ack.accepted:
        return Ack(True)
    known = ack.reason in Reason.__members__
    reason = Reason[ack.reason] if known else Reason.OTHER
    return Ack(False, reason, plain(ack.detail, MOST_DETAIL))


def _parsed(kind: type[P], data: bytes, most_bytes: int) -> P:
    if len(data) > most_bytes:
        raise Refused(Reason.TOO_LARGE, f"{len(data)} bytes; at most {most_bytes} are taken")
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise Refused(Reason.MALFORMED, f"not a {kind.__name__}: {error}") from None


def _fields(message: Proto) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.DESCRIPTOR.fields_by_name}
