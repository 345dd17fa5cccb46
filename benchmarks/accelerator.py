"""plait beside loops around PEFT on a graphics card, on the same batches, by turns.

    python benchmarks/accelerator.py --glue-dir ~/data/glue

Medians of client-steps per second. Ten clients stand for all in the loops, which take as long for
each. Losses are compared with those of plait in fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from engine import MODELS, console, random_model, save
from race import seconds_of
from rich.progress import track
from rich.table import Table
from rivals import peft_steps, plait_steps
from work import Steps, Work, config_of, load, work_of

from plait.config import Machine
from plait.machine.devices import resolve_device

STEPS = 4


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--glue-dir", type=Path, help="a folder with SST-2/train.tsv")
    parser.add_argument("--device", default="auto", help="cuda or mps")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["roberta-base"])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    config, machine = config_of(args.glue_dir), Machine(device=device.type)
    tokens, minilm = load(config)
    models = {"minilm": minilm} | {name: random_model(name) for name in args.models}
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        for n in args.clients:
            work = work_of(model, tokens, config, n, machine)
            rows += [{"model": name, "clients": n, **row} for row in race(work, args.repeats)]
            console.print(table(rows[-4:]))
    card = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    save(args.out / "summary.json", {"accelerator": {"device": card, "races": rows}})


def race(work: Work, repeats: int) -> list[dict[str, Any]]:
    """A row for each system: its speed, and how far its losses are from the CPU's."""
    few = work.only(work.clients[:10])
    systems: dict[str, tuple[Steps, int]] = {}
    for kind, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        typed = dataclasses.replace(work, config=dataclasses.replace(work.config, dtype=dtype))
        systems[f"plait {kind}"] = plait_steps(typed), len(work.clients)
        systems[f"peft {kind}"] = peft_steps(few, kind == "bf16"), len(few.clients)
    on_cpu = dataclasses.replace(few, machine=dataclasses.replace(few.machine, device="cpu"))
    expected = plait_steps(on_cpu)(STEPS)
    apart = {
        name: float(np.abs(steps(STEPS)[: len(expected)] - expected).max())
        for name, (steps, _) in systems.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in track(range(repeats), f"{len(work.clients)} clients"):
        for name, (steps, clients) in systems.items():
            seconds[name].append(seconds_of(steps, STEPS) / (clients * STEPS))
    return [
        {"system": name, "client_steps_per_second": 1 / median(times), "losses_apart": apart[name]}
        for name, times in seconds.items()
    ]


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each system of a race."""
    shown = Table(
        "system", "client-steps/s", "over the best peft", "losses apart",
        title=f"{rows[0]['model']}, {rows[0]['clients']} clients",
    )  # fmt: skip
    speeds = {row["system"]: row["client_steps_per_second"] for row in rows}
    best = max(speed for name, speed in speeds.items() if name.startswith("peft"))
    for row in rows:
        speed = row["client_steps_per_second"]
        far = f"{row['losses_apart']:.0e}"
        shown.add_row(row["system"], f"{speed:.1f}", f"{speed / best:.2f}", far)
    return shown


if __name__ == "__main__":
    main()
