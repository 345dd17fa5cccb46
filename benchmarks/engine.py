"""plait's engine beside what people write today: client-steps per second, in one run.

    python benchmarks/engine.py --out runs/bench        (make bench)

Each system does the same work on the same batches, one after another, again and again; medians
over the repeats. Texts are SST-2's where `--glue-dir` has them, else the embedded movie snippets.
The machine's own rate for the frozen layers' matrix products, measured between the others, gives
the share of it that plait reaches on real tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rivals import Steps, Work, in_two_processes, peft_steps, plait_steps, vmap_steps

from plait.backbone import Backbone
from plait.config import Config
from plait.loading import load_model
from plait.local import chunks
from plait.lora import initial_stack
from plait.mixing import average, neighbour_weights
from plait.packed import PackedEncoder
from plait.tasks import load_task
from plait.tokens import Tokens, pack, tokenize
from plait.topology import build_schedule

RANK_SITES = 2  # query and value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--glue-dir", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    config, tokens, model = load(args.glue_dir, args.batch_size)
    summary: dict[str, Any] = {"threads": torch.get_num_threads(), "repeats": args.repeats}
    for clients in (10, 100):
        summary[f"clients_{clients}"] = race(config, tokens, model, clients, args)
    summary |= headline(summary)
    summary |= scale(config, tokens, model, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{args.out / 'summary.json'}")


def load(glue_dir: Path | None, batch_size: int) -> tuple[Config, Tokens, Any]:
    """Settings, tokenised training texts, and MiniLM with its own head, as PEFT would take it."""
    task = "sst2" if glue_dir else "movies"
    config = Config(
        task=task, glue_dir=str(glue_dir) if glue_dir else None, pooling="model", head="frozen",
        batch_size=batch_size,
    )  # fmt: skip
    loaded = load_model(config, 2)
    rows = load_task(config).train
    return config, tokenize(rows.texts, rows.labels, loaded.tokenizer, 128), loaded.model


def shares_of(tokens: Tokens, clients: int) -> list[np.ndarray]:
    return np.array_split(np.random.default_rng(0).permutation(len(tokens)), clients)


def race(config: Config, tokens: Tokens, model: Any, clients: int, args: Any) -> dict[str, Any]:
    """Seconds per client-step of every system, interleaved."""
    work = Work(model, tokens, shares_of(tokens, clients), config)
    # A loop costs the same for each client, so ten stand for all; a stack has to hold them all.
    few = Work(model, tokens, shares_of(tokens, 10), config)
    half = dataclasses.replace(config, dtype="bfloat16")
    systems: dict[str, tuple[Steps, int]] = {
        "peft fp32, two processes": (in_two_processes(few), 10),
        "peft bf16, two processes": (in_two_processes(few, bfloat16=True), 10),
        "plait fp32": (plait_steps(work), clients),
        "plait bf16": (plait_steps(Work(model, tokens, work.shares, half)), clients),
        "peft fp32": (peft_steps(few), 10),
        "peft bf16": (peft_steps(few, bfloat16=True), 10),
        "peft fp32, padded to 128": (peft_steps(few, length=128), 10),
        "vmap fp32": (vmap_steps(few), 10),
    }
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    rates: list[float] = []
    backbone = Backbone(load_model(config, 2), config)
    for steps, _ in systems.values():
        steps(1)
    for _ in track(range(args.repeats), f"{clients} clients"):
        rates.append(gemm_rate(backbone))
        for name, (steps, count) in systems.items():
            begin = time.perf_counter()
            steps(args.steps)
            seconds[name].append((time.perf_counter() - begin) / (count * args.steps))
    speed = {name: 1 / median(times) for name, times in seconds.items()}
    flops = flops_per_client_step(work, backbone, args.steps)
    fraction = flops * speed["plait fp32"] / median(rates)
    show(clients, speed, fraction)
    return {"client_steps_per_second": speed, "gemm_flops": median(rates),
            "gemm_fraction_fp32": fraction, "padding_fraction": padding(work)}  # fmt: skip


def gemm_rate(backbone: Backbone, tokens: int = 1024) -> float:
    """FLOP/s of the frozen layers' own products, forward and backward, at a chunk's height."""
    assert isinstance(backbone.encoder, PackedEncoder)
    layer = backbone.encoder.layers[0]
    work, spent = 0.0, 0.0
    for linear in (layer.qkv, layer.merge, layer.up, layer.down):
        d_out, d_in = linear.weight.shape
        x, y = torch.randn(tokens, d_in), torch.randn(tokens, d_out)
        for _ in range(4):
            begin = time.perf_counter()
            linear.forward(x)
            linear.backward(y)
            seconds = time.perf_counter() - begin
        spent += seconds
        work += 4 * tokens * d_in * d_out
    return work / spent


def flops_per_client_step(work: Work, backbone: Backbone, steps: int) -> float:
    """Floating-point operations of one client's step on real tokens, forward and backward.

    The frozen weights' gradients are never formed, so a frozen layer counts 2 + 2 operations for
    each weight and token, less for the last layer's rows that the head doesn't read and for the
    first layer's input, which needs no gradient; a LoRA branch counts 2 + 4.
    """
    assert isinstance(backbone.encoder, PackedEncoder)
    counts = [
        work.tokens.lengths[work.rows(client, step)].sum()
        for client in range(min(10, len(work.shares)))
        for step in range(steps)
    ]
    tokens, texts = float(np.mean(counts)), work.config.batch_size
    layers = backbone.encoder.layers
    flops = 0.0
    for index, layer in enumerate(layers):
        past = texts if index == len(layers) - 1 else tokens
        flops += (2 if index == 0 else 4) * tokens * layer.qkv.weight.numel()
        for linear in (layer.merge, layer.up, layer.down):
            flops += 4 * past * linear.weight.numel()
        d = layer.merge.weight.shape[0]
        flops += 6 * tokens * RANK_SITES * backbone.layout.rank * 2 * d
    return flops


def padding(work: Work) -> float:
    """Share of the tokens computed in a step of all clients that are filler."""
    config, everyone = work.config, len(work.shares)
    batches = [
        pack(work.tokens, np.stack([work.rows(client, 0) for client in chunk]))
        for chunk in chunks(everyone, config.batch_size * work.tokens.lengths.mean(), config)
    ]
    return 1 - sum(b.num_tokens for b in batches) / sum(len(b.ids) for b in batches)


def show(clients: int, speed: dict[str, float], fraction: float) -> None:
    table = Table("system", "client-steps/s", "over peft fp32", title=f"{clients} clients")
    for name, value in sorted(speed.items(), key=lambda item: item[1]):
        table.add_row(name, f"{value:.1f}", f"{value / speed['peft fp32']:.2f}")
    Console().print(table, f"plait fp32 reaches {fraction:.0%} of the machine's GEMM rate\n")


def headline(summary: dict[str, Any]) -> dict[str, float]:
    """Speed-ups over the best PEFT loop of each kind, the smaller of 10 and 100 clients."""
    runs = [summary[f"clients_{n}"]["client_steps_per_second"] for n in (10, 100)]
    loops = {
        kind: [max(v for k, v in run.items() if k.startswith(f"peft {kind}") and "128" not in k)
               for run in runs]
        for kind in ("fp32", "bf16")
    }  # fmt: skip
    best = [max(pair) for pair in zip(*loops.values(), strict=True)]
    ratio = lambda ours, theirs: min(r[ours] / t for r, t in zip(runs, theirs, strict=True))  # noqa: E731
    return {
        "speedup_fp32_vs_peft": ratio("plait fp32", loops["fp32"]),
        "speedup_best_vs_peft": ratio("plait bf16", best),
        "speedup_best_vs_padded128": ratio(
            "plait bf16", [run["peft fp32, padded to 128"] for run in runs]
        ),
        "gemm_fraction_fp32": min(summary[f"clients_{n}"]["gemm_fraction_fp32"] for n in (10, 100)),
        "padding_fraction": max(summary[f"clients_{n}"]["padding_fraction"] for n in (10, 100)),
    }


def scale(config: Config, tokens: Tokens, model: Any, args: Any) -> dict[str, float]:
    """Seconds per client-step and share of mixing against the number of clients."""
    per_client, mixing = {}, {}
    table = Table("clients", "ms per client-step", "mixing / round of 8 steps")
    for clients in track((10, 30, 100, 300, 1000), "scale"):
        sized = dataclasses.replace(config, clients=clients, topology="ring")
        work = Work(model, tokens, shares_of(tokens, clients), sized)
        steps = plait_steps(work)
        times = []
        for _ in range(max(1, args.repeats // 2)):
            begin = time.perf_counter()
            steps(1)
            times.append(time.perf_counter() - begin)
        per_client[clients] = median(times) / clients
        mixing[clients] = mix_seconds(sized) / (8 * median(times))
        table.add_row(str(clients), f"{per_client[clients] * 1e3:.1f}", f"{mixing[clients]:.1%}")
    Console().print(table)
    return {"cost_per_client_1000_over_30": per_client[1000] / per_client[30],
            "mixing_fraction_1000": mixing[1000]}  # fmt: skip


def mix_seconds(config: Config) -> float:
    backbone = Backbone(load_model(config, 2), config)
    stack = initial_stack(backbone.layout, {}, config.clients, 0, backbone.device)
    W = neighbour_weights(build_schedule(config)(0))
    begin = time.perf_counter()
    for value in stack.factors.values():
        average(value, value, W)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
