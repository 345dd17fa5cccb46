"""A run as it is read back, finished or still going: a fold over the events in its folder.

`Track.read` takes up the lines that came since it was last called, so the same object serves a
report, which reads once, and the dashboard, which reads twice a second. What would not fit in
memory for a thousand clients is not kept: of each round's pairs of clients only those among the
first `MOST_DRAWN` stay, as arrays, and how many met.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from plait.config import Config
from plait.events import (
    KINDS,
    Evaluated,
    Event,
    RoundDone,
    Started,
    all_active,
    from_line,
    together,
)
from plait.metrics import MOST_PAIRED
from plait.runs.run_folder import Sample, load_config, load_fingerprints, load_samples, load_summary

MOST_DRAWN = MOST_PAIRED
"""Clients in the drawing of who met whom; more can't be told apart on a screen."""

Pairs = np.ndarray[Any, np.dtype[np.uint16]]
Float32s = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Meetings:
    """Who met whom in a round, and how far apart they and the others were then.

    Attributes:
        pairs: (E, 2) clients i < j, among the first `MOST_DRAWN`.
        weights: (E,) what they gave each other in mixing; the larger where the two differ.
        count: Pairs among all clients.
        apart: (n, n) squared distances of the first n clients; NaN where not known.
    """

    pairs: Pairs
    weights: Float32s
    count: int
    apart: Float32s


@dataclass
class Track:
    """A run folder and what has been read of it.

    Attributes:
        path: The folder.
        config: Its config.
        events: What the run said, the edges of its rounds left out.
        meetings: For each round, in the place of its edges.
        unread_lines: Lines that say nothing to this plait: damaged ones, or those of a later one.
    """

    path: Path
    config: Config
    events: list[Event] = field(default_factory=list)
    meetings: list[Meetings] = field(default_factory=list)
    unread_lines: int = 0
    _read_bytes: int = 0
    _file_id: int = 0
    _config_file: tuple[int, int] | None = None
    _fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def samples(self) -> list[Sample]:
        """What its language model writes; empty where nobody asked for it."""
        return load_samples(self.path)

    @classmethod
    def open(cls, path: Path) -> Track:
        """Take up a run folder; nothing of its events is read yet."""
        file = _identity(path / "config.json")
        config = load_config(path)
        return cls(path, config, _config_file=file)

    @property
    def is_outdated(self) -> bool:
        """Whether the folder has another config by now: more rounds, or another run."""
        replaced = self._config_file != _identity(self.path / "config.json")
        return replaced and Track.open(self.path).config != self.config

    @property
    def spoke_at(self) -> float:
        """When it last said something, in seconds of the epoch."""
        return (self.path / "events.jsonl").stat().st_mtime

    @property
    def title(self) -> str:
        """A name for people."""
        return self.path.resolve().name

    @property
    def fingerprints(self) -> dict[str, str]:
        """What it read; nothing if that isn't known."""
        if not self._fingerprints:
            self._fingerprints = load_fingerprints(self.path)
        return self._fingerprints

    def see(self, event: Event) -> None:
        """Take note of one event."""
        if isinstance(event, RoundDone):
            self.meetings.append(meetings(event, self.config.clients))
            event = dataclasses.replace(event, edges=[], pairs_apart=[])
        self.events.append(event)

    def read(self) -> bool:
        """Take up what was written since the last call; returns whether there was anything."""
        file = self.path / "events.jsonl"
        if not file.exists():
            return False
        status = file.stat()
        # A resumed run drops what came after its checkpoint: another file, or a shorter one.
        if self._read_bytes and (
            status.st_ino != self._file_id or status.st_size < self._read_bytes
        ):
            self.events.clear()
            self.meetings.clear()
            self._read_bytes = self.unread_lines = 0
        self._file_id = status.st_ino
        if status.st_size == self._read_bytes:
            return False
        before = len(self.events)
        with file.open("rb") as lines:
            lines.seek(self._read_bytes)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._read_bytes += len(line)
                try:
                    self._take(line.decode())
                except (ValueError, TypeError, KeyError):
                    self.unread_lines += 1
        return len(self.events) > before

    def _take(self, line: str) -> None:
        # Kinds that a later plait adds say nothing that is shown here.
        if json.loads(line[: line.index(",")] + "}")["event"] in KINDS:
            self.see(from_line(line))

    @property
    def sees_itself_alone(self) -> bool:
        """Whether it is one peer's part of a run; an older plait's is known once evaluated."""
        if self.started and self.started.peer is not None:
            return True
        return any(len(one.scores) < self.config.clients for one in self.evaluations[:1])

    @property
    def configs(self) -> list[Config]:
        """Its settings; of several peers that brought something of their own, each once."""
        return [self.config]

    @property
    def started(self) -> Started | None:
        """What it said first."""
        return next((event for event in self.events if isinstance(event, Started)), None)

    @property
    def rounds(self) -> list[RoundDone]:
        """The rounds that are done."""
        return [event for event in self.events if isinstance(event, RoundDone)]

    @property
    def evaluations(self) -> list[Evaluated]:
        """The evaluations that are done."""
        return [event for event in self.events if isinstance(event, Evaluated)]

    @property
    def scored(self) -> list[list[int]]:
        """The clients whose scores each evaluation has."""
        return [list(range(len(one.scores))) for one in self.evaluations]

    @property
    def here(self) -> list[int]:
        """The clients whose events these are."""
        return self.scored[0] if self.scored else []

    @property
    def names(self) -> list[str]:
        """The clients' names; nothing where they are numbers."""
        return list(self.started.client_names) if self.started else []

    def name_of(self, client: int) -> str:
        """The name of a client, or its number as a word."""
        return self.names[client] if self.names else str(client)

    @property
    def finished(self) -> bool:
        """Whether its figures are written."""
        return (self.path / "summary.json").exists()

    @property
    def summary(self) -> dict[str, Any] | None:
        """Its figures, once they are written."""
        return load_summary(self.path) if self.finished else None


