"""What travels between peers: a typed header, and factors that are checked before use.

Nothing here does I/O; envelope.py turns it into bytes and back, and transport.py carries those. A
message is refused (`Refused`, with the reason) as early as can be:
by its header, before a byte of its body is taken; by its size, before memory is set aside; by the
names and shapes of its tensors, before one is made; by its values, before one is given out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import combinations
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor
from xxhash import xxh3_128

from plait.factors import VALUE, Slot, slots_name
from plait.lora import Layout
from plait.peers.changes import Rows, change_bytes, pack_change, whole_of
from plait.peers.message_body import Template, digest_of, pack, template_of, unpack
from plait.peers.refusals import Reason, Refused
from plait.wire_types import wire_type

NO_ROWS: Rows = MappingProxyType({})
VERSION = 2
PIECE_BYTES = 1 << 22
"""Bodies travel in pieces of this size: larger ones cost less time, smaller ones less memory."""
SMALL_PIECE_BYTES = 1 << 16
"""The same for what is asked for: what has come of it need not come again."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a message says of itself.

    Attributes:
        federation: The federation's id.
        kind: Slots of a `round`, of which a `change` has what isn't as in the sender's last, or all
            of a peer's `state` that ever travel.
        round: The round of the slots; for a state, how many rounds are behind it.
        active: The factors that trained in the round, such as `B`.
        factors: The slots in the body, such as `AB`.
        config_digest: Of the settings that all peers share.
        layout: Digest of the names and shapes of a client's tensors.
        sender: The sender's name, which its certificate must have too.
        receiver: The receiver's name.
        dtype: Of the values.
        num_bytes: Of the body.
        digest: XXH3 of the whole body, 128 bits; of a change that of the round's. It tells a body
            from another by accident; that nobody changed it on the way is TLS's promise.
        version: Of the protocol.
    """

    federation: str
    kind: str
    round: int
    active: str
    factors: str
    config_digest: str
    layout: str
    sender: str
    receiver: str
    num_bytes: int
    digest: bytes
    dtype: str = "F32"
    version: int = VERSION

    @property
    def about(self) -> int:
        """The round that it is about."""
        return self.round


@dataclass(frozen=True)
class Message:
    """A header and its body, as a template has it. One body serves many receivers.

    A round's may have a `change`, a message for those who have the one before.
    """

    header: Header
    body: bytes = field(repr=False)
    template: Template = field(repr=False)
    change: Message | None = field(default=None, repr=False)

    @property
    def values_bytes(self) -> int:
        """Bytes of the values and their scales, without the head that says where they lie."""
        return min(len(self.body), self.template.values_bytes)

    @cached_property
    def values_digest(self) -> str:
        """The SHA-256 of the values, as `digest_of` has it of rows; computed once."""
        values = memoryview(self.body)[-self.values_bytes :]
        return digest_of(dict(self.template.rows(values)))

    @cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """The body as it travels, cut once for all receivers."""
        starts = range(0, len(self.body), PIECE_BYTES)
        return tuple(self.body[start : start + PIECE_BYTES] for start in starts)

    def rest(self, question: Question) -> tuple[int, Iterator[bytes]]:
        """What one needs who asks, and may have the beginning: (offset, the pieces from there).

        Of a link on which a transfer broke off larger pieces would not get through.
        """
        known = question.have_digest == self.header.digest and question.have < len(self.body)
        offset = question.have if known else 0
        starts = range(offset, len(self.body), SMALL_PIECE_BYTES)
        return offset, (self.body[start : start + SMALL_PIECE_BYTES] for start in starts)


@dataclass(frozen=True)
class Ack:
    """A receiver's word on a message.

    Attributes:
        accepted: Whether it was taken.
        reason: Why it was not.
        detail: What was found and what was expected.
    """

    accepted: bool
    reason: Reason | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a peer asks another.

    Attributes:
        kind: For its `status`, its factors of a `round`, its `state`, or, whatever the digest of
            one's own is, for the `settings` that all must share, or a version of the list of
            `members`.
        round: Which round's factors; of the list, which version.
        members: The newest version of the list that the asker has.
        asker_round: Where the one who asks is.
        sender: Who asks; the transport fills in this one and the following.
        receiver: Who is asked.
        federation: The federation's id.
        config_digest: Of the settings that all peers share.
        have: Bytes that the asker has of the body, from a transfer that broke off.
        have_digest: The digest of that body.
        version: Of the protocol.
    """

    kind: Literal["status", "round", "state", "settings", "members"]
    round: int = 0
    asker_round: int = 0
    sender: str = ""
    receiver: str = ""
    federation: str = ""
    config_digest: str = ""
    have: int = 0
    have_digest: bytes = b""
    members: int = 0
    version: int = VERSION

    @property
    def about(self) -> int:
        """The round that it is about."""
        return self.round if self.kind == "round" else self.asker_round


