"""What carries out the runs of a sweep: this process, or several on this machine.

An executor takes cells and gives each back when it has ended, in any order, with the reason if it
failed. It knows nothing of what the cells are for.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context, parent_process

from plait.backbone import resolve_device
from plait.events import Started
from plait.plan import Cell
from plait.runs import run


@dataclass(frozen=True)
class Failure:
    """Why a run has no result.

    Attributes:
        reason: In words.
        diverged: Training diverged: it would again, so the run is not tried again.
    """

    reason: str
    diverged: bool = False


Ended = tuple[Cell, Failure | None]
Executor = Callable[[Sequence[Cell]], Iterator[Ended]]


def here(cells: Sequence[Cell]) -> Iterator[Ended]:
    """Carry the cells out in this process, one after the other."""
    for cell in cells:
        yield cell, attempt(cell)


@contextmanager
def in_processes(jobs: int) -> Iterator[Executor]:
    """Carry cells out in so many processes, which share the cores between them.

    The processes stay until the end of the context, with the data and the model of their last
    cell. One that is killed, as by a system that runs out of memory, costs its own cell only.
    """
    threads = max(1, num_cores() // jobs)
    # A pool of one process each: a process that dies breaks its pool.
    lanes = [_lane(threads) for _ in range(jobs)]

    def carry_out(cells: Sequence[Cell]) -> Iterator[Ended]:
        waiting = deque(cells)
        running: dict[Future[Failure | None], tuple[Cell, int]] = {}

        def give_work(number: int) -> None:
            if waiting:
                cell = waiting.popleft()
                running[lanes[number].submit(attempt, cell)] = cell, number

        for number in range(jobs):
            give_work(number)
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                cell, number = running.pop(future)
                try:
                    failure = future.result()
                except BrokenProcessPool:
                    failure = Failure("Its process was killed; is there enough memory?")
                    lanes[number] = _lane(threads)
                give_work(number)
                yield cell, failure

    try:
        yield carry_out
    finally:
        for lane in lanes:
            lane.shutdown(cancel_futures=True)


def executor_for(device: str, jobs: int) -> AbstractContextManager[Executor]:
    """The executor for a device and a number of jobs; 0 for what this machine does best.

    On a CPU that is a process with one thread for each core. A graphics card is given to one run at
    a time.
    """
    if jobs < 0:
        raise ValueError(f"jobs is {jobs}; give 1 or more, or 0 for what suits the machine.")
    jobs = jobs or (num_cores() if resolve_device(device).type == "cpu" else 1)
    return nullcontext(here) if jobs == 1 else in_processes(jobs)


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def attempt(cell: Cell) -> Failure | None:
    """Run a cell, or go on with it; nothing that goes wrong with it is raised."""
    began = False
    try:
        for event in run(cell.config, cell.folder, resume=True):
            began = began or isinstance(event, Started)
    except ValueError as error:
        # What can't run is refused before the first event; after it only training can go wrong.
        return Failure(str(error), diverged=began)
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}")
    return None


def _lane(threads: int) -> ProcessPoolExecutor:
    # Not forked: torch's threads don't survive that.
    return ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=_settle, initargs=(threads,)
    )


def _settle(threads: int) -> None:
    """Prepare a process: its threads, and that it ends with the process that started it."""
    import torch

    torch.set_num_threads(threads)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        # Else a sweep that was killed and started again would find its folders written to.
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
