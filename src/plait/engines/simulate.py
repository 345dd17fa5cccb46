"""All clients on one machine, as one stack: nothing needs to be exchanged."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from plait.engines.checkpoint import load_rows, save_stack
from plait.engines.eval_schedule import EvalSchedule
from plait.engines.evaluation import Evaluator, evaluation
from plait.engines.job import Job
from plait.engines.local_training import evaluate
from plait.engines.rounds import all_rounds
from plait.engines.steps import (
    Phase,
    active_of,
    edges_of,
    local_steps,
    mix,
    publish,
    round_done,
    train_round,
)
from plait.events import Evaluated, Event, RoundDone, Started
from plait.lora import Stack
from plait.metrics import all_pairs, diagnostics, pair_distances
from plait.mixing import neighbour_weights
from plait.model.peft_adapters import save_adapters
from plait.privacy import seeded_noise


@dataclass(frozen=True)
class Simulation:
    """A prepared run and its clients' state, changed in place: an `Engine`."""

    job: Job
    stack: Stack
    phase: Phase = local_steps
    evaluator: Evaluator = evaluate

    @property
    def started(self) -> Started:
        """The first event."""
        return self.job.started

    @property
    def schedule(self) -> EvalSchedule:
        """When clients are evaluated."""
        return self.job.evaluations

    def round(self, round_: int) -> RoundDone:
        """Local training and mixing."""
        job, stack = self.job, self.stack
        begin = time.perf_counter()
        everyone = range(job.config.clients)
        active = active_of(job, stack, round_, everyone)
        losses = train_round(
            job, stack, round_, everyone, seeded_noise(job.config.seed), self.phase
        )
        publish(job, stack.state, round_, everyone)
        trained = time.perf_counter()
        W = job.schedule(round_)
        before = stack.factors
        stack.state |= mix(job, stack.state, stack.state, neighbour_weights(W), round_, everyone)
        mixed = time.perf_counter()
        edges = edges_of(W, everyone)
        return round_done(
            job,
            round_,
            losses,
            edges,
            job.sent_bytes(round_, edges),
            active,
            **vars(diagnostics(job.backbone.layout, before, stack.factors, W)),
            pairs_apart=all_pairs(pair_distances(job.backbone.layout, before)),
            train_seconds=trained - begin,
            mix_seconds=mixed - trained,
        )

    def evaluate(self, round_: int) -> Evaluated:
        """Every client's own model, and the averaged one."""
        everyone = range(self.job.config.clients)
        return evaluation(self.job, self.stack, everyone, round_, self.evaluator)

    def save(self, path: Path, rounds_done: int) -> None:
        """Write the checkpoint of all clients."""
        save_stack(self.stack, path, rounds_done)

    def restore(self, path: Path) -> None:
        """Go back to a checkpoint."""
        load_rows(self.stack, path)

    def save_adapters(self, out: Path, rounds_done: int) -> None:
        """Write every client's adapter and the averaged one."""
        save_adapters(self.job.backbone, self.stack, self.job.config, out)


def simulate(job: Job, stack: Stack, first_round: int = 0) -> Iterator[Event]:
    """Run the rounds from `first_round` on, changing `stack` in place; see `all_rounds`."""
    return all_rounds(Simulation(job, stack), first_round)
