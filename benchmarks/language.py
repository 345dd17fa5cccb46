"""plait's engine on a language model, beside a PEFT loop and the rate of matrix products.

    python benchmarks/language.py --backbone FOLDER --train-file rows.jsonl --clients 10

Every system trains the same adapters from the same start on the same rows, by turns in one run, and
medians are reported. The share of the GEMM rate counts needed work alone: the products of real
tokens with the frozen layers, forward and back, of the tokens that are learned with the head, and
LoRA's; padding and attention count for nothing. Without a backbone it takes a Qwen2-like stack of
four layers with random weights, as wide as the 0.5B.
"""

from __future__ import annotations

import argparse
import dataclasses
import operator
import resource
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from engine import console, machine, save
from limits import product_seconds
from race import losses_apart, seconds_of
from rich.progress import track
from rich.table import Table
from rivals import in_processes, peft_steps, plait_steps
from transformers import AutoConfig, AutoModelForCausalLM
from work import Steps, Work, has_bfloat16, work_of, workers

from plait.config import Config
from plait.data.objectives import LANGUAGE
from plait.data.rendering import tokens_of
from plait.data.tasks import load_task
from plait.data.tokens import Tokens
from plait.model.loading import load_language_model

QWEN = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 4,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 32000,
}  # fmt: skip
PADDED = "peft fp32, padded"


@dataclass(frozen=True)
class Needed:
    """The products of a client's step that can't be left out.

    Attributes:
        height: Tokens that are computed at once, at which the rate is measured.
        tokens: Real tokens of a client's step.
        learned: Those whose next one is learned.
        layers: (d_out, d_in) of each frozen linear layer.
        head: (vocabulary, width).
        adapted: (d_out, d_in) of each layer with LoRA.
        rank: r.
    """

    height: int
    tokens: float
    learned: float
    layers: tuple[tuple[int, int], ...]
    head: tuple[int, int]
    adapted: tuple[tuple[int, int], ...]
    rank: int

    @classmethod
    def of(cls, work: Work, steps: int) -> Needed:
        """Of the steps that are raced."""
        rows = [work.rows(client, step) for client in work.clients for step in range(steps)]
        learned = np.diff(work.tokens.asked_offsets)
        linear = {
            name: tuple(module.weight.shape)
            for name, module in work.model.base_model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        return cls(
            height=2048,
            tokens=work.real_tokens(steps),
            learned=float(np.mean([learned[one].sum() for one in rows])),
            layers=tuple(linear.values()),
            head=tuple(work.model.get_output_embeddings().weight.shape),
            adapted=tuple((site.d_out, site.d_in) for site in work.layout.sites),
            rank=work.config.rank,
        )

    def products(self) -> Iterator[tuple[int, int, float, float]]:
        """Frozen products: d_out, d_in, how often forward and how often back."""
        for shape in sorted(set(self.layers)):
            often = self.layers.count(shape)
            yield *shape, often, often

    def flop(self) -> float:
        """Operations of a client's step."""
        frozen = 4 * self.tokens * sum(d_out * d_in for d_out, d_in in self.layers)
        head = 4 * self.learned * self.head[0] * self.head[1]
        lora = 6 * self.tokens * self.rank * sum(map(sum, self.adapted))
        return frozen + head + lora

    def rate(self, stack: ExitStack, dtype: torch.dtype) -> float:
        """FLOP/s of torch's products with the frozen layers: one process, or one for each core."""
        flop = 4 * self.height * sum(d_out * d_in for d_out, d_in in self.layers)
        cores = torch.get_num_threads()
        found = []
        for count in {1, cores}:
            crew = workers(stack, cores // count, _products, [(self, dtype)] * count)
            for worker in crew:
                worker.ask()
            found.append(sum(flop / worker.answer() for worker in crew))
            for worker in crew:
                worker.close()
        return max(found)


def _products(needed: Needed, dtype: torch.dtype) -> Any:
    """For a worker: the seconds of the frozen products of so many tokens."""
    return lambda: product_seconds(needed.products(), needed.height, dtype)[0]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--backbone", help="a causal language model's folder")
    parser.add_argument("--train-file", help="rows, as `plait run --task chat` takes them")
    parser.add_argument("--text-columns", default="text")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="of the race; 0 for none")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 10, 100],
                        help="numbers of clients whose memory is measured")  # fmt: skip
    args = parser.parse_args(argv)
    # A language model has more tensors than a process may be handed as open files.
    torch.multiprocessing.set_sharing_strategy("file_system")
    config = Config(
        task="chat", backbone=args.backbone or "random", train_file=args.train_file,
        text_columns=args.text_columns, clients=args.clients, batch_size=args.batch_size,
        max_length=args.max_length,
    )  # fmt: skip
    model, tokens = _loaded(config) if args.backbone else (random_model(), random_rows(args))
    work = dataclasses.replace(work_of(model, tokens, config, args.clients), objective="language")
    title = args.backbone or "Qwen2-like, random"
    result = race(work, args.repeats) if args.repeats else {}
    if result:
        console.print(table(title, result))
    result["peak_mb"] = {str(n): peak_mb(work, n) for n in args.sizes}
    console.print(f"{title}, MB at most by number of clients: {result['peak_mb']}")
    save(args.out / "language.json", {"machine": machine(), "language": result})


