"""The one frozen model that all clients share, and where their adapters sit in it.

Any `AutoModelForSequenceClassification` or `AutoModelForCausalLM` will do. Its encoder runs packed
(packed_encoder.py, interface_encoder.py) or in rectangles (rectangle_encoder.py) where that gives
what the model's own forward pass does (own_forward.py); its head is the model's own code in all
cases.

Legend: R texts of a batch, n clients, Q places asked, C outputs, d the model's width.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from plait.config import THIS_MACHINE, Config, Head, Machine
from plait.data.objectives import CLASSIFICATION, LANGUAGE, Objective
from plait.data.tokens import Batch, Tokens, pack
from plait.factors import Factor
from plait.lora import Dropout, Layout, Site, joined, layer_index
from plait.machine.devices import resolve_device, resolve_dtype
from plait.machine.process_settings import configure_process
from plait.model.backend import build_backend
from plait.model.encoder_choice import Encoder, Probe, check_dropout, choose
from plait.model.heads import (
    MeanHead,
    MeanPooledClassifier,
    OwnHead,
    judge_in_parts,
    losses_in_parts,
)
from plait.model.interface_encoder import InterfaceEncoder
from plait.model.loading import Loaded
from plait.model.own_forward import OwnForward
from plait.model.quantized_linear import quantize

HEAD_NAMES = ("classifier", "score")
"""What PEFT takes for the classifier of a sequence classification model."""

TARGET_MODULES: dict[str, Sequence[str]] = {
    "distilbert": ["q_lin", "v_lin"],
    "albert": ["query", "value"],
    "modernbert": ["Wqkv"],
    "xlnet": ["layer_1", "layer_2"],
} | TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
"""Architecture -> names of the linear layers that are adapted by default, as PEFT has them."""

ALL_LINEAR = "all-linear"
"""What `target_modules` calls all linear layers but the head, as PEFT does."""


class Backbone:
    """The frozen model, ready to compute for a stack of clients.

    Attributes:
        tokenizer: The model's tokenizer.
        weights_hash: Of the loaded weights.
        drawn: The modules that it doesn't count: their weights are no checkpoint's.
        layout: Where the adapters and the trained head lie in a client's row.
        head_policy: Whether the head is frozen, trained and mixed, or trained and local.
        head_start: The trained head's parameters at the start, by name.
        kept: Head and freshly drawn parameters by name: what an adapter needs beside its factors.
        machine: Where to compute, and how much at once.
        device: The same, resolved.
        backend: How it computes.
        encoder: What computes hidden states, or with `head` None the logits.
        head: What makes logits of hidden states.
        objective: What is learned.
    """

    encoder: Encoder | OwnForward
    head: MeanHead | OwnHead | None

    def __init__(
        self,
        loaded: Loaded,
        config: Config,
        machine: Machine = THIS_MACHINE,
        objective: Objective = CLASSIFICATION,
    ) -> None:
        """Freeze the model and lay out the adapters.

        Args:
            loaded: The model, its tokenizer, and what of it the checkpoint didn't have.
            config: Rank, targets, head and precision.
            machine: Where and how to compute, and how much at once.
            objective: What is learned.

        Raises:
            ValueError: No linear layer matches the targets, or the backend isn't there.
        """
        configure_process()
        self.objective = objective
        self.machine, self.device = machine, resolve_device(machine.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.backend = build_backend(self.device, self.dtype, machine.backend)
        self.tokenizer, self.name = loaded.tokenizer, config.backbone
        self.weights_hash, self.drawn = loaded.weights_hash, loaded.drawn
        self._num_embeddings = _num_embeddings(getattr(loaded.model, "base", loaded.model))
        model = loaded.model.eval().requires_grad_(False)
        mean_pooled = isinstance(model, MeanPooledClassifier)
        base, prefix = (
            (model.base, "base.")
            if mean_pooled
            else (model.base_model, f"{model.base_model_prefix}.")
        )
        # A language model's head travels with its base, and stays as it is.
        self.head_names = () if objective is LANGUAGE else head_names(model)
        if objective is LANGUAGE and config.head not in (None, "frozen"):
            raise ValueError(f"head is {config.head}; that of a language model stays frozen.")
        sites = find_sites(model, base.config.model_type, config)
        # A layer that the checkpoint lacks travels whole, which PEFT can't do with an adapted one.
        sites = tuple(site for site in sites if site.name not in loaded.fresh)
        if config.load_in:
            quantize(base, config.load_in, self.device, self.dtype)
        model.to(self.device, self.dtype)
        kept = {
            name: parameter.detach().float().cpu()
            for name, parameter in model.named_parameters()
            if self.in_head(name) or name.rpartition(".")[0] in loaded.fresh
        }
        head = {name: value for name, value in kept.items() if self.in_head(name)}
        self.head_policy: Head = config.head or ("mixed" if mean_pooled else "frozen")
        self.head_start = head if self.head_policy != "frozen" else {}
        self.kept = kept
        self.layout = Layout(
            sites=sites,
            rank=config.rank,
            scale=config.lora_alpha / config.rank,
            head=tuple((name, tuple(value.shape)) for name, value in self.head_start.items()),
        )
        probe = Probe.of(
            self.tokenizer, base.config, self.layout, self.head_start, self.backend, objective
        )
        self.encoder, self.head = choose(model, base, prefix, self.layout, self.backend, probe)
        if config.lora_dropout:
            check_dropout(self.encoder, probe)
        if self.head is not None and objective is LANGUAGE:
            self.backend.prepack_outputs(model)
        elif self.head is not None:
            self._stacked_head = self.backend.head(self.head, self.head_policy == "frozen")
        self._head_prefix = "" if mean_pooled else "model."
        self._others: dict[tuple[int, int], Backbone] = {}  # by what with_layout was asked for
        self._head_lock = threading.Lock()  # a module's parameters are swapped while it runs

    def with_layout(self, base_rank: int, notes: int) -> Backbone:
        """The same with room for what a method keeps beside A and B (`Layout`)."""
        key = base_rank, notes
        if key not in self._others:
            self._others[key] = copy.copy(self)
            layout = dataclasses.replace(self.layout, base_rank=base_rank, notes=notes)
            self._others[key].layout = layout
        return self._others[key]

    @property
    def chunk_tokens(self) -> int:
        """About how many tokens to compute at once."""
        encoder = self.encoder
        floats = encoder.token_floats if isinstance(encoder, InterfaceEncoder) else 0.0
        return self.backend.chunk_tokens(self.machine.chunk_tokens, floats)

    def batch(self, tokens: Tokens, rows: np.ndarray) -> Batch:
        """The batch of `rows` (n, b), indices into `tokens`, on the device."""
        return pack(tokens, rows, self.encoder.padded).to(self.device)

    def losses(
        self, batch: Batch, factors: dict[Factor, Tensor], dropout: Dropout | None = None
    ) -> Tensor:
        """The losses (Q,) of each client's own model on its own texts, in float32.

        Args:
            batch: b texts for each of n clients.
            factors: Factor -> (n, P) rows of these clients.
            dropout: The LoRA branches' dropout.
        """
        if self.objective is LANGUAGE and self.head is not None:
            features = self._features(batch, factors, dropout)
            counts = batch.asked_counts.tolist()
            return losses_in_parts(self.head, features, batch.targets, counts)
        return self.objective.loss(self.logits(batch, factors, dropout), batch.targets)

    @torch.no_grad()
    def judge(
        self, batch: Batch, factors: dict[Factor, Tensor], objective: Objective | None = None
    ) -> tuple[Tensor, Tensor]:
        """The losses, and what each client's own model answers; without gradients.

        Args:
            batch: b texts for each of n clients.
            factors: Factor -> (n, P) rows of these clients.
            objective: How answers are wanted; as they are learned for None.

        Returns:
            (Q,) float32 losses, and (Q,) answers, of whatever shape each.
        """
        objective = objective or self.objective
        if self.objective is LANGUAGE and self.head is not None:
            features = self._features(batch, factors, None)
            counts = batch.asked_counts.tolist()
            return judge_in_parts(self.head, features, batch.targets, counts, objective)
        outputs = self.logits(batch, factors)
        return objective.loss(outputs, batch.targets), objective.answer(outputs)

    def logits(
        self, batch: Batch, factors: dict[Factor, Tensor], dropout: Dropout | None = None
    ) -> Tensor:
        """What is judged, (Q, C) float32; not for language models, which have too much."""
        heads = self.layout.views(Factor.HEAD, factors[Factor.HEAD]) if self.layout.head else {}
        parts = {name: part.to(self.dtype) for name, part in heads.items()}
        if isinstance(self.encoder, OwnForward):
            A, B = joined(self.layout, factors)
            return self.encoder(batch, A, B, parts, dropout).float()
        features = self._features(batch, factors, dropout).unflatten(0, (batch.num_clients, -1))
        parts = {self._head_prefix + name: part for name, part in parts.items()}
        with self._head_lock:
            return self._stacked_head(parts, features).flatten(0, 1).float()

    def _features(
        self, batch: Batch, factors: dict[Factor, Tensor], dropout: Dropout | None
    ) -> Tensor:
        """(Q, d), what the head reads."""
        assert self.head is not None
        assert not isinstance(self.encoder, OwnForward)
        A, B = joined(self.layout, factors)
        return self.head.read(self.encoder(batch, A, B, dropout, self.head.asked_only), batch)

    def in_head(self, name: str) -> bool:
        """Whether a parameter or module belongs to the classifier head."""
        return name.split(".")[0] in self.head_names

    def check(self, tokens: Tokens) -> None:
        """That the model takes a split's tokens.

        Raises:
            ValueError: A token that it has no embedding for, or nothing but unknown words.
        """
        most, unknown = int(tokens.ids.max(initial=0)), self.tokenizer.unk_token_id
        if self._num_embeddings and most >= self._num_embeddings:
            raise ValueError(
                f"The tokenizer of {self.name!r} gives token {most}, but the model has embeddings "
                f"for {self._num_embeddings} only: they belong to different models. Put the "
                "model's own tokenizer into its folder."
            )
        real = np.setdiff1d(np.unique(tokens.ids), self.tokenizer.all_special_ids)
        if len(tokens) and not len(real) and unknown in tokens.ids:
            raise ValueError(
                f"The tokenizer of {self.name!r} knows no word of the texts: all tokens are "
                f"{self.tokenizer.unk_token}. Put the model's own tokenizer into its folder."
            )

    @torch.no_grad()
    def with_hidden(self, tokens: Tokens) -> Tokens:
        """The same tokens with what lies below the first adapted layer computed once and for all.

        Only where that saves layers, and at most `Machine.cache_gib` of it; else it is computed
        again in every step.
        """
        below = self.encoder.below
        if below is None:
            return tokens
        width = below(self.batch(tokens, np.zeros((1, 1), dtype=np.int64))).shape[1]
        room = self.machine.cache_gib * 2**30
        if len(tokens.ids) * width * self.dtype.itemsize > room:
            return tokens
        hidden = torch.empty(len(tokens.ids), width, dtype=self.dtype)
        order = np.argsort(tokens.lengths, kind="stable")
        for texts in np.array_split(order, -(-len(tokens.ids) // 2048)):
            batch = self.batch(tokens, texts[None])
            real = batch.source[: batch.num_tokens].cpu()
            hidden[real] = below(batch).cpu()[: batch.num_tokens]
        return dataclasses.replace(tokens, hidden=hidden)


def _num_embeddings(model: Any) -> int:
    """How many token ids a model takes; 0 where it doesn't say."""
    try:
        return int(getattr(model.get_input_embeddings(), "num_embeddings", 0))
    except (AttributeError, NotImplementedError):  # CANINE hashes characters
        return 0


