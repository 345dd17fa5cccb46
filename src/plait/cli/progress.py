"""Watching runs as they go: a table that stays in place, or plain lines where there is no terminal.

`watch` loops over pairs of a label and an event: `plait run` has one label, `plait compare` one for
each method. What is shown is a function of the events seen so far; nothing here asks an engine.
Evaluations are steps as rounds are: `Started` says when they come, and what one takes is measured
for each of a model's rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from plait.engines.eval_schedule import EvalSchedule
from plait.events import Evaluated, Event, RoundDone, Started
from plait.figures import FIGURES, seconds

SCORES = ("accuracy_client_mean", "accuracy_client_min", "accuracy_averaged_model")
SHOWN_LINES = 14
"""A search for learning rates has many lines; the latest ones fit on a screen."""


@dataclass
class Line:
    """What is known of one label: how many of its runs began, the latest round and evaluation.

    Attributes:
        rounds: Rounds of each of its runs.
        evaluating: Whether the latest run is busy with an evaluation.
        every: Rounds between evaluations; 0 for none.
        rows: The rows of all evaluations but the last.
        all_rows: The rows of the last one.
        models: Models that are evaluated: the clients' and the averaged one.
    """

    rounds: int
    runs: int = 0
    round: int = 0
    evaluating: bool = False
    every: int = 1
    rows: int = 0
    all_rows: int = 0
    models: int = 1
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
                self.every, self.rows, self.evaluating = event.eval_every, event.eval_rows, True
                self.all_rows, self.models = event.held_out_rows, len(event.label_counts) + 1
            case RoundDone():
                self.round, self.active = event.round + 1, event.active
                self.evaluating = self.schedule.after(event.round)
            case Evaluated():
                self.evaluated, self.evaluating = event, False
                self.rows = self.rows or event.rows
                self.all_rows = max(self.all_rows, self.rows)

    @property
    def schedule(self) -> EvalSchedule:
        """When its runs evaluate."""
        return EvalSchedule(self.rounds, self.every or None, self.rows)

    @property
    def evaluations(self) -> int:
        """Evaluations of each of its runs: one before the first round, and those after rounds."""
        return 1 + sum(map(self.schedule.after, range(self.rounds)))

    @property
    def eval_work(self) -> int:
        """Rows that each of its runs evaluates, of all models; at the start these are all alike."""
        between = self.rows * (self.evaluations - 2)
        return self.rows + self.models * (between + self.all_rows)

    @property
    def doing(self) -> str:
        """What is under way."""
        return "evaluating" if self.evaluating else self.active

    @property
    def said_schedule(self) -> str:
        """When its runs evaluate, in words."""
        rows = f" on {self.rows} rows" if self.rows else ""
        ends = "before the first round and after the last"
        if not self.every:
            return f"evaluation {ends} only; --eval-every has more"
        often = "every round" if self.every == 1 else f"every {self.every} rounds"
        return f"evaluation {often}{rows}; {ends} always, then on all rows"

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
        evaluations: Evaluations done in all runs.
        seconds: What rounds took, and preparing.
        eval_seconds: What evaluations took.
        eval_work: Rows that they judged, of all models.
        clock: Tells the time in seconds.
    """

    rounds: int
    planned: Mapping[str, int]
    at_once: int = 1
    lines: dict[str, Line] = field(default_factory=dict)
    done: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    eval_seconds: float = 0.0
    eval_work: int = 0
    clock: Callable[[], float] = time.monotonic
    _seen_s: float = 0.0

    @property
    def runs(self) -> dict[str, int]:
        """Label -> how many runs it will have, as far as is known: a comparison may add some."""
        begun = {label: line.runs for label, line in self.lines.items()}
        return {k: max(self.planned.get(k, 1), begun.get(k, 0)) for k in {**self.planned, **begun}}

    def see(self, label: str, event: Event) -> None:
        """Take note of one event."""
        self.lines.setdefault(label, Line(self.rounds)).see(event)
        self._seen_s = self.clock()
        if not isinstance(event, Evaluated):
            self.done += isinstance(event, RoundDone)
            self.seconds += seconds(event)
            return
        self.evaluations += 1
        self.eval_seconds += event.seconds
        self.eval_work += event.rows * (1 if event.round < 0 else self.lines[label].models)

    @property
    def all_rounds(self) -> int:
        """Rounds of all runs together."""
        return self.rounds * sum(self.runs.values())

    @property
    def all_evaluations(self) -> int:
        """Evaluations of all runs together."""
        return self._in_all(lambda line: line.evaluations)

    def _in_all(self, of: Callable[[Line], int]) -> int:
        """A number of each run, over all runs; a label that has not begun has as much as others."""
        begun = {label: of(line) for label, line in self.lines.items()}
        usual = max(begun.values(), default=0)
        return sum(runs * begun.get(label, usual) for label, runs in self.runs.items())

    @property
    def left(self) -> str:
        """The time left, at the pace so far; never none while there is something to do."""
        rounds = max(0, self.all_rounds - self.done)
        if not self.done:
            return "-:--:--"
        if not rounds and self.evaluations >= self.all_evaluations:
            return "0:00:00"
        work = max(0, self._in_all(lambda line: line.eval_work) - self.eval_work)
        total = rounds * self.seconds / self.done
        total += work * self.eval_seconds / max(1, self.eval_work)
        since = self.clock() - self._seen_s
        return str(timedelta(seconds=max(1, round(total / self.at_once - since))))

    def plain(self, label: str) -> str:
        """The latest evaluation of a label in one line."""
        line = self.lines[label]
        mean, worst, averaged = line.scores
        run = f" run {line.runs}/{self.runs[label]}" if self.runs[label] > 1 else ""
        return (
            f"{label}{run}  round {line.round}/{self.rounds}  {line.metric}"
            f" {mean} (worst {worst})  averaged model {averaged}  left {self.left}"
        )

    def __rich__(self) -> RenderableType:
        """The table of all labels with a progress bar under it."""
        metric = next((line.metric for line in self.lines.values()), "accuracy")
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("method", no_wrap=True)
        for name in ("run", "round", "now", metric, "worst", "averaged model"):
            table.add_column(name, justify="right", no_wrap=True)
        for label in list(self.lines)[-SHOWN_LINES:]:
            table.add_row(*self._cells(label))
        bar = Table.grid(padding=(0, 2, 0, 0))
        bar.add_row(
            ProgressBar(
                total=self.all_rounds + self.all_evaluations,
                completed=self.done + self.evaluations,
                width=40,
            ),
            f"{self.done}/{self.all_rounds} rounds",
            f"{self.evaluations}/{self.all_evaluations} evaluations",
            f"{self.left} left",
        )
        return Group(table, Text(), bar)

    def _cells(self, label: str) -> tuple[str, ...]:
        line = self.lines[label]
        run, round_ = f"{line.runs}/{self.runs[label]}", f"{line.round}/{self.rounds}"
        return (label, run, round_, line.doing, *line.scores)


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
            _say_schedule(view, label, event, console)
            if isinstance(event, Evaluated):
                console.print(view.plain(label), highlight=False, soft_wrap=True)
        return
    with Live(view, console=console, refresh_per_second=4) as live:
        for label, event in said:
            view.see(label, event)
            _say_schedule(view, label, event, console)
            live.refresh()


def _say_schedule(view: View, label: str, event: Event, console: Console) -> None:
    """When runs evaluate, once for all that do alike."""
    line = view.lines[label]
    others = [one for name, one in view.lines.items() if name != label]
    said = line.runs > 1 or line.schedule in [one.schedule for one in others]
    if isinstance(event, Started) and not said:
        console.print(f"{label}: {line.said_schedule}", highlight=False, soft_wrap=True)
