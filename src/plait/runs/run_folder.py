"""A run in a folder: what it writes, how it is resumed, how it is read again.

    config.json        the resolved config
    events.jsonl       what the run said, a line for each event
    summary.json       its figures, written last: a folder with a summary holds a finished run
    checkpoint.safetensors   the state of every client after the last saved round
    adapters/          a PEFT folder for each client and for the averaged model

Every file is written beside its place and renamed into it, so a run that dies leaves no half file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard

from torch import Tensor

from plait.config import Config
from plait.engines.checkpoint import load_rows, rounds_done, save_stack
from plait.engines.job import prepare
from plait.engines.simulate import Simulation
from plait.events import Evaluated, Event, RoundDone, from_line, to_line
from plait.figures import summarize
from plait.lookup import lookup
from plait.lora import Stack
from plait.machine.files import write_atomically

CHECKPOINT = "checkpoint.safetensors"


class Engine(Protocol):
    """What carries out a prepared run; it holds the state of the clients."""

    def rounds(self, first_round: int) -> Iterator[Event]:
        """Run from a round on. Between two events the state is whole, so it can be saved."""
        ...

    def save(self, path: Path, rounds_done: int) -> None:
        """Write a checkpoint after so many rounds."""
        ...

    def restore(self, path: Path) -> None:
        """Go back to a checkpoint."""
        ...

    def save_adapters(self, out: Path) -> None:
        """Write a PEFT folder for each client and for the averaged model."""
        ...


EngineName = Literal["simulate", "ray"]


def run(
    config: Config,
    out: Path | str | None = None,
    resume: bool = False,
    engine: EngineName = "simulate",
    workers: int | None = None,
) -> Iterator[Event]:
    """Run an experiment; with `out`, write the run folder as it goes.

    Args:
        config: What to run.
        out: The run folder; nothing is written without one.
        resume: Go on from the folder's checkpoint; a folder without one is started anew, and a
            finished one only yields its events.
        engine: What computes: all clients in this process, or a block of them in each worker of a
            Ray cluster. The numbers are the same, so the one can go on where the other stopped.
        workers: `ray`: the number of workers.

    Yields:
        The run's events, on resuming those that were recorded before too.

    Raises:
        ValueError: The config can't run, the folder is in use or belongs to another config, or
            workers die again and again.
        OSError: The folder can't be written.

    Example:
        >>> for event in run(Config(task="trec", rounds=2)):  # doctest: +SKIP
        ...     print(event)
    """
    open_engine = lookup(ENGINES, engine, "engine")
    folder = None if out is None else RunFolder.open(Path(out), config, resume)
    if folder and folder.summary_file.exists():
        yield from load_events(folder.path)
        return
    with open_engine(config, workers) as opened:
        yield from carry_out(opened, config, folder)


def _simulation(config: Config, workers: int | None) -> AbstractContextManager[Engine]:
    if workers is not None:
        raise ValueError("--workers is for --engine ray; a simulation is one process.")
    job = prepare(config)
    return nullcontext(Simulation(job, job.initial_stack()))


def _cluster(config: Config, workers: int | None) -> AbstractContextManager[Engine]:
    try:
        from plait.engines.cluster import Cluster
    except ImportError as error:
        raise ValueError("--engine ray needs Ray: pip install 'plait[ray]'.") from error
    return Cluster(config, workers, prepare)


ENGINES: dict[str, Callable[[Config, int | None], AbstractContextManager[Engine]]] = {
    "simulate": _simulation,
    "ray": _cluster,
}


def carry_out(engine: Engine, config: Config, folder: RunFolder | None) -> Iterator[Event]:
    """Run to the end; the result is left in the engine and, if there is one, in the folder.

    Args:
        engine: At the clients' common start.
        config: What the folder says was run.
        folder: As `RunFolder.open` returns it.

    Yields:
        As `run`.

    Raises:
        ValueError: Training diverged.
        OSError: The folder can't be written.
    """
    done: list[Event] = []
    if folder:
        # Only now: a config that can't run leaves nothing behind.
        folder.create(config)
        done = folder.rewind()
        if folder.checkpoint_file.exists():
            engine.restore(folder.checkpoint_file)
    yield from done
    first_round = sum(isinstance(event, RoundDone) for event in done)
    events = list(done)
    for event in engine.rounds(first_round):
        events.append(event)
        if folder:
            # Saved before it is announced: whoever stops listening here can resume from here.
            folder.record(event)
            if _completes_round(event, config) and config.saves_after(event.round):
                engine.save(folder.checkpoint_file, event.round + 1)
        yield event
    if folder:
        engine.save_adapters(folder.path / "adapters")
        folder.finish(summarize(config, events))


def load_run(path: Path | str) -> tuple[Config, list[Event], dict[str, Any]]:
    """The config, events and summary of a finished run.

    Raises:
        ValueError: The folder holds no finished run.
    """
    path = Path(path)
    summary = load_summary(path)
    return load_config(path), load_events(path), summary


def load_config(path: Path) -> Config:
    """The config of a run folder."""
    return Config.from_json(json.loads((path / "config.json").read_text()))


def load_summary(path: Path) -> dict[str, Any]:
    """The figures of a finished run.

    Raises:
        ValueError: The folder holds no finished run.
    """
    if not (path / "summary.json").is_file():
        raise ValueError(
            f"{path} holds no finished run; `plait run --resume --out {path}` goes on."
        )
    figures: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return figures


def load_events(path: Path) -> list[Event]:
    """The events recorded in a run folder; a last line that was cut short is left out."""
    lines = (path / "events.jsonl").read_text().splitlines(keepends=True)
    return [from_line(line) for line in lines if line.endswith("\n")]


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

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
    def rounds_done(self) -> int:
        """Rounds behind the checkpoint; 0 without one."""
        return rounds_done(self.checkpoint_file)

    @classmethod
    def open(cls, path: Path, config: Config, resume: bool) -> RunFolder:
        """Take a folder for a run, or take it up again; nothing is written yet.

        Raises:
            ValueError: It is in use, or was made by another config.
        """
        folder = cls(path)
        if (path / "config.json").exists():
            if not resume:
                raise ValueError(
                    f"{path} already holds a run; take another --out, or --resume to go on with it."
                )
            before, now = load_config(path).to_json(), config.to_json()
            changed = [key for key in now if before[key] != now[key]]
            if changed:
                raise ValueError(
                    f"{path} holds a run with other settings ({', '.join(changed)}); resume with "
                    "the same ones, or take another --out."
                )
            return folder
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"{path} is not an empty folder; take another --out.")
        return folder

    def create(self, config: Config) -> None:
        """Make the folder, unless it is there already."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "config.json").exists():
            text = json.dumps(config.to_json(), indent=2) + "\n"
            write_atomically(self.path / "config.json", text)

    def record(self, event: Event) -> None:
        """Add a line to the events."""
        with self.events_file.open("a") as file:
            file.write(to_line(event) + "\n")

    def save(self, stack: Stack, rounds_done: int, **beside: Tensor) -> None:
        """Write a checkpoint after so many rounds, and what is kept beside the state."""
        save_stack(stack, self.checkpoint_file, rounds_done, **beside)

    def restore(self, stack: Stack) -> list[Event]:
        """Bring `stack` to the last checkpoint; returns the events up to it."""
        if self.checkpoint_file.exists():
            load_rows(stack, self.checkpoint_file)
        return self.rewind()

    def rewind(self) -> list[Event]:
        """The events up to the last checkpoint.

        What was recorded after it is dropped: it will be said again.
        """
        if not self.checkpoint_file.exists():
            self.events_file.unlink(missing_ok=True)
            return []
        kept = [e for e in load_events(self.path) if getattr(e, "round", -1) < self.rounds_done]
        write_atomically(self.events_file, "".join(to_line(event) + "\n" for event in kept))
        return kept

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the figures; the checkpoint has done its duty."""
        write_atomically(self.summary_file, json.dumps(summary, indent=2) + "\n")
        self.checkpoint_file.unlink(missing_ok=True)


def _completes_round(event: Event, config: Config) -> TypeGuard[RoundDone | Evaluated]:
    """Whether nothing more will be said of the event's round."""
    if isinstance(event, RoundDone):
        return not config.evaluates_after(event.round)
    return isinstance(event, Evaluated) and event.round >= 0
