"""The audit book of a peer, `audit.jsonl`: what it sent to whom, took from whom, refused, and gave.

Each line has its number and the SHA-256 of the line before, so no line can be changed, taken out or
put in without all that follow being another. A row is named by the SHA-256 of its values, float32
in the order of a client's row: XXH3, which tells messages apart by accident, is no evidence.

**What a book proves.** Lines of which somebody else noted the hash, or a later one, were not
changed since. Of two books that agree on a row, both say that it travelled. Two peers that took
different rows of a third one in the same round show that it sent different ones (audit_check.py).

**What it does not.** Nothing is signed: a peer may write a book anew from any line on whose hash
nobody has noted, leave out its end, or say of another what isn't so. Where two books contradict
each other one of them is wrong, and not which. The times are those of the peer's own clock. The
rows themselves are not in it, and whether they were trained as they should be it can't tell.

Lines are written by a thread of their own, in the order in which they were noted. They are on the
disk before the checkpoint that is after them, which keeps the hash of the last one: a power cut
takes lines about the round that will be done again, and nothing else goes unnoticed.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from plait.factors import Slot
from plait.machine.files import sync
from plait.peers.audit_lines import START, hash_of, read_chain
from plait.peers.codec import Message
from plait.peers.message_body import digest_of

BOOK = "audit.jsonl"

Rows = Mapping[Slot, Tensor] | Message | None
Note = Callable[..., None]
"""(kind, rows or None, **facts): a line of a book."""


def no_note(kind: str, rows: Rows = None, **facts: Any) -> None:
    """The note of one that keeps no book."""


class Book:
    """A peer's book while it runs."""

    def __init__(self, folder: Path, vouched: str | None = None) -> None:
        """Go on with the book in a run folder, or begin one.

        A torn last line is cut off, which is noted. Where lines are missing that were there at the
        last checkpoint a new book begins, and says so.

        Args:
            folder: The run folder.
            vouched: The hash of a line that must be there: the last one before the checkpoint.

        Raises:
            OSError: It can't be written.
        """
        path = folder / BOOK
        data = path.read_bytes() if path.exists() else b""
        chain = read_chain(data)
        lost = vouched is not None and vouched not in chain.hashes
        if lost and data:
            path.replace(_free(folder))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        sync(folder)
        self._count, self._last = (0, START) if lost else (len(chain.lines), chain.last)
        self._error: OSError | None = None
        self._pool = ThreadPoolExecutor(1, "plait-audit")
        if lost:
            self.note("lost", after=vouched)
        elif len(data) > chain.size:
            os.ftruncate(self._file, chain.size)
            self.note("torn", bytes=len(data) - chain.size)

    def note(self, kind: str, rows: Rows = None, **facts: Any) -> None:
        """Add a line; returns at once.

        Args:
            kind: What happened, a key of `NEEDS`.
            rows: What it is about: its digest comes into the line. Not to be changed afterwards.
            **facts: What else there is to say.
        """
        self._pool.submit(self._write, time.time(), kind, rows, facts)

    def sync(self) -> str:
        """Have all lines so far on the disk; the hash of the last one.

        Raises:
            OSError: One of them can't be written.
        """
        return self._pool.submit(self._sync).result()

    def close(self) -> None:
        """Write what is left."""
        self._pool.shutdown()
        os.close(self._file)

    def _write(self, now: float, kind: str, rows: Rows, facts: dict[str, Any]) -> None:
        if self._error:  # half a line may be there: nothing follows on it
            return
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        line = {"n": self._count, "before": self._last, "time": when, "kind": kind, **facts}
        if rows is not None:
            line["digest"] = rows.values_digest if isinstance(rows, Message) else digest_of(rows)
        text = json.dumps(line).encode()
        try:
            if os.write(self._file, text + b"\n") <= len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._error = error
            return
        self._count, self._last = self._count + 1, hash_of(text)

    def _sync(self) -> str:
        if self._error:
            raise self._error
        os.fsync(self._file)
        return self._last


def _free(folder: Path) -> Path:
    """Where a damaged book is put aside."""
    number = 1
    while (place := folder / f"audit-damaged-{number}.jsonl").exists():
        number += 1
    return place
