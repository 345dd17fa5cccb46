"""Adapters as PEFT folders: `PeftModel.from_pretrained(base, folder)` loads what plait trained.

A trained head travels along as PEFT does it, in `modules_to_save`. The base is the backbone that
the config names; for a mean-pooled one it is `plait.load_base(config, num_labels)`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from plait.backbone import Backbone
from plait.config import Config
from plait.lora import Layout, Stack
from plait.methods import Factor
from plait.mixing import mean


def save_adapters(backbone: Backbone, stack: Stack, config: Config, out: Path) -> None:
    """Write `client-0` ... and `mean` under `out`, each a PEFT folder."""
    for client in range(len(stack.factors[Factor.A])):
        row = {factor: value[client] for factor, value in stack.factors.items()}
        save_adapter(backbone.layout, row, config, out / f"client-{client}")
    averaged = {factor: mean(value)[0] for factor, value in stack.factors.items()}
    save_adapter(backbone.layout, averaged, config, out / "mean")


def save_adapter(layout: Layout, row: dict[Factor, Tensor], config: Config, out: Path) -> None:
    """Write one client's state as a PEFT folder.

    Args:
        layout: Where the parts lie in a row.
        row: Factor -> (P,).
        config: The run's config.
        out: The folder; what is there is replaced.
    """
    tensors = {}
    for factor, suffix in ((Factor.A, "lora_A"), (Factor.B, "lora_B")):
        for name, value in layout.views(factor, row[factor][None]).items():
            tensors[f"base_model.model.{name}.{suffix}.weight"] = value[0]
    if layout.head:
        for name, value in layout.views(Factor.HEAD, row[Factor.HEAD][None]).items():
            tensors[f"base_model.model.{name}"] = value[0]
    heads = sorted({name.split(".")[0] for name, _ in layout.head})
    peft_config = LoraConfig(
        task_type=None,
        base_model_name_or_path=config.backbone,
        inference_mode=True,
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        # Whole paths: a bare `query` would also match layers that were not adapted.
        target_modules=[site.name for site in layout.sites],
        modules_to_save=heads or None,
    )
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            name: value.detach().cpu().to(torch.float32).contiguous()
            for name, value in tensors.items()
        },
        out / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    peft_config.save_pretrained(str(out))


def export(run: Path, client: int | None, out: Path) -> None:
    """Copy an adapter out of a finished run.

    Args:
        run: The run folder.
        client: Whose adapter; the averaged one for None.
        out: The PEFT folder to write.

    Raises:
        ValueError: The run has no such adapter, or `out` exists.
    """
    name = "mean" if client is None else f"client-{client}"
    source = run / "adapters" / name
    if not source.is_dir():
        there = ", ".join(sorted(path.name for path in (run / "adapters").glob("*")))
        raise ValueError(f"{run} has no adapter {name}; it has: {there or 'none'}.")
    if out.exists():
        raise ValueError(f"{out} already exists; take another --out.")
    shutil.copytree(source, out)
