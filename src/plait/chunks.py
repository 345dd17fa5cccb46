"""A body as frames: protobuf's `Frame(body=...)`, written and read with one copy instead of three.

What is written here, any protobuf library reads; what is read is what any of them writes.
"""

from __future__ import annotations

from plait.refusal import Reason, Refused

CHUNK_BYTES = 1 << 22
"""Bodies are cut into chunks of this size: larger ones cost less time, smaller ones less memory."""

BODY_TAG = b"\x12"
"""How such a frame begins: field 2, length-delimited."""


def write_chunks(body: bytes, chunk_bytes: int = CHUNK_BYTES) -> tuple[bytes, ...]:
    """The frames of a body, in order."""
    view = memoryview(body)
    chunks = (view[start : start + chunk_bytes] for start in range(0, len(view), chunk_bytes))
    return tuple(b"".join((BODY_TAG, _varint(len(chunk)), chunk)) for chunk in chunks)


def read_chunk(frame: bytes) -> memoryview:
    """The piece of a body in a frame, not copied.

    Raises:
        Refused: The frame's length isn't what it says, or it is none of these.
    """
    start = 1
    while start < min(len(frame), 6) and frame[start] & 0x80:
        start += 1
    chunk = memoryview(frame)[start + 1 :]
    if frame[: start + 1] != BODY_TAG + _varint(len(chunk)):
        raise Refused(Reason.MALFORMED, "a piece of a body with a wrong length")
    return chunk


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
