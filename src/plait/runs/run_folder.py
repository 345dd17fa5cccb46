"""A run in a folder: what it writes, how it is resumed, how it is read again.

    config.json        the resolved config
    fingerprints.json  hashes of what it read (fingerprints.py)
    made-by.json       the versions and the machine that computed it (made_by.py)
    about.json         what people call it, if they do: a name and tags
    events.jsonl       what the run said, a line for each event
    summary.json       its figures, written last: a folder with a summary holds a finished run
    checkpoint.safetensors   the state of every client after the last saved round
    samples.jsonl      what a language model writes, if that was asked for (samples.py)
    adapters/          a PEFT folder for each client and for the averaged model
    best/              the same after the best round, of a run that may stop early
    .lock              held by the process that writes here

Every file is written beside its place and renamed into it, so a run that dies leaves no half file.
Events are on the disk before a checkpoint that is after them, and all else before the summary, so a
power cut takes no more than what was said since the last checkpoint.
run.py is what writes them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from plait.config import Config
from plait.engines.checkpoint import load_rows, rounds_done, save_stack
from plait.events import Evaluated, Event, RoundDone, Started, from_line, to_line
from plait.lora import Stack
from plait.machine.files import (
    check_new,
    damaged,
    make_lasting,
    read_json,
    sync,
    sync_tree,
    write_atomically,
)
from plait.runs.listing import check_events

CHECKPOINT = "checkpoint.safetensors"
BEST = "best"
FINGERPRINTS, MADE_BY, ABOUT = "fingerprints.json", "made-by.json", "about.json"
SAMPLES = "samples.jsonl"

Sample = dict[str, str]
"""`prompt`, `before` (the base), `after` (the averaged model) and `reference`."""


def load_run(path: Path | str) -> tuple[Config, list[Event], dict[str, Any]]:
    """The config, events and summary of a finished run.

    Raises:
        ValueError: The folder holds no finished run, or one whose files are damaged.
    """
    path = Path(path)
    summary = load_summary(path)
    return load_config(path), load_finished(path), summary


def load_config(path: Path) -> Config:
    """The config of a run folder."""
    return Config.load(path / "config.json")


def load_summary(path: Path) -> dict[str, Any]:
    """The figures of a finished run.

    Raises:
        ValueError: The folder holds no finished run.
    """
    if not (path / "summary.json").is_file():
        raise ValueError(
            f"{path} holds no finished run; `plait run --resume --out {path}` goes on."
        )
    return read_json(path / "summary.json")


def load_samples(path: Path) -> list[Sample]:
    """What its language model writes; empty where nobody asked for it."""
    file = path / SAMPLES
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return [json.loads(line) for line in text.split("\n") if line]


def load_fingerprints(path: Path) -> dict[str, str]:
    """What a run read; nothing of a run by an older plait."""
    file = path / FINGERPRINTS
    return read_json(file) if file.is_file() else {}


def load_events(path: Path) -> list[Event]:
    """The events recorded in a run folder; a last line that was cut short is left out.

    Raises:
        ValueError: A line is none; the message has the file and the line.
        OSError: They can't be read.
    """
    file, found = path / "events.jsonl", []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                found.append(from_line(line.decode()))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise damaged(file, f"line {number}: {type(error).__name__}: {error}") from error
    return found


def load_finished(path: Path) -> list[Event]:
    """The events of a finished run, all of them.

    Raises:
        ValueError: A line is none, or some are missing; the message has the file.
        OSError: They can't be read.
    """
    events = load_events(path)
    judged = [event for event in events if isinstance(event, Evaluated)]
    check_events(path, judged[-1].scores if judged else [])
    return events


def load_start(events_file: Path) -> Started:
    """The first event of a run.

    Raises:
        ValueError: It can't be read; the message has the file.
        OSError: There is no such file.
    """
    with events_file.open("rb") as file:
        try:
            started = from_line(file.readline().decode())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise damaged(events_file, f"{type(error).__name__}: {error}") from error
    if not isinstance(started, Started):
        raise damaged(events_file, "it doesn't begin with a start")
    return started


def _readable(events_file: Path) -> Iterator[Event]:
    """The events up to the first line that can't be read."""
    lines = events_file.read_bytes().splitlines() if events_file.exists() else []
    with suppress(ValueError, TypeError, KeyError):
        for line in lines:
            yield from_line(line.decode())


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Attributes:
        path: The folder.
        rounds_before: The rounds of the run that is there, which may be fewer than are wanted now.
    """

    path: Path
    rounds_before: int = 0

    @property
    def summary_file(self) -> Path:
        """Where the figures go when the run is done."""
        return self.path / "summary.json"

    @property
    def events_file(self) -> Path:
        """Where the events go, line by line."""
        return self.path / "events.jsonl"

    @property
    def checkpoint_file(self) -> Path:
        """Where the state of every client goes."""
        return self.path / CHECKPOINT

    @property
    def best(self) -> Path:
        """Where the adapters of the best round go."""
        return self.path / BEST

    @property
    def rounds_done(self) -> int:
        """Rounds behind the checkpoint; 0 without one."""
        return rounds_done(self.checkpoint_file)

    def finished(self, config: Config) -> bool:
        """Whether it holds the result of as many rounds as a config has."""
        return self.summary_file.exists() and self.rounds_before == config.rounds

    @classmethod
    def open(cls, path: Path, config: Config, resume: bool) -> RunFolder:
        """Take a folder for a run, or take it up again; nothing is written yet.

        A run may go on with more rounds than it had, if its learning rate did not go by them.

        Raises:
            ValueError: It is in use, was made by another config, or can't go on.
        """
        if not resume or not (path / "config.json").exists():
            check_new(path)
            return cls(path, config.rounds)
        there = load_config(path)
        before, now = there.decisive(), config.decisive()
        changed = sorted(key for key in before | now if before.get(key) != now.get(key))
        if changed == ["rounds"] and config.rounds > there.rounds:
            if config.lr_schedule != "constant":
                raise ValueError(
                    f"{path} holds a run whose learning rate went to its end over "
                    f"{there.rounds} rounds ({config.lr_schedule}), so it can't go on with more; "
                    "take another --out."
                )
            changed = []
        if changed:
            raise ValueError(
                f"{path} holds a run with other settings ({', '.join(changed)}); resume with "
                "the same ones, or more rounds, or take another --out."
            )
        folder = cls(path, there.rounds)
        goes_further = folder.summary_file.exists() and not folder.finished(config)
        if goes_further and not folder.has_last_state():
            raise ValueError(
                f"{path} holds a finished run that stopped early, or without its last state, so it "
                "can't go on with more rounds; take another --out."
            )
        return folder

    def has_last_state(self) -> bool:
        """Whether a finished run's checkpoint is there and can be read."""
        try:
            return self.rounds_done == self.rounds_before
        except (SafetensorError, KeyError, OSError):
            return False

    def check(self, fingerprints: Callable[[], Mapping[str, str]]) -> None:
        """Refuse to go on with a run that read something else; an older plait's folder can't tell.

        Args:
            fingerprints: Gives what is read now; called only if the folder has what was read then.

        Raises:
            ValueError: What has changed.
        """
        if not (self.path / FINGERPRINTS).is_file():
            return
        before, now = load_fingerprints(self.path), fingerprints()
        changed = [name for name in now if before.get(name, now[name]) != now[name]]
        if changed:
            raise ValueError(
                f"{self.path} holds a run with what was read then, and since then these have "
                f"changed: {', '.join(changed)}. Put them back as they were, or take another --out."
            )

    def create(
        self,
        config: Config,
        fingerprints: Mapping[str, str] | None = None,
        made_by: Mapping[str, str | int] | None = None,
    ) -> None:
        """Make the folder; if a run goes on with more rounds, its figures so far are set aside.

        Args:
            config: The settings.
            fingerprints: What was read.
            made_by: What computes from here on.
        """
        make_lasting(self.path)
        if self.rounds_before < config.rounds and self.summary_file.exists():
            self.summary_file.replace(self.path / f"summary-{self.rounds_before}.json")
        write_atomically(self.path / "config.json", json.dumps(config.to_json(), indent=2) + "\n")
        for name, facts in ((FINGERPRINTS, fingerprints), (MADE_BY, made_by)):
            if facts is not None:
                write_atomically(self.path / name, json.dumps(facts, indent=2) + "\n")

    def describe(self, name: str, tags: Sequence[str]) -> None:
        """Keep what people call the run; what is not given stays as it was."""
        given = {key: value for key, value in (("name", name), ("tags", list(tags))) if value}
        if given:
            file = self.path / ABOUT
            before = read_json(file) if file.is_file() else {}
            write_atomically(file, json.dumps(before | given, indent=2) + "\n")

    def record(self, event: Event) -> None:
        """Add a line to the events."""
        with self.events_file.open("a") as file:
            file.write(to_line(event) + "\n")

    def settle(self) -> None:
        """Have the events on the disk: to be done before a checkpoint that is after them."""
        sync(self.events_file)

    def save(self, stack: Stack, rounds_done: int, **beside: Tensor) -> None:
        """Write a checkpoint after so many rounds, and what is kept beside the state."""
        self.settle()
        save_stack(stack, self.checkpoint_file, rounds_done, **beside)

    def restore(self, stack: Stack) -> list[Event]:
        """Bring `stack` to the last checkpoint; returns the events up to it."""
        if self.checkpoint_file.exists():
            load_rows(stack, self.checkpoint_file)
        return self.rewind()

    def rewind(self, last_evaluation: bool = True) -> list[Event]:
        """The events up to the last checkpoint.

        What was recorded after it is dropped: it will be said again. Of a finished run all stays.

        Args:
            last_evaluation: Keep the evaluation after the checkpoint's last round.

        Raises:
            ValueError: They don't reach up to the checkpoint.
        """
        if self.summary_file.exists():
            return load_events(self.path)
        end = self.rounds_done
        kept = self._said_before(end) if end else []
        if not last_evaluation:
            kept = [e for e in kept if not (isinstance(e, Evaluated) and e.round == end - 1)]
        write_atomically(self.events_file, "".join(to_line(event) + "\n" for event in kept))
        return kept

    def _said_before(self, end: int) -> list[Event]:
        """The events before round `end`; lines after them may be in any state."""
        kept = [e for e in _readable(self.events_file) if getattr(e, "round", -1) < end]
        last = max((event.round for event in kept if isinstance(event, RoundDone)), default=None)
        if last != end - 1:
            until = "before the first round" if last is None else f"after round {last}"
            raise ValueError(
                f"{self.events_file} ends {until}, and the checkpoint beside it is after round "
                f"{end - 1}: lines were lost, as by a disk that forgets what it said it had. Put "
                f"back a copy of {self.path}, or move it away to begin anew."
            )
        return kept

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the figures; the checkpoint stays, to go on from with more rounds."""
        sync_tree(self.path)
        write_atomically(self.summary_file, json.dumps(summary, indent=2) + "\n")
