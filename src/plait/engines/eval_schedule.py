"""After which rounds to evaluate, and on how many rows, so that it doesn't eat the run.

What it costs is counted in texts that go forward through the model: a training step takes each of
its texts forward and back, which is two, an evaluation each of its rows once for every client and
for the averaged model. Before the first round all models are alike and are computed once.
"""

from __future__ import annotations

from dataclasses import dataclass

from plait.config import Config

SHARE = 0.25
"""The most of a run's operations that evaluation takes by default."""

FEW_ROWS = 256
"""Rows between the first and the last round, where all of them would leave too few evaluations."""

EVERY = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))


@dataclass(frozen=True)
class EvalSchedule:
    """When a run evaluates.

    Attributes:
        rounds: Rounds of the run.
        every: Rounds between evaluations; None for none but before the first and after the last.
        rows: How many rows are evaluated between those two; None for all.
    """

    rounds: int
    every: int | None
    rows: int | None

    def after(self, round_: int) -> bool:
        """Whether the clients are evaluated after round `round_`, counted from 0."""
        due = self.every is not None and (round_ + 1) % self.every == 0
        return due or round_ + 1 == self.rounds

    def rows_after(self, round_: int) -> int | None:
        """How many rows are evaluated then; None for all."""
        return None if round_ + 1 == self.rounds else self.rows


def eval_schedule(config: Config, num_rows: int, texts_of_row: float = 1) -> EvalSchedule:
    """What a config asks for, or what takes at most `SHARE` of the run where it asks for nothing.

    Args:
        config: Its `eval_every` and `eval_rows`, and what training costs.
        num_rows: Rows of the evaluated split.
        texts_of_row: How many texts are read to judge one: more where it has options.

    Example:
        >>> eval_schedule(Config(local_steps=5, rounds=50), num_rows=872)
        EvalSchedule(rounds=50, every=10, rows=256)
    """
    if config.eval_every is not None:
        return EvalSchedule(config.rounds, config.eval_every, config.eval_rows)
    trained = 2 * config.rounds * config.clients * config.local_steps * config.batch_size
    models = texts_of_row * (config.clients + 1)
    left = trained * SHARE / (1 - SHARE) - (texts_of_row + models) * num_rows

    def fits(every: int, rows: int) -> bool:
        return models * rows * ((config.rounds - 1) // every) <= left

    few = config.eval_rows or FEW_ROWS
    for rows in dict.fromkeys((min(config.eval_rows or num_rows, num_rows), min(few, num_rows))):
        often = next(
            (every for every in EVERY if every < config.rounds and fits(every, rows)), None
        )
        # All rows, if that leaves ten points of a curve.
        if often and (rows == min(few, num_rows) or often <= config.rounds / 10):
            return EvalSchedule(config.rounds, often, None if rows == num_rows else rows)
    return EvalSchedule(config.rounds, None, None)
