"""Watching runs as they go: a table that stays in place, or plain lines where there is no terminal.

`watch` loops over pairs of a label and an event: `plait run` has one label, `plait compare` one for
each method. What is shown is a function of the events seen so far; nothing here asks an engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from plait.events import Evaluated, Event, RoundDone, Started
from plait.figures import FIGURES, seconds

SCORES = ("accuracy_client_mean", "accuracy_client_min", "accuracy_averaged_model")
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

    @property
    def scores(self) -> list[str]:
        """The `SCORES` of the latest evaluation, empty before the first."""
        figures, last = [FIGURES[name] for name in SCORES], self.evaluated
        return [one.shown(one.value(last)) if last else "" for one in figures]


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
        self.seconds += seconds(event)

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
        return str(timedelta(seconds=round(rounds * self.seconds / self.done)))

    def plain(self, label: str) -> str:
        """The latest evaluation of a label in one line."""
        line = self.lines[label]
        mean, worst, averaged = line.scores
        run = f" run {line.runs}/{self.planned[label]}" if self.planned[label] > 1 else ""
        return (
            f"{label}{run}  round {line.round}/{self.rounds}  {line.metric}"
            f" {mean} (worst {worst})  averaged model {averaged}  left {self.left}"
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
        line = self.lines[label]
        run, round_ = f"{line.runs}/{self.planned[label]}", f"{line.round}/{self.rounds}"
        return (label, run, round_, line.active, *line.scores)


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
