"""What a skilled user would write today: loops over clients around PEFT, and vmap.

Every rival trains the same adapters from the same start on the same texts of the same model as
plait does, with an AdamW of its own and each client's gradient clipped, and gets the same losses.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional
from work import Steps, Work, workers

from plait.data.objectives import OBJECTIVES
from plait.engines.local_training import local_phase
from plait.factors import Factor
from plait.lora import Stack
from plait.machine.devices import moved, resolve_device
from plait.model.backbone import Backbone
from plait.model.loading import Loaded


def plait_steps(work: Work, stack: Stack | None = None) -> Steps:
    """plait's stacked engine; on a stack of one's own, where that is to be mixed too."""
    loaded = Loaded(copy.deepcopy(work.model), None, ())
    backbone = Backbone(loaded, work.config, work.machine, OBJECTIVES[work.objective])
    stack = stack or work.stack()
    tokens = backbone.with_hidden(work.tokens)

    def steps(count: int) -> np.ndarray:
        config = dataclasses.replace(work.config, local_steps=count)
        return local_phase(backbone, stack, Factor.AB, 0, tokens, work.shares, work.clients, config)

    return steps


def padded_batch(work: Work, rows: np.ndarray, length: int | None) -> dict[str, torch.Tensor]:
    """(b, L) ids and mask, padded to the batch's longest or to `length`, and labels.

    A language model's labels are (b, L), its tokens, or -100 where none is learned.
    """
    lengths = work.tokens.lengths[rows]
    width = length or int(lengths.max())
    ids = np.full((len(rows), width), work.model.config.pad_token_id or 0, dtype=np.int64)
    learned = np.zeros((len(rows), width), dtype=bool)
    for k, row in enumerate(rows):
        begin = work.tokens.offsets[row]
        ids[k, : lengths[k]] = work.tokens.ids[begin : begin + lengths[k]]
        if work.tokens.asked is not None:
            learned[k, 1 : lengths[k]] = work.tokens.asked[begin : begin + lengths[k] - 1]
    mask = np.arange(width) < lengths[:, None]
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        "labels": torch.from_numpy(
            work.tokens.labels[rows] if work.tokens.asked is None else np.where(learned, ids, -100)
        ),
    }


def adapted(work: Work, model: Any) -> Any:
    """PEFT's model, its adapters where every client starts."""
    config = work.config
    targets = [site.name for site in work.layout.sites]
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets)
    peft_model = get_peft_model(model, lora).eval()
    parameters = dict(peft_model.named_parameters())
    for name, value in work.start().items():
        parameters[name].data.copy_(value)
    return peft_model


def peft_steps(work: Work, bfloat16: bool = False, length: int | None = None) -> Steps:
    """One PEFT model; each client's factors are swapped in by pointer, with an AdamW of its own.

    In bfloat16 the frozen weights are stored so, since autocast would cast them in every step.
    """
    config, device = work.config, resolve_device(work.machine.device)
    model = copy.deepcopy(work.model).to(torch.bfloat16 if bfloat16 else torch.float32)
    model = adapted(work, model).to(device)
    slots = [p for name, p in model.named_parameters() if "lora_" in name]
    clients = []
    for number in work.clients:
        own = [torch.nn.Parameter(p.detach().clone()) for p in slots]
        optimizer = torch.optim.AdamW(
            own, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        clients.append((number, own, optimizer))

    def steps(count: int) -> np.ndarray:
        losses = []
        for number, own, optimizer in clients:
            for slot, value in zip(slots, own, strict=True):
                slot.data = value.data
            for step in range(count):
                padded = padded_batch(work, work.rows(number, step), length)
                batch = {name: moved(value, device) for name, value in padded.items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    loss = model(**batch).loss
                loss.backward()
                for slot, value in zip(slots, own, strict=True):
                    value.grad, slot.grad = slot.grad, None
                torch.nn.utils.clip_grad_norm_(own, config.clip_norm)
                optimizer.step()
                losses.append(loss.detach())
        return torch.stack(losses).view(len(clients), count).cpu().numpy()

    return steps


def vmap_steps(work: Work) -> Steps:
    """One vmap over all clients of the gradient of a functional model, padded to the longest."""
    config = work.config
    model = copy.deepcopy(work.model)
    model.set_attn_implementation("eager")  # fused attention has no batching rule
    peft_model = adapted(work, model)
    start = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    stacks = {
        name: torch.stack([p.detach()] * len(work.clients)).requires_grad_()
        for name, p in start.items()
    }
    optimizer = torch.optim.AdamW(
        list(stacks.values()), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )

    def loss(factors: Any, ids: Any, mask: Any, labels: Any) -> Any:
        # A mask of four dimensions is taken as it is; into a flat one transformers looks first.
        hidden = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        inputs = {"input_ids": ids, "attention_mask": hidden.expand(-1, -1, ids.shape[1], -1)}
        logits = functional_call(peft_model, factors, (), inputs).logits
        return functional.cross_entropy(logits, labels)

    gradient = vmap(grad_and_value(loss))

    def steps(count: int) -> np.ndarray:
        losses = np.empty((len(work.clients), count))
        for step in range(count):
            rows = [work.rows(client, step) for client in work.clients]
            longest = max(int(work.tokens.lengths[r].max()) for r in rows)
            batches = [padded_batch(work, r, longest) for r in rows]
            stacked = {key: torch.stack([b[key] for b in batches]) for key in batches[0]}
            grads, values = gradient(
                {n: s.detach() for n, s in stacks.items()},
                stacked["input_ids"],
                stacked["attention_mask"],
                stacked["labels"],
            )
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
            factor = (config.clip_norm / (norms + 1e-6)).clamp(max=1.0)
            for name, stack in stacks.items():
                stack.grad = grads[name] * factor.view(-1, 1, 1)
            optimizer.step()
            losses[:, step] = values.detach().numpy()
        return losses

    return steps


def in_processes(
    stack: ExitStack, work: Work, processes: int, make: Callable[..., Steps], *how: Any
) -> Steps:
    """A system in processes of its own, which share the clients and the cores between them."""
    parts = [part.tolist() for part in np.array_split(work.clients, processes)]
    threads = torch.get_num_threads() // processes
    made = workers(stack, threads, make, [(work.only(part), *how) for part in parts])

    def steps(count: int) -> np.ndarray:
        for worker in made:
            worker.ask(count)
        return np.concatenate([worker.answer() for worker in made])

    return steps