def head_names(model: Any) -> tuple[str, ...]:
    """The modules that are the classifier: PEFT's names for it, or else all but the encoder."""
    own = [name for name, _ in model.named_children()]
    return tuple(name for name in own if name in HEAD_NAMES) or tuple(
        name for name in own if name != model.base_model_prefix
    )


def find_sites(model: Any, model_type: str, config: Config) -> tuple[Site, ...]:
    """The linear layers that are adapted, in the model's order.

    Raises:
        ValueError: The architecture has no default, or nothing matches.
    """
    targets: Sequence[str]
    if config.target_modules == ALL_LINEAR:
        targets = [name for name, module in model.named_modules() if name]
    elif config.target_modules:
        targets = [name.strip() for name in config.target_modules.split(",")]
    elif model_type in TARGET_MODULES:
        targets = TARGET_MODULES[model_type]
    else:
        raise ValueError(
            f"No default target modules for a {model_type} model; name its linear layers with "
            "--target-modules, such as q_proj,v_proj."
        )
    heads = head_names(model)
    prefix = "base" if isinstance(model, MeanPooledClassifier) else model.base_model_prefix
    inside = f"{prefix}." if hasattr(model, prefix) else ""
    found = [
        Site(name, *_sizes(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and name.split(".")[0] not in heads
        and name.startswith(inside)
        and any(name == target or name.endswith(f".{target}") for target in targets)
    ]
    if not found:
        raise ValueError(f"No linear layer of the {model_type} model is named {targets}.")
    _check_experts(model, found)
    deepest = 1 + max(layer_index(site.name) for site in found)
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", None) or deepest)
    lowest = layers - (config.top_layers or layers)
    # ALBERT's layers share their weights, and so are one.
    lowest = min(lowest, deepest - 1)
    return tuple(site for site in found if layer_index(site.name) >= lowest)


def _check_experts(model: Any, sites: Sequence[Site]) -> None:
    """That PEFT takes no site's name for that of weights of all experts in one tensor.

    Raises:
        ValueError: It does, and would put an adapter there instead.
    """
    fused = {
        name.rpartition(".")[2]
        for name, parameter in model.named_parameters()
        if ".experts." in name and parameter.dim() == 3
    }
    names = fused | {"gate_proj", "up_proj"} if "gate_up_proj" in fused else fused
    if taken := sorted(names & {site.name.rpartition(".")[2] for site in sites}):
        raise ValueError(
            f"PEFT takes {', '.join(taken)} of a mixture of experts for the experts' own, which "
            "aren't adapted here; name others with --target-modules, such as q_proj,v_proj."
        )


def _sizes(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(d_in, d_out); GPT-2's Conv1D is a linear layer with its weight transposed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    d_in, d_out = module.weight.shape
    return d_in, d_out
