"""The lines of an audit book, read with distrust: each as it must be, and after the one before."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

MOST_LINE = 1 << 16
START = "0" * 64
"""What the first line has as the hash of the one before."""

HASH = re.compile("[0-9a-f]{64}")
Line = dict[str, Any]


@dataclass(frozen=True)
class Chain:
    """What of a book holds together.

    Attributes:
        lines: Its lines.
        hashes: The hash of each.
        size: How many bytes they take.
        wrong: What the next line has wrong; empty if there is none.
    """

    lines: tuple[Line, ...]
    hashes: tuple[str, ...]
    size: int
    wrong: str

    @property
    def last(self) -> str:
        """The hash of the last line."""
        return self.hashes[-1] if self.hashes else START


def hash_of(line: bytes) -> str:
    """The hash of a line without its end."""
    return sha256(line).hexdigest()


def read_chain(data: bytes) -> Chain:
    """A book's lines up to the first one that is not as it must be."""
    lines: list[Line] = []
    hashes: list[str] = []
    size, wrong = 0, ""
    *whole, rest = data.split(b"\n")
    for raw in whole:
        line, wrong = _read(raw, len(lines), hashes[-1] if hashes else START)
        if wrong:
            break
        lines.append(line)
        hashes.append(hash_of(raw))
        size += len(raw) + 1
    if rest and not wrong:
        wrong = "is cut short"
    place = f"line {len(lines) + 1} " if wrong else ""
    return Chain(tuple(lines), tuple(hashes), size, place + wrong)


def _read(raw: bytes, number: int, before: str) -> tuple[Line, str]:
    """A line, and what is wrong with it."""
    try:
        line = json.loads(raw) if len(raw) <= MOST_LINE else None
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return {}, "is no line of a book"
    needed = ("n", "before", *NEEDS.get(line["kind"], ()))
    if lacking := [name for name in needed if name not in line]:
        return {}, f"has no {lacking[0]}"
    if bad := [name for name in FIELDS.keys() & line.keys() if not FIELDS[name](line[name])]:
        return {}, f"has a {min(bad)} that can't be"
    if line["n"] != number:
        return {}, f"has the number {line['n']} where {number} is due: lines are missing"
    if line["before"] != before:
        return {}, "does not follow on the one before it: that one was changed"
    return line, ""


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and HASH.fullmatch(value) is not None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


FIELDS: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("n", "round", "keep", "bytes"), _is_count),
    **dict.fromkeys(("before", "digest", "after"), _is_hash),
    **dict.fromkeys(("time", "kind", "by", "peer", "what", "reason", "detail"), _is_text),
    **dict.fromkeys(("federation", "config", "version", "slots"), _is_text),
    "peers": _are_texts,
}
"""Name -> whether a value can be of that name."""

ROW = ("peer", "what", "round", "digest")
NEEDS: dict[str, tuple[str, ...]] = {
    "started": ("by", "federation", "config", "round", "keep"),
    "made": ("round", "digest"),
    "sent": ROW,
    "gave": ROW,
    "took": ROW,
    "mixed": ("round", "peers"),
    "refused": ("peer", "reason", "round"),
    "asked": ("peer", "what", "round"),
    "members": ("peer", "round", "digest"),
    "torn": ("bytes",),
    "lost": ("after",),
    "finished": ("round",),
}
"""Kind -> what a line of it has. `sent` was acknowledged, `gave` went out as an answer, whole;
`members` is a list that holds from the round on."""
