"""Runs side by side in one process, whose local phases and evaluations are computed as one.

Each run has a thread, of which one computes at a time; the others wait for their turn. When all of
them have come to a local phase or an evaluation, those with the same model and rows, and phases
with the same kind of steps, are computed together, as if they were one run with all the clients.
Rounds, seeds, learning rates, graphs and methods may differ. No client's numbers depend on the
others', so each run's are those of a run alone, on a CPU to the last bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.data.objectives import Objective
from plait.data.tokens import Tokens
from plait.engines.job import Job
from plait.engines.local_training import Work, evaluate, local_phases
from plait.engines.steps import Turns, check_finite
from plait.factors import Factor
from plait.lora import Stack
from plait.model.backbone import Backbone


@dataclass(eq=False)
class _Phase:
    """A local phase that a run waits for, and then its losses (n, K)."""

    job: Job
    work: Work
    result: np.ndarray | None = None
    error: BaseException | None = None

    def fits(self, other: object) -> bool:
        """Whether both can be computed together."""
        return isinstance(other, _Phase) and self._kind == other._kind

    @property
    def _kind(self) -> tuple[object, ...]:
        config = self.work.config
        return (
            id(self.job.backbone), id(self.job.train), tuple(self.work.turns),
            config.batch_size, config.lora_dropout, self.job.method.optimizer,
        )  # fmt: skip

    @staticmethod
    def compute(some: Sequence[_Phase]) -> Sequence[np.ndarray]:
        """The results of some that fit."""
        job = some[0].job
        works = [one.work for one in some]
        return local_phases(job.backbone, job.train, works, job.method.optimizer)


@dataclass(eq=False)
class _Evaluation:
    """An evaluation that a run waits for, and then its losses and answers."""

    backbone: Backbone
    factors: Mapping[Factor, Tensor]
    tokens: Tokens
    objective: Objective | None
    result: tuple[Tensor, Tensor] | None = None
    error: BaseException | None = None

    def fits(self, other: object) -> bool:
        """Whether both can be computed together."""
        return (
            isinstance(other, _Evaluation)
            and self.backbone is other.backbone
            and self.objective == other.objective
            and np.array_equal(self.tokens.offsets, other.tokens.offsets)
            and np.array_equal(self.tokens.ids, other.tokens.ids)
            and np.array_equal(self.tokens.targets, other.tokens.targets)
            and np.array_equal(self.tokens.asked_offsets, other.tokens.asked_offsets)
        )

    @staticmethod
    def compute(some: Sequence[_Evaluation]) -> Sequence[tuple[Tensor, Tensor]]:
        """The results of some that fit."""
        first, counts = some[0], [len(one.factors[Factor.A]) for one in some]
        factors = {f: torch.cat([one.factors[f] for one in some]) for f in first.factors}
        found = evaluate(first.backbone, factors, first.tokens, first.objective)
        return list(zip(*(one.split(counts) for one in found), strict=True))


@dataclass(eq=False)
class StackedRuns:
    """The runs that wait for one another; `count` of them are to come."""

    count: int
    _waiting: list[_Phase | _Evaluation] = field(default_factory=list)
    _turn: threading.Condition = field(default_factory=threading.Condition)
    _stopped: bool = False

    def carry_out(self, run: Callable[[], None]) -> None:
        """A run from its begin to its end, whatever becomes of it, in the caller's thread."""
        with self._turn:
            try:
                run()
            finally:
                self.count -= 1
                self._compute_if_all_wait()

    def stop(self) -> None:
        """Have each run end where it waits next, as one that was killed."""
        self._stopped = True
        with self._turn:
            self._turn.notify_all()

    def phase(
        self, job: Job, stack: Stack, round_: int, clients: Sequence[int], turns: Turns
    ) -> np.ndarray:
        """A `Phase` (steps.py): the local steps of one of the runs.

        Raises:
            ValueError: The run's training diverged.
            InterruptedError: It was stopped.
        """
        work = Work(stack, turns, round_, job.shares, clients, job.config)
        losses: np.ndarray = self._result(_Phase(job, work)).mean(axis=1)
        check_finite(losses, clients, round_, job.config.lr)
        return losses

    def evaluate(
        self,
        backbone: Backbone,
        factors: Mapping[Factor, Tensor],
        tokens: Tokens,
        objective: Objective | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `local_training.evaluate`, of the models of one of the runs.

        Raises:
            InterruptedError: It was stopped.
        """
        found: tuple[Tensor, Tensor] = self._result(
            _Evaluation(backbone, factors, tokens, objective)
        )
        return found

    def _result(self, asked: _Phase | _Evaluation) -> Any:
        self._waiting.append(asked)
        self._compute_if_all_wait()
        self._turn.wait_for(lambda: asked not in self._waiting or self._stopped)
        if self._stopped:
            raise InterruptedError
        if asked.error:
            raise asked.error
        return asked.result

    def _compute_if_all_wait(self) -> None:
        if self._stopped or len(self._waiting) < self.count:
            return
        while self._waiting:
            first = self._waiting[0]
            some = [one for one in self._waiting if one.fits(first)]
            self._waiting = [one for one in self._waiting if one not in some]
            try:
                for one, result in zip(some, first.compute(some), strict=True):  # type: ignore[arg-type]
                    one.result = result  # type: ignore[assignment]
            except BaseException as error:  # each of these runs ends with it
                for one in some:
                    one.error = error
        self._turn.notify_all()
