"""The loop over the rounds, and what it asks of whatever computes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from plait.engines.eval_schedule import EvalSchedule
from plait.events import Evaluated, Event, RoundDone, Started


class Engine(Protocol):
    """What carries out a prepared run; it holds the state of the clients, changed in place."""

    @property
    def started(self) -> Started:
        """The run's first event."""
        ...

    @property
    def schedule(self) -> EvalSchedule:
        """When clients are evaluated."""
        ...

    def round(self, round_: int) -> RoundDone:
        """Local training and mixing of a round; a `ValueError` if a loss is no longer finite."""
        ...

    def evaluate(self, round_: int) -> Evaluated:
        """How the clients do after a round; -1 is before the first."""
        ...

    def save(self, path: Path, rounds_done: int) -> None:
        """Write a checkpoint after so many rounds."""
        ...

    def restore(self, path: Path) -> None:
        """Go back to a checkpoint."""
        ...

    def save_adapters(self, out: Path, rounds_done: int) -> None:
        """Write a PEFT folder for each client and for the averaged model, after so many rounds."""
        ...


def all_rounds(
    engine: Engine, first_round: int = 0, evaluate_first: bool = False
) -> Iterator[Event]:
    """Run the rounds from `first_round` on; between two events the state is whole.

    Args:
        engine: At the state after so many rounds.
        first_round: The round to begin with.
        evaluate_first: Evaluate what the last round before it left.

    Raises:
        ValueError: A client's loss is no longer finite, or workers die again and again.
    """
    if first_round == 0:
        yield engine.started
    if first_round == 0 or evaluate_first:
        yield engine.evaluate(first_round - 1)
    for round_ in range(first_round, engine.schedule.rounds):
        yield engine.round(round_)
        if engine.schedule.after(round_):
            yield engine.evaluate(round_)
