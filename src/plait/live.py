"""Watching runs as they go: a table that stays in place, or plain lines where there is no terminal.

`watch` loops over pairs of a label and an event: `plait run` has one label, `plait compare` one for
each method. What is shown is a function of the events seen so far; nothing here asks an engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from plait.events import Evaluated, Event, RoundDone, Started


@dataclass
class Line:
    """What is known of one label: its latest round and evaluation, and how many runs it began."""

    runs: int = 0
    round: int = 0
    rounds: int = 0
    active: str = ""
    metric: str = "accuracy"
    evaluated: Evaluated | None = None


@dataclass
class Watched:
    """All that has been seen so far.

    Attributes:
        num_rounds: Rounds of all runs together, for the time left.
        lines: Label -> its line, in the order of their first events.
        done: Rounds done in all runs.
        seconds: What they took, preparation and evaluation included.
    """

    num_rounds: int
    lines: dict[str, Line] = field(default_factory=dict)
    done: int = 0
    seconds: float = 0.0

    def see(self, label: str, event: Event) -> None:
        """Take note of one event."""
        line = self.lines.setdefault(label, Line())
        match event:
            case Started():
                line.runs, line.round, line.metric = line.runs + 1, 0, event.metric
                self.seconds += event.seconds
            case RoundDone():
                line.round, line.active = event.round + 1, event.active
                self.done += 1
                self.seconds += event.train_seconds + event.mix_seconds
            case Evaluated():
                line.evaluated = event
                self.seconds += event.seconds

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far; None before the first round."""
        if not self.done:
            return None
        return max(0, self.num_rounds - self.done) * self.seconds / self.done
