"""The race: every system on the same batches, one after another, again and again."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterable
from contextlib import ExitStack
from statistics import median
from typing import Any

import numpy as np
import torch
from limits import Limits, Shape
from rich.progress import track
from rich.table import Table
from rivals import in_processes, peft_steps, plait_steps, vmap_steps
from work import Steps, Work, has_bfloat16

from plait.engines.local_training import chunks
from plait.model.backbone import Backbone
from plait.model.loading import Loaded

Speed = dict[str, float | None]
"""System -> client-steps per second; None where the machine has no units for its type."""

TYPES = {"fp32": "float32", "bf16": "bfloat16"}
PLAIT = {"fp32": ["plait fp32"], "bf16": ["plait bf16"]}
LOOPS = {kind: [f"peft {kind}", f"peft {kind}, a process per core"] for kind in ("fp32", "bf16")}
PADDED = "peft fp32, padded"
LEAST_SECONDS = 3.0
"""Of a measurement: the fast systems are done with their steps in half a second."""


def race(work: Work, client_steps: int, repeats: int, whole: bool = True) -> dict[str, Any]:
    """Medians of each system's client-steps per second, and the limit measured in between.

    Args:
        work: The job.
        client_steps: At least so many in a measurement, of `LEAST_SECONDS` at least.
        repeats: Measurements of each system.
        whole: With the rivals that are slowest, for which ten of the clients stand for all.
    """
    steps = -(-client_steps // len(work.clients))
    with ExitStack() as stack:
        systems = entrants(stack, work, whole)
        limits = {
            kind: Limits(stack, Shape.of(work, work.real_tokens(steps), getattr(torch, dtype)))
            for kind, dtype in TYPES.items()
            if PLAIT[kind][0] in systems
        }
        apart = losses_apart(systems, steps)
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        for _ in track(range(repeats), f"{len(work.clients)} clients"):
            for one in limits.values():
                one.measure()
            for name, (run, clients) in systems.items():
                seconds[name].append(seconds_of(run, steps) / (clients * steps))
    names = [*PLAIT["fp32"], *PLAIT["bf16"], *LOOPS["fp32"], *LOOPS["bf16"]]
    names += [PADDED, "vmap fp32"] if whole else []
    speed: Speed = {n: 1 / median(seconds[n]) if n in seconds else None for n in names}
    reached = {
        kind: one.result(best(speed, PLAIT[kind]) or 0.0, best(speed, LOOPS[kind]) or 0.0)
        for kind, one in limits.items()
    }
    return {
        "clients": len(work.clients),
        "real_tokens_per_client_step": work.real_tokens(steps),
        "client_steps_per_second": speed,
        "losses_apart": apart,
        "padding_fraction": padding(work),
        "limit": reached["fp32"],
        "limit_bf16": reached.get("bf16"),
    }


def seconds_of(run: Steps, count: int) -> float:
    """The time of so many steps: the median of as many times as `LEAST_SECONDS` have room for."""
    seconds: list[float] = []
    while not seconds or sum(seconds) < LEAST_SECONDS:
        begin = time.perf_counter()
        run(count)
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def entrants(stack: ExitStack, work: Work, whole: bool) -> dict[str, tuple[Steps, int]]:
    """Name -> its steps, and of how many clients; plait first. Each has processes of its own."""
    n, cores = len(work.clients), torch.get_num_threads()
    found: dict[str, tuple[Steps, int]] = {}
    for kind, dtype in TYPES.items():
        half = kind == "bf16"
        if half and not has_bfloat16():
            continue
        typed = dataclasses.replace(work, config=dataclasses.replace(work.config, dtype=dtype))
        found[f"plait {kind}"] = in_processes(stack, typed, 1, plait_steps), n
        one, each = LOOPS[kind]
        found[one] = in_processes(stack, work, 1, peft_steps, half), n
        found[each] = in_processes(stack, work, cores, peft_steps, half), n
    if whole:
        few = work.only(work.clients[:10])
        padded = in_processes(stack, few, 1, peft_steps, False, work.config.most_tokens)
        found[PADDED] = padded, len(few.clients)
        found["vmap fp32"] = in_processes(stack, few, 1, vmap_steps), len(few.clients)
    return found


def losses_apart(systems: dict[str, tuple[Steps, int]], steps: int) -> dict[str, float]:
    """System -> its losses' largest difference from plait's in fp32; warms everyone up."""
    losses = {name: run(steps) for name, (run, _) in systems.items()}
    ours = losses["plait fp32"]
    return {name: float(np.abs(ours[: len(own)] - own).max()) for name, own in losses.items()}


def padding(work: Work) -> float:
    """Share of the tokens computed in a step of all clients that are padding."""
    rows = np.stack([work.rows(client, 0) for client in work.clients])
    tokens = work.tokens.lengths[rows].sum(axis=1)
    backbone = Backbone(Loaded(copy.deepcopy(work.model), None, ()), work.config, work.machine)
    at_once = backbone.chunk_tokens
    parts = chunks(tokens, at_once, backbone.backend.workers())
    batches = [backbone.batch(work.tokens, rows[part]) for part in parts]
    return 1 - sum(b.num_tokens for b in batches) / sum(len(b.ids) for b in batches)


def best(speed: Speed, names: Iterable[str]) -> float | None:
    """The highest speed of some systems; None if none of them was measured."""
    return max((value for n in names if (value := speed[n]) is not None), default=None)


def ratio(result: dict[str, Any], ours: list[str], theirs: list[str]) -> float | None:
    """plait's best of some over the rivals' best of some; None where one wasn't measured."""
    speed = result["client_steps_per_second"]
    plait, rival = best(speed, ours), best(speed, theirs)
    return None if plait is None or rival is None else plait / rival


def table(title: str, result: dict[str, Any]) -> Table:
    """A line for each system, slowest first."""
    shown = Table(
        "system", "client-steps/s", "over the best peft fp32", "losses apart", title=title
    )
    speed = result["client_steps_per_second"]
    base = best(speed, LOOPS["fp32"])
    for name, value in sorted(speed.items(), key=lambda item: item[1] or 0.0):
        if value is None:
            shown.add_row(name, "no bf16 units", "", "")
        else:
            far = f"{result['losses_apart'][name]:.1e}"
            shown.add_row(name, f"{value:.2f}", f"{value / base:.2f}", far)
    return shown
