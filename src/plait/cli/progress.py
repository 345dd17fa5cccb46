"""Watching runs as they go: a table that stays in place, or plain lines where there is no terminal.

`watch` loops over pairs of a label and an event: `plait run` has one label, `plait compare` one for
each method. What is shown is a function of the events seen so far; nothing here asks an engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from plait.events import Evaluated, Event, RoundDone, Started

SHOWN_LINES = 14
"""A search for learning rates has many lines; the latest ones fit on a screen."""


@dataclass
class Line:
    """What is known of one label: how many of its runs began, the latest round and evaluation."""

    runs: int = 0
    round: int = 0
    active: str = ""
    metric: str = "accuracy"
    majority: float = 0.0
    evaluated: Evaluated | None = None

    def see(self, event: Event) -> None:
        """Take note of one event."""
        match event:
            case Started():
                self.runs, self.round, self.evaluated = self.runs + 1, 0, None
                self.metric, self.majority = event.metric, event.majority
            case RoundDone():
                self.round, self.active = event.round + 1, event.active
            case Evaluated():
                self.evaluated = event


@dataclass
class View:
    """All that has been seen so far.

    Attributes:
        rounds: Rounds of one run.
        planned: Label -> how many runs it will have.
        at_once: Runs at a time.
        lines: Label -> what is known of it, in the order in which they began.
        done: Rounds done in all runs.
        seconds: What they took, preparation and evaluation included.
    """

    rounds: int
    planned: Mapping[str, int]
    at_once: int = 1
    lines: dict[str, Line] = field(default_factory=dict)
    done: int = 0
    seconds: float = 0.0

    def see(self, label: str, event: Event) -> None:
        """Take note of one event."""
        self.lines.setdefault(label, Line()).see(event)
        self.done += isinstance(event, RoundDone)
        self.seconds += _seconds(event)

    @property
    def all_rounds(self) -> int:
        """Rounds of all runs together."""
        return self.rounds * sum(self.planned.values())

    @property
    def left(self) -> str:
        """The time left, at the pace so far."""
        if not self.done:
            return "-:--:--"
        rounds = max(0, self.all_rounds - self.done) / self.at_once
        seconds = rounds * self.seconds / self.done
        return str(timedelta(seconds=round(seconds)))

    def plain(self, label: str) -> str:
        """The latest evaluation of a label in one line."""
        line, last = self.lines[label], self.lines[label].evaluated
        assert last is not None
        run = f" run {line.runs}/{self.planned[label]}" if self.planned[label] > 1 else ""
        return (
            f"{label}{run}  round {line.round}/{self.rounds}  {line.metric}"
            f" {np.mean(last.scores):.3f} (worst {min(last.scores):.3f})"
            f"  averaged model {last.averaged_score:.3f}  left {self.left}"
        )

    def __rich__(self) -> RenderableType:
        """The table of all labels with a progress bar under it."""
        metric = next((line.metric for line in self.lines.values()), "accuracy")
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("method", no_wrap=True)
        for name in ("run", "round", "trains", metric, "worst", "averaged model"):
            table.add_column(name, justify="right", no_wrap=True)
        for label in list(self.lines)[-SHOWN_LINES:]:
            table.add_row(*self._cells(label))
        bar = Table.grid(padding=(0, 2, 0, 0))
        bar.add_row(
            ProgressBar(total=self.all_rounds, completed=self.done, width=40),
            f"{self.done}/{self.all_rounds} rounds",
            f"{self.left} left",
        )
        return Group(table, Text(), bar)

    def _cells(self, label: str) -> tuple[str, ...]:
        line, last = self.lines[label], self.lines[label].evaluated
        scores = (
            (f"{np.mean(last.scores):.3f}", f"{min(last.scores):.3f}", f"{last.averaged_score:.3f}")
            if last
            else ("", "", "")
        )
        run, round_ = f"{line.runs}/{self.planned[label]}", f"{line.round}/{self.rounds}"
        return (label, run, round_, line.active, *scores)


def watch(
    said: Iterable[tuple[str, Event]],
    rounds: int,
    planned: Mapping[str, int],
    console: Console,
    at_once: int = 1,
) -> None:
    """Loop over what runs say and show it.

    Args:
        said: Labels, such as the method's name, with events.
        rounds: Rounds of each run.
        planned: Label -> how many runs it will have, for the time left.
        console: Where to show it. On a terminal the table stays in place; elsewhere there is a
            line for each evaluation.
        at_once: Runs at a time.
    """
    view = View(rounds, planned, at_once)
    if not console.is_terminal:
        for label, event in said:
            view.see(label, event)
            if isinstance(event, Evaluated):
                console.print(view.plain(label), highlight=False, soft_wrap=True)
        return
    with Live(view, console=console, refresh_per_second=4) as live:
        for label, event in said:
            view.see(label, event)
            live.refresh()


def _seconds(event: Event) -> float:
    match event:
        case RoundDone():
            return event.train_seconds + event.mix_seconds
        case Started() | Evaluated():
            return event.seconds
    return 0.0
