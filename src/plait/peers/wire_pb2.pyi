from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Header(_message.Message):
    __slots__ = ("version", "federation", "kind", "round", "active", "factors", "config_digest", "layout", "dtype", "sender", "receiver", "num_bytes", "digest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    FACTORS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    federation: str
    kind: str
    round: int
    active: str
    factors: str
    config_digest: str
    layout: str
    dtype: str
    sender: str
    receiver: str
    num_bytes: int
    digest: bytes
    def __init__(self, version: _Optional[int] = ..., federation: _Optional[str] = ..., kind: _Optional[str] = ..., round: _Optional[int] = ..., active: _Optional[str] = ..., factors: _Optional[str] = ..., config_digest: _Optional[str] = ..., layout: _Optional[str] = ..., dtype: _Optional[str] = ..., sender: _Optional[str] = ..., receiver: _Optional[str] = ..., num_bytes: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("accepted", "reason", "detail")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    detail: str
    def __init__(self, accepted: _Optional[bool] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class Question(_message.Message):
    __slots__ = ("version", "federation", "kind", "round", "asker_round", "config_digest", "sender", "receiver", "have", "have_digest", "members")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ASKER_ROUND_FIELD_NUMBER: _ClassVar[int]
    CONFIG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    HAVE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    version: int
    federation: str
    kind: str
    round: int
    asker_round: int
    config_digest: str
    sender: str
    receiver: str
    have: int
    have_digest: bytes
    members: int
    def __init__(self, version: _Optional[int] = ..., federation: _Optional[str] = ..., kind: _Optional[str] = ..., round: _Optional[int] = ..., asker_round: _Optional[int] = ..., config_digest: _Optional[str] = ..., sender: _Optional[str] = ..., receiver: _Optional[str] = ..., have: _Optional[int] = ..., have_digest: _Optional[bytes] = ..., members: _Optional[int] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("ack", "facts", "header", "offset", "roster")
    ACK_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    ack: Ack
    facts: str
    header: Header
    offset: int
    roster: str
    def __init__(self, ack: _Optional[_Union[Ack, _Mapping]] = ..., facts: _Optional[str] = ..., header: _Optional[_Union[Header, _Mapping]] = ..., offset: _Optional[int] = ..., roster: _Optional[str] = ...) -> None: ...
