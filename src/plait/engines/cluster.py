"""A run on a Ray cluster: a worker for each block of clients, and a driver that passes references.

What the blocks hand each other (block.py) lies in Ray's object store and goes from worker to
worker; here only references to it are seen, events, and the small numbers that those are made of.

A worker that dies is started again by Ray. All blocks then go back to the last checkpoint, or to
the start, and do the rounds since once more: the same ones, so the run says the same.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from plait.config import Config, Machine
from plait.engines.block import Block, Part
from plait.engines.checkpoint import rounds_done
from plait.engines.job import Job
from plait.events import Evaluated, RoundDone, all_active, together
from plait.machine.files import sync
from plait.metrics import diagnose

ATTEMPTS = 3
"""So often a step of a run is tried before the run gives up."""

Result = TypeVar("Result")
Ref = Any
"""A reference to what a worker has returned, or will."""


class Cluster:
    """The workers of a run, while the context is open: an `Engine`.

    Uses the cluster that Ray finds, by RAY_ADDRESS or on this machine, or starts one here.
    """

    def __init__(self, config: Config, machine: Machine, make_job: Callable[[Config], Job]) -> None:
        """Nothing is started yet.

        Args:
            config: What to run.
            machine: Its workers: into how many blocks the clients go.
            make_job: Prepares the run, at each worker.

        Raises:
            ValueError: No number of workers, or one that can't be.
        """
        workers = machine.workers
        if workers is None:
            raise ValueError(
                "--engine ray needs --workers: one for each GPU, or for every few cores."
            )
        if not 1 <= workers <= config.clients:
            raise ValueError(
                f"--workers is {workers}; take 1 to {config.clients}, the number of clients."
            )
        self.config, self.machine, self.make_job = config, machine, make_job
        self.bounds = bounds(config.clients, workers)
        self.saved: Path | None = None
        self.asked: list[Ref] = []

    def __enter__(self) -> Cluster:
        """Start the workers.

        Raises:
            ValueError: The cluster has no place for them, or the config can't run.
            OSError: There is no cluster at RAY_ADDRESS.
        """
        self.started_ray = not ray.is_initialized()
        if self.started_ray:
            # Ray would report its use to its makers.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        try:
            share = share_of_cluster(len(self.bounds), self.machine.device)
            worker = ray.remote(max_restarts=-1, **share)(Block)
            self.blocks = [
                worker.remote(self.make_job, self.config, self.bounds, k, share["num_cpus"])
                for k in range(len(self.bounds))
            ]
            self.started, self.schedule, self.sites = self._surely(self._begin, 0)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Stop the workers, and Ray if it was started here."""
        for block in getattr(self, "blocks", []):
            ray.kill(block)
        if self.started_ray:
            ray.shutdown()

    # -- what a run asks for

    def round(self, round_: int) -> RoundDone:
        """Local training and mixing of a round.

        Raises:
            ValueError: A client's loss is no longer finite, or workers die again and again.
        """
        return self._surely(partial(self._round, round_), round_)

    def evaluate(self, round_: int) -> Evaluated:
        """How the clients do after a round.

        Raises:
            ValueError: Workers die again and again.
        """
        return self._surely(partial(self._evaluation, round_), round_ + 1)

    def save(self, path: Path, rounds_done: int) -> None:
        """Have all blocks write one checkpoint together."""
        self._surely(partial(self._save, path.resolve(), rounds_done), rounds_done)

    def restore(self, path: Path) -> None:
        """Have all blocks go back to a checkpoint, of whatever engine and blocks."""
        self.saved = path.resolve()
        self._surely(self._begin, 0)

    def save_adapters(self, out: Path, rounds_done: int) -> None:
        """Have every block write the adapters of its clients."""
        self._surely(partial(self._save_adapters, out.resolve()), rounds_done)

    # -- the same, by workers that may die

    def _surely(self, act: Callable[[], Result], rounds_done: int) -> Result:
        """Do what needs the state after so many rounds; if a worker dies, from a checkpoint on."""
        for attempt in range(ATTEMPTS):
            try:
                if attempt:
                    self._go_back(rounds_done)
                self.asked = []
                return act()
            except RayError as error:
                lost = error
        why = str(lost).splitlines()[0]
        raise ValueError(
            f"A worker died {ATTEMPTS} times after {rounds_done} rounds: {why} "
            "If memory is short, take more --workers, or fewer on a machine; --resume goes on."
        )

    def _go_back(self, to_round: int) -> None:
        """Bring every block to the state after so many rounds, from the last checkpoint on."""
        # What is under way fails or ends first: it must not come after the new beginning.
        ray.wait(self.asked, num_returns=len(self.asked))
        self._begin()
        for round_ in range(rounds_done(self.saved) if self.saved else 0, to_round):
            self._round(round_)

    def _begin(self) -> Any:
        # The only call that waits for a worker to be back; the others fail without it.
        answers = [self._ask(b.begin, self.saved, max_task_retries=-1)[0] for b in self.blocks]
        return self._get(answers)[0]

    def _round(self, round_: int) -> RoundDone:
        count = len(self.blocks)
        trained = [self._ask(b.train, round_, returns=count + 1) for b in self.blocks]
        mixed = [
            self._ask(block.mix, round_, *(rows[1 + k] for rows in trained))
            for k, block in enumerate(self.blocks)
        ]
        sums = [answer[0] for answer in trained + mixed]
        measured = [self._ask(b.measure, round_, *sums, returns=count + 1) for b in self.blocks]
        added = [
            self._ask(block.add_up, *(crosses[1 + k] for crosses in measured))
            for k, block in enumerate(self.blocks)
        ]
        parts, crosses = (self._get([answer[0] for answer in x]) for x in (measured, added))
        return merged(parts, crosses, self.sites)

    def _evaluation(self, round_: int) -> Evaluated:
        first, *others = self.blocks
        answers = [self._ask(first.evaluate, round_, *self._sums())]
        answers += [self._ask(block.evaluate, round_) for block in others]
        return together(self._get([answer[0] for answer in answers]))

    def _save(self, path: Path, rounds_done: int) -> None:
        partial_path = path.with_name(path.name + ".partial")
        laid_out = self._ask(self.blocks[0].lay_out, partial_path, rounds_done)
        written = [self._ask(b.write_rows, partial_path, *laid_out)[0] for b in self.blocks]
        self._get(written)
        partial_path.replace(path)
        sync(path.parent)
        self.saved = path

    def _save_adapters(self, out: Path) -> None:
        first, *others = self.blocks
        written = [self._ask(first.save_adapters, out, *self._sums())]
        written += [self._ask(block.save_adapters, out) for block in others]
        self._get([answer[0] for answer in written])

    def _sums(self) -> list[Ref]:
        return [self._ask(block.towards_mean)[0] for block in self.blocks]

    # -- Ray

    def _ask(self, method: Any, *args: Any, returns: int = 1, **options: Any) -> list[Ref]:
        """Call a worker's method; references to what it returns."""
        refs = method.options(num_returns=returns, **options).remote(*args)
        refs = refs if returns > 1 else [refs]
        self.asked.append(refs[0])
        return list(refs)

    def _get(self, refs: list[Ref]) -> Any:
        """What is behind references.

        Raises:
            RayError: A worker died.
            Exception: What a worker raised.
        """
        try:
            return ray.get(refs)
        except RayTaskError as error:
            raise error.cause from None


