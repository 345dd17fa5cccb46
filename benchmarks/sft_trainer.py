"""plait's engine on one client of a language model, beside TRL's SFTTrainer.

    pip install trl
    python benchmarks/sft_trainer.py --backbone FOLDER --train-file rows.jsonl --text-columns text

Both fine-tune the same adapters on texts of the same file, cut to the same length, with the same
batch size; what is counted are real tokens a second, padding aside. SFTTrainer runs with its
defaults, and once more in float32 and without computing activations again, which suits a CPU that
doesn't multiply in bfloat16. Its steps are timed by its own callbacks: neither set-up nor the first
step counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from engine import console, machine, save
from language import _loaded
from peft import LoraConfig
from rivals import plait_steps
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
from work import Work, work_of

from plait.config import Config

SETTINGS: dict[str, dict[str, Any]] = {
    "SFTTrainer, its defaults": {},
    "SFTTrainer, fp32, without recomputation": {"bf16": False, "gradient_checkpointing": False},
}


class Clock(TrainerCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_args: Any, **_more: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, *_args: Any, **_more: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begin)


def sft_rate(work: Work, steps: int, **more: Any) -> float:
    """Real tokens a second of SFTTrainer, which takes the texts as they come."""
    config, clock, batch = work.config, Clock(), work.config.batch_size
    offsets = work.tokens.offsets
    rows = [work.tokens.ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    targets = [site.name for site in work.layout.sites]
    with TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=work.model,
            train_dataset=Dataset.from_dict({"input_ids": rows[: batch * steps]}),
            peft_config=LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets),
            callbacks=[clock],
            args=SFTConfig(
                output_dir=out, max_steps=steps, report_to="none", save_strategy="no", use_cpu=True,
                per_device_train_batch_size=batch, max_length=config.most_tokens,
                train_sampling_strategy="sequential", **more,
            ),
        )  # fmt: skip
        trainer.train()
    return float(offsets[batch * steps] - offsets[batch]) / sum(clock.seconds[1:])


def plait_rate(work: Work, steps: int) -> float:
    """Real tokens a second of plait."""
    run = plait_steps(work)
    run(1)
    begin = time.perf_counter()
    run(steps)
    return steps * work.real_tokens(steps) / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--backbone", default="smollm2")
    parser.add_argument("--train-file", required=True)
    parser.add_argument("--text-columns", default="text")
    parser.add_argument("--batch-size", type=int, default=8, help="SFTTrainer's own default")
    parser.add_argument("--max-length", type=int, default=1024, help="SFTTrainer's own default")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    config = Config(
        task="chat", backbone=args.backbone, train_file=args.train_file, clients=1,
        text_columns=args.text_columns, batch_size=args.batch_size, max_length=args.max_length,
    )  # fmt: skip
    rates = {"plait fp32": plait_rate(_work(config), args.steps)}
    for name, more in SETTINGS.items():
        rates[name] = sft_rate(_work(config), args.steps, **more)
    for name, rate in rates.items():
        console.print(f"{name}: {rate:.0f} tokens/s, plait {rates['plait fp32'] / rate:.1f} times")
    save(args.out / "sft_trainer.json", {"machine": machine(), "tokens_per_second": rates})


def _work(config: Config) -> Work:
    """With a model of its own: SFTTrainer changes the one that it is given."""
    model, tokens = _loaded(config)
    return dataclasses.replace(work_of(model, tokens, config, 1), objective="language")


if __name__ == "__main__":
    main()
