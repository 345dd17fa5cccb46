"""What carries out the runs of a comparison or a sweep: this process, or several on this machine.

An executor takes cells and says what their runs say, and of each at last that it has ended, with
the reason if it failed. It knows nothing of what the cells are for.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue

import torch

from plait.config import THIS_MACHINE, Config, Machine
from plait.data.sources import say
from plait.engines.job import shared_settings
from plait.engines.stacked_runs import StackedRuns
from plait.events import Event, Started
from plait.experiments.cell_state import Failure
from plait.experiments.plan import Cell
from plait.machine.devices import resolve_device
from plait.machine.process_settings import configure_process
from plait.runs.loggers import logged
from plait.runs.run import OpenEngine, Run, simulation

STACKED = 16
"""Runs in one stack on a graphics card, if not said otherwise."""


@dataclass(frozen=True)
class CellEnded:
    """A run's last word."""

    failure: Failure | None = None


CellSaid = tuple[Cell, Event | CellEnded]
Executor = Callable[[Sequence[Cell]], Iterator[CellSaid]]


def here(
    cells: Sequence[Cell], loggers: Sequence[str] = (), machine: Machine = THIS_MACHINE
) -> Iterator[CellSaid]:
    """Carry the cells out in this process, one after the other, and write to loggers."""
    for cell in cells:
        for said in _told(cell, loggers, machine):
            yield cell, said


def in_one_stack(
    cells: Sequence[Cell],
    runs: int,
    loggers: Sequence[str] = (),
    machine: Machine = THIS_MACHINE,
) -> Iterator[CellSaid]:
    """Carry cells out in this process, so many at once, their local phases computed as one.

    Where memory doesn't hold so many, half as many; what a run has said it doesn't say again.
    """
    for waiting in _alike(cells):
        at_once, told = runs, Counter[Cell]()
        while waiting:
            some, waiting = waiting[:at_once], waiting[at_once:]
            again = yield from _fitting(_stacked(some, loggers, machine), told, len(some))
            if again:
                at_once = (len(some) + 1) // 2
                say(f"{len(some)} runs at once don't fit into memory; now {at_once} at a time.")
                waiting = again + waiting


def _fitting(
    said: Iterator[CellSaid], told: Counter[Cell], runs: int
) -> Generator[CellSaid, None, list[Cell]]:
    """What cells of a stack of so many runs say for the first time.

    Returns:
        Those that are to be tried in a smaller stack.
    """
    again: list[Cell] = []
    saying: Counter[Cell] = Counter()
    for cell, one in said:
        if isinstance(one, CellEnded) and one.failure and one.failure.out_of_memory and runs > 1:
            again.append(cell)
            continue
        saying[cell] += 1
        if saying[cell] > told[cell]:
            told[cell] += 1
            yield cell, one
    return again


def _stacked(cells: Sequence[Cell], loggers: Sequence[str], machine: Machine) -> Iterator[CellSaid]:
    """All of the cells at once."""
    said: SimpleQueue[CellSaid] = SimpleQueue()
    stacked = StackedRuns(len(cells))
    engine = partial(simulation, phase=stacked.phase, evaluator=stacked.evaluate)

    def tell(cell: Cell) -> None:
        try:
            for one in _told(cell, loggers, machine, engine):
                said.put((cell, one))
        except BaseException as error:  # such as SystemExit: nobody would hear of it
            said.put((cell, CellEnded(Failure(f"{type(error).__name__}: {error}"))))

    threads = [
        threading.Thread(target=stacked.carry_out, args=(partial(tell, cell),), daemon=True)
        for cell in cells
    ]
    for thread in threads:
        thread.start()
    left = len(cells)
    try:
        while left:
            cell, one = said.get()
            left -= isinstance(one, CellEnded)
            yield cell, one
    finally:
        stacked.stop()
        for thread in threads:
            thread.join()


