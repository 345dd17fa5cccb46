"""The command `plait audit`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from plait.cli.arguments import Flag, parse


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Check peers' audit books: whether each holds together, and whether they say the same."""

    books: tyro.conf.Positional[tuple[Path, ...]]
    """Files audit.jsonl, or the run folders that they are in, of one peer or more."""
    json: Flag = False
    """Print JSON."""


def audit(args: list[str]) -> int:
    """`plait audit`: 0 when nothing is wrong, 1 when something is."""
    given = parse(Audit, "audit", args)
    from plait.peers.audit_check import PeersBook, findings

    books = [PeersBook.read(path) for path in given.books]
    found = findings(books)
    told = [
        {
            "peer": book.owner,
            "file": str(book.path),
            "lines": len(book.chain.lines),
            "rounds": len(book.mixed),
            "last_hash": book.chain.last,
        }
        for book in books
    ]
    if given.json:
        print(json.dumps({"books": told, "findings": [vars(one) for one in found]}, indent=2))
    else:
        for one in told:
            print("{peer}: {lines} lines, {rounds} rounds, last hash {last_hash}".format(**one))
        for line in found:
            print(f"{'wrong' if line.wrong else 'not clear'}: {line.text}")
        print(f"{sum(line.wrong for line in found) or 'nothing'} wrong")
    return int(any(line.wrong for line in found))