class JoinedPeers(Track):
    """The peers of one federation as one run; each wrote a folder of what it saw of itself alone.

    A round is taken up when every peer that is still there has done it. The distances between
    clients and the averaged model, which no peer sees, are missing.
    """

    def __init__(self, path: Path, parts: Sequence[Track]) -> None:
        """Join the runs of peers, in the order of their numbers, in a folder that has them all."""
        super().__init__(path, parts[0].config)
        self.parts = list(parts)
        self._scored: list[list[int]] = []
        self._joined: list[tuple[int, bool]] = []

    def read(self) -> bool:
        """Take up what any of the peers wrote."""
        for part in self.parts:
            part.read()
        now = [(len(part.events), part.finished) for part in self.parts]
        if now == self._joined:
            return False
        self._joined, self.events, self.meetings, self._scored = now, [], [], []
        staying = [len(part.rounds) for part in self.parts if not part.finished]
        last = min(staying) if staying else max(len(part.rounds) for part in self.parts)
        self.events += _joined_start([part.started for part in self.parts if part.started])
        self._join_evaluations(-1)
        for round_ in range(last):
            self._join_rounds(round_)
            self._join_evaluations(round_)
        return True

    @property
    def configs(self) -> list[Config]:
        """The settings of the peers, each once."""
        return list(dict.fromkeys(part.config for part in self.parts))

    @property
    def scored(self) -> list[list[int]]:
        """The clients whose scores each evaluation has."""
        return self._scored

    @property
    def here(self) -> list[int]:
        """The clients whose events these are; a peer with a loop of its own may have no scores."""
        told = [part.started.peer for part in self.parts if part.started]
        known = [one for one in told if one is not None]
        return list(dict.fromkeys([one for some in self._scored[:1] for one in some] + known))

    @property
    def sees_itself_alone(self) -> bool:
        """Whether some peers are missing."""
        return len(self.parts) < self.config.clients

    @property
    def spoke_at(self) -> float:
        """When any of them last said something."""
        return max(part.spoke_at for part in self.parts)

    @property
    def title(self) -> str:
        """The name of the only peer that is known, or of the folder."""
        clients = self._clients()
        alone = len(clients) == 1 and bool(self.names)
        return self.name_of(clients[0]) if alone else super().title

    def _clients(self) -> list[int]:
        """The client of each part; an older plait didn't say."""
        said = [part.started for part in self.parts]
        return [k if one is None or one.peer is None else one.peer for k, one in enumerate(said)]

    @property
    def fingerprints(self) -> dict[str, str]:
        """What the first of them read; each may have rows of its own."""
        return self.parts[0].fingerprints

    @property
    def finished(self) -> bool:
        """Whether all peers are done."""
        return all(part.finished for part in self.parts)

    @property
    def summary(self) -> dict[str, Any] | None:
        """None: no peer sees all that a summary has."""
        return None

    def _join_rounds(self, round_: int) -> None:
        there = [(p, k) for p in self.parts for k, e in enumerate(p.rounds) if e.round == round_]
        if not there:
            return
        said = [part.rounds[k] for part, k in there]
        self.meetings.append(_joined([part.meetings[k] for part, k in there]))
        joined = dataclasses.replace(
            said[0],
            active=all_active(said),
            train_losses=[loss for one in said for loss in one.train_losses],
            sent_bytes=sum(one.sent_bytes for one in said),
            before=[],
            after=[],
            apart=[],
        )
        self.events.append(joined)

    def _join_evaluations(self, round_: int) -> None:
        there = [(client, e) for client, part in zip(self._clients(), self.parts, strict=True)
                 for e in part.evaluations if e.round == round_]  # fmt: skip
        said = [event for _, event in there]
        if len(said) < len(self.parts) and round_ == -1:
            return
        if said:
            joined = dataclasses.replace(
                together(said),
                averaged_score=float("nan"),
                averaged_loss=float("nan"),
                averaged_confusion=[],
            )
            self.events.append(joined)
            self._scored.append([client for client, _ in there])