def _alike(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that share data and model, in their order."""
    alike: dict[Config, list[Cell]] = {}
    for cell in cells:
        alike.setdefault(shared_settings(cell.config), []).append(cell)
    return [*alike.values()]


@contextmanager
def in_processes(
    jobs: int, loggers: Sequence[str] = (), machine: Machine = THIS_MACHINE
) -> Iterator[Executor]:
    """Carry cells out in so many processes, which share the cores between them.

    The processes stay until the end of the context, with the data and the model of their last
    cell. One that is killed, as by a system that runs out of memory, costs its own cell only.
    """
    threads = max(1, num_cores() // jobs)
    idle: list[_Lane] = []
    busy: dict[Connection, tuple[_Lane, Cell]] = {}

    def carry_out(cells: Sequence[Cell]) -> Iterator[CellSaid]:
        waiting = deque(cells)
        while waiting or busy:
            while waiting and len(busy) < jobs:
                lane = idle.pop() if idle else _Lane(threads, loggers, machine)
                cell = waiting.popleft()
                lane.pipe.send(cell)
                busy[lane.pipe] = lane, cell
            for lane, cell in [busy[pipe] for pipe in wait(busy)]:  # type: ignore[index]
                try:
                    said = lane.pipe.recv()
                except (EOFError, ConnectionResetError):
                    del busy[lane.pipe]
                    said = CellEnded(Failure("Its process was killed; is there enough memory?"))
                else:
                    if isinstance(said, CellEnded):
                        del busy[lane.pipe]
                        idle.append(lane)
                yield cell, said

    try:
        yield carry_out
    finally:
        for lane in idle:
            lane.close()
        for lane, _ in busy.values():
            lane.kill()


def executor_for(
    jobs: int, loggers: Sequence[str] = (), machine: Machine = THIS_MACHINE
) -> AbstractContextManager[Executor]:
    """The executor for so many runs at a time, which write to loggers.

    On a CPU that is a process for each, on a graphics card all in one stack.
    """
    stacks = machine.engine == "simulate" and resolve_device(machine.device).type != "cpu"
    if jobs > 1 and stacks:
        return nullcontext(partial(in_one_stack, runs=jobs, loggers=loggers, machine=machine))
    if jobs == 1:
        return nullcontext(partial(here, loggers=loggers, machine=machine))
    return in_processes(jobs, loggers, machine)


def num_jobs(device: str, jobs: int, runs: int | None = None) -> int:
    """How many of so many runs to carry out at a time: `jobs`, or if it is 0 what is best here.

    On a CPU that is a process with one thread for each core, on a graphics card a stack of
    `STACKED` runs.

    Raises:
        ValueError: `jobs` is below 0.
    """
    if jobs < 0:
        raise ValueError(f"jobs is {jobs}; give 1 or more, or 0 for what suits the machine.")
    best = num_cores() if resolve_device(device).type == "cpu" else STACKED
    return jobs or max(1, min(best, runs or best))


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _told(
    cell: Cell, loggers: Sequence[str], machine: Machine, engine: OpenEngine | None = None
) -> Iterator[Event | CellEnded]:
    """What a run says, or goes on to say; nothing that goes wrong with it is raised."""
    began = False
    try:
        said = Run(cell.config, cell.folder, resume=True, machine=machine, engine=engine)
        for event in logged(said, loggers, cell.config, cell.folder):
            began = began or isinstance(event, Started)
            yield event
    except (ValueError, OSError) as error:
        # What can't run is refused before the first event; after it only training can go wrong.
        yield CellEnded(Failure(str(error), diverged=began and isinstance(error, ValueError)))
    except (MemoryError, torch.OutOfMemoryError) as error:
        yield CellEnded(Failure(f"{type(error).__name__}: {error}", out_of_memory=True))
    except Exception as error:
        traceback.print_exc()
        yield CellEnded(Failure(f"{type(error).__name__}: {error}"))
    else:
        yield CellEnded()


class _Lane:
    """A process that carries out a cell at a time, and the pipe to it."""

    def __init__(self, threads: int, loggers: Sequence[str], machine: Machine) -> None:
        # Not forked: torch's threads don't survive that.
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, threads, loggers, machine), daemon=True
        )
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """Let it end, now that there is nothing more to do."""
        self.pipe.close()
        self._process.join()

    def kill(self) -> None:
        """End it in the middle of a run, whose folder can be gone on with."""
        self._process.terminate()
        self.close()


def _serve(pipe: Connection, threads: int, loggers: Sequence[str], machine: Machine) -> None:
    """Carry out the cells that come, until the process that started this one is gone."""
    configure_process(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to answer
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        # Else a sweep that was killed and started again would find its folders written to.
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    with suppress(EOFError):  # there are no more
        while cell := pipe.recv():
            for said in _told(cell, loggers, machine):
                pipe.send(said)