def bounds(num_clients: int, workers: int) -> list[range]:
    """The clients of each worker: one after another, and as many for each, to within one.

    Example:
        >>> bounds(7, 2)
        [range(0, 3), range(3, 7)]
    """
    ends = np.linspace(0, num_clients, workers + 1).astype(int).tolist()
    return [range(*pair) for pair in pairwise(ends)]


def share_of_cluster(workers: int, device: str) -> dict[str, int]:
    """What of the cluster each worker gets: a GPU where there are any, else as many cores each.

    Raises:
        ValueError: There is not enough.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    on_gpu = device in ("auto", "cuda") and any("GPU" in node for node in nodes)
    kind = "GPU" if on_gpu else "CPU"
    counts = [int(node.get(kind, 0)) for node in nodes]
    # A worker lies on one machine, and machines may differ.
    shares = [c for c in range(1, max(counts) + 1) if sum(n // c for n in counts) >= workers]
    if not shares:
        raise ValueError(
            f"The cluster has {sum(counts)} {kind}s for {workers} workers; take fewer --workers."
        )
    return {"num_gpus": 1, "num_cpus": 1} if on_gpu else {"num_cpus": shares[-1]}


def merged(
    parts: Sequence[Part], crosses: Sequence[list[list[float]]], sites: Sequence[str]
) -> RoundDone:
    """The event of a round.

    Args:
        parts: Of every block.
        crosses: What `add_up` returned at every block.
        sites: The names of the adapted layers.
    """
    said = [part.done for part in parts]
    layers = torch.from_numpy(np.concatenate([part.layers for part in parts], axis=3))
    k = len(parts)
    cross_terms = [
        [crosses[site % k][moment][site // k] for site in range(len(sites))] for moment in (0, 1)
    ]
    # The block that trains longest waits least for the others: it says how long a round takes.
    train_seconds = max(one.train_seconds for one in said)
    return dataclasses.replace(
        said[0],
        active=all_active(said),
        train_losses=[loss for one in said for loss in one.train_losses],
        edges=[edge for one in said for edge in one.edges],
        sent_bytes=sum(one.sent_bytes for one in said),
        worker_bytes=sum(one.worker_bytes for one in said),
        train_seconds=train_seconds,
        mix_seconds=max(one.train_seconds + one.mix_seconds for one in said) - train_seconds,
        **vars(diagnose(sites, layers, cross_terms)),
    )
