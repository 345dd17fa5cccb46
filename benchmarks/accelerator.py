"""plait beside loops around PEFT on a graphics card, on the same batches, by turns.

    python benchmarks/accelerator.py --glue-dir ~/data/glue

Medians of client-steps per second. Ten clients stand for all in the loops, which take as long for
each. Losses are compared with those of plait in fp32 on the CPU. Then a study: sixteen runs of ten
clients in one stack, as `plait compare` has them, and one after another; with `--protocol` in the
size of the published one (RoBERTa-large with random weights, 32 texts a step), with the hours that
its 150 rounds of 20 steps would take.
"""

from __future__ import annotations

import argparse
import copy
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
from plait.engines.local_training import Work as Run
from plait.engines.local_training import local_phases
from plait.factors import Factor
from plait.machine.devices import resolve_device
from plait.model.backbone import Backbone
from plait.model.loading import Loaded
from plait.optimizers import ADAMW

STEPS = 4
ROBERTA_LARGE = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--glue-dir", type=Path, help="a folder with SST-2/train.tsv")
    parser.add_argument("--device", default="auto", help="cuda or mps")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["roberta-base"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--runs", type=int, default=16, help="of a study")
    parser.add_argument("--protocol", action="store_true", help="a study as large as published")
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    config, machine = config_of(args.glue_dir), Machine(device=device.type)
    tokens, minilm = load(config)
    models = {"minilm": minilm} | {name: random_model(MODELS[name]) for name in args.models}
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        for n in args.clients:
            work = work_of(model, tokens, config, n, machine)
            rows += [{"model": name, "clients": n, **row} for row in race(work, args.repeats)]
            console.print(table(rows[-4:]))
    config = dataclasses.replace(config, dtype="auto")
    studies = {"minilm": study(work_of(minilm, tokens, config, 10, machine), args.runs)}
    if args.protocol:
        model = random_model(ROBERTA_LARGE)
        large = dataclasses.replace(config, batch_size=32)
        studies["protocol"] = study(work_of(model, tokens, large, 10, machine), args.runs)
    for name, found in studies.items():
        console.print(told(name, found))
    card = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    result = {"device": card, "races": rows, "studies": studies}
    save(args.out / "summary.json", {"accelerator": result})


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


def study(work: Work, runs: int) -> dict[str, float]:
    """Seconds of a step of so many runs, in one stack and one after another."""
    backbone = Backbone(Loaded(copy.deepcopy(work.model), None, ()), work.config, work.machine)
    works = [
        Run(work.stack(), [Factor.AB] * STEPS, 0, work.shares, work.clients,
            dataclasses.replace(work.config, seed=seed, local_steps=STEPS))
        for seed in range(runs)
    ]  # fmt: skip

    def seconds(parts: list[list[Run]]) -> float:
        def steps(_count: int) -> np.ndarray:
            found = [local_phases(backbone, work.tokens, part, ADAMW) for part in parts]
            return np.concatenate([losses for some in found for losses in some])

        steps(STEPS)
        return seconds_of(steps, STEPS) / STEPS

    return {
        "runs": runs,
        "stacked_seconds": seconds([works]),
        "alone_seconds": seconds([[one] for one in works]),
        "needed_flop": runs * len(work.clients) * step_flop(work),
    }


def step_flop(work: Work) -> float:
    """Operations of the frozen products of a client's step, forward and back."""
    layers = [m for m in work.model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    return 4 * work.real_tokens(STEPS) * sum(layer.weight.numel() for layer in layers)


def told(name: str, found: dict[str, float]) -> str:
    """A study in a line."""
    stacked, alone, runs = found["stacked_seconds"], found["alone_seconds"], found["runs"]
    whole, one = (150 * 20 * seconds / 3600 for seconds in (stacked, alone / runs))
    return (
        f"{name}, {runs} runs of 10 clients: {stacked:.3f} s a step in one stack, "
        f"{alone / stacked:.1f} times as fast as one after another; "
        f"{found['needed_flop'] / stacked / 1e12:.2f} TFLOP/s; 150 rounds of 20 steps would take "
        f"{whole:.1f} hours, of one run alone {one:.1f}"
    )


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
