"""The slow, readable twin of the stacked engine: plain PEFT, one client after another.

It computes in float64, so that what differs is the engine's own rounding.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from conftest import tiny_model
from plait.config import THIS_MACHINE, Config
from plait.data.objectives import CLASSIFICATION
from plait.data.tokens import Tokens
from plait.engines.local_training import batch_rows
from plait.factors import Factor
from plait.lora import initial_stack
from plait.model.backbone import TARGET_MODULES, Backbone
from plait.model.loading import Loaded

ARCHITECTURES = ("bert", "roberta", "electra", "distilbert", "deberta-v2", "mean-pooled")
OTHERS = ("modernbert", "albert", "xlnet")
PHASES = (Factor.A, Factor.B, Factor.AB)


def setup(architecture, config, tokens, machine=THIS_MACHINE, objective=CLASSIFICATION):
    """A tiny model, a backbone of it, clients that differ, their rows, and the adapted layers."""
    model = tiny_model(architecture)
    backbone = Backbone(Loaded(copy.deepcopy(model), None, ()), config, machine, objective)
    stack = initial_stack(backbone.layout, backbone.head_start, config.clients, 0, backbone.device)
    # B away from zero, and clients apart: otherwise A has no gradient and rows can be swapped. With
    # this seed no weight's gradient is so near zero that AdamW makes much of how it was rounded.
    generator = torch.Generator().manual_seed(4)
    for value in stack.factors.values():
        value += 0.05 * torch.randn(value.shape, generator=generator).to(value.device)
    shares = np.array_split(np.random.default_rng(2).permutation(len(tokens)), config.clients)
    kind = model.config.model_type
    targets = config.target_modules.split(",") if config.target_modules else TARGET_MODULES[kind]
    return model, backbone, stack, shares, targets


def peft_client(model, layout, stack, client, config, targets):
    """A PEFT model with one client's factors and head."""
    peft_model = get_peft_model(
        copy.deepcopy(model).double(),
        LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=targets
        ),
    )
    parameters = dict(peft_model.named_parameters())
    for factor, letter in ((Factor.A, "A"), (Factor.B, "B")):
        for name, value in layout.views(factor, stack.factors[factor]).items():
            place = parameters[f"base_model.model.{name}.lora_{letter}.default.weight"]
            place.data.copy_(value[client])
    for name, _ in layout.head:
        head = layout.views(Factor.HEAD, stack.factors[Factor.HEAD])[name]
        parameters[f"base_model.model.{name}"].data.copy_(head[client])
    return peft_model.eval()


def padded(tokens: Tokens, rows, pad_id):
    """Input ids, types and mask (b, L) of some texts, padded to their longest."""
    lengths = tokens.lengths[rows]
    ids = torch.full((len(rows), int(lengths.max())), pad_id)
    types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for k, row in enumerate(rows):
        span = slice(tokens.offsets[row], tokens.offsets[row + 1])
        ids[k, : lengths[k]] = torch.from_numpy(tokens.ids[span].astype(np.int64))
        types[k, : lengths[k]] = torch.from_numpy(tokens.types[span].astype(np.int64))
        mask[k, : lengths[k]] = 1
    return ids, types, mask


def twin_logits(peft_model, tokens, rows):
    """(b, C) float64 from the whole PEFT model, padded; XLNet, which goes by the last, isn't."""
    config = peft_model.config if hasattr(peft_model, "config") else peft_model.base_model.config
    if config.model_type == "xlnet" and len(rows) > 1:
        return torch.cat([twin_logits(peft_model, tokens, [row]) for row in rows])
    ids, types, mask = padded(tokens, rows, config.pad_token_id or 0)
    kinds = {"token_type_ids": types} if getattr(config, "type_vocab_size", 0) > 1 else {}
    return peft_model(input_ids=ids, attention_mask=mask, **kinds).logits


@torch.no_grad()
def twin_evaluation(model, layout, stack, tokens, config: Config, targets):
    """(N, R, C) float32, the logits of each client's own model on all texts."""
    everything = np.arange(len(tokens))
    models = (
        peft_client(model, layout, stack, client, config, targets)
        for client in range(len(stack.factors[Factor.A]))
    )
    return torch.stack([twin_logits(one, tokens, everything) for one in models]).float()


def twin_local_phase(model, layout, stack, train, round_, tokens, shares, config: Config, targets):
    """Losses (N, K) and Factor -> (N, P) after the local phase, each client on its own."""
    losses, rows = [], {factor: [] for factor in layout.factors}
    for client, share in enumerate(shares):
        peft_model = peft_client(model, layout, stack, client, config, targets)
        names = [f"lora_{f.name}" for f in (Factor.A, Factor.B) if f in train]
        heads = (
            [f"base_model.model.{name}" for name, _ in layout.head] if Factor.HEAD in train else []
        )
        groups = {True: [], False: []}
        for name, parameter in peft_model.named_parameters():
            is_head = name in heads
            parameter.requires_grad_(is_head or any(part in name for part in names))
            if parameter.requires_grad:
                groups[is_head].append(parameter)
        optimizer = torch.optim.AdamW(
            [
                {"params": groups[False], "lr": config.lr},
                {"params": groups[True], "lr": config.head_lr},
            ],
            weight_decay=config.weight_decay,
        )
        client_losses = []
        for step in range(config.local_steps):
            position = round_ * config.local_steps + step
            (texts,) = batch_rows(share, client, range(position, position + 1), config)
            logits = twin_logits(peft_model, tokens, texts)
            loss = functional.cross_entropy(logits, torch.from_numpy(tokens.labels[texts]))
            optimizer.zero_grad()
            loss.backward()
            if config.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(groups[False] + groups[True], config.clip_norm)
            optimizer.step()
            client_losses.append(loss.item())
        losses.append(client_losses)
        after = dict(peft_model.named_parameters())
        for factor, letter in ((Factor.A, "A"), (Factor.B, "B")):
            rows[factor].append(
                torch.cat(
                    [
                        after[f"base_model.model.{s.name}.lora_{letter}.default.weight"].flatten()
                        for s in layout.sites
                    ]
                )
            )
        if layout.head:
            rows[Factor.HEAD].append(
                torch.cat([after[f"base_model.model.{name}"].flatten() for name, _ in layout.head])
            )
    return np.array(losses), {f: torch.stack(v).detach().float() for f, v in rows.items()}


def all_logits(backbone, factors, tokens) -> torch.Tensor:
    """(n, Q, C), each client's model on every text, in one batch."""
    rows = np.tile(np.arange(len(tokens)), (len(factors[Factor.A]), 1))
    with torch.no_grad():
        logits = backbone.logits(backbone.batch(tokens, rows), dict(factors)).cpu()
    return logits.unflatten(0, (len(rows), -1))