def _identity(file: Path) -> tuple[int, int]:
    """What tells a file from one that has taken its place."""
    status = file.stat()
    return status.st_ino, status.st_mtime_ns


def _joined_start(said: Sequence[Started]) -> list[Started]:
    """The first event of all peers: each may know its own label counts alone, the others' as 0."""
    if not said:
        return []
    counts = np.max([one.label_counts for one in said], axis=0).tolist()
    return [dataclasses.replace(said[0], label_counts=counts)]


def meetings(event: RoundDone, clients: int) -> Meetings:
    """The pairs of a round's edges, whichever way they point, and the distances of pairs.

    Args:
        event: The round.
        clients: N.
    """
    ends, weights = _pairs(event.edges)
    # A pair as one number, which is much faster to tell from others than two.
    count = len(np.unique(ends[:, 0] * clients + ends[:, 1]))
    drawn = (ends < MOST_DRAWN).all(axis=1)
    n = min(clients, MOST_DRAWN)
    apart = np.full((n, n), np.nan, dtype=np.float32)
    of, distances = _pairs(event.pairs_apart)
    known = (of < n).all(axis=1)
    apart[of[known, 0], of[known, 1]] = apart[of[known, 1], of[known, 0]] = distances[known]
    return Meetings(*_once(ends[drawn], weights[drawn]), count, apart)


def _joined(parts: Sequence[Meetings]) -> Meetings:
    """What several peers saw of a round."""
    pairs = np.concatenate([one.pairs for one in parts])
    pairs, weights = _once(pairs.astype(int), np.concatenate([one.weights for one in parts]))
    apart = np.fmax.reduce([one.apart for one in parts])  # a number wins over NaN
    return Meetings(pairs, weights, len(pairs), apart)


def _pairs(triples: Sequence[tuple[int, int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """(i, j, number) as (E, 2) i < j and (E,)."""
    flat = np.fromiter(chain.from_iterable(triples), dtype=np.float64, count=3 * len(triples))
    table = flat.reshape(-1, 3)
    return np.sort(table[:, :2].astype(int), axis=1), table[:, 2]


def _once(ends: np.ndarray, weights: np.ndarray) -> tuple[Pairs, Float32s]:
    """Each pair of (E, 2) once, with the largest of its weights (E,)."""
    numbers, place = np.unique(ends[:, 0] * MOST_DRAWN + ends[:, 1], return_inverse=True)
    largest = np.zeros(len(numbers), dtype=np.float32)
    np.maximum.at(largest, place, weights.astype(np.float32))
    pairs = np.stack([numbers // MOST_DRAWN, numbers % MOST_DRAWN], axis=1)
    return pairs.astype(np.uint16), largest
