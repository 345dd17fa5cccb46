"""Time and memory against the number of clients, each number in a process of its own."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from rivals import plait_steps
from work import Work, work_of, workers

from plait.config import Config
from plait.data.tokens import Tokens
from plait.factors import VALUE
from plait.mixing import average, neighbour_weights
from plait.topology import build_schedule

ROUND_STEPS = 8
LEAST = 300
"""Client-steps of a measurement, at least: fewer are too short to time."""


def round_of(work: Work) -> Callable[[], tuple[float, float, float]]:
    """For a worker: seconds of a step of all clients and of a mixing, and the peak so far in MB."""
    stack = work.stack()
    steps = plait_steps(work, stack)
    W = neighbour_weights(build_schedule(work.config)(0))
    clients = len(work.clients)
    phases = max(1, LEAST // clients)
    steps(1)

    def measure() -> tuple[float, float, float]:
        begin = time.perf_counter()
        for _ in range(phases):
            steps(1)
        trained = time.perf_counter()
        for factor, value in stack.factors.items():
            stack.state[VALUE, factor] = average(value, value, W)
        mixed = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return (trained - begin) / phases, mixed - trained, peak

    return measure


def scale(
    model: Any, tokens: Tokens, config: Config, sizes: list[int], repeats: int
) -> dict[str, dict[str, float]]:
    """Each number of clients in turn, again and again: medians of a round on a ring."""
    with ExitStack() as stack:
        works = [
            work_of(model, tokens, dataclasses.replace(config, clients=n, topology="ring"), n)
            for n in sizes
        ]
        crew = workers(stack, torch.get_num_threads(), round_of, [(work,) for work in works])
        for worker in crew:
            worker.ask()
            worker.answer()
        heard: dict[int, list[tuple[float, float, float]]] = {n: [] for n in sizes}
        for _ in track(range(repeats), "scale"):
            for n, worker in zip(sizes, crew, strict=True):
                worker.ask()
                heard[n].append(worker.answer())
    return {str(n): _row(n, *zip(*answers, strict=True)) for n, answers in heard.items()}


def _row(n: int, steps: tuple[float], mixings: tuple[float], peaks: tuple[float]) -> dict[str, Any]:
    step, mixing = statistics.median(steps), statistics.median(mixings)
    seconds = ROUND_STEPS * step + mixing
    return {
        "seconds_per_round": seconds,
        "ms_per_client_step": 1e3 * step / n,
        "ms_per_client_round": 1e3 * seconds / n,
        "mixing_fraction": mixing / seconds,
        "peak_mb": max(peaks),
    }


def table(rows: dict[str, dict[str, float]]) -> Table:
    """The rows, and what a client costs beside a client of 30."""
    shown = Table(
        "clients", "s / round", "ms / client-step", "cost of a client, of 30", "mixing", "peak MB",
        title=f"a round: {ROUND_STEPS} steps, and mixing on a ring",
    )  # fmt: skip
    for n, row in rows.items():
        cost = cost_ratio(rows, n, "30")
        shown.add_row(
            n,
            f"{row['seconds_per_round']:.2f}",
            f"{row['ms_per_client_step']:.1f}",
            "" if cost is None else f"{cost:.2f}",
            f"{row['mixing_fraction']:.1%}",
            f"{row['peak_mb']:.0f}",
        )
    return shown


def cost_ratio(rows: dict[str, dict[str, float]], many: str, few: str) -> float | None:
    """What a client costs in a round among many, over the same among few; None if not measured."""
    if not {many, few} <= rows.keys():
        return None
    return rows[many]["ms_per_client_round"] / rows[few]["ms_per_client_round"]
