"""Adapters as PEFT folders: `PeftModel.from_pretrained(base, folder)` loads what plait trained.

Whatever the checkpoint had no weights for, a classifier above all, travels along in
`modules_to_save`, trained or not. The base is then the backbone as anyone loads it; a sentence
encoder's mean-pooled classifier is no class of transformers, and `plait.load_base` makes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor

from plait.config import Config
from plait.data.objectives import LANGUAGE
from plait.factors import VALUE, Factor
from plait.lora import Stack, joined, resized, values
from plait.machine.files import save_tensors
from plait.model.backbone import Backbone
from plait.site_mixing import mean_client


def save_adapters(backbone: Backbone, stack: Stack, config: Config, out: Path) -> None:
    """Write `client-0` ... and `mean` under `out`, each a PEFT folder."""
    save_clients(backbone, stack, config, out)
    averaged = mean_client(backbone.layout, stack.factors)
    save_adapter(backbone, {f: row[0] for f, row in averaged.items()}, config, out / "mean")


def save_clients(
    backbone: Backbone, stack: Stack, config: Config, out: Path, first: int = 0
) -> None:
    """Write a PEFT folder under `out` for each client of a stack, numbered from `first` on."""
    for k in range(len(stack.factors[Factor.A])):
        row = {factor: value[k] for factor, value in stack.factors.items()}
        save_adapter(backbone, row, config, out / f"client-{first + k}", config.rank_of(first + k))


def save_adapter(
    backbone: Backbone,
    row: dict[Factor, Tensor],
    config: Config,
    out: Path,
    rank: int | None = None,
) -> None:
    """Write one client's state as a PEFT folder.

    Args:
        backbone: The frozen model that the factors adapt.
        row: Factor -> (P,).
        config: The run's config.
        out: The folder; what is there is replaced.
        rank: Of the client; the run's if not given.
    """
    rank = rank or config.rank
    layout = backbone.layout.of_rank(rank)
    whole = {(VALUE, factor): value[None] for factor, value in row.items()}
    rows = values(resized(backbone.layout, whole, rank))
    tensors = dict(backbone.kept)
    flats = zip((Factor.A, Factor.B), joined(layout, rows), strict=True)
    for (factor, flat), suffix in zip(flats, (".lora_A.weight", ".lora_B.weight"), strict=True):
        views = layout.views(factor, flat)
        tensors |= {name + suffix: value[0] for name, value in views.items()}
    if layout.head:
        views = layout.views(Factor.HEAD, rows[Factor.HEAD])
        tensors |= {name: value[0] for name, value in views.items()}
    peft_config = lora_config(
        backbone,
        config,
        rank + layout.base_rank,
        base_model_name_or_path=config.backbone,
        inference_mode=True,
        modules_to_save=sorted({_module(backbone, name) for name in backbone.kept}),
    )
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(
        {f"base_model.model.{name}": value.detach().float().cpu().contiguous()
         for name, value in tensors.items()},
        out / "adapter_model.safetensors",
        {"format": "pt"},
    )  # fmt: skip
    peft_config.save_pretrained(str(out))


def lora_config(
    backbone: Backbone, config: Config, rank: int | None = None, **more: Any
) -> LoraConfig:
    """PEFT's settings of a run's adapters.

    Args:
        backbone: The frozen model that they sit in.
        config: The run's config.
        rank: Of the client; the run's if not given.
        **more: Other settings of PEFT's.
    """
    rank = rank or config.rank
    return LoraConfig(
        task_type="CAUSAL_LM" if backbone.objective is LANGUAGE else None,
        r=rank,
        lora_alpha=config.lora_alpha * (rank / config.rank),  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        # Whole paths: a bare `query` would also match layers that were not adapted.
        target_modules=[site.name for site in backbone.layout.sites],
        **more,
    )


def _module(backbone: Backbone, parameter: str) -> str:
    """The module that PEFT is told to save for a parameter: a head whole, others themselves."""
    head = parameter.split(".")[0]
    return head if backbone.in_head(parameter) else parameter.rpartition(".")[0]
