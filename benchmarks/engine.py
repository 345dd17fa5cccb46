"""plait's engine beside what people write today, and beside what this machine could do at most.

    make bench
    python benchmarks/engine.py --glue-dir ~/data/glue --out runs/bench

Texts are SST-2's where `--glue-dir` has them, else the embedded film reviews. Everything is
measured in one run, by turns, and medians are reported: races with 10 and 100 clients, the limit
that the hardware sets, time and memory up to 1000 clients, and larger models with random weights.
docs/benchmarks.md explains the columns.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from limits import arithmetic, profile
from limits import table as limit_table
from race import LOOPS, PADDED, PLAIT, race, ratio
from race import table as race_table
from rich.console import Console
from scale import cost_ratio, scale
from scale import table as scale_table
from transformers import AutoConfig, AutoModelForSequenceClassification
from work import Work, config_of, has_bfloat16, load, work_of

MODELS: dict[str, dict[str, int]] = {
    "roberta-base": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "roberta-large, 4 layers": {
        "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}  # fmt: skip
"""Sizes of models that come with random weights: speed doesn't depend on them."""
MODEL_CLIENTS = 8
console = Console(width=100)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--glue-dir", type=Path, help="a folder with SST-2/train.tsv")
    parser.add_argument("--backbone", default="minilm", help="as of `plait run`")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100], help="races")
    parser.add_argument("--scale", type=int, nargs="*", default=[10, 30, 100, 300, 1000])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--client-steps", type=int, default=40, help="of a measurement, at least")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128)
    args = parser.parse_args(argv)
    config = config_of(args.glue_dir, args.backbone, args.batch_size, args.max_length)
    tokens, model = load(config)
    summary: dict[str, Any] = {"machine": machine(), "texts": config.task, "repeats": args.repeats}
    races = {}
    for n in args.clients:
        work = work_of(model, tokens, config, n)
        races[n] = race(work, args.client_steps, args.repeats)
        console.print(race_table(f"{args.backbone}, {n} clients", races[n]))
        races[n]["profile"] = profiled(work)
        console.print(limit_table("where the time goes", races[n]["limit"], races[n]["profile"]))
        print_limits(races[n])
    rows = scale(model, tokens, config, args.scale, (args.repeats + 1) // 2) if args.scale else {}
    if rows:
        console.print(scale_table(rows))
    sizes = {}
    for name in args.models:
        work = work_of(random_model(MODELS[name]), tokens, config, MODEL_CLIENTS)
        sizes[name] = race(work, MODEL_CLIENTS, (args.repeats + 1) // 2, whole=False)
        console.print(race_table(f"{name}, {MODEL_CLIENTS} clients", sizes[name]))
        print_limits(sizes[name])
    summary |= headline(list(races.values()), rows)
    summary |= {"races": races, "scale": rows, "sizes": sizes}
    console.print_json(data={k: v for k, v in summary.items() if not isinstance(v, dict)})
    save(args.out / "summary.json", summary)


def print_limits(race: dict[str, Any]) -> None:
    """How far plait is from what the machine could do, in each type that it has units for."""
    console.print(arithmetic(race["limit"]), "\n")
    if race["limit_bf16"]:
        console.print(arithmetic(race["limit_bf16"], "bf16"), "\n")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "bfloat16": has_bfloat16(),
        "torch": torch.__version__,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def profiled(work: Work) -> dict[str, float]:
    """Shares of the kinds of operations in plait's step of up to ten clients, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shares = profile(work.only(work.clients[:10]))
    torch.set_num_threads(threads)
    return shares


def random_model(sizes: dict[str, int]) -> Any:
    """A RoBERTa of some size."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "roberta", num_labels=2, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1,
        layer_norm_eps=1e-5, **sizes,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config)


def headline(
    races: list[dict[str, Any]], rows: dict[str, dict[str, float]]
) -> dict[str, float | None]:
    """The worst figure of the races, and the thousand clients; None where not measured."""
    fp32, half = PLAIT["fp32"], LOOPS["fp32"] + LOOPS["bf16"]
    plait = fp32 + PLAIT["bf16"]
    lowest = lambda ours, theirs: min(ratio(one, ours, theirs) for one in races)  # noqa: E731
    return {
        "speedup_fp32_vs_peft": lowest(fp32, LOOPS["fp32"]),
        "speedup_best_vs_peft": lowest(plait, half),
        "speedup_best_vs_padded128": lowest(plait, [PADDED]),
        "gemm_fraction_fp32": min(one["limit"]["reached"] for one in races),
        "gemm_fraction_of_limit_fp32": min(one["limit"]["reached_of_limit"] for one in races),
        **half_limits([one["limit_bf16"] for one in races]),
        "padding_fraction": max(one["padding_fraction"] for one in races),
        "cost_per_client_1000_over_30": cost_ratio(rows, "1000", "30"),
        "mixing_fraction_1000": rows["1000"]["mixing_fraction"] if "1000" in rows else None,
    }


def half_limits(limits: list[dict[str, Any] | None]) -> dict[str, float | None]:
    """The lowest shares of rate and limit in bfloat16; None where the CPU has no units for it."""
    keys = {"gemm_fraction_bf16": "reached", "gemm_fraction_of_limit_bf16": "reached_of_limit"}
    there = [one for one in limits if one]
    return {name: min((one[key] for one in there), default=None) for name, key in keys.items()}


def save(path: Path, more: dict[str, Any]) -> None:
    """Put results into the summary beside what other benchmarks put there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | more, indent=2) + "\n")
    console.print(f"{path}")


if __name__ == "__main__":
    main()