@dataclass(frozen=True)
class Answer:
    """What a peer answers: a few facts (a small JSON object), and what was asked for.

    Attributes:
        facts: A few words and numbers.
        message: Factors, if it has them.
        roster: The text of a list of members.
    """

    facts: dict[str, Any]
    message: Message | None = None
    roster: str = ""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a peer knows of itself; whatever comes must agree with it.

    Attributes:
        name: The peer's name.
        federation: The federation's id.
        config_digest: Round -> digest of what all peers share then.
        layout: Of the factors of a client of the largest rank.
        kinds: The kinds of slot that the method sends.
        max_message_bytes: The most that a body may have.
        norm_bound: The largest norm of a message's values, if there is one.
        rank_of: Name -> that peer's rank; all have the layout's if not given.
        wire: The type of the values in a round's messages, a name for `wire_type`.
    """

    name: str
    federation: str
    config_digest: Callable[[int], str]
    layout: Layout
    max_message_bytes: int
    norm_bound: float | None = None
    kinds: tuple[str, ...] = (VALUE,)
    rank_of: Callable[[str], int] | None = None
    wire: str = "float32"

    def layout_of(self, sender: str) -> Layout:
        """Of the factors that a peer sends."""
        return self.layout.of_rank(self.rank_of(sender)) if self.rank_of else self.layout

    @cached_property
    def _slots(self) -> dict[str, tuple[Slot, ...]]:
        """Every set of slots that a message may hold, by its name."""
        slots = [(kind, factor) for kind in self.kinds for factor in self.layout.factors]
        sizes = range(1, len(slots) + 1)
        sets = (some for size in sizes for some in combinations(slots, size))
        return {slots_name(some): some for some in sets}

    def check(self, header: Header | Question, certified: frozenset[str] | None) -> None:
        """Refuse a header that isn't for this peer, or isn't from who it says.

        Args:
            header: What came.
            certified: The names in the sender's certificate; None where there are none.

        Raises:
            Refused: With the first thing that doesn't agree.
        """
        if certified is not None and header.sender not in certified:
            names = ", ".join(sorted(certified))
            raise Refused(
                Reason.WRONG_SENDER, f"{header.sender!r:.80} has a certificate for {names:.200}"
            )
        expected = {
            "version": (VERSION, Reason.WRONG_VERSION),
            "federation": (self.federation, Reason.WRONG_FEDERATION),
            "receiver": (self.name, Reason.WRONG_RECEIVER),
            "config_digest": (self.config_digest(header.about), Reason.WRONG_CONFIG),
            "layout": (layout_digest(self.layout_of(header.sender)), Reason.WRONG_SHAPE),
            "dtype": (dtype_of(getattr(header, "kind", ""), self.wire), Reason.WRONG_SHAPE),
        }
        if getattr(header, "kind", "") in ("settings", "status", "members"):
            del expected["config_digest"]  # one with others is told which they are
        for name, (ours, reason) in expected.items():
            theirs = getattr(header, name, ours)
            if theirs != ours:
                raise Refused(reason, f"{name} is {theirs!r:.80}, here it is {ours!r}")

    def template(self, header: Header) -> Template:
        """The tensors that a message must hold, when its declared size is possible for them.

        Raises:
            Refused: It can't be, or is above the limit.
        """
        slots = self._slots.get(header.factors)
        if slots is None:
            raise Refused(Reason.MALFORMED, f"factors are {header.factors!r:.80}")
        template = template_of(
            self.layout_of(header.sender), slots, dtype_of(header.kind, self.wire)
        )
        if header.kind == "change":
            self._check_change(header, template)
            return template
        most = min(template.most_bytes, self.max_message_bytes)
        if header.num_bytes > most:
            raise Refused(Reason.TOO_LARGE, f"{header.num_bytes} bytes; at most {most} are taken")
        if header.num_bytes < template.values_bytes:
            raise Refused(
                Reason.WRONG_SHAPE, f"{header.num_bytes} bytes; {template.values_bytes} of values"
            )
        return template

    def _check_change(self, header: Header, template: Template) -> None:
        wire = wire_type(self.wire)
        if wire.share is None:
            raise Refused(Reason.MALFORMED, f"with {self.wire} all of a message is sent")
        if header.num_bytes != (ours := change_bytes(template, wire)):
            raise Refused(Reason.WRONG_SHAPE, f"{header.num_bytes} bytes; a change has {ours}")


def dtype_of(kind: str, wire: str) -> str:
    """The type of a kind of message's values: of a round's `wire`, of others float32."""
    return wire_type(wire if kind == "round" else "float32").dtype


@lru_cache(maxsize=64)
def layout_digest(layout: Layout) -> str:
    """Sixteen hex digits that are equal when two peers' tensors have equal names and shapes."""
    return template_of(layout, tuple((VALUE, factor) for factor in layout.factors)).digest


