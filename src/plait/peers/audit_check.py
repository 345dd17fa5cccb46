"""Audit books laid side by side: does each hold together, and do they say the same?

What one says it sent the other must have taken, with the same digest. Of a row that several took
all must have the same, whether or not its sender's book is there: else it sent different ones,
which is equivocation. A peer that was killed or lost power may lack the lines about rounds that it
did again; what rests on those is said, and counts as not clear instead of wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, permutations
from pathlib import Path

from plait.peers.audit import BOOK
from plait.peers.audit_lines import Chain, Line, read_chain

Row = tuple[str, str, int]
"""Peer, `round` or `state`, round."""
Digests = Mapping[Row, list[str]]


@dataclass(frozen=True)
class Finding:
    """Something that was found, in a line.

    Attributes:
        text: What.
        wrong: Whether it is a fault; else it is only to be known.
    """

    text: str
    wrong: bool = True


@dataclass(frozen=True)
class PeersBook:
    """The book of a peer, as somebody else reads it.

    Attributes:
        path: Its file.
        chain: Its lines.
    """

    path: Path
    chain: Chain

    @classmethod
    def read(cls, path: Path) -> PeersBook:
        """A book, or that of a run folder; an `OSError` if there is none."""
        path = path / BOOK if path.is_dir() else path
        return cls(path, read_chain(path.read_bytes()))

    def lines(self, kind: str) -> Iterator[Line]:
        """The lines of a kind."""
        return (line for line in self.chain.lines if line["kind"] == kind)

    @cached_property
    def starts(self) -> list[Line]:
        """Where it was begun and taken up."""
        return list(self.lines("started"))

    @cached_property
    def owner(self) -> str:
        """Whose it is; the file's name where it doesn't say."""
        return str(self.starts[0]["by"]) if self.starts else str(self.path)

    def rows(self, *kinds: str) -> Digests:
        """The digests of rows in the lines of some kinds."""
        found: dict[Row, list[str]] = defaultdict(list)
        for kind in kinds:
            for line in self.lines(kind):
                if "digest" in line:
                    found[line["peer"], line["what"], line["round"]].append(line["digest"])
        return found

    @cached_property
    def took(self) -> Digests:
        """Of rows of others."""
        return self.rows("took")

    @cached_property
    def made(self) -> Mapping[int, list[str]]:
        """Round -> the digests of its own row."""
        found: dict[int, list[str]] = defaultdict(list)
        for line in self.lines("made"):
            found[line["round"]].append(line["digest"])
        return found

    @cached_property
    def mixed(self) -> Mapping[int, list[str]]:
        """Round -> those it mixed with, as it was last done."""
        return {line["round"]: line["peers"] for line in self.lines("mixed")}

    def tells(self, round_: int) -> bool:
        """Whether it has to have all lines about a round."""
        again = any(s["round"] <= round_ <= s["round"] + s["keep"] for s in self.starts[1:])
        return round_ in self.mixed and not again


def findings(books: Sequence[PeersBook]) -> list[Finding]:
    """All that is to be said of some books."""
    found = [one for book in books for one in _of_one(book)]
    found += [one for a, b in combinations(books, 2) for one in _of_two(a, b)]
    apart = {book.owner: book for book in sorted(books, key=lambda book: len(book.chain.lines))}
    for sender, receiver in permutations(apart.values(), 2):
        found += [*_taken(sender, receiver), *_sent(sender, receiver)]
    return [*found, *_equivocations(list(apart.values()))]


def _of_one(book: PeersBook) -> Iterator[Finding]:
    who = book.owner
    if book.chain.wrong:
        yield Finding(f"{book.path}: {book.chain.wrong}; what follows was not read")
    if not book.starts:
        yield Finding(f"{book.path}: no line says whose book it is")
    for line in book.lines("torn"):
        text = (
            f"{who}: {line['bytes']} bytes of a line cut short were cut off at line {line['n'] + 1}"
        )
        yield Finding(text, wrong=False)
    for line in book.lines("lost"):
        yield Finding(
            f"{who}: the book before this one is missing; its hash was {line['after'][:16]}"
        )
    for round_, peers in book.mixed.items():
        for peer in peers:
            if (peer, "round", round_) not in book.took:
                yield Finding(f"round {round_}: {who} mixed with {peer} and says not what it took")
    for round_, digests in book.made.items():
        if len(set(digests)) > 1:
            yield Finding(f"round {round_}: {who} made {_named(digests)}, and not one row")


def _of_two(a: PeersBook, b: PeersBook) -> Iterator[Finding]:
    if a.owner == b.owner:
        pairs = enumerate(zip(a.chain.hashes, b.chain.hashes, strict=False), 1)
        if (apart := next((n for n, (x, y) in pairs if x != y), None)) is not None:
            yield Finding(
                f"{a.path} and {b.path} are two books of {a.owner}, apart from line {apart}"
            )
    for name in ("federation", "config"):
        ours, theirs = ({start[name] for start in book.starts} for book in (a, b))
        if ours and theirs and not ours & theirs:
            yield Finding(
                f"{a.owner} and {b.owner} had another {name}: {_one(ours)}, {_one(theirs)}"
            )


def _taken(sender: PeersBook, receiver: PeersBook) -> Iterator[Finding]:
    """What one took of the other, by the other's book."""
    gave = sender.rows("asked", "gave")  # whoever has it all may hang up before `gave` is sure
    for (peer, what, round_), digests in receiver.took.items():
        if peer != sender.owner:
            continue
        said = sender.made[round_] if what == "round" else gave[receiver.owner, what, round_]
        begin = f"{what} {round_}: {receiver.owner} took {_named(digests)} of {peer}"
        if said and not set(digests) <= set(said):
            yield Finding(f"{begin}, by whose book it was {_named(said)}")
        elif not said and sender.tells(round_):
            yield Finding(f"{begin}, whose book says nothing of it")
        elif not said:
            yield Finding(f"{begin}, whose book doesn't reach it or was interrupted", wrong=False)


def _sent(sender: PeersBook, receiver: PeersBook) -> Iterator[Finding]:
    """What one says that the other acknowledged, by the other's book."""
    for (peer, what, round_), digests in sender.rows("sent").items():
        if peer != receiver.owner or (sender.owner, what, round_) in receiver.took:
            continue
        begin = f"{what} {round_}: {sender.owner} sent {_named(digests)} to {peer}, whose book"
        if receiver.tells(round_):
            yield Finding(f"{begin} says nothing of it")
        else:
            yield Finding(f"{begin} doesn't reach it or was interrupted", wrong=False)


def _equivocations(books: Sequence[PeersBook]) -> Iterator[Finding]:
    """Rows of a round of which different peers took different ones."""
    takers: dict[Row, dict[str, list[str]]] = defaultdict(dict)
    for book in books:
        for row, digests in book.took.items():
            takers[row][book.owner] = digests
    for (peer, what, round_), by in sorted(takers.items()):
        if len({digest for digests in by.values() for digest in digests}) > 1:
            each = ", ".join(f"{who} took {_named(digests)}" for who, digests in sorted(by.items()))
            yield Finding(f"{what} {round_}: {peer} sent different rows: {each}")


def _named(digests: Sequence[str]) -> str:
    """Digests in short, each once."""
    return " and ".join(digest[:16] for digest in dict.fromkeys(digests))


def _one(values: set[str]) -> str:
    return " or ".join(sorted(values))