def _loaded(config: Config) -> tuple[Any, Tokens]:
    loaded = load_language_model(config)
    rows = load_task(config).train
    return loaded.model, tokens_of(LANGUAGE, rows, loaded.tokenizer, config, operator.call)


def random_model() -> Any:
    """Four layers of a Qwen2 as wide as the 0.5B."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **QWEN)).float()


def random_rows(args: argparse.Namespace) -> Tokens:
    """Texts of a quarter of the longest to the longest, half of whose tokens are learned."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(args.max_length // 4, args.max_length + 1, 4 * args.clients * 8)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = rng.integers(10, QWEN["vocab_size"], offsets[-1]).astype(np.int32)
    place = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    ends = np.repeat(lengths, lengths)
    asked = (place >= ends // 2) & (place < ends - 1)
    return Tokens(ids, ids * 0, offsets, np.zeros(len(lengths), np.int64), asked=asked)


def race(work: Work, repeats: int) -> dict[str, Any]:
    """Medians of each system's client-steps per second, and the share of its type's GEMM rate."""
    n, cores = len(work.clients), torch.get_num_threads()
    few = work.only(work.clients[:2])
    half = dataclasses.replace(work, config=dataclasses.replace(work.config, dtype="bfloat16"))
    with ExitStack() as stack:
        systems: dict[str, tuple[Steps, int]] = {
            "plait fp32": (in_processes(stack, work, 1, plait_steps), n),
            "peft fp32": (in_processes(stack, work, 1, peft_steps), n),
            "peft fp32, a process per core": (in_processes(stack, work, cores, peft_steps), n),
            PADDED: (in_processes(stack, few, 1, peft_steps, False, work.config.most_tokens), 2),
        }
        types = {"fp32": torch.float32}
        if has_bfloat16():
            types["bf16"] = torch.bfloat16
            systems["plait bf16"] = in_processes(stack, half, 1, plait_steps), n
            systems["peft bf16"] = in_processes(stack, work, 1, peft_steps, True), n
        needed = Needed.of(work, 1)
        apart = losses_apart(systems, 1)
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        rates: dict[str, list[float]] = {kind: [] for kind in types}
        for _ in track(range(repeats), f"{n} clients"):
            for kind, dtype in types.items():
                rates[kind].append(needed.rate(stack, dtype))
            for name, (run, clients) in systems.items():
                seconds[name].append(seconds_of(run, 1) / clients)
    speed = {name: 1 / median(found) for name, found in seconds.items()}
    rate = {kind: median(found) for kind, found in rates.items()}
    return {
        "clients": n, "tokens_per_client_step": needed.tokens,
        "learned_per_client_step": needed.learned, "gemm_flops": rate,
        "client_steps_per_second": speed, "losses_apart": apart,
        "gemm_fraction": {
            name: one * needed.flop() / rate[_kind(name)] for name, one in speed.items()
        },
    }  # fmt: skip


def _kind(system: str) -> str:
    return "bf16" if "bf16" in system else "fp32"


def peak_mb(work: Work, clients: int) -> float:
    """What a process has at most in which so many clients do a step of a text each."""
    config = dataclasses.replace(work.config, clients=clients, batch_size=1)
    alike = work_of(work.model, work.tokens, config, clients)
    with ExitStack() as stack:
        one = dataclasses.replace(alike, objective=work.objective)
        (worker,) = workers(stack, torch.get_num_threads(), _peak_of, [(one,)])
        worker.ask()
        return float(worker.answer())


def _peak_of(work: Work) -> Any:
    """For a worker: its peak in MB after a step."""
    steps = plait_steps(work)

    def measure() -> float:
        steps(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    return measure


def table(title: str, result: dict[str, Any]) -> Table:
    """The race."""
    shown = Table("system", "client-steps/s", "learned tokens/s", "GEMM rate", "plait is",
                  title=f"{title}, {result['clients']} clients")  # fmt: skip
    speed = result["client_steps_per_second"]
    for name, one in speed.items():
        shown.add_row(
            name, f"{one:.3f}", f"{one * result['learned_per_client_step']:.0f}",
            f"{result['gemm_fraction'][name]:.1%}", f"{speed['plait ' + _kind(name)] / one:.2f}x",
        )  # fmt: skip
    rates = [f"{rate / 1e9:.0f} GFLOP/s in {kind}" for kind, rate in result["gemm_flops"].items()]
    shown.caption = f"GEMM rate: {', '.join(rates)}"
    return shown


if __name__ == "__main__":
    main()