def encode(
    slots: Mapping[Slot, Tensor],
    *,
    layout: Layout,
    federation: str,
    config_digest: str,
    sender: str,
    round: int,
    active: str,
    kind: Literal["round", "state"] = "round",
    wire: str = "float32",
    before: Rows | None = None,
) -> Message:
    """A message with some slots, addressed to nobody yet.

    Args:
        slots: Slot -> (P,) float32; copied.
        layout: Where everything lies in a row.
        federation: The federation's id.
        config_digest: Of the settings that all peers share.
        sender: The name of this peer.
        round: The round of the slots.
        active: The factors that trained in it.
        kind: What the slots are.
        wire: The type of the values, a name for `wire_type`; of a state they are float32.
        before: The slots that whoever has the message before knows, if it is told what changed.
    """
    dtype = dtype_of(kind, wire)
    template = template_of(layout, tuple(slots), dtype)
    body = pack(slots, template)
    header = Header(
        federation=federation,
        kind=kind,
        round=round,
        active=active,
        factors=slots_name(slots),
        config_digest=config_digest,
        layout=layout_digest(layout),
        sender=sender,
        receiver="",
        num_bytes=len(body),
        digest=xxh3_128(body).digest(),
        dtype=dtype,
    )
    message = Message(header, body, template)
    if before is None or change_bytes(template, wire_type(wire)) >= message.values_bytes:
        return message
    change = pack_change(before, slots, template, wire_type(wire))
    header = replace(header, kind="change", num_bytes=len(change))
    return replace(message, change=Message(header, change, template))


def decode(
    header: Header, body: bytes | bytearray, identity: Identity, before: Rows = NO_ROWS
) -> dict[Slot, Tensor]:
    """The slots of a message whose header was checked.

    Args:
        header: What came first.
        body: What followed.
        identity: Who takes it.
        before: What the sender sent before, for a change.

    Returns:
        Slot -> (P,) float32, all values finite.

    Raises:
        Refused: Something in the body is not as it must be.
    """
    template, changed = identity.template(header), header.kind == "change"
    if changed:
        body = whole_of(body, before, template, wire_type(identity.wire))
    if xxh3_128(body).digest() != header.digest:
        reason = Reason.NO_COPY if changed else Reason.WRONG_DIGEST
        raise Refused(reason, "the body is not the one that the header promises")
    return unpack(body, template, identity.norm_bound)
