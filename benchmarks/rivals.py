"""What a skilled user would write today: loops over clients around PEFT, and vmap.

Every rival trains the same adapters on the same texts of the same model as plait does, with its
own AdamW, and gets the same batches. `steps(count)` does that many optimizer steps for each client.
"""

from __future__ import annotations

import copy
import multiprocessing as mp
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from plait.backbone import Backbone
from plait.config import Config
from plait.loading import Loaded
from plait.local import batch_rows, local_phase
from plait.lora import initial_stack
from plait.methods import Factor
from plait.tokens import Tokens

Steps = Callable[[int], None]


@dataclass(frozen=True)
class Work:
    """The job that all of them do: texts, the shares of the clients, the model, the settings."""

    model: Any
    tokens: Tokens
    shares: list[np.ndarray]
    config: Config

    def rows(self, client: int, step: int) -> np.ndarray:
        return batch_rows(self.shares[client], client, step, self.config)


def plait_steps(work: Work) -> Steps:
    """plait's stacked engine."""
    backbone = Backbone(Loaded(copy.deepcopy(work.model), None, ()), work.config)
    clients = len(work.shares)
    stack = initial_stack(backbone.layout, backbone.head_start, clients, 0, backbone.device)
    tokens = backbone.with_hidden(work.tokens, work.config.cache_gib)

    def steps(count: int) -> None:
        config = Config(**(work.config.to_json() | {"local_steps": count}))
        args = (Factor.AB, 0, tokens, work.shares, range(clients), config)
        local_phase(backbone, stack, *args)

    return steps


def padded_batch(work: Work, rows: np.ndarray, length: int | None) -> dict[str, torch.Tensor]:
    """(b, L) ids and mask, padded to the batch's longest or to `length`, and labels."""
    lengths = work.tokens.lengths[rows]
    width = length or int(lengths.max())
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for k, row in enumerate(rows):
        begin = work.tokens.offsets[row]
        ids[k, : lengths[k]] = work.tokens.ids[begin : begin + lengths[k]]
    mask = np.arange(width) < lengths[:, None]
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        "labels": torch.from_numpy(work.tokens.labels[rows]),
    }


def peft_steps(work: Work, bfloat16: bool = False, length: int | None = None) -> Steps:
    """One PEFT model; each client's factors are swapped in by pointer, with an AdamW of its own."""
    config = work.config
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=["query", "value"])
    model = get_peft_model(copy.deepcopy(work.model), lora).eval()
    slots = [p for name, p in model.named_parameters() if "lora_" in name]
    clients = []
    for _ in work.shares:
        own = [torch.nn.Parameter(p.detach().clone()) for p in slots]
        clients.append((own, torch.optim.AdamW(own, lr=config.lr, fused=True)))

    def steps(count: int) -> None:
        for client, (own, optimizer) in enumerate(clients):
            for slot, value in zip(slots, own, strict=True):
                slot.data = value.data
            for step in range(count):
                batch = padded_batch(work, work.rows(client, step), length)
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    loss = model(**batch).loss
                loss.backward()
                for slot, value in zip(slots, own, strict=True):
                    value.grad, slot.grad = slot.grad, None
                torch.nn.utils.clip_grad_norm_(own, config.clip_norm)
                optimizer.step()

    return steps


def vmap_steps(work: Work) -> Steps:
    """One vmap over all clients of the gradient of a functional model, padded to the longest."""
    config = work.config
    model = copy.deepcopy(work.model)
    model.set_attn_implementation("eager")  # fused attention has no batching rule
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=["query", "value"])
    peft_model = get_peft_model(model, lora).eval()
    names = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    start = dict(peft_model.named_parameters())
    stacks = {n: torch.stack([start[n].detach()] * len(work.shares)) for n in names}
    for stack in stacks.values():
        stack.requires_grad_()
    optimizer = torch.optim.AdamW(list(stacks.values()), lr=config.lr, fused=True)

    def loss(factors: Any, ids: Any, mask: Any, labels: Any) -> Any:
        # A mask of four dimensions is taken as it is; into a flat one transformers looks first.
        hidden = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        inputs = {"input_ids": ids, "attention_mask": hidden.expand(-1, -1, ids.shape[1], -1)}
        logits = functional_call(peft_model, factors, (), inputs).logits
        return functional.cross_entropy(logits, labels)

    gradient = vmap(grad(loss))

    def steps(count: int) -> None:
        for step in range(count):
            rows = [work.rows(client, step) for client in range(len(work.shares))]
            longest = max(int(work.tokens.lengths[r].max()) for r in rows)
            batches = [padded_batch(work, r, longest) for r in rows]
            stacked = {key: torch.stack([b[key] for b in batches]) for key in batches[0]}
            grads = gradient(
                {n: s.detach() for n, s in stacks.items()},
                stacked["input_ids"],
                stacked["attention_mask"],
                stacked["labels"],
            )
            for name, stack in stacks.items():
                stack.grad = grads[name]
            optimizer.step()

    return steps


def in_two_processes(work: Work, **how: Any) -> Steps:
    """The PEFT loop as two processes of one thread, each with half of the clients."""
    context = mp.get_context("fork")
    pipes = []
    for half in range(2):
        ours, theirs = context.Pipe()
        part = Work(work.model, work.tokens, work.shares[half::2], work.config)
        context.Process(target=_serve, args=(theirs, part, how), daemon=True).start()
        pipes.append(ours)

    def steps(count: int) -> None:
        for pipe in pipes:
            pipe.send(count)
        for pipe in pipes:
            pipe.recv()

    return steps


def _serve(pipe: Any, work: Work, how: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    steps = peft_steps(work, **how)
    while True:
        steps(pipe.recv())
        pipe.send(True)
