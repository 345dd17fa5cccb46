"""The job that every system of a benchmark does, and processes to do it in."""

from __future__ import annotations

import dataclasses
import multiprocessing as mp
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plait.config import THIS_MACHINE, Config, Machine
from plait.data.tasks import load_task
from plait.data.tokens import Tokens, tokenize
from plait.engines.local_training import batch_rows
from plait.factors import Factor
from plait.lora import Layout, Stack, initial_stack
from plait.machine.devices import resolve_device
from plait.model.backbone import find_sites
from plait.model.loading import load_model

Steps = Callable[[int], np.ndarray]
"""So many optimizer steps of every client, each from where it stands: losses (clients, steps)."""


@dataclass(frozen=True)
class Work:
    """Model, texts, settings, each client's share, which clients train, where, and what."""

    model: Any
    tokens: Tokens
    config: Config
    shares: list[np.ndarray]
    clients: list[int]
    machine: Machine = THIS_MACHINE
    objective: str = "classification"

    def rows(self, client: int, step: int) -> np.ndarray:
        """(b,) the texts of a client's step."""
        return batch_rows(self.shares[client], client, range(step, step + 1), self.config)[0]

    def only(self, clients: list[int]) -> Work:
        """The same for some of the clients."""
        return dataclasses.replace(self, clients=clients)

    def real_tokens(self, steps: int) -> float:
        """Tokens of a client's step, without padding: the mean over the first steps of all."""
        counts = [
            self.tokens.lengths[self.rows(client, step)].sum()
            for client in self.clients
            for step in range(steps)
        ]
        return float(np.mean(counts))

    @cached_property
    def layout(self) -> Layout:
        """Where the adapters sit."""
        sites = find_sites(self.model, self.model.config.model_type, self.config)
        return Layout(sites, self.config.rank, self.config.alpha / self.config.rank)

    def stack(self) -> Stack:
        """The adapters of all clients, where they start."""
        device = resolve_device(self.machine.device)
        return initial_stack(self.layout, {}, len(self.clients), self.config.seed, device)

    def start(self) -> dict[str, torch.Tensor]:
        """PEFT's name of each adapter's parameter -> where every client starts."""
        stack = self.only([0]).stack()
        return {
            f"base_model.model.{name}.lora_{letter}.default.weight": value[0]
            for factor, letter in ((Factor.A, "A"), (Factor.B, "B"))
            for name, value in self.layout.views(factor, stack.factors[factor]).items()
        }


def load(config: Config) -> tuple[Tokens, Any]:
    """Tokenised training texts, and a model with its own head, as PEFT would take it."""
    loaded = load_model(config, 2)
    rows = load_task(config).train
    return tokenize(rows.texts, rows.labels, loaded.tokenizer, config.most_tokens), loaded.model


def config_of(
    glue_dir: Path | None, backbone: str = "minilm", batch_size: int = 16, max_length: int = 128
) -> Config:
    """SST-2 of a GLUE folder, or the embedded film reviews where there is none."""
    return Config(
        task="sst2" if glue_dir else "movies", glue_dir=str(glue_dir) if glue_dir else None,
        backbone=backbone, pooling="model", head="frozen", batch_size=batch_size,
        max_length=max_length,
    )  # fmt: skip


def work_of(
    model: Any, tokens: Tokens, config: Config, clients: int, machine: Machine = THIS_MACHINE
) -> Work:
    """The job for so many clients, the texts dealt out to them in equal parts."""
    shares = np.array_split(np.random.default_rng(0).permutation(len(tokens)), clients)
    return Work(model, tokens, config, shares, list(range(clients)), machine)


def has_bfloat16() -> bool:
    """Whether this CPU computes products in bfloat16; elsewhere they would be emulated."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Worker:
    """A process of its own that makes a function and calls it when it is asked."""

    def __init__(self, threads: int, make: Callable[..., Callable[..., Any]], *given: Any) -> None:
        """Start it: what `make(*given)` returns is called in the process, on so many threads."""
        context = mp.get_context("forkserver")  # imports once for all, and has no threads yet
        context.set_forkserver_preload(
            ["peft", "plait.model.backbone", "plait.data.tasks", "sklearn"]
        )
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, threads, make, given), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, *args: Any) -> None:
        """Have the function called."""
        self._pipe.send(args)

    def answer(self) -> Any:
        """What the function returned.

        Raises:
            EOFError: The process has failed; its traceback is on stderr.
        """
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, threads: int, make: Callable[..., Callable[..., Any]], given: Any) -> None:
    torch.set_num_threads(threads)
    function = make(*given)
    while True:
        try:
            args = pipe.recv()
        except EOFError:
            return
        pipe.send(function(*args))


def workers(
    stack: ExitStack, threads: int, make: Callable[..., Callable[..., Any]], givens: list[Any]
) -> list[Worker]:
    """A worker for each of `givens`, all ended with the stack."""
    made = [Worker(threads, make, *given) for given in givens]
    for worker in made:
        stack.callback(worker.close)
    return made
